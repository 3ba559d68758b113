"""Run folders: whose they are, one process at a time, and the run before, which stays until another one has begun.

A folder of ours bears ``MARKER``; all that commands write into it is listed in ``OWN``, and where there is anything
else nothing is replaced. The files of a run that is replaced are moved aside (``ASIDE``) when the new one has done its
first step, and deleted when that has a checkpoint. So whatever ends the new run before, one of the two is whole: what
was moved is moved back by whoever works in the folder next. All of it happens inside the folder, which may be a
symbolic link, a mount point, or the only place that may be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from glimpseprune import config, files, resources
from glimpseprune.config import FREE, PLACE, START, UserError
from glimpseprune.files import PARTIAL

MARKER, ASIDE, LOCK = ".glimpseprune", ".replaced", ".lock"
CONFIG, WEIGHTS, INDEX = "config.yaml", "trainable.safetensors", "checkpoints/checkpoints.json"
CHECKPOINTS = (INDEX, "checkpoints/last.ckpt")
"""Either is there as soon as a run can be gone on with."""
JOB = "slurm-job"
"""File of a run folder: number of the SLURM job that wrote it last."""
PASSING = (MARKER, LOCK, "heartbeats/*", "tensorboard/*", "csv/*", "wandb/*", JOB)
"""What a run that came to nothing leaves."""
LIVE = (MARKER, LOCK, "heartbeats/*")
"""What belongs to the folder, whichever run is in it."""
REPORTS = ("bad-batch-*.json",)
OWN = (
    *PASSING,
    *REPORTS,
    *(CONFIG, WEIGHTS, "metrics.jsonl", "curve.json", INDEX, "checkpoints/*.ckpt", "best/*", "model/*"),
    *(
        "scores.json",
        "predictions.jsonl",
        "timings.jsonl",
        "summary.json",
        "evaluation.yaml",
        "unfinished/*",
        "earlier/*",
    ),
    *("kept.png", "kept/*.png", "report.md", "report.tex", "report.html", "frontier.png", "compare.md", "compare.json"),
    *(".evaluation.lock", f"{ASIDE}/*"),
)
"""Patterns of all files that commands write into a run folder, seen from there; each may end in ``PARTIAL``."""


def inside(folder: Path) -> Iterator[str]:
    """Every file in ``folder``, and every link, seen from there."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *links]):
            yield os.path.relpath(os.path.join(root, name), folder)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    while name.endswith(PARTIAL):
        name = name.removesuffix(PARTIAL)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_empty(folder: Path) -> bool:
    """Whether nothing is there, or what a run of ours has left that came to nothing."""
    names = [name for name in inside(folder) if not matches(name, LIVE)]
    ours = (folder / MARKER).is_file()
    return not names or (ours and all(matches(name, PASSING) or name.endswith(PARTIAL) for name in names))


def require_ours(folder: Path, schema: type) -> None:
    """Raise UserError unless ``folder`` holds a run as ``schema`` configures it, and nothing else.

    A run of before there were markers is known by its config.yaml, all of whose keys are of the schema.
    """
    if not (folder / MARKER).is_file() or (folder / CONFIG).is_file():
        try:
            known = config.names(folder / CONFIG) <= {name for name, _ in config.roles(schema)}
        except UserError:
            known = False
        if not known:
            raise UserError(f"out={folder} is not a run folder of this command, and not replaced: give another one")
    foreign = [name for name in inside(folder) if not matches(name, OWN)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"out={folder} holds {foreign[0]}{more}, which no run writes: move it elsewhere, or give another folder"
        )


def require_same(saved: Any, asked: Any, out: str | Path) -> None:
    """Raise UserError where a run would go on as another one than it was, with the key and both values."""
    before, now, roles = dict(config.flat(saved)), dict(config.flat(asked)), dict(config.roles(type(saved)))
    for key in dict.fromkeys([*before, *now]):
        role, was, is_ = roles.get(key, START), before.get(key), now.get(key)
        if was == is_ or role in (START, FREE) or (role == PLACE and moved(was, is_)):
            continue
        if key == "lora.first_layer" and is_ is None:  # filled in when the run began
            continue
        free = ", ".join(dict.fromkeys(section(key, roles) for key, role in roles.items() if role == FREE))
        raise UserError(
            f"resume=true: {key} was {shown(was)} in {out}, is {shown(is_)}: leave it as it was "
            f"(`{out}/{CONFIG}` as the first argument says all), or give another out. May change: {free}"
        )


def section(key: str, roles: dict[str, str]) -> str:
    """The widest section of ``key`` that has its role, as ``section.*``, or the key."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        if roles.get(".".join(parts[:end])) == roles[key]:
            return ".".join(parts[:end]) + ".*"
    return f"{key}.*" if any(other.startswith(f"{key}.") for other in roles) else key


def moved(was: Any, is_: Any) -> bool:
    """Whether two paths lead to one place, or the first one's is gone, as of what was moved."""
    if not isinstance(was, str) or not isinstance(is_, str):
        return False
    was, is_ = resources.find(was), resources.find(is_)
    return os.path.realpath(was) == os.path.realpath(is_) or (not os.path.exists(was) and os.path.exists(is_))


def shown(value: Any) -> str:
    return json.dumps(value, default=str)


class Run:
    """A process at work in the folder ``out``, as a context; what it left there goes unless :meth:`begin` was called.

    Raises:
        UserError: it is somebody else's folder.
        files.Held: another process is at work there.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = files.resolved(out)
        self.begun = False
        self.there: set[str] | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Run:
        if not is_empty(self.out) and not any((self.out / name).exists() for name in (MARKER, CONFIG, "checkpoints")):
            raise UserError(f"out={self.out} is not empty, and no run folder: give another one")
        self.made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.stack.enter_context(files.lock(self.out, LOCK))
            restore(self.out)
        except BaseException:
            self.stack.close()
            self._unmake()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            if self.begun:
                restore(self.out)
            elif self.there is not None:
                new = [name for name in inside(self.out) if name not in self.there and matches(name, PASSING)]
                _remove(self.out, [name for name in new if name != LOCK])
        finally:
            self.stack.close()
            self._unmake()

    def _unmake(self) -> None:
        for folder in self.made:
            if any(folder.iterdir()):
                return
            folder.rmdir()

    def claim(self) -> None:
        """What is in the folder is what may be replaced or gone on with; mark it as ours."""
        self.there = set(inside(self.out))
        if MARKER not in self.there:
            files.write_json(self.out / MARKER, {"format": 1})

    def begin(self, anew: bool) -> None:
        """The first step is done. ``anew``: what was there before is moved aside, for it is another run."""
        if anew and self.there is not None and not self.begun:
            aside(self.out, sorted(name for name in self.there if not matches(name, LIVE)))
        self.begun = True


def aside(out: Path, names: list[str]) -> None:
    """Move these files of a run that is replaced out of the way; before :func:`drop`, :func:`restore` undoes it."""
    if not names:
        return
    files.write_json(out / ASIDE / "files.json", names)  # before anything is moved
    for name in names:
        target = out / ASIDE / "run" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(out / name, target)
    _prune(out, names)


def drop(out: Path) -> None:
    """Delete the run that was replaced: the new one has a checkpoint."""
    if (out / ASIDE).is_dir():
        os.replace(out / ASIDE, out / f"{ASIDE}{PARTIAL}")  # at one stroke
    files.remove(out / f"{ASIDE}{PARTIAL}")


def restore(out: Path) -> None:
    """Put a run back whose successor was ended before it had a checkpoint, or else finish deleting it."""
    listed, run = out / ASIDE / "files.json", out / ASIDE / "run"
    names = set(json.loads(listed.read_text(encoding="utf-8"))) if listed.is_file() else set()
    names = {name for name in names if ".." not in Path(name).parts}
    waiting = {name for name in names if os.path.lexists(run / name)}
    if any((out / name).is_file() and (name in waiting or name not in names) for name in CHECKPOINTS):
        return drop(out)
    files.remove(out / f"{ASIDE}{PARTIAL}")
    if names:
        stay = (*LIVE, *REPORTS, f"{ASIDE}/*")
        new = [name for name in inside(out) if name not in names - waiting and matches(name, OWN)]
        _remove(out, [name for name in new if not matches(name, stay)])
        for name in sorted(waiting):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(run / name, out / name)
    if waiting:
        print(f"{out}: the run that was to be replaced is back, for the new one came to no checkpoint")
    files.remove(out / ASIDE)


def _remove(out: Path, names: list[str]) -> None:
    for name in names:
        files.remove(out / name)
    _prune(out, names)


def _prune(out: Path, names: list[str]) -> None:
    """Remove the folders in which these files were, if nothing is left in them."""
    folders = {folder for name in names for folder in Path(name).parents if folder.parts}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            (out / folder).rmdir()
