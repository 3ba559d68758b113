"""FLOPs of a training step of the KL stage, forward and backward, from shapes alone: what perf/mfu is made of.

Counted as :mod:`glimpseprune.cost` counts, for each sample without its padding: the prompt through tower, projector and
the layers below K; glimpse and predictor; teacher and student behind them, or the answer behind the glimpse. Backward,
in units of the forward: a frozen matrix 1 (the gradient of its input), one that trains 2 (and its own), attention 2 (of
queries, keys, values and probabilities), the predictor 2. Nothing for what needs no gradient (the prompt below K, the
teacher). The gate `stc` runs the student's attention once more, 8 channels per head wider, and half of that backward.
Against torch's counter that is within 2%, on tiny models.

Not counted, beside what ``cost`` leaves out: adapters, losses, the optimiser. Left out: the RL stage, whose cost is
that of what it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glimpseprune.cost import Shapes, Vip, layer_flops, prefill_flops, row_flops, vip_flops
from glimpseprune.options import LossOptions
from glimpseprune.types import Layout
from glimpseprune.vip import window_ids


@dataclass(frozen=True)
class Work:
    """What a step of the KL stage runs, whatever the sample."""

    shapes: Shapes
    vip: Vip
    window: int | None
    """Side of the predictor's windows."""
    depth: int
    """K."""
    probed: int
    """Layers that the glimpse runs through."""
    loss: LossOptions
    decoder_trains: bool = False
    asks: bool = False
    """Whether the glimpse is made of the question's tokens."""


def of_sample(
    work: Work, text: int, layouts: Sequence[Layout], answer: int, estimator: str = "stc", looks: int = 1
) -> float:
    """FLOPs of one sample in a step: ``text`` tokens, images, ``answer`` tokens (end of turn included), and so many
    positions of the glimpse."""
    shapes, loss, depth, layers = work.shapes, work.loss, work.depth, work.shapes.decoder.layers
    visual = sum(layout.count for layout in layouts)
    prompt = text + visual
    parts = prefill_flops(shapes, text, layouts, [(layers, visual)])
    segments = window_ids([grid for layout in layouts for grid in layout.grids], work.window).bincount().tolist()
    head = answer * parts.lm_head
    weights = 2 if work.decoder_trains else 1
    total = parts.tower + parts.projector + _run(work, depth, prompt) + 3 * vip_flops(work.vip, shapes, segments)
    behind = answer if loss.answer else 0
    total += 3 * row_flops(shapes.decoder, prompt + looks + behind, work.vip.probes * looks)
    if work.asks:
        total += 2 * 2 * shapes.decoder.width**2 * looks  # W on the tokens, which need no gradient
    if loss.answer:  # the glimpse with the answer behind it, through every layer
        total += _run(work, layers - depth, prompt)
        total += _run(work, layers, answer + looks, prompt, weights=weights) + 2 * head
    else:  # of the last layer nothing behind queries and keys is used
        decoder = shapes.decoder
        probed = 2 * decoder.width * (decoder.heads + decoder.kv_heads) * decoder.head_width * looks
        total += _run(work, work.probed - 1, looks, prompt, weights=weights)
        total += _run(work, 1, looks, prompt) + weights * probed
    if loss.kl:
        follow, whole = answer - 1, prompt + answer - 1
        total += _run(work, depth, follow, prompt) + _run(work, layers - depth, whole) + head  # the teacher
        width = shapes.decoder.head_width
        gate = 1.5 * (width + 8) / width if estimator == "stc" else 0.0
        total += _run(work, depth, follow, prompt, weights=weights, gate=gate)
        total += _run(work, layers - depth, whole, weights=weights, gate=gate) + 2 * head
    return total


def _run(work: Work, layers: int, new: int, cached: int = 0, *, weights: float = 0.0, gate: float = 0.0) -> float:
    """``new`` tokens through ``layers``, forward, and backward where ``weights`` (what matrices cost there) is not 0;
    ``gate``: what a gate adds, in units of the attention's forward."""
    decoder = work.shapes.decoder
    attention = 4 * new * (cached + new) * decoder.heads * decoder.head_width
    matrices = layer_flops(decoder, new, cached) - attention
    return layers * (matrices * (1 + weights) + attention * (1 + (2 if weights else 0) + gate))
