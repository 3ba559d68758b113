"""No pruning: the unpruned model through the same loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from glimpseprune.backbones import LVLM
from glimpseprune.decoder import View
from glimpseprune.types import Decision, Needs, Stop


@dataclass
class Options:
    """There are none."""


class Pruner(nn.Module):
    stops: tuple[Stop, ...] = ()
    needs = Needs()

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()

    def decide(self, view: View) -> Decision:
        return Decision(view.state.mask)
