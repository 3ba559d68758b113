"""What pruners share: how many tokens, which of them, and back to the columns of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpseprune.config import UserError
from glimpseprune.decoder import View


def prune_depth(layer: int, num_layers: int, key: str = "pruner.options.prune_layer") -> tuple[int, ...]:
    """Prune after decoder layer ``layer`` (0-based): this many layers have run then. Beyond the last means after it.

    Raises:
        UserError: ``layer`` is negative other than -1 (before the first layer).
    """
    if layer < -1:
        raise UserError(f"{key}={layer}: give 0 to {num_layers - 1}, or -1 to prune before the first layer")
    return (min(layer + 1, num_layers),)


def require_minimum(min_keep: int, count: int) -> None:
    """Raises UserError if ``min_keep`` is above the ``count`` visual tokens of a row."""
    if min_keep > count:
        raise UserError(f"min_keep is {min_keep} but a prompt has only {count} visual tokens")


def at_columns(view: View, decided: Tensor | Sequence[Tensor]) -> Tensor:
    """Decisions on visual tokens, bool [N] or per row [V], at their columns: bool [B, S], False elsewhere."""
    if not isinstance(decided, Tensor):
        decided = torch.cat(list(decided))
    visual = view.state.visual
    return torch.zeros_like(visual).masked_scatter(visual, decided.to(visual.device))
