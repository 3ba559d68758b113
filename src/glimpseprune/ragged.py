"""Rows of different lengths, end to end: the layers of a padded batch without its padding, and without a dense mask.

A mask of B x S x S numbers costs more than what it hides once rows are long, keeps attention from the kernels that are
fast, and with it keys are repeated for every query head. Laid end to end every matrix product sees exactly the tokens
there are, and attention runs row by row, causal, without a mask: as each row would alone.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from glimpseprune.attention import Probe
from glimpseprune.host import Columns, upload


class Ragged:
    """The columns of a batch [B, S] that are no padding, N in all."""

    def __init__(self, known: Columns, device: torch.device) -> None:
        self.shape, self.lengths = known.mask.shape, known.counts
        self.places = known.mask.flatten().nonzero()[:, 0]  # [N], on the host
        self.device = device

    @cached_property
    def index(self) -> Tensor:
        return upload(self.places, self.device)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [1, N, D]"""
        return x.flatten(0, 1)[self.index][None]

    def pack_positions(self, x: Tensor) -> Tensor:
        """[B, S] or [3, B, S] -> [1, N] or [3, 1, N]"""
        return x.flatten(-2)[..., self.index].unsqueeze(-2)

    def lay(self, x: Tensor) -> Tensor:
        """[1, N, D] -> [B, S, D], zero at padding."""
        laid = x.new_zeros(self.shape.numel(), x.shape[-1])
        return laid.index_copy(0, self.index, x[0]).unflatten(0, self.shape)

    def lay_heads(self, x: Tensor) -> Tensor:
        """[1, H, N, d] -> [B, H, S, d], zero at padding."""
        batch, size = self.shape
        laid = x.new_zeros(batch * size, x.shape[1], x.shape[-1])
        return laid.index_copy(0, self.index, x[0].transpose(0, 1)).unflatten(0, self.shape).transpose(1, 2)

    def seen_by(self, probe: Probe) -> Probe:
        """``probe``, which knows batches only, for queries and keys that lie end to end."""

        def see(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
            probe(layer, self.lay_heads(query), self.lay_heads(key), scaling)

        return see


class Laying:
    """What a layer takes for a cache: stores keys and values as those of a batch, and gives them back end to end."""

    def __init__(self, cache: DynamicCache, ragged: Ragged) -> None:
        self.cache, self.ragged = cache, ragged

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.cache.update(self.ragged.lay_heads(keys), self.ragged.lay_heads(values), layer)
        return keys, values
