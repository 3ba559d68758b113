"""VisionZip: before the decoder, the tokens that the vision tower attends to stay, and the rest is merged into a few.

arXiv 2412.04467, checked against copies of the official code (W1nd55/VisionZip-exp, clip_encoder.py @1553817;
jsilvcast/VisionZip, qwen2_5vl_visionzip.py @68993a3) and, for choosing per image and the default fractions, against
HVision-NKU/GlimpsePrune's port to Qwen2.5-VL @210b56d. Of each image, for itself:

1. *Dominant* tokens are those that receive most attention in the layer whose output becomes the visual tokens: from the
   class token where there is one, else from all queries. They stay as they are.
2. Of the R others, in order, every (R // contextual)-th is a *contextual* one, a target. Each that is left goes to the
   target whose key (mean over heads) is most like its own by cosine.
3. A target becomes itself plus the mean of those that came to it (as in the code; the paper says average). They are
   merged where the published ones are: tower states before a ``backbone.projector``, where there is one of single
   states, else the decoder's inputs.

Tokens that are no cell of a picture, such as newlines, have neither attention nor keys: they are never dominant, nor
targets, nor merged, and always go (LLaVA-NeXT's published order has none either). They count where a fraction is taken.
Features that are added inside the decoder are a target's own. In a layer whose attention has windows of unequal size,
what tokens of a small one receive is overrated; published layers have none.

Otherwise than published: (a) A class token is no visual token here, for Hugging Face's models drop it before the
decoder. The published 64 = 54 + 10 are class token, 53 patches and 10 merged ones; ``dominant_count=54`` gives 64
tokens with one patch more in its place, 53 exactly its patches and targets. (b) Contextual tokens stand at their
targets' places (as for Qwen2.5-VL); LLaVA's come behind the dominant ones. There positions run on without gaps, which
is ``renumber=true``; for Qwen2.5-VL tokens keep theirs, the default. (c) LLaVA-NeXT's tiles compete, where each had the
same number of tokens: counts are per image. (d) Of equal scores the first; float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import option
from glimpseprune.cost import attention_flops
from glimpseprune.decoder import View
from glimpseprune.pruners._columns import at_columns, top
from glimpseprune.pruners._cosine import cosines, directions
from glimpseprune.types import Decision, Needs, Stop

SHARES = 0.061, 0.05
"""Fractions of dominant and of contextual tokens in the published comparison at 11.1%."""


@dataclass
class Options:
    dominant: float = option(
        SHARES[0], "fraction of an image's tokens that stay as they are, 0 to 1; one at least", least=0, most=1
    )
    contextual: float = option(
        SHARES[1], "fraction that the others are merged into, 0 to 1; one at least", least=0, most=1
    )
    dominant_count: int | None = option(
        None, "this number of each image instead, such as 54; all where it has fewer", least=0, most=10**6
    )
    contextual_count: int | None = option(None, "this number of each image instead, such as 10", least=0, most=10**6)
    layer: int | None = option(
        None,
        "vision-tower layer that is looked into, negative ones from the last; null: the visual tokens' own",
        least=-1000,
        most=1000,
    )
    renumber: bool = option(False, "survivors get positions 0, 1, 2 ...; false: they keep theirs")


class Pruner(nn.Module):
    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        self.options = options
        self.stops = (Stop(0, renumber=options.renumber),)
        wanted = backbone.feature_layer if options.layer is None else options.layer
        self.layer = backbone.tower_layer(wanted, "pruner.options.layer")
        states = () if backbone.projector is None else (backbone.feature_layer,)
        self.needs = Needs(states=states, keys=(self.layer,), attention=(self.layer,))

    def decide(self, view: View) -> Decision:
        keep, merging, flops = self.choose(view)
        embeds, projector = view.state.hidden[view.state.visual], view.backbone.projector  # [N', D]
        if projector is None:
            merged = merge(embeds, merging)  # [C', D]
        else:
            merged = projector(merge(view.pick(view.encoded.states[view.backbone.feature_layer]), merging))
        embeds = embeds.index_copy(0, merging.targets, merged.to(embeds.dtype))
        return Decision(at_columns(view, keep), embeds[keep], flops)

    @torch.no_grad()
    def choose(self, view: View) -> tuple[Tensor, Merging, list[int]]:
        """Which tokens stay, bool [N'], what is merged into them, and the FLOPs of it all for each row."""
        encoded = view.encoded
        cell, sizes = cells(view)
        every = [size for row in sizes for size in row]  # one per image, as what follows
        pictured = [int(own.sum()) for own in cell.split(every)]
        numbers = [self.numbers(size, number) for size, number in zip(every, pictured)]
        scores = view.pick(encoded.attention[self.layer]).masked_fill(~cell, -torch.inf)  # [N']
        dominant = torch.cat(top(scores, every, [number for number, _ in numbers]))
        rest = (cell & ~dominant).nonzero()[:, 0].split([n - number for n, (number, _) in zip(pictured, numbers)])
        keys = view.pick(encoded.keys[self.layer]).float().mean(1)  # [N', d]
        merging = assign(directions(keys), rest, [number for _, number in numbers])
        merged = iter([merge_flops(view.backbone, keys.shape[1], n - d, c) for n, (d, c) in zip(pictured, numbers)])
        flops = [self.looking(view, row) + sum(islice(merged, len(own))) for row, own in enumerate(sizes)]
        return dominant.index_fill(0, merging.targets, True), merging, flops

    def looking(self, view: View, row: int) -> int:
        """FLOPs of the attention that is computed once more for a row's images, as the tower encoded them."""
        grids = [grid for layout in view.encoded.layouts[int(view.state.row[row])] for grid in layout.encoded]
        return attention_flops(view.backbone.shapes.tower, grids, self.layer)

    def numbers(self, count: int, pictured: int) -> tuple[int, int]:
        """Dominant and contextual tokens of an image with ``count`` tokens, of which ``pictured`` are cells."""
        options = self.options

        def number(share: float, told: int | None, most: int) -> int:
            wanted = max(int(share * count), int(share > 0)) if told is None else told
            return min(wanted, most)

        dominant = number(options.dominant, options.dominant_count, pictured)
        return dominant, number(options.contextual, options.contextual_count, pictured - dominant)


class Merging(NamedTuple):
    """Of the tokens that are left: places of the targets, and of the others that join them."""

    targets: Tensor  # [C'] ascending
    others: Tensor  # [R']
    joined: Tensor  # [R'] which target, 0 to C' - 1


def cells(view: View) -> tuple[Tensor, list[list[int]]]:
    """Whether each token is a cell of a picture, bool [N'], and per row, per image: how many tokens are left."""
    layouts, device = [layout for row in view.encoded.layouts for layout in row], view.state.mask.device
    image = torch.tensor([n for n, layout in enumerate(layouts) for _ in range(layout.count)], device=device)  # [N]
    cell = torch.tensor([cell for layout in layouts for part in layout.parts for cell in part.cells], device=device)
    rows = view.pick(image).split(view.counts)
    return view.pick(cell), [row.unique_consecutive(return_counts=True)[1].tolist() for row in rows]


def assign(keys: Tensor, rest: Sequence[Tensor], numbers: Sequence[int]) -> Merging:
    """Targets among the places ``rest`` of each image, ``numbers`` of them, and the most similar one of each other;
    ``keys`` [N', d] are directions."""
    targets, others, joined, before = [], [], [], 0
    for places, number in zip(rest, numbers):
        if number == 0:
            continue
        step = len(places) // number
        place = torch.arange(len(places), device=places.device)
        target = (place % step == 0) & (place < step * number)
        targets.append(places[target])
        others.append(places[~target])
        joined += [rows.argmax(1) + before for rows in cosines(keys[others[-1]], keys[targets[-1]])]
        before += number
    none = torch.zeros(0, dtype=torch.long, device=keys.device)
    return Merging(*(torch.cat([none, *found]) for found in (targets, others, joined)))


def merge(states: Tensor, merging: Merging) -> Tensor:
    """[N', C] -> [C', C]: each target plus the mean of the others that joined it; alone where none did."""
    targets, others, joined = merging
    total = torch.zeros(len(targets), states.shape[1], device=states.device)
    # Accumulated in the same order each time, which index_add is not on a GPU.
    total = total.index_put((joined,), states[others].float(), accumulate=True)
    number = torch.bincount(joined, minlength=len(targets)).clamp(min=1)  # [C']
    return (states[targets].float() + total / number[:, None]).to(states.dtype)


def merge_flops(backbone: LVLM, width: int, rest: int, contextual: int) -> int:
    """Of comparing keys of this ``width``, all ``rest`` but the targets with each of these, and of projecting them."""
    projector = () if backbone.projector is None else backbone.shapes.projector
    return contextual * (2 * width * (rest - contextual) + sum(2 * wide * out for wide, out in projector))


def to_budget(keep_ratio: float, backbone: LVLM) -> dict[str, Any]:
    """In the published proportion."""
    dominant, contextual = (keep_ratio * share / sum(SHARES) for share in SHARES)
    return {"dominant": dominant, "contextual": contextual, "dominant_count": None, "contextual_count": None}
