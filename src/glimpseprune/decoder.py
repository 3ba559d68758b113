"""The prefill loop: run unmodified decoder layers to a depth, prune, run on. The heart of the project.

A :class:`Prefill` is a batch on its way through the decoder. ``start`` makes one from an encoded prompt, ``run_layers``
takes it deeper, ``select`` drops columns, ``append`` adds new ones (the glimpse, an answer, a decoded token), ``fork``
shares a cache so that one branch does not see the other's tokens, ``fan_out`` makes many prunings of one prompt,
``prefill`` puts them together for any pruner, and ``follow`` scores tokens behind it.
Only public sub-modules of the text model are called (``layers``, ``rotary_emb``); nothing of it is copied or patched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from . import attention
from .types import Encoded, Frame, Prefill

if TYPE_CHECKING:
    from .backbones import Backbone


@dataclass
class View:
    """What a pruner decides from. ``state.visual`` [B, S] marks the columns it may drop."""

    state: Prefill
    encoded: Encoded
    backbone: Backbone


class Pruner(Protocol):
    """A pruning method: where and what to keep. ``renumber`` and ``prune_cache`` are its declared facts.

    ``layers``: prune when this many decoder layers have run, ascending, 0 = before the first, L = after the last.
    ``vision_layers``: vision-tower layers whose states ``backbone.encode`` should collect for it.
    ``renumber``: survivors get positions 0, 1, 2 ... in the layers above (earlier layers keep theirs).
    ``prune_cache``: drop the K/V of the layers that have run, too.
    """

    layers: tuple[int, ...]
    vision_layers: tuple[int, ...]
    renumber: bool
    prune_cache: bool

    def keep(self, view: View) -> Tensor:
        """bool [B, S]; text columns and padding are the driver's business and may hold anything."""


def start(encoded: Encoded, cache: DynamicCache | None = None) -> Prefill:
    """A prompt at depth 0 on an empty ``cache``. Right padding is turned into left padding."""
    mask = encoded.mask
    last = encoded.positions.masked_fill(~mask, -1).amax(-1)  # [B] or [3, B]
    state = Prefill(
        hidden=encoded.embeds,
        positions=encoded.positions,
        mask=mask,
        visual=encoded.visual & mask,
        source=torch.arange(mask.shape[1], device=mask.device).expand(mask.shape),  # [B, S]
        next_position=(last.amax(0) if last.ndim == 2 else last) + 1,  # [B]
        cache=DynamicCache() if cache is None else cache,
    )
    return state if bool(mask[:, -1].all()) else select(state, mask)


def run_layers(
    backbone: Backbone,
    state: Prefill,
    stop: int,
    *,
    probe: attention.Probe | None = None,
    gate: attention.Gate | None = None,
    inject: Tensor | None = None,
) -> Prefill:
    """Run decoder layers ``state.depth`` .. ``stop`` - 1 on ``state.hidden``; their K/V join ``state.cache``.

    ``probe`` sees q and k of each layer, ``gate`` weighs the keys (see :mod:`glimpseprune.attention`). ``inject``
    [L, n, D] is added to the first n of the Q columns at the input of every layer but the first (docs/method.md §1.2).
    """
    text, hidden = backbone.text_model, state.hidden
    queries = hidden.shape[1]
    implementation = backbone.attention if gate is None else "sdpa"
    prepared: dict[int, tuple] = {}
    for index in range(state.depth, stop):
        frame = _frame(state, index)
        if id(frame) not in prepared:
            rope = text.rotary_emb(hidden, frame.positions[..., -queries:])
            mask = attention.mask(implementation, frame.mask, queries, hidden.dtype)
            prepared[id(frame)] = rope, mask
        rope, mask = prepared[id(frame)]
        if inject is not None and index > 0:
            hidden = hidden + F.pad(inject[index], (0, 0, 0, queries - inject.shape[1]))  # [B, Q, D]
        hidden = text.layers[index](
            hidden,
            attention_mask=mask,
            position_embeddings=rope,
            past_key_values=state.cache,
            use_cache=True,
            probe=probe,
            gate=gate,
        )  # [B, Q, D]
    return replace(state, hidden=hidden, depth=max(stop, state.depth))


def select(state: Prefill, keep: Tensor, *, prune_cache: bool = True, renumber: bool = False) -> Prefill:
    """Keep the columns where ``keep`` [B, S] and the mask are True: hidden states, positions and (with
    ``prune_cache``) the K/V of the layers that have run. Rows are left-padded to the longest.

    The cache object is changed in place; fork it before if the unpruned columns are still needed.
    """
    _require_whole(state)
    keep = keep & state.mask
    size = int(keep.sum(1).max())
    # A stable sort puts the dropped columns first and leaves the survivors in order: left padding for free.
    order = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - size :]  # [B, S']
    mask = keep.gather(1, order)

    def columns(positions: Tensor) -> Tensor:
        return positions.gather(-1, order.expand(*positions.shape[:-1], size))

    positions, next_position, frames = columns(state.positions), state.next_position, state.frames
    if prune_cache:
        for layer in state.cache.layers[: state.depth]:
            layer.keys, layer.values = _gather(layer.keys, order), _gather(layer.values, order)
        frames = tuple(replace(frame, positions=columns(frame.positions), mask=mask) for frame in frames)
    if state.depth > 0 and (renumber or not prune_cache):
        old = (positions, mask) if prune_cache else (state.positions, state.mask)
        frames = (*frames, Frame(state.depth, *old, next_position))
    if renumber:
        positions = (mask.cumsum(1) - 1).clamp(min=0).expand(positions.shape)
        next_position = mask.sum(1)
    return replace(
        state,
        hidden=state.hidden.gather(1, order[..., None].expand(-1, -1, state.hidden.shape[-1])),
        positions=positions,
        mask=mask,
        visual=state.visual.gather(1, order) & mask,
        source=state.source.gather(1, order),
        next_position=next_position,
        frames=frames,
    )


def fan_out(state: Prefill, index: Tensor, keep: Tensor) -> Prefill:
    """Rows ``index`` [R] (repeats allowed), each with the columns ``keep`` [R, S] of its own, on a cache of their own.

    What ``select(rows(state, index), keep)`` gives, without ever holding R copies of the unpruned columns: this is how
    G rollouts with G masks share one prefill.
    """
    _require_whole(state)
    if state.frames:
        raise ValueError("fan_out needs a state that has not been pruned before")
    mask = state.mask[index]
    keep = keep & mask
    size = int(keep.sum(1).max())
    order = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - size :]  # [R, S']
    row, mask = index[:, None], keep.gather(1, order)
    cache = fork(state.cache)
    for layer in cache.layers[: state.depth]:
        # Advanced indices with a slice between them come first: [R, S', H, d].
        layer.keys, layer.values = (x[row, :, order].transpose(1, 2) for x in (layer.keys, layer.values))
    return replace(
        state,
        hidden=state.hidden[row, order],
        positions=state.positions[..., row, order],
        mask=mask,
        visual=state.visual[row, order] & mask,
        source=state.source[row, order],
        next_position=state.next_position[index],
        cache=cache,
    )


def append(state: Prefill, embeds: Tensor, mask: Tensor | None = None) -> Prefill:
    """New columns ``embeds`` [B, T, D] at depth 0, behind all others and on the same cache.

    Each row goes on at its own next position, counting only tokens where ``mask`` [B, T] is True (default: all).
    """
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)  # [B, T]
    offset = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]

    def grow(frame: Frame | Prefill) -> dict:
        positions = (frame.next_position[:, None] + offset).expand(*frame.positions.shape[:-1], -1)
        return {
            "positions": torch.cat([frame.positions, positions], -1),
            "mask": torch.cat([frame.mask, mask], 1),
            "next_position": frame.next_position + mask.sum(1),
        }

    source = state.source[:, -1:] + 1 + torch.arange(embeds.shape[1], device=embeds.device)  # [B, T]
    return replace(
        state,
        **grow(state),
        frames=tuple(replace(frame, **grow(frame)) for frame in state.frames),
        hidden=embeds,
        visual=torch.cat([state.visual, torch.zeros_like(mask)], 1),
        source=torch.cat([state.source, source], 1),
        depth=0,
    )


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that shares every tensor with ``cache`` now and none that either gets later."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def branch(state: Prefill) -> Prefill:
    """``state`` on a :func:`fork` of its cache."""
    return replace(state, cache=fork(state.cache))


def rows(state: Prefill, index: Tensor) -> Prefill:
    """Batch rows ``index`` [B'] (repeats allowed) on a fork: G continuations of a prompt share one prefill."""
    cache = fork(state.cache)
    cache.batch_select_indices(index)

    def pick(frame: Frame | Prefill) -> dict:
        return {
            "positions": frame.positions[..., index, :],
            "mask": frame.mask[index],
            "next_position": frame.next_position[index],
        }

    return replace(
        state,
        **pick(state),
        frames=tuple(replace(frame, **pick(frame)) for frame in state.frames),
        hidden=state.hidden[index],
        visual=state.visual[index],
        source=state.source[index],
        cache=cache,
    )


def prefill(backbone: Backbone, encoded: Encoded, pruner: Pruner) -> Prefill:
    """The whole prompt through the whole decoder, pruned wherever ``pruner`` says. Text always stays."""
    state = start(encoded)
    for stop in pruner.layers:
        state = run_layers(backbone, state, stop)
        keep = pruner.keep(View(state, encoded, backbone)) | ~state.visual
        state = select(state, keep, prune_cache=pruner.prune_cache, renumber=pruner.renumber)
    return run_layers(backbone, state, backbone.num_layers)


def follow(
    backbone: Backbone, state: Prefill, ids: Tensor, mask: Tensor, *, gate: attention.Gate | None = None
) -> Tensor:
    """Logits [B, T, vocabulary] that predict the tokens ``ids`` [B, T] behind a prompt that waits at some depth.

    The tokens run through the layers below on the cache that the prompt left there, then prompt and tokens run on
    together: what decoding them one by one computes, in one pass. ``mask`` [B, T]: False on right padding.
    """
    prompt = branch(state)
    if ids.shape[1] > 1:
        tokens = append(prompt, backbone.embed(ids[:, :-1]), mask[:, :-1])
        tokens = run_layers(backbone, tokens, prompt.depth, gate=gate)
        prompt = replace(tokens, hidden=torch.cat([prompt.hidden, tokens.hidden], 1))  # [B, S + T - 1, D]
    final = run_layers(backbone, prompt, backbone.num_layers, gate=gate)
    return backbone.logits(final.hidden[:, -ids.shape[1] :])


def _require_whole(state: Prefill) -> None:
    if state.hidden.shape[1] != state.mask.shape[1]:
        raise ValueError("pruning needs the hidden states of all columns: prune before tokens are appended")


def _frame(state: Prefill, layer: int) -> Frame | Prefill:
    return next((frame for frame in state.frames if layer < frame.stop), state)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """[B, H, S, d], [B, S'] -> [B, H, S', d]"""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
