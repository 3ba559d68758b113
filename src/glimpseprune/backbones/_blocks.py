"""Running the blocks of a vision tower on packed patches: nothing is read from the device, and no more memory is taken
than a chunk of the patches asks for.

Rows (patches) attend within their segments only, so whole segments go through a block a chunk at a time. A segment that
is longer than a chunk is gone through twice: for its keys and values, which all of its queries need, and then with a
chunk of queries at a time. Every row is computed as if all ran at once. Where a tower trains everything does run at
once, because results are written over their inputs; and where ZeRO-3 splits its weights, because all processes must
call its parts equally often.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from glimpseprune import windows
from glimpseprune.attention import Enough
from glimpseprune.backbones._tower import PREFIX, Watch
from glimpseprune.sharded import is_split
from glimpseprune.windows import Segments


def is_free(*modules: nn.Module, given: Sequence[Tensor] = ()) -> bool:
    """Whether it is nobody's business how ``modules`` are run: neither they nor what is ``given`` to them have a
    gradient, and no other process holds parts of their weights."""
    weights = [weight for module in modules for weight in module.parameters()]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, *given))
    return not trains and not any(map(is_split, weights))


def chunk_of(*modules: nn.Module, given: Sequence[Tensor] = ()) -> int:
    """Rows that ``modules`` may work on at a time."""
    if not is_free(*modules, given=given):
        return sys.maxsize
    on_cpu = next(modules[0].parameters()).device.type == "cpu"
    return min(windows.CHUNK, windows.CACHED) if on_cpu else windows.CHUNK


def by_rows(work: Callable[[slice], Tensor], total: int, chunk: int) -> Tensor:
    """[total, ...] of ``work``, which is given so many rows at a time and gives as many."""
    if total <= chunk:
        return work(slice(0, total))
    whole = None
    for rows in _chunks(total, chunk):
        part = work(rows)
        whole = part.new_empty(total, *part.shape[1:]) if whole is None else whole
        whole[rows] = part
    return whole


@dataclass(frozen=True)
class Piece:
    """Rows that go through a block together."""

    rows: slice
    segments: Segments


def pieces(lengths: Sequence[int], chunk: int, tower: nn.Module) -> list[Piece]:
    """Consecutive segments of these ``lengths``, as many as make a chunk in each piece, and at least one."""
    device, step = next(tower.parameters()).device, windows.even(sum(lengths), chunk)
    groups: list[list[int]] = [[]]
    for length in filter(None, lengths):
        size = sum(groups[-1])
        if size and (size >= step or size + length > chunk):
            groups.append([])
        groups[-1].append(length)
    found, start, edges_on = [], 0, device if _kernel(tower) == "flash" else "cpu"
    for group in groups:
        end = start + sum(group)
        found.append(Piece(slice(start, end), Segments.of(group, device, edges_on)))
        start = end
    return found


def walk(
    tower: nn.Module,
    hidden: Tensor,
    rope: Sequence[Tensor],
    layers: Sequence[Sequence[Piece]],
    chunk: int,
    watch: Watch | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Number and output [P, C] of each block of ``tower``, one after the other; an output is gone when the next is
    asked for.

    Args:
        hidden: [P, C], which may be written over.
        rope: cosine and sine [P, d].
        layers: the pieces of each block.
        watch: sees queries and keys, see :func:`._tower.watched`.
    """
    kernel = _kernel(tower)
    watching = {} if watch is None else {"watch": watch}
    for layer, (block, parts) in enumerate(zip(tower.blocks, layers, strict=True)):
        for part in parts:
            segments, rows = part.segments, part.rows
            if kernel == "ours" and segments.longest > chunk:
                _long(block, hidden, rope, rows, chunk, watch)
                continue
            known = watching | ({"segments": segments} if kernel == "ours" else {})
            made = block(
                hidden[rows],
                cu_seqlens=segments.edges,
                max_seqlen=segments.longest,
                position_embeddings=tuple(x[rows] for x in rope),
                **known,
            )
            if len(parts) == 1:
                hidden = made
            else:
                hidden[rows] = made
        yield layer, hidden


def _long(
    block: nn.Module, hidden: Tensor, rope: Sequence[Tensor], rows: slice, chunk: int, watch: Watch | None
) -> None:
    """A block on one segment of more rows than a chunk, written over ``hidden``."""
    total = rows.stop - rows.start
    step = windows.even(total, max(1, chunk // 2))  # queries, keys and values of all rows are held beside
    parts = list(_chunks(rows.stop, step, rows.start))
    taken: list[tuple[Tensor, Tensor, Tensor, float]] = []
    queries: list[Tensor] = []
    whole: list[Tensor] = []

    def take(*given: Any) -> None:
        taken[:] = [given]
        raise Enough

    for part in parts:
        size = part.stop - part.start
        with suppress(Enough):
            block.attn(
                block.norm1(hidden[part]),
                cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
                max_seqlen=size,
                position_embeddings=tuple(x[part] for x in rope),
                take=take,
            )
        ((query, *others, scaling),) = taken
        whole = whole or [x.new_empty(*x.shape[:2], total, x.shape[3]) for x in others]
        for x, own in zip(whole, others):
            x[:, :, part.start - rows.start : part.stop - rows.start] = own
        queries.append(query)
    taken.clear()
    key, value = whole  # [1, H, total, d]
    if watch is not None:
        watch(block.attn, torch.cat(queries, 2), key, scaling, None)
    for part in parts:
        seen = windows.scaled_dot_product_attention(queries.pop(0), key, value, scale=scaling)  # [1, H, n, d]
        state = hidden[part] + block.attn.proj(seen[0].transpose(0, 1).flatten(1))
        hidden[part] = state + block.mlp(block.norm2(state))


def _chunks(stop: int, chunk: int, start: int = 0) -> Iterator[slice]:
    return (slice(at, min(at + chunk, stop)) for at in range(start, stop, chunk))


def _kernel(tower: nn.Module) -> str:
    """``ours`` (:mod:`glimpseprune.windows`), transformers' ``flash`` attention, or a ``loop`` over segments."""
    if tower.config._attn_implementation.removeprefix(PREFIX) == windows.NAME:
        return "ours"
    return "flash" if is_flash_attention_requested(tower.config) else "loop"
