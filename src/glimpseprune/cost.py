"""What pruning costs and saves, counted from shapes alone: FLOPs, KV bytes, mean visual tokens; and a stopwatch.

A multiply-add is two FLOPs. Counted: every matrix product of the vision tower (patch embedding, windowed and full
attention), merger or projector, decoder layers, glimpse position, VIP and last-position lm_head. Not counted: norms,
activations, softmax, rotary embeddings, biases, embedding look-ups, gathers, and the D x D projection of the glimpse
embeddings, which does not depend on the input. Attention counts every query-key pair, as kernels that do not skip the
masked half compute it; ``causal=True`` counts the half that a causal kernel needs. A pruning schedule is a list of
stages ``(decoder layers, visual tokens they saw)``, so that methods with several stages are counted alike.

Source: docs/method.md §1, docs/evaluation.md §4. The published tool (HVision-NKU/GlimpsePrune@210b56d,
cal_flops.py) counts decoder layers as here but leaves out: the text tokens in the layers after pruning (it passes the
number of kept visual tokens as the whole length); vision tower, merger and lm_head, which pruning does not shrink and
which therefore bring the ratio nearer to 1; the glimpse position; in the VIP the input, conditioning and output
projections, and all but one position of W_o. It also lets the VIP attend across images, where the method does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .types import Grid

Stage = tuple[int, int]
"""Decoder layers, and how many visual tokens they saw."""


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
    """The visual importance predictor, as in ``vip.py``; ``probes`` glimpse layers feed it."""

    width: int = 256
    cond_width: int = 512
    blocks: int = 4
    probes: int = 1
    window: bool = False
    """Attend within the vision tower's windows only."""

    @classmethod
    def of(cls, pruner: Any) -> Vip | None:
        """That of a pruner; None for a method without one."""
        if not hasattr(pruner, "vip"):
            return None
        options = pruner.options
        probes, blocks = len(options.probe_layers), len(options.vision_layers)
        return cls(options.width, options.cond_width, blocks, probes, window=options.window)


@dataclass(frozen=True)
class Shapes:
    """A vision-language model as its matrix shapes."""

    decoder: Decoder
    tower: Tower
    projector: tuple[tuple[int, int], ...]
    """Linear layers (in, out) that each visual token passes between tower and decoder."""

    @classmethod
    def from_config(cls, config: Any) -> Shapes:
        """From a Hugging Face config with ``text_config`` and ``vision_config`` of the Qwen2.5-VL or CLIP form."""
        text, vision = config.text_config, config.vision_config
        decoder = Decoder(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            mlp=text.intermediate_size,
            vocab=text.vocab_size,
        )
        if hasattr(vision, "spatial_merge_size"):
            merge = vision.spatial_merge_size
            tower = Tower(
                layers=vision.depth,
                width=vision.hidden_size,
                mlp=vision.intermediate_size,
                patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
                gated=True,
                merge=merge,
                window=vision.window_size // merge // vision.patch_size,
                full=tuple(vision.fullatt_block_indexes),
            )
            merged = merge**2 * tower.width
            return cls(decoder, tower, ((merged, merged), (merged, decoder.width)))
        tower = Tower(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            patch=vision.num_channels * vision.patch_size**2,
            extra=1,
        )
        return cls(decoder, tower, ((tower.width, decoder.width), (decoder.width, decoder.width)))


_QWEN_TOWER = Tower(32, 1280, 3420, 3 * 2 * 14**2, gated=True, merge=2, window=4, full=(7, 15, 23, 31))
_CLIP_TOWER = Tower(24, 1024, 4096, 3 * 14**2, extra=1)

SHAPES = {
    "qwen2.5-vl-3b": Shapes(
        Decoder(36, 2048, 16, 2, 128, 11008, 151936), _QWEN_TOWER, ((5120, 5120), (5120, 2048))
    ),
    "qwen2.5-vl-7b": Shapes(
        Decoder(28, 3584, 28, 4, 128, 18944, 152064), _QWEN_TOWER, ((5120, 5120), (5120, 3584))
    ),
    "llava-1.5-7b": Shapes(
        Decoder(32, 4096, 32, 32, 128, 11008, 32064), _CLIP_TOWER, ((1024, 4096), (4096, 4096))
    ),
    "llava-1.5-13b": Shapes(
        Decoder(40, 5120, 40, 40, 128, 13824, 32064), _CLIP_TOWER, ((1024, 5120), (5120, 5120))
    ),
}  # fmt: skip
"""From the config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct and llava-hf/llava-1.5-{7b,13b}-hf."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one prefill, by part."""

    tower: float
    projector: float
    decoder: float
    glimpse: float
    vip: float
    extra: float
    lm_head: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def prunable(self) -> float:
        """Without tower, projector and lm_head: what the paper's ratio is about."""
        return self.decoder + self.glimpse + self.vip + self.extra


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
    """The same of decoder, glimpse and VIP alone."""
    kv_bytes: int
    """Of the cache at the first answer token."""


def stages(layers: int, visual: int, cuts: Iterable[tuple[int, int]] = ()) -> list[Stage]:
    """The schedule of a decoder of ``layers`` layers on ``visual`` tokens, from ``cuts`` in order: (layers that have
    run by then, visual tokens kept). No cut: unpruned."""
    schedule, depth = [], 0
    for after, kept in (*cuts, (layers, visual)):
        schedule.append((after - depth, visual))
        depth, visual = after, kept
    return schedule


def account(
    shapes: Shapes,
    text: int,
    grids: Sequence[Grid],
    schedule: Sequence[Stage],
    vip: Vip | None = None,
    *,
    extra: float = 0.0,
    prune_cache: bool = True,
    itemsize: int = 2,
) -> Account:
    """Everything about one sample: ``text`` tokens and images of ``grids`` under a pruning ``schedule``.

    Args:
        vip: given for a glimpse pruner, which then also pays for its glimpse position in the first stage.
        extra: FLOPs of another pruner's scores.
        prune_cache: whether the layers before a cut drop the pruned columns from their cache too.
        itemsize: bytes of a cached number.
    """
    flops = prefill_flops(shapes, text, grids, schedule, vip, extra=extra)
    visual = sum(rows * cols for rows, cols in grids)
    full = prefill_flops(shapes, text, grids, stages(shapes.decoder.layers, visual))
    kept = schedule[-1][1]
    cached = [(layers, text + (kept if prune_cache else seen)) for layers, seen in schedule]
    return Account(
        kept=kept,
        mean_tokens=mean_visual_tokens(schedule),
        flops=flops.total,
        ratio=flops.total / full.total,
        decoder_ratio=flops.prunable / full.prunable,
        kv_bytes=kv_bytes(shapes, cached, itemsize),
    )


def prefill_flops(
    shapes: Shapes,
    text: int,
    grids: Sequence[Grid],
    schedule: Sequence[Stage],
    vip: Vip | None = None,
    *,
    extra: float = 0.0,
    causal: bool = False,
) -> Flops:
    """FLOPs of one prefill, by part; arguments as in :func:`account`.

    Raises:
        ValueError: the schedule does not run every layer once.
    """
    decoder = shapes.decoder
    if sum(layers for layers, _ in schedule) != decoder.layers:
        raise ValueError(f"schedule {list(schedule)} does not add up to {decoder.layers} layers")
    visual = sum(rows * cols for rows, cols in grids)
    probed = schedule[0][0]  # layers that the glimpse runs through
    return Flops(
        tower=_tower_flops(shapes.tower, grids),
        projector=visual * sum(2 * width_in * width_out for width_in, width_out in shapes.projector),
        decoder=sum(layers * layer_flops(decoder, text + seen, causal=causal) for layers, seen in schedule),
        glimpse=probed * layer_flops(decoder, 1, text + visual, causal=causal) if vip else 0,
        vip=_vip_flops(vip, shapes, grids) if vip else 0,
        extra=extra,
        lm_head=2 * decoder.width * decoder.vocab,
    )


def decode_flops(shapes: Shapes, cached: int | Sequence[Stage]) -> float:
    """FLOPs of one new token, lm_head included, on ``cached`` columns: a number, or (layers, columns) pairs."""
    decoder = shapes.decoder
    per_layer = [(decoder.layers, cached)] if isinstance(cached, int) else cached
    run = sum(layers * layer_flops(decoder, 1, columns) for layers, columns in per_layer)
    return run + 2 * decoder.width * decoder.vocab


def layer_flops(decoder: Decoder, new: int, cached: int = 0, *, causal: bool = False) -> float:
    """FLOPs of one decoder layer for ``new`` tokens after ``cached`` ones."""
    width = decoder.heads * decoder.head_width
    pairs = new * cached + (new * (new + 1) // 2 if causal else new**2)
    linear = 2 * decoder.width * (2 * width + 2 * decoder.kv_heads * decoder.head_width + 3 * decoder.mlp)
    return new * linear + 4 * pairs * width


def kv_bytes(shapes: Shapes, cached: int | Sequence[Stage], itemsize: int = 2) -> int:
    """Bytes of a cache of ``cached`` columns: a number for all layers, or (layers, columns) pairs."""
    decoder = shapes.decoder
    per_layer = [(decoder.layers, cached)] if isinstance(cached, int) else cached
    return sum(layers * columns for layers, columns in per_layer) * 2 * decoder.kv_heads * decoder.head_width * itemsize


def mean_visual_tokens(schedule: Sequence[Stage]) -> float:
    """Visual tokens that a decoder layer saw, mean over layers."""
    return sum(layers * seen for layers, seen in schedule) / sum(layers for layers, _ in schedule)


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


def _vip_flops(vip: Vip, shapes: Shapes, grids: Sequence[Grid]) -> float:
    n, f = sum(rows * cols for rows, cols in grids), vip.width
    wide = f + vip.cond_width
    side = shapes.tower.window if vip.window else 0
    pairs = sum(_window_pairs(grid, side) if side else (grid[0] * grid[1]) ** 2 for grid in grids)
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
