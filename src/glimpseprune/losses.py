"""Pure functions of training: each takes tensors and returns tensors. Imports only torch.

docs/method.md §2 and §3; dice, bce and answer_loss were checked against HVision-NKU/GlimpsePrune@091a3d5, advantages
and the policy's losses against its recordings. Left out: focal and ranking variants of the mask loss, which the
published recipe does not use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(teacher_logits: Tensor, student_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) in nats, mean over the True positions of ``mask`` [B, T]; logits [B, T, vocabulary]."""
    teacher, student = (x[mask].float().log_softmax(-1) for x in (teacher_logits, student_logits))  # [M, vocabulary]
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / max(len(teacher), 1)


def answer_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of answer tokens: logits [B, T, vocabulary] predict ids [B, T]; mean over ``mask`` [B, T]."""
    return F.cross_entropy(logits[mask].float(), ids[mask], reduction="sum") / max(int(mask.sum()), 1)


def attention_kl(target: Tensor, logits: Tensor, counts: Sequence[int]) -> Tensor:
    """KL(``target`` || softmax of ``logits``) over each row's tokens, mean over rows; [N], rows of ``counts`` tokens.

    ``target`` [N] sums to 1 over each row. Source: TwigVLM++, arXiv 2503.14075 v3, there with a head's scores.
    """
    rows = zip(target.split(list(counts)), logits.float().split(list(counts)))
    return torch.stack([F.kl_div(x.log_softmax(-1), t, reduction="sum") for t, x in rows]).mean()


def dice(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """1 - 2 |p t| / (|p| + |t|) per row, mean over rows. logits, targets [N], rows of ``counts`` tokens."""
    return mask_loss(logits, targets, counts, dice=1.0, bce=0.0)


def bce(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """Binary cross-entropy, mean over each row's tokens, then over rows."""
    return mask_loss(logits, targets, counts, dice=0.0, bce=1.0)


def mask_loss(
    logits: Tensor,
    targets: Tensor,
    counts: Sequence[int],
    dice: float = 1.0,
    bce: float = 0.1,
    eps: float = 1e-6,
    boxed: Sequence[bool] | None = None,
) -> Tensor:
    """The published recipe's loss against box targets [N], its terms weighted by ``dice`` and ``bce``.

    logits [N], or [outputs, N] under deep supervision, where the losses of all outputs are added. Rows that are not
    ``boxed`` have no part in it, for nobody has said what they should keep; 0 where none is.
    """
    if logits.ndim == 2:
        return torch.stack([mask_loss(row, targets, counts, dice, bce, eps, boxed) for row in logits]).sum()
    losses = []
    for row, (x, t) in enumerate(zip(logits.float().split(list(counts)), targets.float().split(list(counts)))):
        if boxed is None or boxed[row]:
            p = x.sigmoid()
            overlap = 1 - (2 * (p * t).sum() + eps) / (p.sum() + t.sum() + eps)
            losses.append(dice * overlap + bce * F.binary_cross_entropy_with_logits(x, t))
    return torch.stack(losses).mean() if losses else 0 * logits.float().sum()


def pressure(gate: Tensor, counts: Sequence[int], kind: str = "mean", target: float = 0.0) -> Tensor:
    """What pruning costs when it is not done; gate [N] in [0, 1], rows of ``counts`` tokens.

    ``mean``: the mean gate of each row, mean over rows. ``hinge``: how far each row's exceeds ``target``, mean over
    rows. ``budget``: how far the mean over rows exceeds ``target``, so that a question that needs more tokens may take
    what another one leaves.
    """
    means = torch.stack([row.mean() for row in gate.float().split(list(counts))])  # [B]
    if kind == "mean":
        return means.mean()
    if kind == "hinge":
        return (means - target).relu().mean()
    if kind == "budget":
        return (means.mean() - target).relu()
    raise ValueError(f"unknown pressure '{kind}': choices are mean, hinge, budget")


# --------------------------------------------------------------------------------------------------- policy (stage 2)


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    scale: str = "group",
    std_floor: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """How much better than its group each rollout did: (r - mean) / (std + ``std_floor``).

    Args:
        rewards, group: [R], and which prompt each rollout answers, numbered from 0.
        valid: bool [R]; rollouts without a reward count in no mean and get advantage 0.
        scale: whose (unbiased) std divides: ``group``, ``batch``, or ``none`` (no division).
        std_floor: TRL's is 1e-4. Where every answer is right the rewards of a group differ only by their pruning term,
            and dividing by so small a std made pruning run away (docs/method.md §5).

    Returns:
        Advantages [R], and the std of each group [P].

    Raises:
        ValueError: unknown ``scale``.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"unknown scale '{scale}': choices are group, batch, none")
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    weight, groups = valid.double(), int(group.max()) + 1
    rewards = rewards.double().masked_fill(~valid, 0.0)  # the mean of equal float32 values is then exactly that value

    def total(values: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=values.dtype, device=values.device).index_add(0, group, values)  # [P]

    count = total(weight)
    centred = (rewards - (total(rewards) / count.clamp(min=1))[group]) * weight
    std = (total(centred**2) / (count - 1).clamp(min=1)).sqrt()
    if scale != "none":
        by = std[group] if scale == "group" else rewards[valid].std() if int(valid.sum()) > 1 else torch.zeros(())
        centred = centred / (by + std_floor).clamp(min=torch.finfo(torch.float64).tiny)  # equal ones stay 0
    return centred.float(), std.float()


def policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - ``epsilon``, 1 + ``epsilon_high``) A) per action, r = exp(log_probs - old); nothing summed.

    log_probs, old [R, T]; advantages [R, 1] or [R, T]. ``epsilon_high`` defaults to ``epsilon``. Returns the loss and
    where the ratio was clipped: -1 below, 1 above, 0 not. Source: Schulman et al. 2017; DAPO for the upper bound.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (log_probs - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    clipped = ((ratio > 1 + high) & (advantages > 0)).long() - ((ratio < 1 - epsilon) & (advantages < 0)).long()
    return loss, clipped


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) per action, estimated without bias and never negative: e^d - d - 1 with
    d = reference - log_probs (Schulman's third estimator)."""
    d = reference - log_probs
    return d.exp() - d - 1


def token_weights(mask: Tensor, loss_type: str, max_length: int) -> Tensor:
    """Weights [R, T] with which ``loss_type`` sums per-token losses of R completions; ``mask`` [R, T].

    ``grpo``: mean over each completion's tokens, then over completions. ``bnpo`` and ``dapo``: mean over all tokens
    (``dapo``: of all processes, which the caller sees to). ``dr_grpo``: sum over tokens / (R ``max_length``).
    Because they are fixed before the batch is cut, micro-batches add up to exactly the same gradient.

    Raises:
        ValueError: unknown ``loss_type``.
    """
    mask = mask.float()
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(len(mask), 1)
    if loss_type in ("bnpo", "dapo"):
        return mask / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (max(len(mask), 1) * max_length)
    raise ValueError(f"unknown loss_type '{loss_type}': choices are grpo, bnpo, dr_grpo, dapo")


def keep_log_probs(logits: Tensor, keep: Tensor) -> Tensor:
    """Log-probability of each Bernoulli decision ``keep`` (bool) under sigmoid(``logits``), elementwise."""
    return -F.binary_cross_entropy_with_logits(logits, keep.to(logits.dtype), reduction="none")


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of keeping with probability sigmoid(``logits``), elementwise."""
    return F.softplus(logits) - logits * logits.sigmoid()
