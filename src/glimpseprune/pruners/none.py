"""No pruning: the unpruned model through the same loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.decoder import View


@dataclass
class Options:
    """There are none."""


class Pruner(nn.Module):
    layers: tuple[int, ...] = ()
    vision_layers: tuple[int, ...] = ()
    renumber, prune_cache = False, True

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()

    def keep(self, view: View) -> Tensor:
        return view.state.mask
