"""Control: keep a random choice of the visual tokens; with ``keep_ratio=0, min_keep=0`` the zero-token control.

As the control of another method it decides where that method does and keeps as many tokens there (:meth:`mimic`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import SEEDS, option
from glimpseprune.decoder import View
from glimpseprune.pruners._columns import at_columns, depth_after, require_minimum
from glimpseprune.types import Cut, Decision, Needs, Stop


@dataclass
class Options:
    prune_layer: int = option(0, "prune after this decoder layer, 0-based; -1: before the first", least=-1, most=1000)
    keep_ratio: float = option(0.1, "fraction of the visual tokens to keep, 0 to 1", was="keep", least=0, most=1)
    min_keep: int = option(
        1, "keep at least so many; with keep_ratio=0 and min_keep=0 no visual token stays", least=0, most=10**6
    )
    seed: int = option(
        0, "the choice follows from this and the prompt's token ids, whatever else is in the batch", least=0, most=SEEDS
    )


class Pruner(nn.Module):
    needs = Needs()

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        self.options = options
        self.stops = (Stop(depth_after(options.prune_layer, backbone.num_layers)),)
        self.counts: list[Sequence[int]] | None = None

    def mimic(self, stops: tuple[Stop, ...], trace: Sequence[Cut] | None = None) -> None:
        """Decide at these stops; ``trace``: and keep as many tokens of the next batch as it says, row by row."""
        self.stops = stops
        self.counts = None if trace is None else [cut.kept.tolist() for cut in trace[1:]]

    def decide(self, view: View) -> Decision:
        encoded, options, decided = view.encoded, self.options, []
        taken = len(view.state.trace) - 1
        for row, (place, left) in enumerate(zip(view.state.row.tolist(), view.counts)):
            ids = encoded.input_ids[place][encoded.mask[place]]
            generator = torch.Generator().manual_seed(options.seed + crc32(ids.cpu().numpy().tobytes()))
            if self.counts is not None:
                number = self.counts[taken][row]
            else:
                total = encoded.counts[place]
                require_minimum(options.min_keep, total)
                number = max(int(options.keep_ratio * total), options.min_keep)
            decided.append(torch.randperm(left, generator=generator) < number)  # [V']
        return Decision(at_columns(view, decided))


def to_budget(keep_ratio: float, backbone: LVLM) -> dict[str, float]:
    return {"keep_ratio": keep_ratio}
