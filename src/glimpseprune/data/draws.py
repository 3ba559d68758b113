"""Which samples of a split: all, the first few, or a random subset that only its seed, size and the split decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def drawn(total: int, count: int, seed: int, split: str) -> np.ndarray:
    """``count`` different ones of 0 ... total - 1 in ascending order, or all where there are no more; int64 [n].

    The draw of a smaller count is a part of that of a larger one.
    """
    order = np.random.default_rng([seed, *split.encode()]).permutation(total)
    return np.sort(order[:count])


def runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending positions as (start, stop) of those that follow each other."""
    start = stop = None
    for position in map(int, positions):
        if position != stop:
            if start is not None:
                yield start, stop
            start = position
        stop = position + 1
    if start is not None:
        yield start, stop
