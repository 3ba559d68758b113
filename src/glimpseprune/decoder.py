"""The prefill loop: run unmodified decoder layers to a depth, prune, run on. The heart of the project.

A :class:`Prefill` is a batch on its way through the decoder. ``start`` makes one from an encoded prompt, ``run_layers``
takes it deeper, ``cut`` drops columns (or makes many prunings of one prompt), ``append`` adds new ones (the glimpse, an
answer, a decoded token), ``fork`` shares a cache so that one branch does not see the other's tokens, ``follow`` scores
tokens behind a prompt. ``advance`` is the one driver of pruners, from wherever a prompt stands; prefill, sampled masks,
training and reinforcement all go through it or its steps ``approach`` (to the next stop) and ``decide`` (there).

Only public sub-modules of the text model are called (``layers``, ``rotary_emb``); nothing of it is copied or patched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from glimpseprune import attention, replay
from glimpseprune.host import Columns, upload
from glimpseprune.ragged import Laying, Ragged
from glimpseprune.sharded import is_split
from glimpseprune.types import Cut, Decision, Encoded, Frame, Needs, Prefill, Ride, Stop

if TYPE_CHECKING:
    from glimpseprune.backbones import Backbone


@dataclass(frozen=True)
class View:
    """What a pruner decides from, and must leave as it is. ``state.visual`` [B, S] marks the columns it may drop."""

    state: Prefill
    encoded: Encoded
    backbone: Backbone
    stop: Stop | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """[N'] places of the tokens that are left, among all N that the tower made; a prompt's come again for each
        row that continues it."""
        visual = self.encoded.visual
        place = (visual.flatten().cumsum(0) - 1).view(visual.shape)[self.state.row]  # [B, S]
        return place.gather(1, self.state.source)[self.state.visual]

    @property
    def rows(self) -> Tensor:
        """[N'] the row that each of them is in."""
        return self.state.visual.nonzero()[:, 0]

    def pick(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N', ...]: of the tokens that are left."""
        return x if self.untouched else x[self.tokens]

    def of_visual(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [N', ...]: at the columns that a pruner may drop."""
        known = self.state.known
        if known is None or known.visual is None:
            return x[self.state.visual]
        return x.flatten(0, 1)[upload(known.visual.flatten().nonzero()[:, 0], x.device)]

    @property
    def untouched(self) -> bool:
        """Whether rows are those that were encoded, in their order, and have all their visual tokens."""
        return self.state.whole

    @property
    def counts(self) -> list[int]:
        """Visual tokens that are left in each row; N' in all."""
        return self.encoded.counts if self.untouched else self.state.trace[-1].kept.tolist()

    @property
    def columns(self) -> list[int]:
        """Columns that are left in each row, text included."""
        known = self.state.known
        return self.state.mask.sum(1).tolist() if known is None else known.counts

    @property
    def probes(self) -> dict[int, Tensor]:
        """Decoder layer -> [N', H], as the pruner's ``needs`` asked."""
        return {layer: self.of_visual(probe) for layer, probe in self.state.probes.items()}


class Pruner(Protocol):
    """A pruning method: where it decides, what it must have collected for it, and what to keep.

    A method may send columns along with the prompt to its first stop: ``ride(view) -> Ride | None``, asked before the
    first layer (``needs.probes`` is for others). A method that acts before the vision tower also has
    ``look(backbone, prompt) -> (prompt, flops per row)``, which gives the prompt anew (a coarse image, crops), wherever
    its tensors are. Methods with weights are ``nn.Module``s. A method that trains has a gate at its first stop:
    ``logits(view) -> [N']``, ``mask(logits, counts) -> bool [N']``, and for stage 1 ``all_logits(view) -> [outputs,
    N']``. Whatever else a method has is its own business.
    """

    stops: tuple[Stop, ...]
    """Depths ascending; several looks of one method are several stops."""
    needs: Needs

    def decide(self, view: View) -> Decision:
        """What stays at ``view.stop``. Text columns and padding are the driver's business."""


# ----------------------------------------------------------------------------------------------------------- the driver


def see(backbone: Backbone, pruner: Pruner, prompt: Mapping[str, Any], targets: list[Tensor] | None = None) -> Encoded:
    """A prompt as ``pruner`` wants it: after its look before the tower, if it takes one, and with what it needs."""
    flops: Sequence[float] = ()
    if hasattr(pruner, "look"):
        prompt, flops = pruner.look(backbone, backbone.unshared(prompt))
    return replace(backbone.encode(prompt, pruner.needs, targets), flops=flops)


def approach(backbone: Backbone, state: Prefill, pruner: Pruner, encoded: Encoded | None = None) -> Prefill:
    """On to the pruner's next stop, where nothing is decided yet; behind the last one nothing is done.

    ``encoded``: what whole prompts were started from; the pruner's columns then may ride along (:class:`Ride`).
    """
    taken = len(state.trace) - 1
    if taken == len(pruner.stops):
        return state
    stop = pruner.stops[taken]
    if encoded is not None and state.whole and state.depth == 0 and hasattr(pruner, "ride"):
        ride = pruner.ride(View(state, encoded, backbone, stop))
        if ride is not None:
            state = _carry(backbone, state, stop.depth, ride)
            return replace(state, ridden=(pruner, ride.found()))
    return run_layers(backbone, state, stop.depth, probes=pruner.needs.probes)


def _carry(backbone: Backbone, state: Prefill, stop: int, ride: Ride) -> Prefill:
    """:func:`run_layers` with the columns of ``ride`` behind the prompt, which are gone when it is there."""
    size = state.mask.shape[1]
    joined = append(state, ride.vectors[0], ride.mask)
    joined = replace(joined, hidden=torch.cat([state.hidden, joined.hidden], 1))  # [B, S + n, D]
    joined = run_layers(backbone, joined, stop, probe=ride.see, probed=ride.layers, behind=ride.vectors)
    for layer in state.cache.layers[:stop]:
        layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]
    added = {layer: features for layer, features in state.added.items() if layer >= stop}
    return replace(state, hidden=joined.hidden[:, :size], depth=stop, added=added)


def decide(backbone: Backbone, encoded: Encoded, state: Prefill, pruner: Pruner) -> Prefill:
    """On to the pruner's next stop, and its decision there. Text always stays."""
    state, stop = approach(backbone, state, pruner, encoded), pruner.stops[len(state.trace) - 1]
    decision = pruner.decide(View(state, encoded, backbone, stop))
    return cut(state, decision.keep, stop, merge=decision.merge, flops=decision.flops)


def advance(backbone: Backbone, encoded: Encoded, state: Prefill, pruner: Pruner, until: int | None = None) -> Prefill:
    """On through the decoder from wherever ``state`` stands, pruned wherever ``pruner`` says.

    Args:
        encoded: the prompts that ``state`` was started from; its rows may be others, :attr:`Prefill.row` says which.
        until: wait as soon as so many decisions have been taken; default: take all, and run through all layers.
    """
    left = pruner.stops[len(state.trace) - 1 : until]
    key = replay.key(backbone) if left else None  # while the device is busy with what comes before
    for _ in left:
        state = decide(backbone, encoded, state, pruner)
    if until is not None:
        return state
    done = replay.rest(backbone, state, key) if len(state.trace) > 1 else None
    return run_layers(backbone, state, backbone.num_layers) if done is None else done


def prefill(backbone: Backbone, encoded: Encoded, pruner: Pruner) -> Prefill:
    """The whole prompt through the whole decoder."""
    return advance(backbone, encoded, start(encoded), pruner)


# ----------------------------------------------------------------------------------------------------------- its steps


def start(encoded: Encoded, cache: DynamicCache | None = None) -> Prefill:
    """A prompt at depth 0 on an empty ``cache``. Right padding is turned into left padding."""
    mask = encoded.mask
    device, batch = mask.device, len(mask)
    last = encoded.positions.masked_fill(~mask, -1).amax(-1)  # [B] or [3, B]
    state = Prefill(
        hidden=encoded.embeds,
        positions=encoded.positions,
        mask=mask,
        visual=encoded.visual,
        source=torch.arange(mask.shape[1], device=device).expand(mask.shape),  # [B, S]
        row=torch.arange(batch, device=device),
        next_position=(last.amax(0) if last.ndim == 2 else last) + 1,  # [B]
        cache=DynamicCache() if cache is None else cache,
        added=encoded.added,
        trace=(Cut(Stop(0), encoded.visual.sum(1), _flops(encoded.flops, mask)),),
        known=encoded.known,
        whole=True,
    )
    if bool(encoded.known.mask[:, -1].all()):
        return state
    return replace(_select(state, mask, state.row, prune_cache=True, renumber=False), whole=True)


def run_layers(
    backbone: Backbone,
    state: Prefill,
    stop: int,
    *,
    probe: attention.Probe | None = None,
    probed: Sequence[int] | None = None,
    probes: Sequence[int] = (),
    gate: attention.Gate | None = None,
    inject: Tensor | None = None,
    behind: Tensor | None = None,
    layers: Mapping[int, nn.Module] | None = None,
) -> Prefill:
    """Run decoder layers ``state.depth`` .. ``stop`` - 1 on ``state.hidden``; their K/V join ``state.cache``.

    Args:
        probe: sees q and k of each layer, see :mod:`glimpseprune.attention`; of ``probed`` alone, where given.
        probes: layers whose attention from the last column is put into ``state.probes``.
        gate: weighs the keys.
        inject: [L, n, D] or [L, B, n, D], added to the first n of the Q columns at the input of every layer but the
            first (the glimpse, docs/method.md §1.2).
        behind: the same, [L, B, n, D], for the last n; changes hidden states in place.
        layers: modules to run in place of the decoder's own, by their number, which is also their ``layer_idx`` (a
            method's private layers).
    """
    text, hidden = backbone.text_model, state.hidden
    queries = hidden.shape[1]
    implementation = backbone.attention if gate is None else "sdpa"
    ragged = _ragged(state, implementation) if gate is None else None
    cache = state.cache if ragged is None else Laying(state.cache, ragged)
    hidden = hidden if ragged is None else ragged.pack(hidden)
    parts = hidden[..., 0].numel() > ROWS and not torch.is_grad_enabled() and not is_split(backbone.lm_head.weight)
    prepared: dict[int, tuple] = {}
    seen: dict[int, Tensor] = {}
    for index in range(state.depth, stop):
        frame = _frame(state, index)
        if id(frame) not in prepared:
            prepared[id(frame)] = _prepare(backbone, state, frame, hidden, implementation, ragged)
        rope, mask = prepared[id(frame)]
        if inject is not None and index > 0:
            hidden = hidden + F.pad(inject[index], (0, 0, 0, queries - inject.shape[-2]))  # [B, Q, D]
        if behind is not None and index > 0:
            _add_behind(hidden, behind[index], ragged)
        layer = text.layers[index] if layers is None or index not in layers else layers[index]
        see = attention.last_row(seen, frame.mask) if index in probes else probe
        see = None if see is probe and probed is not None and index not in probed else see
        hidden = (partial(_in_parts, layer) if parts else layer)(
            hidden,
            attention_mask=mask,
            position_embeddings=rope,
            past_key_values=cache,
            use_cache=True,
            probe=see if ragged is None or see is None else ragged.seen_by(see),
            gate=gate,
            lengths=None if ragged is None else ragged.lengths,
        )  # [B, Q, D]
        if index in state.added:
            hidden = hidden + (state.added[index] if ragged is None else ragged.pack(state.added[index]))
    return replace(
        state,
        hidden=hidden if ragged is None else ragged.lay(hidden),
        depth=max(stop, state.depth),
        added={index: features for index, features in state.added.items() if index >= stop},
        probes=state.probes | seen,
    )


ROWS = 1536
"""Columns of a batch that a layer's MLP works on at a time: at 7B all 5,000 of a prompt would take three times what the
prompt's cache takes. Not under ZeRO-3, where all processes must call a layer's parts equally often."""


def _in_parts(layer: nn.Module, hidden: Tensor, **context: Any) -> Tensor:
    """A decoder layer, which is norm, attention, norm, MLP in all backbones, each half added to what it was given; its
    MLP on a part of the columns at a time, which do not see each other there."""
    hidden = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **context)[0]
    for part in hidden.flatten(0, 1).split(ROWS):
        part += layer.mlp(layer.post_attention_layernorm(part))
    return hidden


DENSE = 1 << 18
"""Numbers of a mask [B, S, S] up to which rows of different lengths are padded and masked, not laid end to end."""


def _ragged(state: Prefill, implementation: str) -> Ragged | None:
    """How to lay the prompts of a batch end to end; None where there is no need to, or not all of them is ahead."""
    batch, size = state.mask.shape
    if state.known is None or state.known.full or state.hidden.shape[1] != size or implementation == "eager":
        return None
    return Ragged(state.known, state.mask.device) if batch * size**2 > DENSE else None


def _prepare(
    backbone: Backbone, state: Prefill, frame: Frame | Prefill, hidden: Tensor, implementation: str, ragged: Any
) -> tuple[Any, Tensor | None]:
    """Cosines and sines, and the mask, of the layers of a frame."""
    if ragged is not None:
        return backbone.text_model.rotary_emb(hidden, ragged.pack_positions(frame.positions)), None
    queries = hidden.shape[1]
    rope = backbone.text_model.rotary_emb(hidden, frame.positions[..., -queries:])
    full = state.known.full if frame is state and state.known is not None else None
    return rope, attention.mask(implementation, frame.mask, queries, hidden.dtype, full)


def _add_behind(hidden: Tensor, vectors: Tensor, ragged: Ragged | None) -> None:
    """``vectors`` [B, n, D] to the last n columns of each row, in place."""
    count = vectors.shape[1]
    if ragged is None:
        hidden[:, -count:] += vectors
        return
    batch, size = ragged.shape
    spots = torch.arange(len(ragged.places))
    row, column = ragged.places // size, ragged.places % size
    last = column >= size - count
    which = row[last] * count + column[last] - (size - count)
    spots, which = (upload(x, hidden.device) for x in (spots[last], which))
    hidden[0].index_add_(0, spots, vectors.flatten(0, 1)[which])


def peek(backbone: Backbone, state: Prefill) -> Tensor:
    """Log of the attention from the last column in the decoder layer that comes next, [B, S, H], from the states that
    wait before it. Of that layer nothing but queries, keys and values is computed, and nothing is cached."""
    text, seen = backbone.text_model, {}
    look = attention.last_row(seen, state.mask)

    def see(*given: Any) -> None:
        look(*given)
        raise attention.Enough

    rope = text.rotary_emb(state.hidden, state.positions)
    with suppress(attention.Enough):
        text.layers[state.depth](state.hidden, attention_mask=None, position_embeddings=rope, probe=see)
    return seen[state.depth]


def cut(
    state: Prefill,
    keep: Tensor,
    stop: Stop | None = None,
    *,
    index: Tensor | None = None,
    merge: Tensor | None = None,
    flops: Sequence[float] | Tensor = (),
) -> Prefill:
    """Keep the visual columns where ``keep`` [R, S] is True, and all text: hidden states, positions and (unless
    ``stop`` says otherwise) the K/V of the layers that have run. Rows are left-padded to the longest.

    Args:
        stop: how; default: positions stay and the cache is pruned.
        index: [R] rows of ``state`` to be pruned, repeats allowed: G prunings of a prompt share one prefill, and R
            copies of the unpruned columns are never held. The new state then has a cache of its own; without
            ``index`` every row is pruned once and the cache object is changed in place (fork it before if the
            unpruned columns are still needed).
        merge: [N', D] hidden states of the visual tokens that stay.
        flops: per row, of deciding.

    Raises:
        ValueError: tokens have been appended since, or ``merge`` is not of the survivors' size.
    """
    if state.hidden.shape[1] != state.mask.shape[1]:
        raise ValueError("pruning needs the hidden states of all columns: prune before tokens are appended")
    stop = Stop(state.depth) if stop is None else stop
    if index is None:
        index = torch.arange(len(state.mask), device=state.mask.device)
    else:
        state = replace(state, cache=fork(state.cache))
        if not stop.prune_cache:
            state.cache.batch_select_indices(index)
    keep = keep | ~state.visual[index]
    state = _select(state, keep, index, prune_cache=stop.prune_cache, renumber=stop.renumber)
    state = replace(state, whole=False, ridden=None)
    if merge is not None:
        count = int(state.visual.sum())
        if merge.shape != (count, state.hidden.shape[-1]):
            expected = [count, state.hidden.shape[-1]]
            raise ValueError(f"merged states are {list(merge.shape)}, the tokens that stay ask for {expected}")
        state = replace(state, hidden=state.hidden.masked_scatter(state.visual[..., None], merge.to(state.hidden)))
    return replace(state, trace=(*state.trace, Cut(stop, state.visual.sum(1), _flops(flops, state.mask))))


def append(state: Prefill, embeds: Tensor, mask: Tensor | None = None) -> Prefill:
    """New columns ``embeds`` [B, T, D] at depth 0, behind all others and on the same cache.

    Each row goes on at its own next position, counting only tokens where ``mask`` [B, T] is True (default: all).
    """
    count = embeds.shape[1]
    known = None if state.known is None else state.known.followed(count, mask)
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)  # [B, T]
    mask = upload(mask, embeds.device)
    offset = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]

    def grow(frame: Frame | Prefill) -> dict[str, Tensor]:
        positions = (frame.next_position[:, None] + offset).expand(*frame.positions.shape[:-1], -1)
        source = frame.source[:, -1:] + 1 + torch.arange(count, device=embeds.device)  # [B, T]
        return {
            "positions": torch.cat([frame.positions, positions], -1),
            "mask": torch.cat([frame.mask, mask], 1),
            "source": torch.cat([frame.source, source], 1),
            "next_position": frame.next_position + mask.sum(1),
        }

    return replace(
        state,
        **grow(state),
        frames=tuple(replace(frame, **grow(frame)) for frame in state.frames),
        hidden=embeds,
        visual=torch.cat([state.visual, torch.zeros_like(mask)], 1),
        added={layer: F.pad(features, (0, 0, 0, count)) for layer, features in state.added.items()},
        probes={},
        depth=0,
        known=known,
        ridden=None,
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
    return replace(
        state,
        **_rows(state, index),
        frames=tuple(replace(frame, **_rows(frame, index)) for frame in state.frames),
        hidden=state.hidden[index],
        visual=state.visual[index],
        row=state.row[index],
        added={layer: features[index] for layer, features in state.added.items()},
        probes={layer: probe[index] for layer, probe in state.probes.items()},
        trace=_trace_rows(state, index),
        cache=cache,
        known=None,
        whole=False,
        ridden=None,
    )


def follow(
    backbone: Backbone, state: Prefill, ids: Tensor, mask: Tensor, *, gate: attention.Gate | None = None
) -> Tensor:
    """Logits [B, T, vocabulary] that predict the tokens ``ids`` [B, T] behind a prompt that waits at some depth, its
    last decision taken.

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


def _select(state: Prefill, keep: Tensor, index: Tensor, *, prune_cache: bool, renumber: bool) -> Prefill:
    """Columns ``keep`` [R, S] of the rows ``index`` [R]; a cache that is not pruned has these rows already."""
    keep = keep & state.mask[index]
    known = Columns.counted(keep.sum(1).tolist())  # the device has been waited for
    size = known.mask.shape[1]
    order = _order(keep, size)  # [R, S']
    row, mask = index[:, None], keep.gather(1, order)
    positions, next_position = state.positions[..., row, order], state.next_position[index]
    frames, depth = state.frames, state.depth
    if prune_cache:
        below, pruned = 0, []
        for frame in frames:  # whose columns may be others than those that are left above them
            own = _order(_among(frame, state, index, keep), size)  # [R, S']
            _prune(state.cache, range(below, frame.stop), row, own)
            places = frame.positions[..., row, own], mask, frame.source[row, own]
            pruned.append(Frame(frame.stop, *places, frame.next_position[index]))
            below = frame.stop
        _prune(state.cache, range(below, depth), row, order)
        frames = tuple(pruned)
    else:
        frames = tuple(replace(frame, **_rows(frame, index)) for frame in frames)
    source = state.source[row, order]
    if depth > 0 and prune_cache and renumber:
        frames = (*frames, Frame(depth, positions, mask, source, next_position))
    elif depth > 0 and not prune_cache:
        frames = (*frames, Frame(depth, **_rows(state, index)))
    if renumber:
        positions = (mask.cumsum(1) - 1).clamp(min=0).expand(positions.shape)
        next_position = mask.sum(1)
    return replace(
        state,
        hidden=state.hidden[row, order],
        positions=positions,
        mask=mask,
        visual=state.visual[row, order] & mask,
        source=source,
        row=state.row[index],
        next_position=next_position,
        added={layer: features[row, order] for layer, features in state.added.items()},
        probes={layer: probe[row, order] for layer, probe in state.probes.items()},
        trace=_trace_rows(state, index),
        frames=frames,
        known=known,
    )


def _among(frame: Frame, state: Prefill, index: Tensor, keep: Tensor) -> Tensor:
    """``keep`` [R, S] of a state's columns, as bool [R, S''] over those of a frame below it."""
    width = int(frame.source.max()) + 1  # columns of the unpruned prompt, of which a row has none twice
    kept = torch.zeros(len(index), width, dtype=torch.bool, device=keep.device)
    return kept.scatter(1, state.source[index], keep).gather(1, frame.source[index])


def _order(keep: Tensor, size: int) -> Tensor:
    """[R, S] bool -> [R, size] columns: those kept, in order, behind as many others as rows need to be equally long."""
    # A stable sort puts the dropped columns first and leaves the survivors in order: left padding for free.
    return keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - size :]


def _prune(cache: DynamicCache, layers: range, row: Tensor, order: Tensor) -> None:
    for layer in cache.layers[layers.start : layers.stop]:
        # Advanced indices with a slice between them come first: [R, S', H, d].
        layer.keys, layer.values = (x[row, :, order].transpose(1, 2) for x in (layer.keys, layer.values))


def _rows(frame: Frame | Prefill, index: Tensor) -> dict[str, Tensor]:
    return {
        "positions": frame.positions[..., index, :],
        "mask": frame.mask[index],
        "source": frame.source[index],
        "next_position": frame.next_position[index],
    }


def _trace_rows(state: Prefill, index: Tensor) -> tuple[Cut, ...]:
    return tuple(replace(past, kept=past.kept[index], flops=past.flops[index]) for past in state.trace)


def _flops(flops: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """[B] int64 on the device of ``like`` [B, ...]; nothing said is 0."""
    if not len(flops):
        return torch.zeros(len(like), dtype=torch.long, device=like.device)
    return upload(flops, like.device, torch.float64).long().expand(len(like))


def _frame(state: Prefill, layer: int) -> Frame | Prefill:
    return next((frame for frame in state.frames if layer < frame.stop), state)
