"""Losses against their formulas, on ragged batches."""

from __future__ import annotations

import pytest
import torch

from glimpseprune import losses

COUNTS = [5, 3]


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(8), torch.tensor([1, 0, 0, 1, 0, 0, 1, 0]).bool()


def test_kl_is_zero_for_equals_and_right_for_two_outcomes() -> None:
    mask = torch.tensor([[True, False]])
    teacher = torch.tensor([[[0.0, 0.0], [9.0, 1.0]]])
    student = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
    assert losses.kl(teacher, teacher, mask).item() == pytest.approx(0.0, abs=1e-7)
    q = torch.tensor([0.0, 2.0]).softmax(0)
    expected = sum(0.5 * (torch.tensor(0.5) / p).log() for p in q)
    assert losses.kl(teacher, student, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.kl(teacher, student, torch.zeros_like(mask)).item() == 0.0


def test_answer_loss_is_the_mean_over_answer_tokens() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    each = [-logits[b, t].log_softmax(0)[ids[b, t]] for b, t in mask.nonzero().tolist()]
    assert losses.answer_loss(logits, ids, mask).item() == pytest.approx((sum(each) / 4).item(), rel=1e-6)


def test_mask_losses_are_per_row_then_mean(rows) -> None:
    logits, targets = rows
    dices, bces = [], []
    for row, target in zip(logits.split(COUNTS), targets.float().split(COUNTS)):
        p = row.sigmoid()
        dices.append(1 - (2 * (p * target).sum() + 1e-6) / (p.sum() + target.sum() + 1e-6))
        bces.append(-(target * p.log() + (1 - target) * (1 - p).log()).mean())
    dice, bce = sum(dices) / 2, sum(bces) / 2
    torch.testing.assert_close(losses.dice(logits, targets, COUNTS), dice)
    torch.testing.assert_close(losses.bce(logits, targets, COUNTS), bce)
    torch.testing.assert_close(losses.mask_loss(logits, targets, COUNTS), dice + 0.1 * bce)
    torch.testing.assert_close(losses.mask_loss(logits, targets, COUNTS, dice=0.5, bce=2.0), 0.5 * dice + 2 * bce)
    deep = torch.stack([logits, logits])
    torch.testing.assert_close(losses.mask_loss(deep, targets, COUNTS), 2 * (dice + 0.1 * bce))


def test_perfect_masks_cost_nothing() -> None:
    targets = torch.tensor([True, False, False])
    assert losses.mask_loss(targets.float() * 200 - 100, targets, [3]).item() == pytest.approx(0.0, abs=1e-6)
    nothing = torch.zeros(3).bool()
    assert losses.dice(torch.full((3,), -100.0), nothing, [3]).item() == pytest.approx(0.0, abs=1e-6)


def test_pressure(rows) -> None:
    gate = rows[0].sigmoid().requires_grad_()
    means = torch.stack([row.mean() for row in gate.split(COUNTS)])
    torch.testing.assert_close(losses.pressure(gate, COUNTS), means.mean())
    target = means.mean().item()
    expected = (means - target).clamp(min=0).mean()
    torch.testing.assert_close(losses.pressure(gate, COUNTS, "hinge", target), expected)
    assert losses.pressure(gate, COUNTS, "hinge", 1.0).item() == 0.0
    below, above = means.argmin(), means.argmax()
    losses.pressure(gate, COUNTS, "hinge", target).backward()
    gradients = gate.grad.split(COUNTS)
    assert not gradients[below].any() and (gradients[above] > 0).all()
    with pytest.raises(ValueError, match="mean, hinge"):
        losses.pressure(gate, COUNTS, "sum")
