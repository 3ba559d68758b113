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


def test_rows_without_boxes_have_no_part_in_the_mask_loss(rows) -> None:
    logits, targets = rows
    first, its = logits[: COUNTS[0]], targets[: COUNTS[0]]
    own = losses.mask_loss(logits, targets, COUNTS, boxed=[True, False])
    torch.testing.assert_close(own, losses.mask_loss(first, its, COUNTS[:1]))
    free = logits.clone().requires_grad_()
    none = losses.mask_loss(torch.stack([free, free]), targets, COUNTS, boxed=[False, False])
    none.backward()  # a batch without any has a loss, of nothing
    assert none.item() == 0 and free.grad.abs().sum() == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_whatever_the_floor(scale) -> None:
    group = torch.tensor([0, 0, 1, 1])
    for rewards in ([1.0, 1, 0, 0], [1.0, 1, 0, 1], [1.0, 1, 1, 1]):
        advantages, _ = losses.group_advantages(torch.tensor(rewards), group, None, scale, 0.0)
        assert advantages.isfinite().all() and (advantages[:2] == 0).all()


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


# --------------------------------------------------------------------------------------------------------------- policy

REWARDS = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 9.0, 0.5])
GROUP = torch.tensor([0, 0, 0, 1, 1, 2, 0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_by_hand(scale) -> None:
    """A group of four, one of two that agree and one of a single rollout."""
    advantages, std = losses.group_advantages(REWARDS, GROUP, scale=scale, std_floor=0.1)
    mean = (1 + 2 + 6 + 0.5) / 4
    spread = (sum((r - mean) ** 2 for r in (1, 2, 6, 0.5)) / 3) ** 0.5
    by = {"group": spread + 0.1, "batch": REWARDS.std().item() + 0.1, "none": 1.0}[scale]
    expected = [(1 - mean) / by, (2 - mean) / by, (6 - mean) / by, 0, 0, 0, (0.5 - mean) / by]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert std.tolist() == pytest.approx([spread, 0, 0], rel=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rollouts_without_a_reward_leave_their_group(scale) -> None:
    valid = torch.tensor([True, False, True, True, True, False, True])
    rewards = REWARDS.masked_fill(~valid, torch.nan)
    advantages, std = losses.group_advantages(rewards, GROUP, valid, scale)
    assert not advantages[~valid].any() and advantages.isfinite().all()
    alone, own = losses.group_advantages(REWARDS[valid], GROUP[valid], scale=scale)  # group 2 is gone
    torch.testing.assert_close(advantages[valid], alone)
    torch.testing.assert_close(std, torch.cat([own, torch.zeros(1)]))
    nobody = losses.group_advantages(rewards, GROUP, torch.zeros(7).bool(), scale)
    assert not nobody[0].any() and not nobody[1].any()


def test_std_floor() -> None:
    """Where a group's rewards differ by little only, a tiny floor blows the difference up and ours does not."""
    rewards, group = torch.tensor([1.0, 1.001]), torch.zeros(2, dtype=torch.long)
    std = 0.001 / 2**0.5
    for floor in (1e-4, 0.1):
        found = losses.group_advantages(rewards, group, std_floor=floor)[0]
        assert found.tolist() == pytest.approx([-0.0005 / (std + floor), 0.0005 / (std + floor)], rel=1e-3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 0.3, 1.4667])
def test_equal_rewards_have_no_advantage_whatever_the_rounding(scale, value) -> None:
    """Exactly zero: such rollouts are left out of the backward pass."""
    rewards = torch.cat([torch.full((8,), value), torch.tensor([0.0, 1.0])])
    group = torch.tensor([0] * 8 + [1] * 2)
    advantages, std = losses.group_advantages(rewards, group, scale=scale, std_floor=1e-4)
    assert not advantages[:8].any() and advantages[8:].all() and std[0] < 1e-6


def test_unknown_scale() -> None:
    with pytest.raises(ValueError, match="group, batch, none"):
        losses.group_advantages(REWARDS, GROUP, scale="std")


def test_policy_loss_is_clipped_on_both_sides() -> None:
    """Only where a step further would pay: above for good actions, below for bad ones."""
    ratio = torch.tensor([[1.0, 1.25, 1.5, 0.85, 0.5]]).repeat(2, 1)
    log_probs, old = ratio.log().requires_grad_(), torch.zeros(2, 5)
    advantages = torch.tensor([[2.0], [-1.0]])
    loss, clipped = losses.policy_loss(log_probs, old, advantages, epsilon=0.2, epsilon_high=0.3)
    expected = [[-2.0, -2.5, -2.6, -1.7, -1.0], [1.0, 1.25, 1.5, 0.85, 0.8]]
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert clipped.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, -1]]
    loss.sum().backward()
    moves = -advantages * ratio * (clipped == 0)
    torch.testing.assert_close(log_probs.grad, moves)
    assert (losses.policy_loss(log_probs, old, advantages, epsilon=0.2)[1] != 0).tolist() == [
        [False, True, True, False, False],
        [False, False, False, False, True],
    ]


def test_policy_loss_where_nothing_has_changed_is_reinforce() -> None:
    torch.manual_seed(0)
    log_probs, advantages = torch.randn(3, 4).requires_grad_(), torch.randn(3, 1)
    loss, clipped = losses.policy_loss(log_probs, log_probs.detach(), advantages)
    torch.testing.assert_close(loss, -advantages.expand(3, 4))
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages.expand(3, 4))
    assert not clipped.any()


def test_k3() -> None:
    half, quarter = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert losses.k3(half, quarter).item() == pytest.approx(0.5 + 0.693147 - 1, rel=1e-5)
    torch.manual_seed(0)
    policy, reference = (torch.randn(7).log_softmax(0) for _ in range(2))
    assert (losses.k3(policy, reference) > 0).all() and not losses.k3(policy, policy).any()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)
    found = losses.k3(policy[drawn], reference[drawn])
    exact = (policy.exp() * (policy - reference)).sum()
    assert abs(found.mean() - exact) < 4 * found.std() / 200_000**0.5
    assert abs((reference.exp() * (reference - policy)).sum() - exact) > 20 * found.std() / 200_000**0.5  # directed


def test_token_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    each = {
        "grpo": [1 / 2 / 3, 1 / 4 / 3],
        "bnpo": [1 / 6, 1 / 6],
        "dapo": [1 / 6, 1 / 6],
        "dr_grpo": [1 / (3 * 8), 1 / (3 * 8)],
    }
    for kind, (short, long) in each.items():
        expected = torch.tensor([[short, short, 0, 0], [long] * 4, [0.0] * 4])
        torch.testing.assert_close(losses.token_weights(mask, kind, 8), expected)
        assert not losses.token_weights(torch.zeros_like(mask), kind, 8).any()
    with pytest.raises(ValueError, match="grpo, bnpo, dr_grpo, dapo"):
        losses.token_weights(mask, "mean", 8)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_weighted_sums_are_the_means_they_stand_for(kind) -> None:
    """However the rollouts are cut, and however wide their padding."""
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 5, 2, 4])
    mask, loss = torch.arange(6) < lengths[:, None], torch.randn(5, 6)
    rows = [row[:length] for row, length in zip(loss, lengths)]
    whole = {
        "grpo": torch.stack([row.mean() for row in rows]).mean(),
        "dr_grpo": torch.cat(rows).sum() / (5 * 9),
    }.get(kind, torch.cat(rows).mean())
    weights = losses.token_weights(mask, kind, 9)
    for size in (1, 2, 5):
        parts = [(w * x).sum() for w, x in zip(weights.split(size), loss.split(size))]
        torch.testing.assert_close(sum(parts), whole)
    assert not weights[~mask].any()


def test_keep_decisions_are_bernoulli() -> None:
    torch.manual_seed(0)
    logits = torch.cat([3 * torch.randn(20), torch.tensor([0.0, 40.0, -40.0])])
    gate, keep = torch.distributions.Bernoulli(logits=logits), torch.rand(23) < 0.5
    torch.testing.assert_close(losses.keep_log_probs(logits, keep), gate.log_prob(keep.float()))
    torch.testing.assert_close(losses.bernoulli_entropy(logits), gate.entropy(), atol=1e-6, rtol=1e-5)
    assert losses.bernoulli_entropy(logits)[20].item() == pytest.approx(0.693147, abs=1e-6)
