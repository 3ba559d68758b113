"""What pruners share: at which depth, how many tokens, which of them, and back to the columns of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpseprune.config import UserError
from glimpseprune.decoder import View


def depth_after(layer: int, num_layers: int) -> int:
    """Decoder layers that have run after ``layer`` (0-based; -1: before the first). Beyond the last means after it."""
    return min(layer + 1, num_layers)


def require_minimum(min_keep: int, count: int) -> None:
    """Raises UserError if ``min_keep`` is above the ``count`` visual tokens of a row."""
    if min_keep > count:
        raise UserError(f"min_keep is {min_keep} but a prompt has only {count} visual tokens")


def at_columns(view: View, decided: Tensor | Sequence[Tensor]) -> Tensor:
    """Decisions on the visual tokens that are left, bool [N'] or per row, at their columns: bool [B, S], False
    elsewhere."""
    if not isinstance(decided, Tensor):
        decided = torch.cat(list(decided))
    visual = view.state.visual
    return torch.zeros_like(visual).masked_scatter(visual, decided.to(visual.device))


def top(scores: Tensor, counts: Sequence[int], numbers: Sequence[int]) -> list[Tensor]:
    """Per row bool [V']: the ``numbers`` tokens with the highest ``scores`` [N'] in each row of ``counts`` tokens; of
    equals the first."""
    kept = []
    for row, number in zip(scores.split(list(counts)), numbers):
        best = row.argsort(descending=True, stable=True)[:number]
        kept.append(torch.zeros(len(row), dtype=torch.bool, device=row.device).index_fill(0, best, True))
    return kept
