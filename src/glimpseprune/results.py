"""The folder of an evaluation: written batch by batch, gone on with after a kill, never replaced unasked, read again.

It holds ``evaluation.yaml`` (what was asked for), ``predictions.jsonl`` and ``timings.jsonl``, ``scores.json``,
``summary.json``, ``kept.png`` and ``kept/<method>.png``. Until all of it is there it grows in ``unfinished/``, by
lines, beside the panels that its pictures are made of, and what was in the folder before stays; then that is in
``earlier/1`` (``2`` ...), unless it was to be replaced. A folder without scores.json is an evaluation that has not
finished. One process writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

from glimpseprune import files
from glimpseprune.config import UserError

SCORES, PREDICTIONS, TIMINGS, SUMMARY = "scores.json", "predictions.jsonl", "timings.jsonl", "summary.json"
DESCRIPTION, KEPT, UNFINISHED, EARLIER = "evaluation.yaml", "kept", "unfinished", "earlier"
PANELS = "panels.jsonl"
"""In ``unfinished/`` only: a line per picture of a sample (``method``, ``key``, ``png`` in base64)."""
LOCK = ".evaluation.lock"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Evaluated:
    """What an evaluation's folder says."""

    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    description: dict[str, Any]
    """evaluation.yaml; empty where there is none."""


def read(folder: str | Path) -> Evaluated:
    """The evaluation in a folder.

    Raises:
        UserError: there is none, or it has not finished.
    """
    folder = Path(folder)
    if not (folder / SCORES).is_file():
        unfinished = any((folder / name).is_file() for name in (PREDICTIONS, f"{UNFINISHED}/{PREDICTIONS}"))
        said = "the evaluation has not finished: go on with resume=true" if unfinished else "no evaluation is there"
        raise UserError(f"{folder}: there is no {SCORES}: {said}")
    summary, description = (folder / name for name in (SUMMARY, DESCRIPTION))
    try:
        return Evaluated(
            folder,
            json.loads((folder / SCORES).read_text(encoding="utf-8")),
            json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
            yaml.safe_load(description.read_text(encoding="utf-8")) if description.is_file() else {},
        )
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot be read ({str(error).splitlines()[0]}): evaluate again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in a .jsonl file, without a last line that was torn when its writer was killed.

    Raises:
        UserError: another line is damaged.
    """
    *whole, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}: line {number} is damaged: give overwrite=true to evaluate again") from None
    return found


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass
class Earlier:
    """What an interrupted evaluation has left."""

    records: list[dict] = field(default_factory=list)
    timings: list[dict] = field(default_factory=list)
    panels: list[dict] = field(default_factory=list)
    settings: dict[str, Any] | None = None

    def of(self, task: str) -> Earlier:
        """What there is of a task, or where there are none."""
        parts = (self.records, self.timings, self.panels)
        return Earlier(*([line for line in part if line.get("task", "") == task] for part in parts), self.settings)


class Folder:
    """Where an evaluation is written, as a context: by one process at a time.

    It grows in ``unfinished/``, and takes the place of what was there before when it is done, which is kept in
    ``earlier/1`` and so on unless it was to be replaced; killed on the way, it is gone on with from there. Every file
    is written as a whole, but those that grow by lines, whose last one may be torn.
    """

    def __init__(self, out: Path, description: dict[str, Any]) -> None:
        self.out, self.description = files.resolved(out), description
        self.work = self.out / UNFINISHED
        self.kept = Earlier()
        self.sets_aside = self.is_done = False
        self.aside: Path | None = None
        """Where the finished evaluation is, once it has been set aside, that was there before."""
        self.streams: dict[str, IO[str]] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: Any) -> None:
        for stream in self.streams.values():
            stream.close()
        self.stack.close()

    def claim(self) -> None:
        """Be the only one at work here.

        Raises:
            UserError: another process is.
        """
        made = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        if made:
            self.stack.callback(lambda: any(self.out.iterdir()) or self.out.rmdir())
        try:
            self.stack.enter_context(files.lock(self.out, LOCK))
        except files.Held as error:
            raise UserError(error.strerror) from None

    def earlier(self, *, resume: bool, overwrite: bool, draws: int) -> Earlier:
        """What there is to go on from.

        Raises:
            UserError: one is there that was interrupted, or that may not be gone on with.
        """
        there = require_room(self.out, resume or overwrite)
        begun, finished = (self.work / DESCRIPTION).is_file(), (self.out / SCORES).is_file()
        self.sets_aside = finished and not overwrite and (begun or not resume)
        if not there or not (resume and self._same(overwrite)):
            return self.kept
        records = read_lines(self._file(PREDICTIONS))
        if draws > 1 and records:  # the last sample may lack some of its draws
            last = identity(records[-1])
            records = [record for record in records if identity(record) != last]
        self.is_done = finished and not begun
        timings, panels = read_lines(self._file(TIMINGS)), read_lines(self.work / PANELS)
        self.kept = Earlier(records, timings, panels, self._found().get("settings") or {})
        return self.kept

    def _file(self, name: str) -> Path:
        """Of the evaluation to go on with: the unfinished one if there is one, some of whose files may be in place."""
        begun = (self.work / DESCRIPTION).is_file()  # made after the lines, and put in place after them
        return self.work / name if begun and (self.work / name).is_file() else self.out / name

    def _same(self, overwrite: bool) -> bool:
        """Whether the evaluation that is there was asked for as this one is."""
        found = self._found()
        said = difference(found["asked"], self.description["asked"]) if "asked" in found else "it does not say which"
        if said and not overwrite:
            finished = (self.out / SCORES).is_file() and not (self.work / DESCRIPTION).is_file()
            keep = f"leave resume out, which keeps it in {EARLIER}/, or " if finished else ""
            raise UserError(
                f"resume=true: the evaluation in {self.out} is another one ({said}): "
                f"{keep}give overwrite=true or another out"
            )
        return not said

    def _found(self) -> dict[str, Any]:
        file = self._file(DESCRIPTION)
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.is_file() else {}

    def draw(self, panels: Sequence[dict]) -> None:
        """Write the panels of a batch, before the lines that say that it is done."""
        self._write({PANELS: panels})

    def add(self, records: Sequence[dict], timings: Sequence[dict]) -> None:
        """Write the lines of a batch."""
        self._write({PREDICTIONS: records, TIMINGS: timings})

    def _write(self, lines: Mapping[str, Sequence[dict]]) -> None:
        if not any(lines.values()):  # all of it was there
            return
        self._begin()
        for name, new in lines.items():
            with files.naming(self.out / name):
                self.streams[name].write("".join(map(line, new)))
                self.streams[name].flush()

    def _begin(self) -> None:
        if self.streams:
            return
        self.work.mkdir(exist_ok=True)
        kept = {PREDICTIONS: self.kept.records, TIMINGS: self.kept.timings, PANELS: self.kept.panels}
        for name, lines in kept.items():
            self.streams[name] = files.growing(self.work / name, "".join(map(line, lines)))
        files.write(self.work / DESCRIPTION, yaml.safe_dump(self.description, sort_keys=False, allow_unicode=True))

    def finish(
        self,
        rows: list[dict[str, Any]],
        summary: Any,
        pictures: Mapping[str, bytes],
        records: Sequence[dict] | None = None,
    ) -> None:
        """Write what the lines come to, and a picture per method, of which the first one's is also ``kept.png``; then
        put all of it in its place. A finished evaluation to which nothing was added stays as it is. ``records``: all
        of predictions.jsonl, if lines of before have changed, for a judge has spoken."""
        if self.is_done and not self.streams:
            if records is not None:  # the lines last: until they are there the judge is asked again
                if summary is not None:
                    files.write_json(self.out / SUMMARY, summary, indent=1)
                files.write_json(self.out / SCORES, rows, indent=1)
                files.write(self.out / PREDICTIONS, "".join(map(line, records)))
            return
        self._begin()
        if records is not None:
            self.streams.pop(PREDICTIONS).close()
            files.write(self.work / PREDICTIONS, "".join(map(line, records)))
        for place, (name, picture) in enumerate(pictures.items()):
            files.write(self.work / KEPT / f"{name}.png", picture)
            if place == 0:
                files.write(self.work / "kept.png", picture)
        if summary is not None:
            files.write_json(self.work / SUMMARY, summary, indent=1)
        files.write_json(self.work / SCORES, rows, indent=1)
        self.place()

    def _set_aside(self, names: Sequence[str]) -> None:
        self.aside = next(path for n in count(1) if not (path := self.out / EARLIER / str(n)).exists())
        with files.folder(self.aside) as partial:
            for name in names:
                if (self.out / name).is_file():
                    (partial / name).parent.mkdir(exist_ok=True)
                    files.copy(self.out / name, partial / name)

    def place(self) -> None:
        """Without scores.json, which goes first and comes last, an evaluation has not finished, wherever this is
        killed; it is gone on with from where its description is."""
        pictures = ["kept.png", *(f"{KEPT}/{path.name}" for path in (self.out / KEPT).glob("*.png"))]
        if self.sets_aside:
            self._set_aside([SCORES, SUMMARY, PREDICTIONS, TIMINGS, DESCRIPTION, *pictures])
        for old in (SCORES, SUMMARY, *pictures):
            files.remove(self.out / old)
        (self.out / KEPT).mkdir(exist_ok=True)
        for name in sorted(self.work.glob("kept/*.png")):
            os.replace(name, self.out / KEPT / name.name)
        for name in ("kept.png", SUMMARY, PREDICTIONS, TIMINGS, DESCRIPTION, SCORES):
            if (self.work / name).is_file():
                os.replace(self.work / name, self.out / name)
        if not any((self.out / KEPT).iterdir()):
            (self.out / KEPT).rmdir()
        files.remove(self.work)


def identity(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a record is about: its task, method and sample."""
    return record.get("task", ""), record["method"], record["key"]


def require_room(out: Path, allowed: bool) -> bool:
    """Whether an evaluation is in ``out``.

    Raises:
        UserError: an interrupted one is, and nothing is ``allowed`` to happen to it.
    """
    begun, finished = f"{UNFINISHED}/{DESCRIPTION}", (out / SCORES).exists()
    there = [name for name in (begun, PREDICTIONS, DESCRIPTION) if (out / name).exists()]
    if there and not allowed and (there[0] == begun or not finished):
        raise UserError(
            f"an evaluation was interrupted in {out} ({there[0]}): give resume=true to go on with it, "
            "overwrite=true, or another out=<folder>"
        )
    return finished or bool(there)


def difference(there: Any, here: Any, key: str = "") -> str:
    """Where two descriptions differ first: "metric was a, is b"; empty where they do not."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys((*there, *here))
        return next(filter(None, (difference(there.get(k), here.get(k), f"{key}.{k}".strip(".")) for k in keys)), "")
    return "" if there == here else f"{key} was {json.dumps(there)}, is {json.dumps(here)}"


def plain(value: Any) -> Any:
    """Of nothing but what YAML and JSON know."""
    return json.loads(json.dumps(value))


ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""What some readers take for the end of a line, and JSON does not escape."""


def line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False).translate(ENDS) + "\n"
