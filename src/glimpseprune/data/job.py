"""A split of a source as shards, each written by one of several processes, and taken over where it is whole already.

Process number p of n writes the shards p, p + n, p + 2n ...; a shard's bytes depend on its samples alone, so neither
how many processes there are nor which of them were killed makes any difference.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from glimpseprune import lookup, processes
from glimpseprune.config import UserError
from glimpseprune.data import shards
from glimpseprune.data.draws import runs
from glimpseprune.data.journal import Journal
from glimpseprune.data.pixels import PixelLimit
from glimpseprune.types import Sample

SOURCES = "glimpseprune.data.sources"


@dataclass
class Job:
    """What one process needs to write its share of the shards of a split."""

    source: str
    options: Any
    split: str
    folder: Path
    shard_size: int
    limit: int | None = None
    """Only so many of the first samples."""
    positions: np.ndarray | None = None
    """Only these, in ascending order; None: all up to ``limit``."""
    image_format: str = "auto"
    pixels: PixelLimit = PixelLimit()
    max_invalid: int = 0

    def write(self, part: int, parts: int, count: Count) -> Iterator[dict[str, Any]]:
        """Write this part's shards, giving the manifest's entry of each.

        Raises:
            UserError: there are too many invalid samples.
        """
        journal, draw, number = Journal(self.folder), self._draw(), part
        while (bounds := self._bounds(number)) is not None:
            name = shards.shard_name(self.split, number)
            if (entry := journal.whole(name)) is not None:
                rows = entry["count"] + len(entry["invalid"])
                count.done(rows, taken_over=True)
                for key, reason in entry["invalid"]:
                    self._leave_out(count, f"'{key}': {reason}")
            else:
                entry = shards.write_shard(
                    draw(*bounds),
                    self.folder / name,
                    image_format=self.image_format,
                    fit=self.pixels,
                    tick=count.done,
                    leave_out=partial(self._leave_out, count),
                )
                if entry is None:
                    return
                journal.add(entry)
            yield entry
            number += parts

    def _leave_out(self, count: Count, said: str) -> None:
        if count.invalid() > self.max_invalid:
            more = f"more than max_invalid={self.max_invalid} invalid samples, such as" if self.max_invalid else ""
            raise UserError(f"split '{self.split}': the source gave {more or 'an invalid sample'} {said}")

    def _bounds(self, number: int) -> tuple[int, int] | None:
        """The slice of what is wanted that a shard is; None where that is known to be past the end."""
        start, stop = number * self.shard_size, (number + 1) * self.shard_size
        total = self.limit if self.positions is None else len(self.positions)
        if total is None:
            return start, stop
        return (start, min(stop, total)) if start < total else None

    def _draw(self) -> Callable[[int, int], Iterable[Sample]]:
        """What draws a slice; called with ascending ones, none of which is left before its end."""
        source = lookup.find(SOURCES, self.source)
        if can_slice(source):
            return self._drawn_alone(partial(source.samples, self.options, self.split))
        return self._drawn_in_turn(iter(source.samples(self.options, self.split)))

    def _drawn_alone(self, samples: Callable[..., Iterator[Sample]]) -> Callable[[int, int], Iterable[Sample]]:
        def draw(start: int, stop: int) -> Iterator[Sample]:
            wanted = ((start, stop),) if self.positions is None else runs(self.positions[start:stop])
            return chain.from_iterable(samples(start=first, stop=end) for first, end in wanted)

        return draw

    def _drawn_in_turn(self, stream: Iterator[Sample]) -> Callable[[int, int], Iterable[Sample]]:
        at = 0

        def draw(start: int, stop: int) -> Iterator[Sample]:
            nonlocal at
            wanted = ((start, stop),) if self.positions is None else runs(self.positions[start:stop])
            for first, end in wanted:
                yield from islice(stream, first - at, end - at)
                at = end

        return draw


def can_slice(source: ModuleType) -> bool:
    return "start" in inspect.signature(source.samples).parameters


def counted(samples: Iterable[Sample], tick: Callable[[int], None]) -> int:
    """How many there are, by going through them."""
    number = 0
    for number, _ in enumerate(samples, 1):
        tick(number)
    return number


# ------------------------------------------------------------------------------------------------------------ processes


@dataclass
class Count:
    """How far all processes are with a split: samples that are done, those of them in shards that were whole already,
    and those that are invalid."""

    total: Any
    kept: Any
    bad: Any

    def done(self, number: int = 1, taken_over: bool = False) -> None:
        _more(self.total, number)
        if taken_over:
            _more(self.kept, number)

    def invalid(self) -> int:
        """One more; how many there are."""
        return _more(self.bad, 1)

    def seen(self) -> tuple[int, int]:
        """How many are done, and how many of them were before; asks for no lock, which a killed worker may have."""
        return self.total.get_obj().value, self.kept.get_obj().value


def _more(counter: Any, number: int) -> int:
    with counter.get_lock():
        counter.value += number
        return counter.value


def write_split(
    job: Job, workers: int, report: Callable[[int, int], None] = lambda done, kept: None
) -> list[dict[str, Any]]:
    """Write the shards of a split with so many processes; what :func:`.shards.write_shard` said of each, in order.

    ``report(done, kept)`` is called now and then with how many samples are done, and how many of them were before.

    Raises:
        UserError: there are too many invalid samples, or a worker was ended from outside.
    """
    context = multiprocessing.get_context("fork")  # saves importing torch again; there are no threads in this process
    count = Count(*(context.Value("q", 0) for _ in range(3)))
    if workers == 1:
        return list(job.write(0, 1, _Reporting(count, report)))
    with ProcessPoolExecutor(workers, context, initializer=_share, initargs=(os.getpid(), count)) as pool:
        running = {pool.submit(_work, job, part, workers) for part in range(workers)}
        entries: list[dict[str, Any]] = []
        try:
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION)
                report(*count.seen())
                for future in finished:
                    entries += future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker was ended from outside, as a machine does that is out of memory: go on with resume=true and "
                f"fewer than workers={workers}"
            ) from None
        except BaseException:
            for process in list((pool._processes or {}).values()):  # or the pool would wait until they are done
                process.kill()
            raise
    return sorted(entries, key=lambda entry: entry["name"])


class _Reporting(Count):
    """In one process, which counts and reports in turn."""

    def __init__(self, count: Count, report: Callable[[int, int], None]) -> None:
        super().__init__(count.total, count.kept, count.bad)
        self.report = report

    def done(self, number: int = 1, taken_over: bool = False) -> None:
        super().done(number, taken_over)
        self.report(*self.seen())


def _share(parent: int, count: Count) -> None:
    global _count
    _count = count
    processes.serve(parent)


def _work(job: Job, part: int, parts: int) -> list[dict[str, Any]]:
    return list(job.write(part, parts, _count))
