"""In which order the samples of an epoch come: pure functions of seeds, counts and lengths, on indices.

A mixture gives each folder a share of the epoch by its weight. A folder goes through epochs of its own, one after the
other, whatever those of the mixture are; its samples are spread evenly, and at random, over the mixture's epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["bucketed", "mixed", "padded", "shares", "shuffled"]


def shuffled(counts: Sequence[int], seed: Sequence[int], window: int, together: int = 1) -> np.ndarray:
    """int [samples]: a permutation of shards with ``counts`` samples, shuffled within groups of ``window`` consecutive
    ones, with blocks of ``together`` samples (of the index, in one shard) as one."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(counts)
    shards = rng.permutation(len(counts))
    order = np.concatenate([np.arange(ends[shard] - counts[shard], ends[shard]) for shard in shards])
    edges = np.cumsum([counts[shard] for shard in shards])[window - 1 :: window]
    parts = np.split(order, edges)  # views
    if together == 1:
        for part in parts:
            rng.shuffle(part)
        return order
    begins = (order % together == 0) | np.isin(order, ends - counts)
    for part, begin in zip(parts, np.split(begins, edges)):
        blocks = np.split(part, np.flatnonzero(begin)[1:])
        part[:] = np.concatenate([blocks[block] for block in rng.permutation(len(blocks))]) if len(part) else part
    return order


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` samples in proportion to ``weights``, by largest remainders."""
    exact = np.asarray(weights, dtype=float) / np.sum(weights) * total
    found = np.floor(exact).astype(int)
    for place in np.argsort(found - exact, kind="stable")[: total - found.sum()]:
        found[place] += 1
    return found.tolist()


def mixed(
    folders: Sequence[Sequence[int]],
    weights: Sequence[float],
    seed: int,
    epoch: int,
    window: int,
    together: int = 1,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """int [samples]: the order of an epoch of several folders, given the samples of each one's shards.

    Indices count through all folders; ``keep`` bool [samples]: of these, those that are dealt at all. The epoch has as
    many samples as there are, :func:`shares` of which come from each folder: one of a large weight comes round more
    than once, and one of a small weight goes on in the next epoch where it was left in this one.
    """
    starts = np.cumsum([0, *map(sum, folders)])
    kept = np.ones(starts[-1], dtype=bool) if keep is None else keep
    sizes = [int(kept[begin:end].sum()) for begin, end in zip(starts, starts[1:])]
    given, places = [], []
    for number, share in enumerate(shares(sum(sizes), np.where(np.asarray(sizes) > 0, weights, 0))):
        position, last, taken = epoch * share, (epoch + 1) * share, []
        while position < last:
            own, skip = divmod(position, sizes[number])
            order = shuffled(folders[number], (seed, own, number + 1), window, together) + starts[number]
            taken.append(order[kept[order]][skip : skip + last - position])
            position += len(taken[-1])
        given.append(np.concatenate([np.zeros(0, dtype=int), *taken]))
        jitter = np.random.default_rng((seed, epoch, number + 1, 1)).random(share)
        spread = (np.arange(share) + jitter) / max(share, 1)
        places.append(spread[_first_of_block(given[-1] - starts[number], folders[number], together)])
    return np.concatenate(given)[np.argsort(np.concatenate(places), kind="stable")]


def _first_of_block(order: np.ndarray, counts: Sequence[int], together: int) -> np.ndarray:
    """For each place in an order, that of the first sample of its block."""
    shard, block = np.searchsorted(np.cumsum(counts), order, side="right"), order // together
    new = np.r_[True, (np.diff(shard) != 0) | (np.diff(block) != 0)][: len(order)]
    return np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))


def bucketed(order: np.ndarray, lengths: np.ndarray, buffer: int, step: int, seed: Sequence[int]) -> np.ndarray:
    """``order`` with samples of like ``lengths`` in one step of ``step`` samples: in each buffer of so many consecutive
    ones they are sorted and cut into steps, and the steps are shuffled. Equal lengths stay in their order.

    What is left over for no whole step, at the end, is as random as before."""
    rng, order = np.random.default_rng(seed), order.copy()
    buffer = max(1, buffer // step) * step
    whole = len(order) - len(order) % step
    for start in range(0, whole, buffer):
        part = order[start : min(start + buffer, whole)]
        steps = part[np.argsort(lengths[part], kind="stable")].reshape(-1, step)
        part[:] = steps[rng.permutation(len(steps))].ravel()
    return order


def padded(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> float:
    """Share of the visual columns of all whole batches that are padding, in an ``order``."""
    whole = len(order) - len(order) % batch_size
    batches = lengths[order[:whole]].reshape(-1, batch_size)
    columns = batches.max(1).sum() * batch_size
    return 1 - float(batches.sum() / columns) if columns else 0.0
