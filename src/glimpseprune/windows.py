"""Attention of a vision tower within segments (windows, whole images) in as few calls as there are sizes of them.

transformers hands a packed sequence of images or windows to flash attention in one call, but to every other backend
one segment at a time: a loop over hundreds of small calls. Here segments of equal length become the batch of one SDPA
call. The numbers are those of the loop; only the order of the calls differs.

How long the segments are is known before anything runs (:class:`Segments`). Who runs a tower's blocks hands it to them
as ``segments=``, and nothing is read back from the device; a call without it reads the cumulative lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glimpseprune.host import upload

CHUNK = 12288
"""Rows (patches) that a tower works on at a time, at most, where it need not work on all at once: few enough to bound
its memory, and so many that a GPU is not kept waiting for launches (docs/speed.md)."""
CACHED = 1024
"""The same on a CPU, where what is made of so many stays nearer in its caches."""
TILE = 128
"""Rows that matrix kernels work on at a time; chunks that are no multiple of it are slower, and round otherwise."""
NAME = "windows_like_flash"
"""transformers passes cumulative lengths only to backends whose name contains ``flash``."""


@dataclass(frozen=True)
class Segments:
    """Consecutive rows of a packed sequence, each run of which attends within itself."""

    lengths: tuple[int, ...]
    sizes: tuple[tuple[int, slice | Tensor], ...]
    """Every length there is, and the rows of all segments that have it: together, where they lie side by side."""
    edges: Tensor
    """[segments + 1] int32, cumulative lengths."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, edges_on: torch.device | str = "cpu") -> Segments:
        """``device``: of the rows; ``edges_on``: of the cumulative lengths, which only flash attention has there."""
        lengths = tuple(length for length in lengths if length)
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        starts: dict[int, list[int]] = {}
        for length, start in zip(lengths, edges.tolist()):
            starts.setdefault(length, []).append(start)
        sizes = tuple((size, _rows(size, starts[size], device)) for size in sorted(starts))
        return cls(lengths, sizes, upload(edges, edges_on))

    @property
    def longest(self) -> int:
        return max(self.lengths)


def _rows(size: int, starts: Sequence[int], device: torch.device) -> slice | Tensor:
    last = starts[-1] + size
    if last - starts[0] == size * len(starts):
        return slice(starts[0], last)
    rows = torch.tensor(starts)[:, None] + torch.arange(size)
    return upload(rows.flatten(), device)


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    segments: Segments | None = None,
    take: Callable[[Tensor, Tensor, Tensor, float], None] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Bidirectional attention within consecutive segments. query, key, value [1, H, N, d] -> [1, N, H, d].

    ``take`` gets them, and the scale of q . k, and ends the call by raising something: no attention is computed."""
    if take is not None:
        take(query, key, value, scaling)
    _, heads, total, width = query.shape
    if segments is None:
        segments = Segments.of(cu_seq_lens_q.diff().tolist(), query.device)

    def attend(size: int, rows: slice | Tensor) -> Tensor:
        parts = [t[0][:, rows].view(heads, -1, size, width).transpose(0, 1) for t in (query, key, value)]
        return scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).reshape(-1, heads, width)

    if len(segments.sizes) == 1:
        return attend(*segments.sizes[0])[None], None
    out = query.new_empty(total, heads, width)
    for size, rows in segments.sizes:
        out[rows] = attend(size, rows)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, windowed_attention)


def even(total: int, most: int) -> int:
    """Rows of a chunk where ``total`` of them are cut into as few chunks as can be, of about equal size; by full tiles
    of matrix kernels, where there are so many."""
    rows = -(-total // -(-total // most)) if total else most
    return min(-(-rows // TILE) * TILE, most)


def batch_windows(vision_tower: nn.Module) -> None:
    """Let a vision tower that would loop over its windows on SDPA run them as a batch; other backends stay."""
    if vision_tower.config._attn_implementation == "sdpa":
        vision_tower.config._attn_implementation = NAME
