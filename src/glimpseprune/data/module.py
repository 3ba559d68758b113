"""The stream of batches as a Lightning trainer wants it: loaders per role, whose place is in the checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from glimpseprune.config import UserError
from glimpseprune.data.limits import Limits, Tokens, measure
from glimpseprune.data.shards import Store
from glimpseprune.data.stream import Deal as Deal
from glimpseprune.data.stream import ShardDataset, ShardLoader
from glimpseprune.types import Sample


class ShardDataModule(LightningDataModule):
    """Training, validation and test batches from a folder of shards, for a Lightning trainer.

    Training batches are shuffled (with ``Trainer(overfit_batches=...)`` they are not), and their place is saved with
    Lightning's checkpoints, so that training resumes at the next sample. Evaluation is in order and complete; samples
    marked ``stands_in`` (replacements for damaged ones, and padding where ranks run out) are not to be scored.

    Args:
        folder: as ``python -m src.prepare`` writes it, or what else :class:`.shards.Shards` reads.
        collate: list[Sample] -> batch; may be set later, as attribute, once a backbone is there.
        train, val, test: names of splits; None where there is none. Those given are checked at once.
        batch_size: samples per batch and rank; ``eval_batch_size`` likewise, by default the same.
        val_limit: validate on the first so many samples only.
        workers: processes per loader.
        seed: of the order of training samples.
        shuffle_shards: shards that are shuffled together.
        together: consecutive training samples of a shard that stay next to each other.
        verify: compare the hashes of all shards with the manifest first.
        store: how what is not just files with our manifest is read.
        mix: further folders to train on -> weight; ``folder`` has 1 unless it is named there.
        val_folder: that of validation samples, by default ``folder``.
        bucket: samples among which those of like numbers of visual tokens are put together; 0: none.
        limits: of a sample; above them it is left out, or made smaller.
        tokens: (width, height) -> visual tokens of an image; needed for buckets and limits, may be set later.

    Attributes:
        left_out: role -> reason -> samples that the limits leave out.
        damaged: place and reason -> times a stand-in came instead, over all loaders and workers of this rank.

    Raises:
        UserError: as :class:`.shards.Shards` and :class:`ShardLoader`.
    """

    def __init__(
        self,
        folder: str | Path,
        collate: Callable[[list[Sample]], Any] | None = None,
        *,
        train: str | None = "train",
        val: str | None = "val",
        test: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        val_limit: int | None = None,
        workers: int = 0,
        seed: int = 0,
        shuffle_shards: int = 16,
        together: int = 1,
        verify: bool = False,
        store: Store = Store(),  # noqa: B008 (frozen)
        mix: Mapping[str, float] | None = None,
        val_folder: str | Path | None = None,
        bucket: int = 0,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        tokens: Tokens | None = None,
    ) -> None:
        super().__init__()
        self.collate = collate
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.workers, self.seed, self.shuffle_shards = workers, seed, shuffle_shards
        self.together, self.bucket, self.limits, self.tokens = together, bucket, limits, tokens
        own = {"train": {"mix": mix}, "val": {"limit": val_limit}, "test": {}}
        folders = {"train": folder, "val": val_folder or folder, "test": folder}
        self.datasets = {
            role: ShardDataset(folders[role], split, verify=verify, store=store, **own[role])
            for role, split in {"train": train, "val": val, "test": test}.items()
            if split is not None
        }
        self.left_out: dict[str, Counter[str]] = {}
        self._lengths: dict[str, np.ndarray] = {}
        self.loaders: dict[str, ShardLoader] = {}
        self.damaged: Counter[str] = Counter()
        self._place: Mapping[str, int] | None = None

    def setup(self, stage: str) -> None:
        self.loaders.clear()  # another run: its ranks may be others, and without a checkpoint it starts over

    def train_dataloader(self) -> ShardLoader:
        if self._place is None and "train" in self.loaders:  # Trainer(reload_dataloaders_every_n_epochs=...)
            return self.loaders["train"]
        loader = self._loader("train", self.batch_size, shuffle=not getattr(self.trainer, "overfit_batches", 0))
        if self._place is not None and loader.deal.shuffle:
            loader.load_state_dict(self._place)
        self._place = None
        return loader

    def val_dataloader(self) -> ShardLoader | list:
        return self._loader("val", self.eval_batch_size) if "val" in self.datasets else []  # Lightning's "none"

    def test_dataloader(self) -> ShardLoader:
        return self._loader("test", self.eval_batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.loaders["train"].state_dict()} if "train" in self.loaders else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning restores loaders by itself, but not when it resumes at the end of an epoch: hence here as well.
        self._place = state_dict.get("train")

    def teardown(self, stage: str) -> None:
        for loader in self.loaders.values():
            loader.close()

    def _loader(self, role: str, batch_size: int, *, shuffle: bool = False) -> ShardLoader:
        if role not in self.datasets:
            raise UserError(f"this run was given no split for '{role}'")
        self._measure(role, shuffle)
        loader = ShardLoader(
            self.datasets[role],
            self.collate,
            batch_size,
            shuffle=shuffle,
            workers=self.workers,
            seed=self.seed,
            shuffle_shards=self.shuffle_shards,
            together=self.together,
            lengths=self._lengths.get(role),
            bucket=self.bucket,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.trainer.world_size if self.trainer else 1,
        )
        loader.damaged = self.damaged
        self.loaders[role] = loader
        return loader

    def measure(self) -> dict[str, Counter[str]]:
        """Measure what buckets and limits go by, in this process, unless it was; what is left out, as ``left_out``."""
        for role in ("train", "val"):
            if role in self.datasets:
                self._measure(role, shuffle=role == "train")
        return self.left_out

    def _measure(self, role: str, shuffle: bool) -> None:
        """Find out once how long the samples of a role are, if that is asked for."""
        if role in self._lengths or not (self.limits or (self.bucket and shuffle)):
            return
        assert self.tokens is not None, "buckets and limits go by visual tokens"
        dataset = self.datasets[role]
        measured = measure(dataset.shards, self.tokens, self.limits)
        self._lengths[role], self.left_out[role] = measured.lengths, measured.left_out
        if not measured.keep.all():
            dataset.keep = measured.keep
        if self.limits.above == "shrink" and self.limits:
            dataset.change = partial(self.limits.shrunk, tokens=self.tokens)
