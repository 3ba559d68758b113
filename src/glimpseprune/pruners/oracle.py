"""Control: keep exactly the visual tokens under the ground-truth boxes: what a perfect box predictor would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.decoder import View
from glimpseprune.pruners._columns import at_columns, depth_after
from glimpseprune.types import Cut, Decision, Layout, Needs, Stop


@dataclass
class Options:
    prune_layer: int = option(0, "prune after this decoder layer, 0-based", least=-1, most=1000)
    dilate: int = option(0, "grow the boxes by so many tokens on every side", least=0, most=1000)


class Pruner(nn.Module):
    needs = Needs()
    wants_boxes = True
    """A sample without boxes is none to be measured on: its targets are all of its image."""

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        self.options = options
        self.stops = (Stop(depth_after(options.prune_layer, backbone.num_layers)),)

    def mimic(self, stops: tuple[Stop, ...], trace: Sequence[Cut] | None = None) -> None:
        """Decide at these stops, where another method does; how many tokens that kept is not followed."""
        self.stops = stops

    def decide(self, view: View) -> Decision:
        """Raises UserError where the batch has no box targets."""
        targets = view.encoded.targets
        if targets is None:
            raise UserError("the oracle pruner needs ground-truth boxes: use a dataset that has them")
        kept = [self._grow(row, layouts) for row, layouts in zip(targets, view.encoded.layouts)]
        if view.untouched:
            return Decision(at_columns(view, kept))
        return Decision(at_columns(view, view.pick(torch.cat(kept).to(view.state.visual.device))))

    def _grow(self, target: Tensor, layouts: list[Layout]) -> Tensor:
        side = 2 * self.options.dilate + 1
        parts = [part for layout in layouts for part in layout.parts]
        kept = []
        for part, own in zip(parts, target.split([len(part.cells) for part in parts])):
            grown = F.max_pool2d(own.view(1, 1, *part.grid).float(), side, stride=1, padding=self.options.dilate)
            kept.append((grown.flatten() > 0) & (torch.tensor(part.cells, device=own.device) | own))  # no newlines
        return torch.cat(kept)  # [V]
