"""What a vision tower computes, by Hugging Face's own eager attention: the oracle of what is seen of a tower.

Weights and keys are what the model file's ``eager_attention_forward`` returns and is given. Where the decoder has a
token is read off the states of the same block, whose raster order is a contract of backbones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glimpseprune.backbones import LVLM
from glimpseprune.types import Grid, Needs

NAME = "recorded_eager"


@dataclass
class Tower:
    """Of one layer; all 0 for tokens that are no cell of a picture."""

    states: Tensor  # [N, C]
    keys: Tensor  # [N, H, d]
    attention: Tensor  # [N]


@torch.no_grad()
def eager_tower(backbone: LVLM, prompt: dict[str, Tensor], layer: int) -> Tower:
    calls: list[tuple] = []

    def attend(module, query, key, value, attention_mask=None, **kwargs):
        own = sys.modules[type(module).__module__].eager_attention_forward
        output, weights = own(module, query, key, value, attention_mask, **kwargs)
        calls.append((module, key.transpose(1, 2), weights))  # [b, T, H, d], [b, H, T, T]
        return output, weights

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    config = backbone.model.config.vision_config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        backbone.encode(prompt)
        modules = list(dict.fromkeys(module for module, *_ in calls))
        assert len(modules) == len(backbone.vision_layers)
        module = modules[backbone.vision_layers.index(layer)]
        name = next(name for name, other in backbone.model.named_modules() if other is module)
        outputs: list[Tensor] = []
        block = backbone.model.get_submodule(name.rpartition(".")[0])
        hook = block.register_forward_hook(lambda m, args, y: outputs.append(y[0] if isinstance(y, tuple) else y))
        calls.clear()
        backbone.encode(prompt)
        hook.remove()
    finally:
        config._attn_implementation = before

    extra, unit = backbone.shapes.tower.extra, backbone.shapes.tower.merge**2
    keys, attention = [], []
    for other, key, weights in calls:
        if other is module:
            mean = weights.mean(1)  # [b, T, T]
            attention.append((mean[:, 0] if extra else mean.mean(1))[:, extra:].flatten())
            keys.append(key[:, extra:].flatten(0, 1))
    output = outputs[0] if outputs[0].ndim == 3 else outputs[0][None]  # [b, T, C]
    found = [output[:, extra:].flatten(0, 1), torch.cat(keys), torch.cat(attention)]

    encoded = backbone.encode(prompt, Needs(states=(layer,)))
    places = encoded.states[layer]  # [N, C]
    cell = places.abs().sum(1) > 0
    # The patches of a token lie side by side (a tower that keeps them by token), or in a square (one of rows).
    grids = [grid for row in encoded.layouts for layout in row for grid in layout.encoded]
    for group in (torch.arange(len(found[0])).view(-1, unit), squares(grids, backbone.shapes.tower.merge)):
        states, keys, attention = (x[group].mean(1) for x in found)
        distance, place = torch.cdist(places, states, compute_mode="donot_use_mm_for_euclid_dist").sort(1)
        if (distance[cell, 0] < 1e-4).all():
            break
    assert (distance[cell, 0] < 1e-4).all() and (distance[cell, 1] > 1e-2).all(), "the order cannot be read off"

    def put(x: Tensor) -> Tensor:
        return x[place[:, 0]] * cell.view(-1, *(1,) * (x.ndim - 1))

    return Tower(put(states), put(keys), put(attention))


def squares(grids: list[Grid], merge: int) -> Tensor:
    """[tokens, merge * merge] patches of each token, where pictures are rows of patches; ``grids`` are of tokens."""
    found, start = [], 0
    for rows, cols in grids:
        patches = start + torch.arange(rows * cols * merge**2).view(rows, merge, cols, merge)
        found.append(patches.transpose(1, 2).reshape(-1, merge**2))
        start += patches.numel()
    return torch.cat(found)
