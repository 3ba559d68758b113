"""Time several callables in turn, round after round, and print each one's ratio to the first, with quartiles.

Machines drift; sides that run within a second of each other drift together. Give the first side twice under another
name: that ratio is the A/A control, and what it is off from 1 is what no other ratio may be trusted beyond.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles

from rich.console import Console
from rich.table import Table


def compare(title: str, sides: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median ratio of each side's time to the first side's, over ``rounds`` interleaved rounds after one warm-up."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return ratios(title, seconds)


def ratios(title: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print the quartiles of each side's ratio to the first side, round by round; returns the medians."""
    first = seconds[next(iter(seconds))]
    table = Table("side", "ms (median)", "ratio: quartile", "median", "quartile", title=title)
    medians = {}
    for name, times in seconds.items():
        low, medians[name], high = quantiles([a / b for a, b in zip(times, first)], n=4)
        table.add_row(name, f"{quantiles(times, n=4)[1] * 1e3:.1f}", *(f"{r:.3f}" for r in (low, medians[name], high)))
    Console().print(table)
    return medians
