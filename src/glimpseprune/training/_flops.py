"""FLOPs of a training step of the KL stage, forward and backward, from shapes alone: what perf/mfu is made of.

Counted as :mod:`glimpseprune.cost` counts, for each sample without its padding: the prompt through tower, projector and
the layers below K; glimpse and predictor; teacher and student behind them, or the answer behind the glimpse. Backward,
in units of the forward: a frozen matrix 1 (the gradient of its input), one that trains 2 (and its own), attention 2 (of
queries, keys, values and probabilities), the predictor 2. Nothing for what needs no gradient (the prompt below K, the
teacher). The gradient of the gate `stc` is made of those rows of attention that are kept: as many as the pressure aims
at. Against torch's counter that is within 2%, on tiny models.

Not counted, beside what ``cost`` leaves out: adapters, losses, the optimiser. Left out: the RL stage, whose cost is
that of what it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glimpseprune.cost import Shapes, Vip, layer_flops, prefill_flops, query_key_flops, row_flops, vip_flops
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
    private: int = 0
    """Layers of the method's own, through which the prompt goes where there is no glimpse."""


def of_sample(
    work: Work,
    text: int,
    layouts: Sequence[Layout],
    answer: int,
    estimator: str = "stc",
    looks: int = 1,
    begun: int = 0,
) -> float:
    """FLOPs of one sample in a step: ``text`` tokens, images, ``answer`` tokens (end of turn included), and so many
    positions of the glimpse; ``begun`` columns of its prompt, and its images, have run in another sample."""
    shapes, loss, depth, layers = work.shapes, work.loss, work.depth, work.shapes.decoder.layers
    visual = sum(layout.count for layout in layouts)
    prompt = text + visual
    parts = prefill_flops(shapes, text, layouts, [(layers, visual)])
    segments = window_ids([grid for layout in layouts for grid in layout.grids], work.window).bincount().tolist()
    head = answer * parts.lm_head
    weights = 2 if work.decoder_trains else 1
    total = (
        parts.tower
        + parts.projector
        + _run(work, depth, prompt - begun, begun)
        + 3 * vip_flops(work.vip, shapes, segments)
    )
    behind = answer if loss.answer and not work.private else 0
    keys = prompt if work.private else prompt + looks + behind
    total += 3 * row_flops(shapes.decoder, keys, work.vip.probes * looks)
    if work.asks:
        total += 2 * 2 * shapes.decoder.width**2 * looks  # W on the tokens, which need no gradient
    if work.private:
        total += _private(work, prompt, answer if loss.answer or loss.answer_kl else 0, head)
    elif loss.answer:  # the glimpse with the answer behind it, through every layer
        total += _run(work, layers - depth, prompt - begun, begun)
        total += _run(work, layers, answer + looks, prompt, weights=weights) + 2 * head
    else:  # of the last layer nothing behind queries and keys is used
        decoder = shapes.decoder
        probed = 2 * decoder.width * (decoder.heads + decoder.kv_heads) * decoder.head_width * looks
        total += _run(work, work.probed - 1, looks, prompt, weights=weights)
        total += _run(work, 1, looks, prompt) + weights * probed
    follow = answer - 1
    taught = loss.kl or loss.answer_kl or loss.attention
    if taught or loss.answer and work.private:
        if not loss.answer or work.private:
            total += _run(work, layers - depth, prompt - begun, begun)
        total += taught and _run(work, layers, follow, prompt) + head  # the teacher
    if loss.kl:
        kept, thinned = text + loss.target * visual, estimator == "stc" and loss.dropped is not None
        there = min(prompt, kept + loss.dropped) if thinned else prompt
        total += _run(work, depth, follow, prompt, weights=weights)
        total += _run(work, layers - depth, there + follow, weights=weights) + 2 * head
        if not work.decoder_trains and estimator == "stc":  # in the first layer queries, keys, values need no gradient
            decoder = shapes.decoder
            projections = 2 * decoder.width * (decoder.heads + 2 * decoder.kv_heads) * decoder.head_width
            total -= follow * (projections + 8 * (prompt + follow) * decoder.heads * decoder.head_width)
        if estimator == "stc":
            keys = there + follow + (prompt if thinned else 0)
            pairs = depth * follow * (prompt + follow) + (layers - depth) * (kept + follow) * keys
            total += 4 * pairs * shapes.decoder.heads * shapes.decoder.head_width
    return total


def _private(work: Work, prompt: int, answer: int, head: float) -> float:
    """The prompt through private layers, whose weights all train, and behind it an answer, where one is asked for: else
    of the last one queries and keys alone."""
    if not answer:
        return _run(work, work.private - 1, prompt, weights=2) + 3 * query_key_flops(work.shapes.decoder, prompt)
    follow = answer - 1
    return _run(work, work.depth, follow, prompt) + _run(work, work.private, prompt + follow, weights=2) + 2 * head


def _run(work: Work, layers: int, new: float, cached: int = 0, *, weights: float = 0.0) -> float:
    """``new`` tokens through ``layers``, forward, and backward where ``weights`` (what matrices cost there) is not
    0."""
    decoder = work.shapes.decoder
    attention = 4 * new * (cached + new) * decoder.heads * decoder.head_width
    matrices = layer_flops(decoder, new, cached) - attention
    return layers * (matrices * (1 + weights) + attention * (1 + (2 if weights else 0)))
