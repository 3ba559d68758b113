"""Throw-away pruning methods, each in the form of a file of pruners/: what the contract must be able to say.

None of them is published. Together they use every part of the contract: several looks, private layers, merging (before
the decoder and inside it), new numbers, caches that are kept and pruned in turns, a look before the tower, what the
tower and the decoder let see, and declared costs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.cost import attention_flops, layer_flops, peek_flops, row_flops
from glimpseprune.decoder import View, branch, peek, run_layers
from glimpseprune.pruners import early, glimpse
from glimpseprune.pruners._columns import at_columns, top
from glimpseprune.types import Decision, Needs, Stop


@dataclass
class Fraction:
    keep_ratio: float = option(0.3, "fraction of a prompt's visual tokens that is left after the last stop")


def to_keep(keep: float, backbone: LVLM) -> dict[str, float]:
    return {"keep_ratio": keep}


class Stages(nn.Module):
    """What the methods below share: at each stop a fraction of the prompt's tokens stays, those of the best scores."""

    needs = Needs()
    stops: tuple[Stop, ...]

    def __init__(self, backbone: LVLM, options: Fraction) -> None:
        super().__init__()
        self.options = options

    def chosen(self, view: View, scores: Tensor) -> list[Tensor]:
        """Per row bool [V']."""
        share = self.options.keep_ratio ** ((self.stops.index(view.stop) + 1) / len(self.stops))
        return top(scores, view.counts, [max(1, int(share * n)) for n in view.state.trace[0].kept.tolist()])


class Staged(Stages):
    """Two stops, each looks into the layer ahead; survivors are numbered anew, earlier K/V stays."""

    stops = Stop(1, renumber=True, prune_cache=False), Stop(3, renumber=True, prune_cache=False)

    def decide(self, view: View) -> Decision:
        scores = peek(view.backbone, view.state)[view.state.visual].exp().mean(-1)  # [N']
        flops = [peek_flops(view.backbone.shapes.decoder, columns) for columns in view.columns]
        return Decision(at_columns(view, self.chosen(view, scores)), flops=flops)


class Mixed(Stages):
    """Keeps the cache, prunes it, keeps it, prunes it; numbers survivors anew at some stops. Each looks back into the
    layer that has just run."""

    def __init__(self, backbone: LVLM, options: Fraction) -> None:
        super().__init__(backbone, options)
        last = backbone.num_layers
        self.stops = (
            Stop(1, prune_cache=False),
            Stop(2, renumber=True),
            Stop(3, renumber=True, prune_cache=False),
            Stop(last),
        )
        self.needs = Needs(probes=(0, 1, 2, last - 1))

    def decide(self, view: View) -> Decision:
        scores = view.probes[view.stop.depth - 1].exp().mean(-1)  # [N']
        flops = [row_flops(view.backbone.shapes.decoder, columns) for columns in view.columns]
        return Decision(at_columns(view, self.chosen(view, scores)), flops=flops)


class Merging(Stages):
    """Before the decoder the tokens that the tower attends to least are merged into those with the nearest keys, and
    once more inside it, by hidden states."""

    stops = Stop(0, renumber=True), Stop(2, renumber=True, prune_cache=False)

    def __init__(self, backbone: LVLM, options: Fraction) -> None:
        super().__init__(backbone, options)
        self.layer = backbone.vision_layers[-2]
        self.needs = Needs(keys=(self.layer,), attention=(self.layer,))

    def decide(self, view: View) -> Decision:
        hidden, flops = view.state.hidden[view.state.visual], [0] * len(view.counts)  # [N', D]
        scores, keys = -hidden.norm(dim=-1), hidden
        if view.stop.depth == 0:
            scores = view.pick(view.encoded.attention[self.layer])
            keys = view.pick(view.encoded.keys[self.layer]).mean(1)  # [N', d]
            layouts = [view.encoded.layouts[row] for row in view.state.row.tolist()]
            grids = [[grid for layout in row for grid in layout.encoded] for row in layouts]
            flops = [attention_flops(view.backbone.shapes.tower, row, self.layer) for row in grids]
        chosen, merged = self.chosen(view, scores), []
        for row, (keep, states, key) in enumerate(zip(chosen, hidden.split(view.counts), keys.split(view.counts))):
            key = nn.functional.normalize(key, dim=-1)
            nearest = (key[~keep] @ key[keep].T).argmax(-1)  # [dropped]
            flops[row] += 2 * int(keep.sum()) * int((~keep).sum()) * key.shape[-1]
            total = states[keep].index_put((nearest,), states[~keep], accumulate=True)
            merged.append(total / (1 + nearest.bincount(minlength=len(total)))[:, None])
        return Decision(at_columns(view, chosen), torch.cat(merged), flops)


class Twice(glimpse.Pruner):
    """A glimpse after the first layer, and another at what is left, after the third, with a predictor of its own and
    with the question's tokens."""

    def __init__(self, backbone: LVLM, options: glimpse.Options) -> None:
        super().__init__(backbone, options)
        later = replace(options, prune_layer=2, probe_layers=(1, 2), sight="question", probe="log_softmax")
        self.later = glimpse.Pruner(backbone, later)
        self.stops += self.later.stops

    def decide(self, view: View) -> Decision:
        return super().decide(view) if view.stop == self.stops[0] else self.later.decide(view)


@dataclass
class Wiping(early.Options):
    """Two private layers and, before the decoder's last layer, no visual token any more."""

    private_layers: int = option(2, "private layers")
    last_layer: int | None = option(2, "no visual token is left after this layer")
    width: int = option(64, "so small that the look is most of the cost")
    cond_width: int = option(16, "so small")


@dataclass
class Asking(glimpse.Options):
    """The glimpse whose positions are the question's tokens."""

    sight: str = option("question", "what looks")


class Private(Stages):
    """An early look through two decoder layers of its own, on a fork: before the first layer, with a learned score."""

    stops = (Stop(0),)

    def __init__(self, backbone: LVLM, options: Fraction) -> None:
        super().__init__(backbone, options)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in backbone.text_model.layers[:2])
        for parameter in self.layers.parameters():
            parameter.data.mul_(0.9)
        self.vip = nn.Linear(backbone.num_heads, 1)

    def all_logits(self, view: View) -> Tensor:
        """[1, N'], as stage 1 asks for it."""
        own = dict(enumerate(self.layers))
        state = run_layers(view.backbone, branch(view.state), len(own), probes=(1,), layers=own)
        return self.vip(state.probes[1][view.state.visual]).T

    def logits(self, view: View) -> Tensor:
        return self.all_logits(view)[-1]

    def mask(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        """bool [N']."""
        return torch.cat(top(logits, counts, [max(1, int(self.options.keep_ratio * count)) for count in counts]))

    def decide(self, view: View) -> Decision:
        decoder, logits = view.backbone.shapes.decoder, self.logits(view)
        flops = [
            2 * layer_flops(decoder, columns) + row_flops(decoder, columns) + 2 * decoder.heads * count
            for columns, count in zip(view.columns, view.counts)
        ]
        return Decision(at_columns(view, self.mask(logits, view.counts)), flops=flops)


class Coarse(Stages):
    """Before the tower every other row and column of visual tokens goes, even or odd ones: a picture of half the size.
    Half of what is left goes inside the decoder."""

    stops = (Stop(2),)

    def __init__(self, backbone: LVLM, options: Fraction) -> None:
        if "image_grid_thw" not in backbone.prompt_keys:
            raise UserError("coarse needs a backbone of dynamic resolution, whose images may be of any size")
        super().__init__(backbone, options)
        weights = torch.randn(backbone.shapes.tower.patch, 1, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weights", weights)

    def look(self, backbone: LVLM, prompt: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        layouts = backbone.layouts(prompt)
        grids = [[grid for layout in row for grid in layout.grids] for row in layouts]
        units = prompt["pixel_values"].unflatten(0, (-1, backbone.shapes.tower.merge**2))  # [units, merge^2, patch]
        weights = self.weights.to(units)
        interest = (units.mean(1) @ weights)[:, 0].split([r * c for row in grids for r, c in row])
        left, sizes = [], []
        for (rows, cols), score in zip([grid for row in grids for grid in row], interest):
            score = score.view(rows, cols)
            odd = min(rows, cols) > 1 and bool(score[1::2, 1::2].mean() > score[::2, ::2].mean())
            stays = torch.zeros(rows, cols, dtype=torch.bool, device=score.device)
            stays[int(odd) :: 2, int(odd) :: 2] = True
            left.append(stays.flatten())
            sizes.append((int(stays.any(1).sum()), int(stays.any(0).sum())))
        left = torch.cat(left)
        device = left.device
        prompt = {name: x.to(device) for name, x in prompt.items()}
        mask = prompt["attention_mask"].bool()
        places = (prompt["input_ids"] == backbone.image_token_id) & mask
        mask = mask.masked_scatter(places, left)
        order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - int(mask.sum(1).max()) :]
        texts = {name: x for name, x in prompt.items() if x.shape == mask.shape} | {"attention_mask": mask.long()}
        merge, times = backbone.shapes.tower.merge, prompt["image_grid_thw"][:, :1]
        images = {
            "pixel_values": units[left].flatten(0, 1),
            "image_grid_thw": torch.cat([times, merge * torch.tensor(sizes, device=times.device)], 1),
        }
        flops = [2 * units.shape[-1] * sum(r * c for r, c in row) for row in grids]
        return {name: x.gather(1, order) for name, x in texts.items()} | images, flops

    def decide(self, view: View) -> Decision:
        scores = view.state.hidden[view.state.visual].norm(dim=-1)
        return Decision(at_columns(view, self.chosen(view, scores)))


def method(pruner: type, options: type = Fraction, **rest: Any) -> SimpleNamespace:
    return SimpleNamespace(Pruner=pruner, Options=options, **rest)


METHODS = {
    "asking": method(glimpse.Pruner, Asking, to_budget=glimpse.to_budget),
    "coarse": method(Coarse),
    "merging": method(Merging, to_budget=to_keep),
    "mixed": method(Mixed, to_budget=to_keep),
    "private": method(Private, to_budget=to_keep),
    "staged": method(Staged, to_budget=to_keep),
    "twice": method(Twice, glimpse.Options),
    "wiping": method(early.Pruner, Wiping),
}
