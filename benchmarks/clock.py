"""Time sides in turn, round after round: CPU time on a CPU, device events on a GPU.

Machines drift; sides that run within a second of each other drift together. The first side therefore runs twice in each
round (A/A): what its ratio is off from 1 is what no other ratio may be trusted beyond.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Run = Callable[[], object]


class Late(BaseException):
    """Time is up; no error that a side may be excused for."""


AGAIN = " (A/A)"
"""Behind the name of the first side, when it runs once more."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 3:
            return cls(min(values), median(values), max(values))
        return cls(*quantiles(values, n=4, method="inclusive"))


def elapsed(run: Run, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one ``run``: of the device's stream on a GPU, of this process's CPU time elsewhere; and of the
    wall clock."""
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wall = time.perf_counter()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end), (time.perf_counter() - wall) * 1e3


class Turns:
    """What each side took for each of its parts in each round, in milliseconds."""

    def __init__(self, sides: Mapping[str, Run | Mapping[str, Run]], device: torch.device) -> None:
        """A side is what it runs, or several runs one after the other, by name."""
        parts = {name: run if isinstance(run, Mapping) else {"": run} for name, run in sides.items()}
        first = next(iter(parts))
        self.sides, self.first, self.device = {**parts, first + AGAIN: parts[first]}, first, device
        self.own: dict[str, dict[str, list[float]]] = {name: {} for name in self.sides}
        self.wall: dict[str, dict[str, list[float]]] = {name: {} for name in self.sides}
        self.failed: dict[str, str] = {}
        """Sides that failed as they warmed up, and how."""
        self.warmed: dict[str, dict[str, tuple[float, float]]] = {}
        """What each took when it was last warmed up, for want of a round."""
        self.is_warming = False
        """There was none, and :attr:`own` is what was taken then."""

    def take(self, until: float, rounds: int, warm_up: int | Mapping[str, int] = 1) -> Turns:
        """At most so many ``rounds``, and but for the first none that would end after ``until`` (``time.monotonic``).
        Every other round is run backwards, so that no side is always the one behind another. What has been measured
        when :class:`Late` is raised counts."""
        times = warm_up if isinstance(warm_up, Mapping) else dict.fromkeys(self.sides, warm_up)
        try:
            self._warm(times, until)
            longest = 0.0
            for number in range(rounds if self.sides else 0):
                began = time.monotonic()
                if number and began + longest > until:
                    break
                for name in list(self.sides)[:: -1 if number % 2 else 1]:
                    self._turn(name)
                longest = max(longest, time.monotonic() - began)
        except Late:
            pass
        if not any(self.own.values()):
            self.is_warming = True
            for name, parts in self.warmed.items():
                self.own[name] = {part: [own] for part, (own, _) in parts.items()}
                self.wall[name] = {part: [wall] for part, (_, wall) in parts.items()}
        return self

    def _warm(self, times: Mapping[str, int], until: float) -> None:
        """Each side once, and again, so many ``times`` in all, for as long as most of the time is left."""
        enough = time.monotonic() + (until - time.monotonic()) / 4
        for name, parts in list(self.sides.items()):
            if name.endswith(AGAIN):
                continue
            try:
                for number in range(times[name]):
                    if number and time.monotonic() > enough:
                        break
                    self.warmed[name] = {part: elapsed(run, self.device) for part, run in parts.items()}
            except Exception as error:  # costs this side, and no other
                self.failed[name] = said(error)
                for gone in (name, name + AGAIN):
                    self.sides.pop(gone, None)
                    self.own.pop(gone, None)
                    self.warmed.pop(gone, None)
                free()

    def _turn(self, name: str) -> None:
        took = {part: elapsed(run, self.device) for part, run in self.sides[name].items()}
        for part, (own, wall) in took.items():  # all parts or none
            self.own[name].setdefault(part, []).append(own)
            self.wall[name].setdefault(part, []).append(wall)

    def derive(self, part: str, more: str, less: str, divisor: float = 1.0) -> None:
        """A part that is what one took beyond another, round by round."""
        for times in self.own.values():
            if more in times and less in times:
                times[part] = [(a - b) / divisor for a, b in zip(times[more], times[less])]

    def ratio(self, name: str, part: str = "") -> Spread | None:
        """Of a side to the first one, round by round; None where there is no first."""
        mine, first = self.own[name].get(part), self.own.get(self.first, {}).get(part)
        return Spread.of([a / b for a, b in zip(mine, first)]) if mine and first and all(first) else None


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def free() -> None:
    """Give unused memory back."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
