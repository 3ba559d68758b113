"""DivPrune: before the decoder, the visual tokens that are least alike stay: as far from each other as greed gets them.

arXiv 2503.02175v2; the default is that of vbdi/divprune's README @a6889f7, the rules were checked against a copy of its
code (Sun-HR02/hr_div, LLaVA/llava/model/llava_arch.py @3d79e80), of which no line is used here. The distance of two
tokens is 1 - cosine of their embeddings as the decoder gets them. First comes the token whose nearest neighbour is
farthest, then, again and again, the one whose nearest chosen token is farthest; neither attention nor question plays a
part. All visual tokens of a row are candidates, over all its images and with what is no cell of a picture, such as
newlines, as published. So is the numbering: survivors get positions 0, 1, 2 ..., under M-RoPE on all axes alike, so
that rows and columns of an image are lost; ``renumber=false`` leaves them theirs.

Otherwise than published: no token is chosen twice (there one with an exact duplicate may be), each row of a batch is
chosen for by itself (there: row 0), in float32 (there: the model's own precision). Which of several equal tokens comes
first is open, here as there. The paper calls greed exact; it gets at least half of the largest possible least angle.
Nearest neighbours are found a few rows at a time, and each choice is one product with all tokens: the FLOPs of N x N
pairs for the first token and of T x N for T of them, the memory of neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import option
from glimpseprune.decoder import View
from glimpseprune.pruners._columns import at_columns, require_minimum
from glimpseprune.pruners._cosine import cosines, directions
from glimpseprune.types import Decision, Needs, Stop


@dataclass
class Options:
    keep_ratio: float = option(
        0.098,
        "fraction of a prompt's visual tokens to keep, 0 to 1, rounded to a whole number",
        was="keep",
        least=0,
        most=1,
    )
    count: int | None = option(
        None, "keep this number of tokens instead; all where a prompt has fewer", least=0, most=10**6
    )
    min_keep: int = option(1, "keep at least so many", least=0, most=10**6)
    renumber: bool = option(True, "survivors get positions 0, 1, 2 ...; false: they keep theirs")


class Pruner(nn.Module):
    needs = Needs()

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        self.options = options
        self.stops = (Stop(0, renumber=options.renumber),)

    @torch.no_grad()
    def decide(self, view: View) -> Decision:
        embeds, numbers = view.state.hidden[view.state.visual], self.numbers(view.counts)  # [N', D]
        chosen = [spread(row, number) for row, number in zip(embeds.split(view.counts), numbers)]
        flops = [spread_flops(count, number, embeds.shape[1]) for count, number in zip(view.counts, numbers)]
        return Decision(at_columns(view, chosen), flops=flops)

    def numbers(self, counts: Sequence[int]) -> list[int]:
        """How many tokens stay of rows with ``counts``.

        Raises:
            UserError: ``min_keep`` above the tokens of a row.
        """
        options = self.options
        for count in counts:
            require_minimum(options.min_keep, count)
        wanted = [round(options.keep_ratio * n) if options.count is None else min(options.count, n) for n in counts]
        return [max(number, options.min_keep) for number in wanted]


def spread(features: Tensor, number: int) -> Tensor:
    """Which ``number`` of ``features`` [V, D] lie far apart, bool [V]: greedy max-min of 1 - cosine."""
    chosen = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    if number == 0:
        return chosen
    x, nearest = directions(features), []
    for rows in cosines(x, x):  # [r, V]
        rows.diagonal(sum(map(len, nearest))).fill_(-torch.inf)  # oneself
        nearest.append(rows.amax(1))
    last = torch.cat(nearest).argmin(0, keepdim=True)  # [1]
    chosen.index_fill_(0, last, True)
    nearest_chosen = torch.full_like(x[:, 0], -torch.inf)  # [V]
    for _ in range(number - 1):
        nearest_chosen = nearest_chosen.maximum(torch.cat(list(cosines(x, x[last])))[:, 0])
        last = nearest_chosen.masked_fill(chosen, torch.inf).argmin(0, keepdim=True)
        chosen.index_fill_(0, last, True)
    return chosen


def spread_flops(count: int, number: int, width: int) -> int:
    """Of :func:`spread` for ``number`` of ``count`` tokens."""
    return 2 * width * count * (count + number - 1) if number else 0


def to_budget(keep_ratio: float, backbone: LVLM) -> dict[str, Any]:
    return {"keep_ratio": keep_ratio, "count": None}
