"""What a case is, what it is given, and how its times become rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.clock import AGAIN, Spread, Turns
from benchmarks.counters import Counts, count
from benchmarks.rows import Row
from benchmarks.world import HUGGING_FACE, Prompt, Side, World

ANSWER = 32
"""New tokens."""


@dataclass
class Bench:
    """What a case is given: the world, until when it may run, and how much it may hold."""

    world: World
    until: float = float("inf")
    """Of ``time.monotonic``."""
    rounds: int = 15
    memory: int | None = None
    """Bytes above the weights that the largest batch may need; None: all that the GPU has."""
    counting: bool = True
    warm_up: bool = True
    """Run once what is counted before it is counted."""

    def within(self, parts: int) -> float:
        """The end of the next one of so many equal parts of what time is left."""
        now = time.monotonic()
        return now + (self.until - now) / parts

    def take(self, sides: Mapping[str, Any], until: float | None = None, rounds: int | None = None) -> Turns:
        turns = Turns(sides, self.world.device)
        gpu = self.world.device.type == "cuda"
        # Of ours a graph is recorded the second time, and used the third.
        times = {name: 3 if gpu and not name.startswith(HUGGING_FACE) else 1 for name in sides}
        return turns.take(self.until if until is None else until, rounds or self.rounds, times)

    def count(self, run: Callable[[], object], side: Side, prompt: Prompt) -> Counts | None:
        if not self.counting:
            return None
        return count(run, self.world.device, side.held(prompt), self.warm_up)


@dataclass(frozen=True)
class Case:
    run: Callable[[Bench], Iterator[Row]]
    gpu: int
    """Seconds that it may take there, of four minutes."""
    cpu: int
    """And there, of ten."""

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")

    @property
    def about(self) -> str:
        return " ".join(self.run.__doc__.split())


def case(gpu: int, cpu: int) -> Callable[[Callable[[Bench], Iterator[Row]]], Case]:
    """Make a case of a function that yields its rows as it finds them, so that one that fails or runs out of time costs
    only what it had not found; ``gpu`` and ``cpu`` as in :class:`Case`."""
    return lambda run: Case(run, gpu, cpu)


def rows(
    name: str,
    turns: Turns,
    bounds: Mapping[str, float | None] = {},  # noqa: B006 (never changed)
    *,
    part: str = "",
    samples: int | None = None,
    counts: Mapping[str, Counts | None] = {},  # noqa: B006
) -> Iterator[Row]:
    """One row for each side, the control included; then one for each that failed."""
    first = bounds.get(turns.first)
    for side, times in turns.own.items():
        if part not in times:
            continue
        plain = side.removesuffix(AGAIN)
        bound, counted, spread = bounds.get(plain), counts.get(plain), Spread.of(times[part])
        wall = turns.wall[side].get(part)
        more = {"all": times[part]} | ({"wall ms": Spread.of(wall).median} if wall else {})
        if counted:
            more |= {"launches": counted.launches, "syncs": counted.where}
        yield Row(
            name,
            side,
            value=spread,
            bound=bound,
            ratio=turns.ratio(side, part) if side != turns.first else None,
            ratio_bound=bound / first if bound and first and plain != turns.first else None,
            rate=samples / spread.median * 1e3 if samples else None,
            kernels=counted and counted.kernels,
            syncs=counted and counted.syncs,
            rounds=0 if turns.is_warming else len(times[part]),
            note="as it warmed up: no time was left for a round" if turns.is_warming else "",
            more=more,
        )
    yield from (Row(name, side, note=f"failed: {error}") for side, error in turns.failed.items())
