"""Several folders of shards as one, each with a weight."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from glimpseprune.config import UserError
from glimpseprune.data.order import shares
from glimpseprune.data.shards import Shards, Store, require_room
from glimpseprune.types import Sample


class Mixture:
    """The samples of one split of several folders by one index, that counts through them; as :class:`Shards`.

    Args:
        folders: path or address -> weight, above 0: the share of samples that come from there.

    Raises:
        UserError: as :class:`Shards`; fewer than two folders, or a weight that is none.
    """

    def __init__(
        self,
        folders: Mapping[str | Path, float],
        split: str,
        *,
        verify: bool = False,
        store: Store = Store(),  # noqa: B008 (frozen)
    ) -> None:
        for path, weight in folders.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"data.mix: the weight of {path} is {weight}: give one above 0, or leave it out")
        self.folders = [Shards(path, split, verify=verify, store=store) for path in folders]
        self.weights = list(folders.values())
        self.split, self.folder = split, " + ".join(str(folder.place) for folder in self.folders)
        self.ends = list(accumulate(map(len, self.folders)))

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [count for folder in self.folders for count in folder.counts]

    @property
    def mix(self) -> Sequence[tuple[int, float]]:
        """Number of shards and weight of each folder."""
        return [(len(folder.counts), weight) for folder, weight in zip(self.folders, self.weights)]

    @property
    def left_out(self) -> Counter[str]:
        return sum((folder.left_out for folder in self.folders), Counter())

    def require_shares(self, keep: np.ndarray | None) -> None:
        """Raise UserError where a folder gives nothing to an epoch of ``keep`` (bool [samples]; None: all)."""
        starts = [0, *self.ends]
        sizes = [end - begin if keep is None else int(keep[begin:end].sum()) for begin, end in zip(starts, self.ends)]
        for folder, size, weight, share in zip(self.folders, sizes, self.weights, shares(sum(sizes), self.weights)):
            if not size or not share:
                raise UserError(
                    f"data.mix: {folder.place} gives none of {sum(sizes)} samples: it has {size} within the limits, "
                    f"and its weight is {weight:g}: leave it out, or give it more"
                )

    def require_cache(self, window: int) -> None:
        """As of :class:`Shards`."""
        require_room(sum(folder.in_use(window) for folder in self.folders), self.folders[0].place, window)

    def read(self, index: int) -> Sample:
        """Raises as :meth:`Shards.read`. Scenes of two folders are never one, whatever they are called."""
        number = bisect_right(self.ends, index)
        sample = self.folders[number].read(index - (self.ends[number - 1] if number else 0))
        if sample.scene:
            sample.scene = f"{number}/{sample.scene}"
        return sample
