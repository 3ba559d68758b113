"""Turn a raw dataset into shards: ``python -m src.prepare source=tags out=data/tags options.size=336``.

Reads the samples of a source (a file in glimpseprune/data/sources) split by split and writes WebDataset tars and a
manifest. The folder appears under its name only when all of it is written. With ``workers`` each process writes every
n-th shard; a shard's bytes depend on its samples alone, so any number of workers gives the same folder.

Killed, interrupted or out of disk, it goes on with ``resume=true`` from the shards that are whole, to the same bytes.
``sample=20000 seed=42`` takes a random subset of each split. Every image is decoded, and stored as the file that it is
(``image_format``) within ``max_pixels``.

A sample that no reader would take (:func:`.data.shards.check`) is left out; how many, which first and why is shown in
the end and stands in the manifest. More than ``max_invalid`` of them in a split are a fault of the source, and end it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from glimpseprune import config, files, lookup, results
from glimpseprune.config import FREE, SEEDS, START, UserError, option
from glimpseprune.data import shards, tables
from glimpseprune.data.draws import drawn
from glimpseprune.data.job import SOURCES, Job, counted, write_split
from glimpseprune.data.journal import JOURNAL, Journal
from glimpseprune.data.pixels import PixelLimit
from glimpseprune.data.progress import Watch
from glimpseprune.legible import legible


@dataclass
class PrepareConfig:
    source: str = option(help="name of a file in glimpseprune/data/sources, or the path of a file of your own")
    out: str = option(help="folder to write", role=START)
    splits: list[str] | None = option(None, "splits to write; null means all the source has")
    shard_size: int = option(512, "samples per shard", least=1, most=10**6)
    limit: int | None = option(None, "only the first so many samples of each split", least=1, most=10**9)
    sample: int | None = option(
        None, "a random subset of so many samples of each split, in their order", least=1, most=10**9
    )
    seed: int = option(0, "of that subset", least=0, most=SEEDS)
    image_format: Literal["auto", "png", "jpg"] = option(
        "auto", "auto stores PNG and JPEG files as they are, all else as PNG; png and jpg turn what is none into one"
    )
    max_pixels: int | None = option(None, "width x height that a stored image may have", least=784, most=shards.PIXELS)
    large_images: Literal["refuse", "shrink"] = option(
        "refuse", "of images with more: leave the sample out, or make the image smaller, its boxes with it"
    )
    license: str | None = option(None, "licence of the data, for the manifest; null: what the source declares")
    max_invalid: int = option(
        100, "invalid samples of a split that are left out; one more ends it", least=0, most=10**9, role=FREE
    )
    workers: int = option(1, "processes; the result does not depend on it", least=1, most=256, role=FREE)
    resume: bool = option(
        False, "go on with what was interrupted on its way to `out`; where nothing was, begin", role=START
    )
    overwrite: bool = option(
        False, "replace a folder of shards that is already there (with resume: where it was made otherwise)", role=START
    )
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "options of the source"})


def prepare(cfg: PrepareConfig, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Write the folder ``cfg.out``; returns what its manifest says of each split.

    Raises:
        UserError: unknown source, split or option, a folder that must not be replaced or gone on with, too many invalid
            samples.
    """
    config.check(cfg)
    source = lookup.find(SOURCES, cfg.source)
    options = config.merge_options(source.Options, cfg.options, "options")
    splits = _splits(cfg, source, options)
    out = files.resolved(cfg.out)
    asked = _asked(cfg, options, splits)
    files.recover(out, JOURNAL)
    journal = Journal(files.unfinished(out))
    if cfg.resume and not journal.begun and _difference(_prepared(out), asked) == "":
        return _entries(out, splits)
    with files.folder(out, JOURNAL) as unfinished, Watch(console) as watch:
        lock = unfinished / ".lock"
        _begin(cfg, out, journal, {"asked": asked, "inputs": _inputs(cfg, source, options)}, [lock], watch.console)
        try:
            notes = source.notes(options) if hasattr(source, "notes") else []
            shards.begin_manifest(unfinished, {"prepared": asked, **({"notes": notes} if notes else {})})
            for note in notes:
                watch.console.print(Text(legible(f"note: {note}")), soft_wrap=True)
            return {split: _write(cfg, source, options, split, unfinished, watch) for split in splits}
        except BaseException as error:
            if not journal.begun:
                journal.end()
                raise
            kept = f"{len(journal.names())} shards are whole and kept"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {kept}: set right what is wrong and give resume=true") from error
            if isinstance(error, Exception):
                print(f"note: {kept}: resume=true uses them", file=sys.stderr)
            raise


def _splits(cfg: PrepareConfig, source: ModuleType, options: Any) -> list[str]:
    there = source.splits if not hasattr(source, "present") else source.present(options)
    splits = list(dict.fromkeys(there if cfg.splits is None else cfg.splits))
    if not splits:
        raise UserError(f"splits is empty: choose from {', '.join(there) or 'none, for the source has no samples'}")
    for split in splits:
        lookup.choose(split, there, f"the splits of source '{cfg.source}'")
    return splits


def _write(
    cfg: PrepareConfig, source: ModuleType, options: Any, split: str, folder: Path, watch: Watch
) -> dict[str, Any]:
    """Write a split; its entry in the manifest."""
    total, positions = _chosen(cfg, source, options, split, watch)
    how = {name: getattr(cfg, name) for name in ("shard_size", "limit", "image_format", "max_invalid")}
    pixels = PixelLimit(cfg.max_pixels, cfg.large_images)
    job = Job(cfg.source, options, split, folder, positions=positions, pixels=pixels, **how)
    watch.begin(split, (cfg.limit if total is None else total) if positions is None else len(positions))
    written = write_split(job, cfg.workers, watch.at)
    meta = {"source": cfg.source, "options": asdict(options), "license": _license(cfg, source, options)}
    if positions is not None:
        meta["sample"] = {"drawn": len(positions), "of": total, "seed": cfg.seed}
    try:  # to rename them, once all are there: what has another name than was said of it is made again
        entry = shards.write_manifest(folder, split, shards.close_up(folder, split, written), meta)
    except UserError:
        Journal(folder).end()  # to go on would come to the same
        raise
    watch.end(entry["rows"])
    return entry


def _chosen(cfg: PrepareConfig, source: ModuleType, options: Any, split: str, watch: Watch) -> tuple[int | None, Any]:
    """How many samples a split has, up to ``limit``, where that is known; and which of them are drawn, if any are."""
    total = source.count(options, split) if hasattr(source, "count") else None
    if total is None and cfg.sample is not None:
        watch.begin(f"{split}: counting", None)
        total = counted(source.samples(options, split), watch.at)
        watch.end(total)
    if cfg.limit is not None and total is not None:
        total = min(total, cfg.limit)
    if cfg.sample is None or total is None:
        return total, None
    return total, drawn(total, cfg.sample, cfg.seed, split)


def _license(cfg: PrepareConfig, source: ModuleType, options: Any) -> str | None:
    return cfg.license or (source.license(options) if hasattr(source, "license") else None)


# ------------------------------------------------------------------------------------------------------------- going on


def _asked(cfg: PrepareConfig, options: Any, splits: Sequence[str]) -> dict[str, Any]:
    """All that decides what the shards are, as JSON has it."""
    roles = dict(config.roles(PrepareConfig))
    said = {key: value for key, value in asdict(cfg).items() if roles[key] not in (START, FREE)}
    said |= {"splits": splits, "options": asdict(options)}
    return json.loads(json.dumps(said, default=str))


def _inputs(cfg: PrepareConfig, source: ModuleType, options: Any) -> dict[str, Any]:
    """Files that the source reads its rows from -> size and time of change: with others it would give other samples."""
    given = [*(source.inputs(options) if hasattr(source, "inputs") else ())]
    given += [cfg.source] if lookup.is_file(cfg.source) else []
    found: dict[str, Any] = {}
    for file in sorted(map(str, given)):
        with suppress(OSError):
            status = os.stat(file)
            found[file] = [status.st_size, status.st_mtime_ns]
    return found


def _begin(
    cfg: PrepareConfig, out: Path, journal: Journal, asked: dict[str, Any], but: list[Path], console: Console
) -> None:
    """Have the unfinished folder hold what may be gone on with, and nothing else.

    Raises:
        UserError: something is there that must neither be gone on with nor replaced.
    """
    before = journal.asked()
    if journal.begun and not (cfg.resume or cfg.overwrite):
        raise UserError(
            f"a preparation of {out} was interrupted, {len(journal.names())} shards of it are whole: give resume=true "
            "to go on with it, overwrite=true to begin anew, or another out=<folder>"
        )
    if journal.begun and cfg.resume:
        if not (said := _changed(before, asked)):
            _check_free(out, cfg.overwrite or before.get("overwrite", False))
            journal.go_on(but)
            console.print(Text(f"going on: {len(journal.names())} shards are whole"), soft_wrap=True)
            return
        if not cfg.overwrite:
            raise UserError(
                f"resume=true: what was interrupted on its way to {out} was made otherwise ({said}): leave that as it "
                "was, or give overwrite=true to begin anew, or another out=<folder>"
            )
    elif cfg.resume and not cfg.overwrite and (out / shards.MANIFEST).is_file():
        said = _difference(_prepared(out), asked["asked"])
        raise UserError(f"resume=true: out={out} was made otherwise ({said}): give overwrite=true or another out")
    _check_free(out, cfg.overwrite)
    journal.begin({**asked, "overwrite": cfg.overwrite}, but)


def _changed(before: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Where an interrupted preparation differs from the present one, in words; empty where it does not."""
    if said := _difference(before.get("asked"), asked["asked"]):
        return said
    was, now = before.get("inputs", {}), results.plain(asked["inputs"])
    files_ = [file for file in {**was, **now} if was.get(file) != now.get(file)]
    return f"{shards.some(files_)} changed since" if files_ else ""


def _difference(there: Any, asked: Mapping[str, Any]) -> str:
    return results.difference(there, asked) if there else "it does not say how"


def _prepared(out: Path) -> Any:
    """What the manifest of a folder says of how it was made; None where there is none, or it does not."""
    try:
        return json.loads((out / shards.MANIFEST).read_text(encoding="utf-8")).get("prepared")
    except (OSError, ValueError, AttributeError):
        return None


def _entries(out: Path, splits: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the manifest of a finished folder says of each split; raises UserError where its shards are not there."""
    for split in splits:
        shards.Shards(out, split)
    said = json.loads((out / shards.MANIFEST).read_text(encoding="utf-8"))["splits"]
    return {split: said[split] for split in splits}


def described(out: str, wanted: Mapping[str, Any] | None) -> PrepareConfig | None:
    """The command that makes the shards ``out`` as ``data.prepare`` of a training describes them, None if it does not.

    Raises:
        UserError: what is described is no such command.
    """
    if wanted is None:
        return None
    return config.merge_options(PrepareConfig, {**wanted, "out": out}, "data.prepare")


def make_missing(out: str, wanted: Mapping[str, Any] | None) -> None:
    """Make the shards ``out`` if they are :func:`described` and not there, or go on with that. Not for two processes at
    a time."""
    command = described(out, wanted)
    if command is not None and not Path(out).exists():
        print(f"{out} is not there: making it as data.prepare says")
        prepare(replace(command, resume=True, overwrite=True))  # what is there of it is only half of one


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError unless ``out`` may be written: absent, empty, or shards that the user wants replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"out={out} is a file: give the name of a folder")
    there = sorted(path.name for path in out.iterdir())
    foreign = [name for name in there if name != shards.MANIFEST and not name.endswith(".tar")]
    if there and not overwrite:
        raise UserError(
            f"out={out} is not empty (it holds {shards.some(there)}): give another folder or overwrite=true"
        )
    if foreign or (there and shards.MANIFEST not in there):
        what = shards.some(foreign or there)
        raise UserError(
            f"out={out} holds {what}, so it is no folder of shards that may be replaced: remove it yourself"
        )


@config.entry(PrepareConfig)
def main(cfg: PrepareConfig) -> None:
    console, journal = Console(), Journal(files.unfinished(cfg.out))
    with config.advising(lambda: f"go on with: {config.command('resume=true')}" if journal.begun else ""):
        entries = prepare(cfg, console)
    console.print(tables.written(f"{cfg.source} -> {cfg.out}", entries))
    for split, entry in entries.items():
        console.print(Text(legible(f"{split}: {tables.summary(entry)}")), soft_wrap=True)
    if any(entry.get(name) for entry in entries.values() for name in shards.TOLD):
        console.print(tables.left_out(entries))
    for said in dict.fromkeys(entry.get("license") or "" for entry in entries.values()):
        said = said or "not declared: give license=<text> to have it in the manifest"
        console.print(Text(legible(f"licence: {said}")), soft_wrap=True)
