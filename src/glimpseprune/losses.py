"""Pure functions of training: each takes tensors and returns a scalar. Imports only torch.

method.md §2; dice, bce and answer_loss were checked against HVision-NKU/GlimpsePrune@091a3d5. Left out: focal and
ranking variants, which the published recipe does not use.
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


def dice(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """1 - 2 |p t| / (|p| + |t|) per row, mean over rows. logits, targets [N], rows of ``counts`` tokens."""
    return mask_loss(logits, targets, counts, dice=1.0, bce=0.0)


def bce(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """Binary cross-entropy, mean over each row's tokens, then over rows."""
    return mask_loss(logits, targets, counts, dice=0.0, bce=1.0)


def mask_loss(
    logits: Tensor, targets: Tensor, counts: Sequence[int], dice: float = 1.0, bce: float = 0.1, eps: float = 1e-6
) -> Tensor:
    """The published recipe's loss against box targets [N], its terms weighted by ``dice`` and ``bce``.

    logits [N], or [outputs, N] under deep supervision, where the losses of all outputs are added.
    """
    if logits.ndim == 2:
        return torch.stack([mask_loss(row, targets, counts, dice, bce, eps) for row in logits]).sum()
    losses = []
    for x, t in zip(logits.float().split(list(counts)), targets.float().split(list(counts))):
        p = x.sigmoid()
        overlap = 1 - (2 * (p * t).sum() + eps) / (p.sum() + t.sum() + eps)
        losses.append(dice * overlap + bce * F.binary_cross_entropy_with_logits(x, t))
    return torch.stack(losses).mean()


def pressure(gate: Tensor, counts: Sequence[int], kind: str = "mean", target: float = 0.0) -> Tensor:
    """What pruning costs when it is not done: the mean gate of each row, ``mean``, or how far it exceeds ``target``,
    ``hinge``; mean over rows. gate [N] in [0, 1]."""
    means = torch.stack([row.mean() for row in gate.float().split(list(counts))])  # [B]
    if kind == "mean":
        return means.mean()
    if kind == "hinge":
        return (means - target).relu().mean()
    raise ValueError(f"unknown pressure '{kind}': choices are mean, hinge")
