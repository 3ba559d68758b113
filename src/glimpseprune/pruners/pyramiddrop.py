"""PyramidDrop: visual tokens go in stages, each time those that the last row of attention of the layer ahead ignores.

arXiv 2410.17247, checked against Cooperx521/PyramidDrop, modeling_llama_pdrop.py @3f89f94. Before layer l that layer's
own norm, queries and keys are applied to the states that wait for it: a visual token's score is the attention that the
last token of the prompt would pay it there, a softmax over the whole row, mean over heads. Fractions are of the tokens
that the prompt had at first, cut to whole numbers. The survivors are numbered anew, 0, 1, 2 ...; the K/V of the layers
below are left as they are, and a new token has in each layer the position that comes next there.

Where paper and code differ, the code is followed: the paper ranks by the last layer of a stage and rounds what is
dropped up. Otherwise than in the code: null places the stages at equal parts of any decoder (8, 16, 24 of 32 as
published, which the code takes for 40 layers, too); each row of a batch is chosen for by itself, over all its images
(there: the first), and keeps one token at least; of equals the first. Published for positions of one axis only: under
M-RoPE all axes get the same new numbers, so that the rows and columns of an image are lost behind the first stage;
``renumber=false`` leaves survivors theirs. Left out: training, where the published score is a mean over the turns of a
dialogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.cost import peek_flops
from glimpseprune.decoder import View, peek
from glimpseprune.pruners._columns import at_columns, require_minimum, top
from glimpseprune.types import Decision, Needs, Stop


@dataclass
class Options:
    layers: tuple[int, ...] | None = option(
        None,
        "drop before these decoder layers, 0-based; null: where equal parts of the decoder begin",
        least=1,
        most=1000,
    )
    keep_ratio: tuple[float, ...] = option(
        (0.5, 0.25, 0.125),
        "fractions of a prompt's visual tokens that are left behind each drop, 0 to 1",
        was="keep",
        least=0,
        most=1,
    )
    min_keep: int = option(1, "keep at least so many", least=0, most=10**6)
    renumber: bool = option(True, "survivors get positions 0, 1, 2 ...; false: they keep theirs")


class Pruner(nn.Module):
    needs = Needs()

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        if list(options.keep_ratio) != sorted(options.keep_ratio, reverse=True):
            raise UserError(
                f"pruner.options.keep_ratio={list(options.keep_ratio)}: fractions of the first number never rise"
            )
        layers = equal_parts(backbone.num_layers, len(options.keep_ratio)) if options.layers is None else options.layers
        depths = [layer for layer in range(1, backbone.num_layers) if layer in layers]
        if list(layers) != depths or len(depths) != len(options.keep_ratio):
            raise UserError(
                f"pruner.options.layers={list(layers)}: give {len(options.keep_ratio)} rising numbers, one for each of "
                f"keep_ratio, from 1 to {backbone.num_layers - 1}"
            )
        self.options = options
        self.stops = tuple(Stop(depth, renumber=options.renumber, prune_cache=False) for depth in depths)

    def decide(self, view: View) -> Decision:
        scores = peek(view.backbone, view.state)[view.state.visual].exp().mean(-1)  # [N']
        numbers = self.numbers(self.stops.index(view.stop), view.state.trace[0].kept.tolist())
        flops = [peek_flops(view.backbone.shapes.decoder, columns) for columns in view.columns]
        return Decision(at_columns(view, top(scores, view.counts, numbers)), flops=flops)

    def numbers(self, drop: int, counts: Sequence[int]) -> list[int]:
        """How many tokens are left behind ``drop`` of rows that had ``counts`` at first.

        Raises:
            UserError: ``min_keep`` above the tokens of a row.
        """
        for count in counts:
            require_minimum(self.options.min_keep, count)
        return [max(int(self.options.keep_ratio[drop] * count), self.options.min_keep) for count in counts]


def equal_parts(layers: int, drops: int) -> tuple[int, ...]:
    """The layers with which all equal parts of a decoder but the first begin."""
    return tuple(layers * part // (drops + 1) for part in range(1, drops + 1))


def to_budget(keep_ratio: float, backbone: LVLM) -> dict[str, tuple[float, ...]]:
    """The same fraction goes at each of three drops."""
    return {"keep_ratio": (keep_ratio ** (1 / 3), keep_ratio ** (2 / 3), keep_ratio)}
