"""A folder of shards as an exactly resumable stream of batches.

One rule (:class:`Deal`) says which rank gets which samples at which step, from nothing but (seed, epoch, samples dealt
so far): all samples of the epoch in one seeded order are laid end to end, and every step deals the next batch to each
rank in turn. So in an epoch

- every rank takes the same number of steps, and no sample comes twice (but to stand in for a damaged one);
- fewer than world x batch samples are left over (dropped until another epoch's order brings them);
- the place in it is two numbers, equal on all ranks. A run resumes exactly there, without reading anything again,
  under any number of workers; under another number of ranks or another batch size it goes on from the same sample.

The order of an epoch is a permutation of the shards, shuffled within groups of ``shuffle_shards`` consecutive ones
(``together`` samples as one, where questions on an image come one after the other), so that reading stays local however
large the data: at any time one such group is in use. Workers take whole batches, so there may be more of them, and more
ranks, than shards. webdataset's and torchdata's streams were left out: they tie order and state to the number of ranks,
workers and shards.

Three things bend the order, each a pure function, too (:mod:`.order`): a mixture of folders by weights, limits that
leave samples out, and buckets that put samples of like length into one step, on all ranks.

A damaged sample is replaced by a random intact one, which ``Sample.stands_in`` marks, is counted in ``damaged``, and is
reported once.
"""

from __future__ import annotations

import atexit
import os
import time
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glimpseprune import processes
from glimpseprune.config import UserError
from glimpseprune.data import order as orders
from glimpseprune.data.mixture import Mixture
from glimpseprune.data.shards import Damage, Shards, Store
from glimpseprune.types import Sample

PADDING = "padding"
"""``Sample.stands_in`` of a sample that only gives a rank something to do while others finish an evaluation."""

_TRIES = 100  # random samples tried in place of a damaged one
_WARNINGS = 20  # damaged samples reported one by one; further ones are only counted


class ShardDataset(Dataset):
    """The samples of one split by index; arguments and errors as :class:`.shards.Shards`, or with a ``mix`` of folders
    and their weights :class:`.mixture.Mixture`, where ``folder`` has the weight 1 unless it is named there.

    A damaged sample is replaced by a random intact one, the same on every reading, with ``stands_in`` set. A negative
    index means padding.

    Attributes:
        keep: bool [samples], those that may be dealt, or stand in for others; None: all.
        change: what is done to a sample once it is read.

    Raises:
        UserError: when reading, if nothing intact is found.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        limit: int | None = None,
        verify: bool = False,
        store: Store = Store(),  # noqa: B008 (frozen)
        mix: Mapping[str, float] | None = None,
    ) -> None:
        self.shards: Shards | Mixture
        if mix:
            self.shards = Mixture({str(folder): 1.0, **mix}, split, verify=verify, store=store)
        else:
            self.shards = Shards(folder, split, limit=limit, verify=verify, store=store)
        self.keep: np.ndarray | None = None
        self.change: Callable[[Sample], Sample] = _as_it_is

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            return replace(self[index % len(self)], stands_in=PADDING)
        try:
            return self.change(self.shards.read(index))
        except Damage as damage:
            for other in np.random.default_rng(index).integers(len(self), size=_TRIES):
                if self.keep is not None and not self.keep[other]:
                    other = np.flatnonzero(self.keep)[other % self.keep.sum()]
                try:
                    return replace(self.change(self.shards.read(int(other))), stands_in=str(damage))
                except Damage:
                    continue
            shards = self.shards
            raise UserError(
                f"{damage}, and so are {_TRIES} others of split '{shards.split}' in {shards.folder}: prepare it again"
            ) from damage


@dataclass
class Deal:
    """Whose turn it is: a batch sampler whose whole state is ``epoch`` and ``consumed``.

    Iterating gives this rank's remaining batches of the epoch as lists of indices. With ``shuffle`` all batches are
    whole. Without, all samples come in order; the last batch may be short, and a rank for which none is left gets one
    sample of padding (index -1), so that ranks stay in step.
    """

    counts: Sequence[int]
    batch_size: int
    shuffle: bool
    seed: int = 0
    shuffle_shards: int = 16
    rank: int = 0
    world: int = 1
    together: int = 1
    """So many samples of a shard, counted from the split's first, stay together: the questions on an image."""
    epoch: int = 0
    consumed: int = 0
    """Samples of this epoch dealt so far, to all ranks."""
    mix: Sequence[tuple[int, float]] = ()
    """Of each folder, how many of ``counts`` are its shards, and its weight; empty: there is one."""
    keep: np.ndarray | None = None  # bool [samples]: those that are dealt; None: all
    lengths: np.ndarray | None = None  # int [samples]: by which they are put into buckets
    bucket: int = 0
    """Samples among which those of like length are put together when they are shuffled; 0: none are."""
    step: int = 0
    """Samples of a step for which the buckets of this epoch were made; 0: those of its own. Kept by a run that is
    resumed on other ranks, or it would not know which samples of a bucket it has had."""

    def __post_init__(self) -> None:
        self.total = sum(self.counts) if self.keep is None else int(self.keep.sum())

    @property
    def stride(self) -> int:
        """Samples dealt per step, to all ranks."""
        return self.batch_size * self.world

    @property
    def finished(self) -> bool:
        left = self.total - self.consumed
        return left < (self.stride if self.shuffle else 1)

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.total // self.stride if self.shuffle else -(-self.total // self.stride)

    def __iter__(self) -> Iterator[list[int]]:
        order, start = self.order(), self.consumed
        stop = self.total - self.stride + 1 if self.shuffle else self.total
        for step in range(start, stop, self.stride):
            mine = step + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist() or [-1]

    def order(self) -> np.ndarray:
        """int [samples]: the indices in the order of this epoch."""
        if not self.shuffle:
            return self._kept(np.arange(sum(self.counts)))
        if self.mix:
            edges = np.cumsum([0, *(shards for shards, _ in self.mix)])
            folders = [self.counts[begin:end] for begin, end in zip(edges, edges[1:])]
            weights = [weight for _, weight in self.mix]
            found = orders.mixed(folders, weights, self.seed, self.epoch, self.shuffle_shards, self.together, self.keep)
        else:
            seed = self.seed, self.epoch
            found = self._kept(orders.shuffled(self.counts, seed, self.shuffle_shards, self.together))
        if not self.bucket or self.lengths is None:
            return found
        return orders.bucketed(found, self.lengths, self.bucket, self.step or self.stride, (self.seed, self.epoch, 0))

    def _kept(self, indices: np.ndarray) -> np.ndarray:
        return indices if self.keep is None else indices[self.keep[indices]]


class ShardLoader:
    """Batches of one rank, made in worker processes. A training loader (``shuffle``) knows its place and can be saved.

    Every iterator of a training loader is a new epoch, but for the first one after ``load_state_dict``, which goes on
    from there; so use one at a time. Those of an evaluation loader are all alike.

    Args:
        dataset: where the samples come from.
        collate: list[Sample] -> batch; inherited by forked workers, never pickled.
        batch_size: samples per batch and rank.
        workers: processes beside this one; 0 reads here. They affect speed only.
        rank, world: this process among all that share an epoch.
        together: consecutive samples of a shard that stay next to each other.
        lengths: int [samples], visual tokens of each, and ``bucket``: see :class:`Deal`.

    Attributes:
        deal: the place, see :class:`Deal`.
        damaged: place and reason -> how often a stand-in came instead, in this process and all its workers.
        waited: seconds that whoever iterates has waited for batches.

    Raises:
        UserError: too few samples for one step, and what ``collate`` raises.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        collate: Callable[[list[Sample]], Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        workers: int = 0,
        seed: int = 0,
        shuffle_shards: int = 16,
        rank: int = 0,
        world: int = 1,
        together: int = 1,
        lengths: np.ndarray | None = None,
        bucket: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: at least 1 sample per batch")
        self.dataset, self.collate, self.workers = dataset, collate, workers
        shards, bent = dataset.shards, {"keep": dataset.keep, "lengths": lengths, "bucket": bucket}
        self.deal = Deal(
            shards.counts, batch_size, shuffle, seed, shuffle_shards, rank, world, together, mix=shards.mix, **bent
        )
        self.damaged: Counter[str] = Counter()
        self.waited = 0.0
        self._loader: DataLoader | None = None
        self._batches: Iterator[Any] | None = None
        self._begun = False
        if not len(self):
            raise UserError(
                f"{dataset.shards.folder} ({dataset.shards.split}) has {self.deal.total} samples: too few for one step "
                f"of batch_size {batch_size} on {world} ranks"
            )
        if isinstance(dataset.shards, Mixture):
            dataset.shards.require_shares(dataset.keep)
        if shuffle:
            dataset.shards.require_cache(shuffle_shards)

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return len(self.deal)

    def __iter__(self) -> Iterator[Any]:
        deal = self.deal
        if not deal.shuffle:
            deal.consumed = 0
        elif deal.finished or self._begun:
            deal.epoch, deal.consumed, deal.step = deal.epoch + 1, 0, 0
        self._begun = True
        new = self._loader is None
        self._loader = self._loader or self._start()
        self._batches = batches = iter(self._loader)
        if new and self.workers:  # after torch's own, so before it: that sends SIGTERM, which workers ignore, and waits
            atexit.register(_close, weakref.ref(self))
        try:
            while (item := self._fetch(batches)) is not None:
                batch, damages = item
                self._report(damages)
                deal.consumed += deal.stride  # before the yield: while a batch is worked on, it counts as dealt
                yield batch
        finally:
            if not deal.finished and self._batches is batches:
                self.close()  # left on the way: its workers hold batches that nobody will fetch

    def state_dict(self) -> dict[str, Any]:
        """The place, equal on all ranks, and what makes it mean the same samples."""
        deal = self.deal
        identity = {"samples": deal.total, "seed": deal.seed, "window": deal.shuffle_shards}
        identity |= {"together": deal.together}
        if deal.mix:
            identity["mix"] = str([tuple(folder) for folder in deal.mix])
        if deal.keep is not None:
            identity["kept"] = zlib.crc32(np.packbits(deal.keep))
        if deal.bucket and deal.lengths is not None:
            identity |= {"bucket": deal.bucket, "lengths": zlib.crc32(np.ascontiguousarray(deal.lengths))}
        place = {"epoch": deal.epoch, "consumed": deal.consumed}
        return place | ({"step": deal.step or deal.stride} if "bucket" in identity else {}) | identity

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state`` with the next iterator; raises UserError where that would be other samples."""
        now, before = self.state_dict(), {"together": 1} | dict(state)  # one of before says nothing of `together`
        for name in [name for name in {**now, **before} if name not in ("epoch", "consumed", "step")]:
            if before.get(name) != now.get(name):
                folder = self.dataset.shards.folder
                raise UserError(
                    f"cannot resume: the data of the checkpoint had {name} {before.get(name)}, {folder} now has "
                    f"{now.get(name)}"
                )
        self.deal.epoch, self.deal.consumed = state["epoch"], state["consumed"]
        self.deal.step = state.get("step", 0)
        self._begun = False

    def close(self) -> None:
        """Let the workers go; a later iterator starts new ones."""
        if hasattr(self._batches, "_shutdown_workers"):
            # Left to the garbage collector, their queues may go first; then each is waited for, 5 s, in vain.
            self._batches._shutdown_workers()
        self._loader = self._batches = None

    def _start(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.deal,
            collate_fn=partial(_collate, self.collate),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=partial(_start_worker, os.getpid()),
            # Forked workers share the collator's backbone; spawned ones would each be sent a copy of the model.
            multiprocessing_context="fork" if self.workers else None,
            generator=torch.Generator(),  # its own, or every new iterator would draw from the global one
        )

    def _fetch(self, batches: Iterator[Any]) -> Any:
        start = time.perf_counter()
        try:
            return _next(batches)
        finally:
            self.waited += time.perf_counter() - start

    def _report(self, damages: Sequence[str]) -> None:
        for damage in damages:
            if damage not in self.damaged and len(self.damaged) <= _WARNINGS:
                more = "; further damage is only counted" if len(self.damaged) == _WARNINGS else ""
                warnings.warn(f"damaged sample replaced by another: {damage}{more}", stacklevel=2)
            self.damaged[damage] += 1


def _as_it_is(sample: Sample) -> Sample:
    return sample


def _collate(collate: Callable[[list[Sample]], Any], samples: list[Sample]) -> tuple[Any, list[str]]:
    batch = collate(samples)
    used = getattr(batch, "samples", samples)  # a collator may replace some, too
    return batch, [sample.stands_in for sample in used if sample.stands_in not in ("", PADDING)]


def _close(loader: weakref.ref[ShardLoader]) -> None:
    if (there := loader()) is not None:
        there.close()


def _start_worker(parent: int, _: int) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked after use, tokenizers would warn of a deadlock
    # torch's workers end after their parent, too, unless a batch that nobody will read does not fit into the pipe.
    processes.serve(parent)


def _next(batches: Iterator[Any]) -> Any:
    """The next item or None; a worker's UserError without the traceback that torch folds into its message."""
    try:
        return next(batches, None)
    except UserError as error:
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.partition(f"{UserError.__name__}: ")[2] or message) from error
