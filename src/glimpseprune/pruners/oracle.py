"""Control: keep exactly the visual tokens under the ground-truth boxes: what a perfect box predictor would do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.decoder import View
from glimpseprune.pruners._rows import at_columns, prune_depth


@dataclass
class Options:
    prune_layer: int = option(0, "prune after this decoder layer, 0-based")
    dilate: int = option(0, "grow the boxes by so many tokens on every side")


class Pruner(nn.Module):
    vision_layers: tuple[int, ...] = ()
    renumber, prune_cache = False, True

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        self.options = options
        self.layers = prune_depth(options.prune_layer, backbone.num_layers)

    def keep(self, view: View) -> Tensor:
        """Raises UserError where the batch has no box targets."""
        targets = view.encoded.targets
        if targets is None:
            raise UserError("the oracle pruner needs ground-truth boxes: use a dataset that has them")
        return at_columns(view, [self._grow(row, grids) for row, grids in zip(targets, view.encoded.grids)])

    def _grow(self, target: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        side = 2 * self.options.dilate + 1
        parts = []
        for (rows, cols), part in zip(grids, target.split([r * c for r, c in grids])):
            grown = F.max_pool2d(part.view(1, 1, rows, cols).float(), side, stride=1, padding=self.options.dilate)
            parts.append(grown.flatten() > 0)
        return torch.cat(parts)  # [V]
