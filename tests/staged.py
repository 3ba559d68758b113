"""A pruning method whose cost is known, as a file of pruners/ would be: the first tokens stay, half of what goes goes
after the first layer, the rest after the second. Tests put it where pruners are looked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from glimpseprune.config import option
from glimpseprune.decoder import View
from glimpseprune.types import Decision, Needs, Stop

FLOPS = 1000.0


@dataclass
class Options:
    keep_ratio: float = option(0.5, "fraction of the visual tokens that is left in the end")
    first: int = option(1, "layers that have run at the first stop; the second is one layer above")


class Pruner(nn.Module):
    needs = Needs(attention=(-1,))

    def __init__(self, backbone, options: Options) -> None:
        super().__init__()
        self.options = options
        self.stops = Stop(options.first), Stop(options.first + 1, renumber=True, prune_cache=False)

    def decide(self, view: View) -> Decision:
        assert view.encoded.attention  # as `needs` asked
        share = (1 + self.options.keep_ratio) / 2 if len(view.state.trace) == 1 else self.options.keep_ratio
        kept = [round(share * view.encoded.counts[row]) for row in view.state.row.tolist()]
        visual = view.state.visual
        keep = visual & (visual.cumsum(1) <= torch.tensor(kept, device=visual.device)[:, None])
        return Decision(keep, flops=[FLOPS] * len(keep))


def to_budget(keep_ratio: float, backbone) -> dict[str, float]:
    return {"keep_ratio": keep_ratio}
