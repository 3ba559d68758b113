"""Attention of a windowed vision tower in as few calls as there are window sizes.

transformers hands a packed sequence of images or windows to flash attention in one call, but to every other backend
one window at a time: a loop over hundreds of small calls. Here windows of equal length become the batch of one SDPA
call. The numbers are those of the loop; only the order of the calls differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "windows_like_flash"
"""transformers passes cumulative lengths only to backends whose name contains ``flash``."""


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Bidirectional attention within consecutive segments. query, key, value [1, H, N, d] -> [1, N, H, d]."""
    _, heads, total, width = query.shape
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    sizes = sorted(set(lengths) - {0})
    if len(sizes) == 1:
        parts = [t[0].view(heads, -1, sizes[0], width).transpose(0, 1) for t in (query, key, value)]
        out = scaled_dot_product_attention(*parts, scale=scaling)  # [windows, H, size, d]
        return out.transpose(1, 2).reshape(1, total, heads, width), None
    length = torch.tensor(lengths, device=query.device)
    start = length.cumsum(0) - length
    out = query.new_empty(total, heads, width)
    for size in sizes:
        rows = (start[length == size, None] + torch.arange(size, device=query.device)).flatten()
        parts = [t[0][:, rows].view(heads, -1, size, width).transpose(0, 1) for t in (query, key, value)]
        out = out.index_copy(0, rows, scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).flatten(0, 1))
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, windowed_attention)


def batch_windows(vision_tower: nn.Module) -> None:
    """Let a vision tower that would loop over its windows on SDPA run them as a batch; other backends stay."""
    if vision_tower.config._attn_implementation == "sdpa":
        vision_tower.config._attn_implementation = NAME
