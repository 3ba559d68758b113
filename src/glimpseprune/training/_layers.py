"""Decoder layers that run in another way: with their activations recomputed, or compiled.

What runs them knows a backbone by its parts. So a backbone with other layers is all that is needed, and neither the
prefill loop nor the model is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from glimpseprune.backbones import LVLM
from glimpseprune.decoder import fork
from glimpseprune.ragged import Laying

PARTS = ("rotary_emb", "norm", "embed_tokens", "config")


def checkpointed(backbone: LVLM) -> LVLM:
    """The same model, of whose decoder layers a pass with gradients keeps nothing but what goes in: hidden states and
    the cache. What is between is computed again in the backward pass, to the same bits."""
    made, text = copy.copy(backbone), backbone.text_model
    layers = [Checkpointed(layer) for layer in text.layers]
    made.text_model = SimpleNamespace(layers=layers, **{name: getattr(text, name) for name in PARTS})
    return made


class Checkpointed:
    """A decoder layer in whose place it can be called."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        """Its parts, where it is run in parts."""
        return getattr(self.layer, name)

    def __call__(self, hidden: Tensor, *, past_key_values: DynamicCache | Laying, **given: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.layer(hidden, past_key_values=past_key_values, **given)
        before, after = _forked(past_key_values), []

        def run(hidden: Tensor) -> Tensor:
            own = _forked(before)  # else the second time it would find there what the first left
            out = self.layer(hidden, past_key_values=own, **given)
            after.append(_held(own).layers)
            return out

        out = checkpoint(run, hidden, use_reentrant=False)
        _held(past_key_values).layers = after.pop()
        return out


def _held(cache: DynamicCache | Laying) -> DynamicCache:
    return cache.cache if isinstance(cache, Laying) else cache


def _forked(cache: DynamicCache | Laying) -> DynamicCache | Laying:
    held = fork(_held(cache))
    return Laying(held, cache.ragged) if isinstance(cache, Laying) else held


def compile_parts(backend: str, layers: Iterable[nn.Module], vip: nn.Module | None) -> None:
    """Have torch compile decoder ``layers`` and the predictor, in place: their weights and names stay as they are.
    Lengths are symbols, so that batches of other lengths need no new code."""
    for module in (*layers, *([] if vip is None else [vip])):
        module.compile(backend=backend, dynamic=True)
