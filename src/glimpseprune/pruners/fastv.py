"""FastV: behind an early decoder layer only the visual tokens stay that its last row of attention looks at most.

arXiv 2403.06764, checked against pkunlp-icler/FastV, modeling_llama.py @eca14d6 (tokens are removed in place) and
@6e1b3f0 (Hugging Face's LLaVA), fastv_kvcache.py @49dfad7. Layers 0 to K - 1 see all tokens. A visual token's score is
the attention that it gets in layer K - 1 from the last token of the prompt: a softmax over the whole row, mean over
heads. The highest scores stay, at their positions; the K/V of the first K layers are left as they are, in decoding too.

Where paper and code differ, the code is followed: the paper's text scores a token by the attention of all others. The
paper's own figures come from masks without a cache, chosen anew for every new token; here, as in the cached code, one
choice is made for all of them. Otherwise than in the code: each row of a batch is chosen for by itself, over all its
images (there: one image at a hard-coded place of row 0), and scores are float32, of equals the first. A fraction of the
tokens is cut to a whole number as @49dfad7 does (@6e1b3f0 rounds; the scripts name a number, as ``count`` does). Left
out: K = 0, where the published code drops tokens at random, as the pruner ``random`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.cost import row_flops
from glimpseprune.decoder import View
from glimpseprune.pruners._columns import at_columns, require_minimum, top
from glimpseprune.types import Decision, Needs, Stop


@dataclass
class Options:
    layer: int = option(
        2, "K: so many decoder layers see all tokens; the attention of the last of them decides", least=1, most=1000
    )
    keep_ratio: float = option(
        0.5, "fraction of a prompt's visual tokens to keep, 0 to 1 (the paper's 1 - R)", was="keep", least=0, most=1
    )
    count: int | None = option(
        None, "keep this number of tokens instead; all where a prompt has fewer", least=0, most=10**6
    )
    min_keep: int = option(1, "keep at least so many", least=0, most=10**6)


class Pruner(nn.Module):
    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        last = backbone.num_layers - 1
        if not 1 <= options.layer <= last:
            raise UserError(f"pruner.options.layer={options.layer}: give 1 to {last}, to look in one and spare another")
        self.options = options
        self.stops = (Stop(options.layer, prune_cache=False),)
        self.needs = Needs(probes=(options.layer - 1,))

    def decide(self, view: View) -> Decision:
        scores = view.probes[self.options.layer - 1].exp().mean(-1)  # [N']
        chosen = top(scores, view.counts, self.numbers(view.counts))
        flops = [row_flops(view.backbone.shapes.decoder, columns) for columns in view.columns]
        return Decision(at_columns(view, chosen), flops=flops)

    def numbers(self, counts: Sequence[int]) -> list[int]:
        """How many tokens stay of rows with ``counts``.

        Raises:
            UserError: ``min_keep`` above the tokens of a row.
        """
        options = self.options
        for count in counts:
            require_minimum(options.min_keep, count)
        wanted = [
            int(options.keep_ratio * count) if options.count is None else min(options.count, count) for count in counts
        ]
        return [max(number, options.min_keep) for number in wanted]


def to_budget(keep_ratio: float, backbone: LVLM) -> dict[str, Any]:
    return {"keep_ratio": keep_ratio, "count": None}
