"""The student of the KL stage on the columns that matter: survivors, text, the answer, and the nearest of the rest.

Under the gate ``stc`` a dropped token is read by nobody. It is there for one thing: what the loss would gain if it came
back, which is the gradient of its gate. That takes its keys and values in the layers from K on, and these the teacher
has, all but as if it had been alone with the survivors there. So only those that are nearest to coming back are run
(docs/method.md §2.5). Below K there is nothing to save: the prompt is cached, and the answer sees all of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from glimpseprune.attention import Away, Gate, Probe
from glimpseprune.backbones import LVLM
from glimpseprune.decoder import append, branch, cut, run_layers
from glimpseprune.types import Prefill, Stop


def behind(backbone: LVLM, state: Prefill, ids: Tensor, mask: Tensor, probe: Probe | None = None) -> Tensor:
    """Logits [B, T, vocabulary] that predict the tokens ``ids`` [B, T] behind a prompt that has run through all layers:
    as :func:`.decoder.follow` behind one that waits. ``probe`` sees the layers of all tokens but the last."""
    hidden = state.hidden[:, -1:]
    if ids.shape[1] > 1:
        tokens = append(branch(state), backbone.embed(ids[:, :-1]), mask[:, :-1])
        tokens = run_layers(backbone, tokens, backbone.num_layers, probe=probe)
        hidden = torch.cat([hidden, tokens.hidden], 1)  # [B, T, D]
    return backbone.logits(hidden)


def follow(
    backbone: LVLM, state: Prefill, ids: Tensor, mask: Tensor, gate: Gate, teacher: DynamicCache, dropped: int
) -> Tensor:
    """As :func:`.decoder.follow` behind a prompt at depth K under a gate ``stc``, with no more than ``dropped`` of each
    row's dropped tokens in the layers from K on, those of the greatest weights. The others are there as ``teacher``,
    the cache of the unpruned prompt behind all layers, has them. The same logits [B, T, vocabulary]; the same gradient
    of ``gate`` where none is left out."""
    state, above = thinned(state, gate, teacher, dropped)
    if ids.shape[1] > 1:
        tokens = append(state, backbone.embed(ids[:, :-1]), mask[:, :-1])
        tokens = run_layers(backbone, tokens, state.depth, gate=gate)
        state = replace(tokens, hidden=torch.cat([state.hidden, tokens.hidden], 1))  # [B, S' + T - 1, D]
    final = run_layers(backbone, state, backbone.num_layers, gate=above)
    return backbone.logits(final.hidden[:, -ids.shape[1] :])


def thinned(state: Prefill, gate: Gate, teacher: DynamicCache, dropped: int) -> tuple[Prefill, Gate]:
    """``state`` without most of the columns that ``gate`` drops, on a fork of its cache, whose layers below keep them
    all; and the gate of the columns that are left."""
    weight = gate.weight.detach()  # [B, S]
    gone = state.visual & (weight <= 0.5)
    rank = weight.masked_fill(~gone, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    away = gone & (rank >= dropped)
    left = cut(branch(state), ~away, Stop(state.depth, prune_cache=False))
    # Columns are known by their places in the prompt, also where left padding has come or gone.
    place = torch.zeros(len(weight), int(state.source.max()) + 1, dtype=torch.long, device=weight.device)
    columns = torch.arange(weight.shape[1], device=weight.device).expand_as(weight)
    columns = place.scatter(1, state.source, columns).gather(1, left.source)  # [B, S']
    return left, replace(gate, columns=columns, away=Away(away, teacher))
