"""Rollouts of the RL stage: for each prompt sampled keep masks, each with sampled answers on its pruned cache.

The actions of a rollout are the Bernoulli decision of every visual token and the tokens of the answer. Their
log-probabilities are those of the very distribution that was sampled: the prompt is full in layers < K, only the
survivors run above, and the answer sees only survivors in every layer (docs/method.md §3). The prompt's layers < K run
once for all its rollouts, which take from its cache no more than their survivors; above, rollouts with the same mask
are one prompt with several answers. Masks are drawn at a pruner's first stop; what it decides at later ones it decides
itself.

Left out: top-k, top-p and repetition penalties, under which the ratio of two policies is no longer that of their
log-probabilities; ``generate`` has them for inference. Speculative or paged decoding: answers here are short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glimpseprune.backbones import LVLM
from glimpseprune.decoder import Pruner, advance, branch, cut, follow, rows
from glimpseprune.generate import News
from glimpseprune.losses import keep_log_probs
from glimpseprune.steps import decoding, draw
from glimpseprune.types import Encoded, Prefill


def sample_keep(state: Prefill, keep_logits: Tensor, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """A keep mask for each of R rollouts: decisions bool [R, S], True on text, and their log-probabilities [R, S].

    ``keep_logits`` [N] of all visual tokens are divided by ``temperature``; ``index`` [R]: the prompt of each rollout.
    """
    logits = at_columns(state, keep_logits)[index] / temperature  # [R, S]
    visual = state.visual[index]
    keep = torch.bernoulli(logits.sigmoid()).bool()
    return keep | ~visual, keep_log_probs(logits, keep) * visual


@torch.no_grad()
def answer(
    backbone: LVLM,
    state: Prefill,
    max_new_tokens: int,
    ends: Sequence[int],
    *,
    temperature: float = 1.0,
    synced: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample an answer behind each of R prompts.

    Args:
        state: as :func:`prefilled` gives them.
        ends: ids of the tokens that end an answer.
        synced: other processes hold parts of the weights, so all go on until the last of them has finished.

    Returns:
        Tokens [R, T] (right-padded, end of turn included), their log-probabilities [R, T] (0 on padding), mask [R, T],
        and ended [R], False where an answer was cut. Rows that have ended leave the batch once half of it has.
    """
    device, count = backbone.device, len(state.mask)
    tokens = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    log_probs = torch.zeros(count, max_new_tokens, device=device)
    mask = torch.zeros(count, max_new_tokens, dtype=torch.bool, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    ending = torch.tensor(list(ends), device=device)
    alive = torch.arange(count, device=device)  # rows of the batch -> rollouts
    running = torch.ones(count, dtype=torch.bool, device=device)
    logits, steps, length = backbone.logits(state.hidden[:, -1]), None, 0
    news: deque[News] = deque()
    for step in range(max_new_tokens):
        distribution = (logits.float() / temperature).log_softmax(-1)
        drawn = draw(distribution.exp())  # [R']
        chance = distribution.gather(1, drawn[:, None])[:, 0]
        tokens[alive, step] = drawn.masked_fill(~running, 0)
        log_probs[alive, step] = chance.masked_fill(~running, 0.0)
        mask[alive, step] = running
        live, running = running, running & ~torch.isin(drawn, ending)
        ended[alive] = ~running
        news.append(News(live, running, drawn, synced))
        goes_on, last = True, step + 1 == max_new_tokens
        while goes_on and news and (last or len(news) > news[0].delay):
            was_alive, goes_on, _ = news.popleft().read()
            length += was_alive
        if not goes_on or last:
            break
        steps = decoding(backbone, branch(state), graphs=not synced) if steps is None else steps
        if steps.replay is None and 2 * (left := int(running.sum())) <= len(running):
            kept = running.nonzero()[:, 0] if left else torch.zeros(1, dtype=torch.long, device=device)
            steps.rows(kept)
            alive, running, drawn = alive[kept], running[kept], drawn[kept]
        logits = steps(drawn)
    if steps is not None:
        steps.close()
    return tokens[:, :length], log_probs[:, :length], mask[:, :length], ended


def score(
    backbone: LVLM, state: Prefill, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers' ``tokens`` and the entropies where they were drawn, both [r, T], with gradient.

    ``state``: the r prompts as :func:`prefilled` gives them. Before any update the log-probabilities are those that
    :func:`answer` returned. 0 on padding.
    """
    logits = follow(backbone, state, tokens, mask).float() / temperature
    log_probs = logits.log_softmax(-1)  # [r, T, vocabulary]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(2, tokens[..., None])[..., 0] * mask, entropy * mask


def prefilled(
    backbone: LVLM, encoded: Encoded, pruner: Pruner, state: Prefill, index: Tensor, keep: Tensor | None
) -> Prefill:
    """Prompts ``index`` [R] of a ``state`` that waits at the pruner's first stop, behind all stops and layers, hidden
    states of the last column alone; what occurs several times is run once.

    ``keep`` [R, S]: the first decision of each; None: the pruner's own.
    """
    alike = index[:, None] if keep is None else torch.cat([index[:, None], keep], 1)
    _, place = alike.unique(dim=0, return_inverse=True)  # [R]
    count = torch.arange(len(index), device=index.device)
    first = count.new_full((int(place.max()) + 1,), len(index)).scatter_reduce(0, place, count, "amin")  # [U]
    if keep is None:
        state = rows(state, index[first])
    else:
        state = cut(state, keep[first], pruner.stops[0] if pruner.stops else None, index=index[first])
    state = advance(backbone, encoded, state, pruner)
    return rows(replace(state, hidden=state.hidden[:, -1:]), place)


def at_columns(state: Prefill, values: Tensor) -> Tensor:
    """Values [N] of the visual tokens at their columns [B, S], 0 elsewhere."""
    return values.new_zeros(state.visual.shape).masked_scatter(state.visual, values)
