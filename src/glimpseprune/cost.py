"""What pruning costs and saves: FLOPs, KV bytes, mean visual tokens, read from the trace of a prefill; and a stopwatch.

A trace says how many visual tokens were left after each decision and what deciding cost (:class:`types.Cut`); all that
is known beside it are the model's shapes. Nothing about a method is assumed: staged, merging and private looks are
counted alike. A multiply-add is two FLOPs. Counted: every matrix product of the vision tower (patch embedding, windowed
and full attention), merger or projector, decoder layers, decisions (as declared by their methods) and last-position
lm_head. Not counted: norms, activations, softmax, rotary embeddings, biases, embedding look-ups, gathers, and the D x D
projection of the glimpse embeddings, which does not depend on the input. Attention counts every query-key pair, as
kernels that do not skip the masked half compute it; ``causal=True`` counts the half that a causal kernel needs.

Source: docs/evaluation.md §4. The published tool (HVision-NKU/GlimpsePrune@210b56d, cal_flops.py) counts
decoder layers as here but leaves out: the text tokens in the layers after pruning (it passes the number of kept visual
tokens as the whole length); vision tower, merger and lm_head, which pruning does not shrink and which therefore bring
the ratio nearer to 1; the glimpse position; in the VIP the input, conditioning and output projections, and all but one
position of W_o. It also lets the VIP attend across images, where the method does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glimpseprune.types import Cut, Grid, Layout

Span = tuple[int, int]
"""Decoder layers, and how many visual tokens (or columns) each of them saw (or holds)."""


@dataclass(frozen=True)
class Step:
    """A decision in numbers, as one row of a trace has it; the first is the prompt itself, at depth 0."""

    depth: int
    """Decoder layers that had run."""
    kept: int
    """Visual tokens left."""
    flops: int = 0
    """Of deciding."""
    prune_cache: bool = True


def steps_of(trace: Sequence[Cut], row: int) -> list[Step]:
    """One row of a trace."""
    return [Step(cut.stop.depth, int(cut.kept[row]), int(cut.flops[row]), cut.stop.prune_cache) for cut in trace]


@dataclass(frozen=True)
class Decoder:
    """Grouped-query attention and a SwiGLU MLP per layer."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocab: int


@dataclass(frozen=True)
class Tower:
    """A vision transformer. ``merge`` x ``merge`` patches become one visual token; ``window`` is the side of an
    attention window in visual tokens (0: none), ``full`` the layers that attend to the whole image all the same."""

    layers: int
    width: int
    mlp: int
    patch: int
    """Values in a patch: channels x frames x height x width."""
    gated: bool = False
    merge: int = 1
    window: int = 0
    full: tuple[int, ...] = ()
    extra: int = 0
    """Tokens beside the patches (a class token)."""


@dataclass(frozen=True)
class Vip:
    """The visual importance predictor, as in ``vip.py``; ``probes`` layers of what looks feed it."""

    width: int = 256
    cond_width: int = 512
    blocks: int = 4
    probes: int = 1

    @classmethod
    def of(cls, pruner: Any) -> Vip | None:
        """That of a pruner; None for a method without one."""
        if not hasattr(pruner, "vip"):
            return None
        options = pruner.options
        probes, blocks = len(pruner.probe_layers), len(pruner.vision_layers)
        return cls(options.width, options.cond_width, blocks, probes)


@dataclass(frozen=True)
class Shapes:
    """A vision-language model as its matrix shapes."""

    decoder: Decoder
    tower: Tower
    projector: tuple[tuple[int, int], ...]
    """Linear layers (in, out) that each visual token passes between tower and decoder."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one prefill, by part."""

    tower: float
    projector: float
    decoder: float
    decisions: float
    lm_head: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def prunable(self) -> float:
        """Without tower, projector and lm_head: what the paper's ratio is about."""
        return self.decoder + self.decisions


@dataclass(frozen=True)
class Account:
    """The numbers that are always reported together, for one sample."""

    kept: int
    """Visual tokens kept for decoding."""
    mean_tokens: float
    """Visual tokens a decoder layer saw during prefill, mean over layers."""
    flops: float
    """Of the whole prefill."""
    ratio: float
    """The same, divided by that of the unpruned model."""
    decoder_ratio: float
    """The same of decoder and decisions alone."""
    kv_bytes: int
    """Of the cache at the first answer token."""
    kv_ratio: float
    """Visual tokens in that cache, mean over layers, divided by those of the unpruned model."""


def spans(layers: int, steps: Sequence[Step]) -> list[Span]:
    """What each of ``layers`` decoder layers saw in prefill."""
    ends = [step.depth for step in steps[1:]] + [layers]
    return [(end - step.depth, step.kept) for step, end in zip(steps, ends)]


def cached(layers: int, steps: Sequence[Step]) -> list[Span]:
    """Visual tokens that each of ``layers`` decoder layers holds in its cache after prefill: those that it saw, or
    those left by a later decision that pruned the cache, too."""
    held = []
    for index, (count, seen) in enumerate(spans(layers, steps)):
        later = [step.kept for step in steps[index + 1 :] if step.prune_cache]
        held.append((count, later[-1] if later else seen))
    return held


def account(
    shapes: Shapes,
    text: int,
    layouts: Sequence[Layout],
    steps: Sequence[Step],
    *,
    looked: Sequence[Layout] | None = None,
    itemsize: int = 2,
) -> Account:
    """Everything about one sample: ``text`` tokens, images of ``layouts``, and what was done to them.

    Args:
        steps: one row of the trace, :func:`steps_of`.
        looked: layouts of the images that the tower encoded in fact, where a look before it changed them.
        itemsize: bytes of a cached number.
    """
    layers, visual = shapes.decoder.layers, sum(layout.count for layout in layouts)
    seen, held = spans(layers, steps), cached(layers, steps)
    decisions = sum(step.flops for step in steps)
    flops = prefill_flops(shapes, text, layouts if looked is None else looked, seen, decisions)
    full = prefill_flops(shapes, text, layouts, [(layers, visual)])
    return Account(
        kept=steps[-1].kept,
        mean_tokens=mean_visual_tokens(seen),
        flops=flops.total,
        ratio=flops.total / full.total,
        decoder_ratio=flops.prunable / full.prunable,
        kv_bytes=kv_bytes(shapes, [(count, text + tokens) for count, tokens in held], itemsize),
        kv_ratio=mean_visual_tokens(held) / visual,
    )


def prefill_flops(
    shapes: Shapes,
    text: int,
    layouts: Sequence[Layout],
    seen: Sequence[Span],
    decisions: float = 0,
    *,
    causal: bool = False,
) -> Flops:
    """FLOPs of one prefill, by part: decoder layers on the visual tokens that they ``seen``, :func:`spans`.

    Raises:
        ValueError: the spans do not run every layer once.
    """
    decoder = shapes.decoder
    if sum(layers for layers, _ in seen) != decoder.layers:
        raise ValueError(f"spans {list(seen)} do not add up to {decoder.layers} layers")
    encoded = [grid for layout in layouts for grid in layout.encoded]
    projected = sum(rows * cols for rows, cols in encoded)
    return Flops(
        tower=_tower_flops(shapes.tower, encoded),
        projector=projected * sum(2 * width_in * width_out for width_in, width_out in shapes.projector),
        decoder=sum(layers * layer_flops(decoder, text + tokens, causal=causal) for layers, tokens in seen),
        decisions=decisions,
        lm_head=2 * decoder.width * decoder.vocab,
    )


def decode_flops(shapes: Shapes, columns: int | Sequence[Span]) -> float:
    """FLOPs of one new token, lm_head included, on so many cached columns: a number, or one per span of layers."""
    decoder = shapes.decoder
    per_layer = [(decoder.layers, columns)] if isinstance(columns, int) else columns
    run = sum(layers * layer_flops(decoder, 1, columns) for layers, columns in per_layer)
    return run + 2 * decoder.width * decoder.vocab


def layer_flops(decoder: Decoder, new: int, cached: int = 0, *, causal: bool = False) -> float:
    """FLOPs of one decoder layer for ``new`` tokens after ``cached`` ones."""
    width = decoder.heads * decoder.head_width
    pairs = new * cached + (new * (new + 1) // 2 if causal else new**2)
    linear = 2 * decoder.width * (2 * width + 2 * decoder.kv_heads * decoder.head_width + 3 * decoder.mlp)
    return new * linear + 4 * pairs * width


def kv_bytes(shapes: Shapes, columns: int | Sequence[Span], itemsize: int = 2) -> int:
    """Bytes of a cache of so many columns: a number for all layers, or one per span of layers."""
    decoder = shapes.decoder
    per_layer = [(decoder.layers, columns)] if isinstance(columns, int) else columns
    return sum(layers * columns for layers, columns in per_layer) * 2 * decoder.kv_heads * decoder.head_width * itemsize


def row_flops(decoder: Decoder, columns: int, queries: int = 1) -> int:
    """Of the logits of ``queries`` rows of attention, all heads, taken once more from q and k that are there."""
    return 2 * decoder.heads * decoder.head_width * columns * queries


def query_key_flops(decoder: Decoder, columns: int) -> int:
    """Of queries and keys of so many columns in one layer."""
    return 2 * decoder.width * (decoder.heads + decoder.kv_heads) * decoder.head_width * columns


def peek_flops(decoder: Decoder, columns: int) -> int:
    """Of :func:`decoder.peek`: queries, keys and values of all columns in one layer, and one row of attention."""
    width = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_width
    return 2 * decoder.width * width * columns + row_flops(decoder, columns)


def mean_visual_tokens(per_layer: Sequence[Span]) -> float:
    """Visual tokens of a decoder layer, mean over layers."""
    return sum(layers * tokens for layers, tokens in per_layer) / sum(layers for layers, _ in per_layer)


def _tower_flops(tower: Tower, grids: Sequence[Grid]) -> float:
    total = 0
    for grid in grids:
        patches = grid[0] * grid[1] * tower.merge**2
        tokens = patches + tower.extra
        linear = 8 * tower.width**2 + (6 if tower.gated else 4) * tower.width * tower.mlp
        windowed = tower.layers - len(tower.full) if tower.window else 0
        pairs = windowed * tower.merge**4 * _window_pairs(grid, tower.window) if windowed else 0
        pairs += (tower.layers - windowed) * tokens**2
        total += 2 * patches * tower.patch * tower.width + tower.layers * tokens * linear + 4 * pairs * tower.width
    return total


def attention_flops(tower: Tower, grids: Sequence[Grid], layer: int) -> int:
    """Of the attention that tokens receive in one ``layer`` of the tower, computed once more from q and k that are
    there: the class token's row, or the logits of all queries within their segments."""
    total = 0
    for grid in grids:
        tokens = grid[0] * grid[1] * tower.merge**2 + tower.extra
        windowed = tower.window and layer not in tower.full
        pairs = tower.merge**4 * _window_pairs(grid, tower.window) if windowed else tokens**2
        total += 2 * tower.width * (tokens if tower.extra else pairs)
    return total


def vip_flops(vip: Vip, shapes: Shapes, segments: Sequence[int]) -> int:
    """Of the predictor on one row, whose tokens attend within ``segments`` of so many tokens each. Values are counted
    as wide as they are, not as the keys, to which they are padded for fused kernels."""
    n, f = sum(segments), vip.width
    wide = f + vip.cond_width
    pairs = sum(size**2 for size in segments)
    ends = 2 * n * f * (vip.probes * shapes.decoder.heads + 1)
    condition = 2 * n * shapes.tower.width * vip.cond_width
    block = n * (4 * wide**2 + 4 * f**2 + 12 * f**2) + 2 * pairs * (wide + f)
    return ends + vip.blocks * (condition + block)


def _window_pairs(grid: Grid, side: int) -> int:
    """Sum of squared window sizes, in tokens, when a grid is cut in windows of side x side (smaller at the edges)."""
    rows, cols = (sum(min(side, size - start) ** 2 for start in range(0, size, side)) for size in grid)
    return rows * cols


@dataclass
class Measured:
    """Filled in when :func:`measure` ends."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    """Most memory that torch had allocated on the device; None on a CPU."""


@contextmanager
def measure(device: Any = "cpu") -> Iterator[Measured]:
    """Wall-clock and peak memory of a block, all work of a CUDA ``device`` included."""
    import torch

    device, measured = torch.device(device), Measured()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield measured
    if cuda:
        torch.cuda.synchronize(device)
        measured.peak_bytes = torch.cuda.max_memory_allocated(device)
    measured.seconds = time.perf_counter() - start
