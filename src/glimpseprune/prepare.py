"""Turn a raw dataset into shards: ``python -m src.prepare source=tags out=data/tags options.size=336``.

Reads the samples of a source (a file in glimpseprune/data/sources) split by split and writes WebDataset tars and a
manifest. The folder appears under its name only when all of it is written. With ``workers`` each process writes every
n-th shard; a shard's bytes depend on its samples alone, so any number of workers gives the same folder.

A sample that no reader would take (:func:`.data.shards.check`) is left out; how many, which first and why is printed
and stands in the manifest. More than ``max_invalid`` of them in a split are a fault of the source, and end it.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from glimpseprune import config, files, lookup, processes
from glimpseprune.config import START, UserError, option
from glimpseprune.data import shards
from glimpseprune.legible import legible
from glimpseprune.types import Sample

SOURCES = "glimpseprune.data.sources"


@dataclass
class PrepareConfig:
    source: str = option(help="name of a file in glimpseprune/data/sources, or the path of a file of your own")
    out: str = option(help="folder to write")
    splits: list[str] | None = option(None, "splits to write; null means all the source has")
    shard_size: int = option(512, "samples per shard", least=1, most=10**6)
    limit: int | None = option(None, "at most this many samples of each split", least=1, most=10**9)
    image_format: Literal["auto", "png", "jpg"] = option("auto", "auto keeps JPEG files JPEG, all else becomes PNG")
    max_invalid: int = option(
        100, "invalid samples of a split that are left out; one more ends it", least=0, most=10**9
    )
    workers: int = option(1, "processes; the result does not depend on it", least=1, most=256)
    overwrite: bool = option(False, "replace a folder of shards that is already there", role=START)
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "options of the source"})


@dataclass
class Job:
    """What one process needs to write its share of the shards of a split."""

    source: str
    options: Any
    split: str
    folder: Path
    shard_size: int
    limit: int | None
    image_format: str
    max_invalid: int = 0

    def slices(self, part: int, parts: int) -> Iterator[tuple[int, Iterator[Sample]]]:
        """(shard number, its samples) for shards part, part + parts, ...; a slice past the end is empty."""
        samples, size = lookup.find(SOURCES, self.source).samples, self.shard_size
        stream = None if "start" in inspect.signature(samples).parameters else samples(self.options, self.split)
        number, position = part, 0
        while self.limit is None or number * size < self.limit:
            start, stop = number * size, number * size + size
            if self.limit is not None:
                stop = min(stop, self.limit)
            if stream is None:
                yield number, iter(samples(self.options, self.split, start=start, stop=stop))
            else:
                yield number, islice(stream, start - position, stop - position)
                position = stop
            number += parts

    def write(
        self, part: int, parts: int, tick: Callable[[], None], another: Callable[[], int]
    ) -> Iterator[dict[str, Any]]:
        """Write this part's shards, giving the manifest's entry of each. ``another()`` counts one more invalid sample
        of the split and says how many there are.

        Raises:
            UserError: there are too many.
        """

        def leave_out(said: str) -> None:
            if another() > self.max_invalid:
                more = f"more than max_invalid={self.max_invalid} invalid samples, such as" if self.max_invalid else ""
                raise UserError(f"split '{self.split}': the source gave {more or 'an invalid sample'} {said}")

        for number, samples in self.slices(part, parts):
            path = self.folder / shards.shard_name(self.split, number)
            entry = shards.write_shard(samples, path, image_format=self.image_format, tick=tick, leave_out=leave_out)
            if entry is None:
                return
            yield entry


def write_split(job: Job, workers: int, report: Callable[..., None] = lambda completed: None) -> list[dict[str, Any]]:
    """Write a split with so many processes; the manifest's entries of its shards, in order.

    ``report(completed=...)`` is called now and then with the number of samples written so far.
    """
    if workers == 1:
        done, invalid = count(1), count(1)
        ticking = lambda: report(completed=n) if (n := next(done)) % 32 == 0 else None  # noqa: E731
        return shards.close_up(job.folder, job.split, job.write(0, 1, ticking, lambda: next(invalid)))
    context = multiprocessing.get_context("fork")  # saves importing torch again; there are no threads in this process
    total, invalid = context.Value("q", 0), context.Value("q", 0)
    sharing = (os.getpid(), total, invalid)
    with ProcessPoolExecutor(workers, context, initializer=_share, initargs=sharing) as pool:
        running = {pool.submit(_work, job, part, workers) for part in range(workers)}
        entries: list[dict[str, Any]] = []
        try:
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION)
                report(completed=total.value)
                for future in finished:
                    entries += future.result()
        except BaseException:
            for process in list((pool._processes or {}).values()):  # or the pool would wait until they are done
                process.kill()
            raise
    return shards.close_up(job.folder, job.split, sorted(entries, key=lambda entry: entry["name"]))


def _share(parent: int, *counters: Any) -> None:
    global _counters
    _counters = counters
    processes.serve(parent)


def _work(job: Job, part: int, parts: int) -> list[dict[str, Any]]:
    def one_more(counter: Any) -> int:
        with counter.get_lock():
            counter.value += 1
            return counter.value

    return list(job.write(part, parts, *(partial(one_more, counter) for counter in _counters)))


def prepare(cfg: PrepareConfig, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Write the folder ``cfg.out``; returns what its manifest says of each split.

    Raises:
        UserError: unknown source, split or option, a folder that must not be replaced, too many invalid samples.
    """
    config.check(cfg)
    source = lookup.find(SOURCES, cfg.source)
    options = config.merge_options(source.Options, cfg.options, "options")
    there = source.splits if not hasattr(source, "present") else source.present(options)
    splits = list(dict.fromkeys(there if cfg.splits is None else cfg.splits))
    if not splits:
        raise UserError(f"splits is empty: choose from {', '.join(there) or 'none, for the source has no samples'}")
    for split in splits:
        lookup.choose(split, there, f"the splits of source '{cfg.source}'")
    out = files.resolved(cfg.out)
    _check_free(out, cfg.overwrite)
    bar = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    entries: dict[str, dict[str, Any]] = {}
    # Progress without a thread of its own, which would be forked.
    with files.folder(out) as unfinished, Progress(*bar, console=console, auto_refresh=False) as progress:
        for split in splits:
            task = progress.add_task(split, total=cfg.limit)
            how = cfg.shard_size, cfg.limit, cfg.image_format, cfg.max_invalid
            job = Job(cfg.source, options, split, unfinished, *how)
            written = write_split(job, cfg.workers, partial(progress.update, task, refresh=True))
            meta = {"source": cfg.source, "options": asdict(options)}
            entries[split] = entry = shards.write_manifest(unfinished, split, written, meta)
            progress.update(task, completed=entry["count"], total=entry["count"], refresh=True)
    return entries


def described(out: str, wanted: Mapping[str, Any] | None) -> PrepareConfig | None:
    """The command that makes the shards ``out`` as ``data.prepare`` of a training describes them, None if it does not.

    Raises:
        UserError: what is described is no such command.
    """
    if wanted is None:
        return None
    return config.merge_options(PrepareConfig, {**wanted, "out": out}, "data.prepare")


def make_missing(out: str, wanted: Mapping[str, Any] | None) -> None:
    """Make the shards ``out`` if they are :func:`described` and not there. Not for two processes at a time."""
    command = described(out, wanted)
    if command is not None and not Path(out).exists():
        print(f"{out} is not there: making it as data.prepare says")
        prepare(command)


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
    console = Console()
    entries = prepare(cfg, console)
    table = Table(title=Text(legible(f"{cfg.source} -> {cfg.out}"), "table.title"))
    for column, side in (
        ("split", "left"),
        ("samples", "right"),
        ("kinds", "left"),
        ("shards", "right"),
        ("MB", "right"),
    ):
        table.add_column(column, justify=side)
    for split, entry in entries.items():
        kinds = ", ".join(f"{kind} {number}" for kind, number in entry["kinds"].items())
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        row = split, str(entry["count"]), kinds, str(len(entry["shards"])), f"{size:.1f}"
        table.add_row(*(Text(legible(cell)) for cell in row))
    console.print(table)
    for split, entry in entries.items():
        for said in left_out(entry):
            console.print(Text(legible(f"{split}: {said}")))


def left_out(entry: Mapping[str, Any]) -> Iterator[str]:
    """What a manifest's entry says of samples that were left out, or a part of them, as sentences."""
    for name, what in (
        ("invalid", "{} invalid samples were left out"),
        ("lacking", "{} samples were left without a part"),
    ):
        if told := entry.get(name):
            reasons = "; ".join(f"{times} x {reason}" for reason, times in told["reasons"].items())
            yield f"{what.format(told['count'])} ({reasons}), the first one {told['first'][0]}"
