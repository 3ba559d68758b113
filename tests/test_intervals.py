"""Error bars against the normal approximation and against each other; the same for the same seed."""

import pytest
import torch

from glimpseprune.intervals import Sums, interval, resampled


def scores(count: int = 600) -> torch.Tensor:
    """Of three methods: one is right on 70%, one is wrong where that is and on 5% more, one is always right."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.rand(count, generator=generator)
    return torch.stack([draw < 0.7, draw < 0.65, draw < 2], 1).double()


def normal(values: torch.Tensor) -> list[float]:
    """The 95% interval of a mean, were it normally distributed."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return [mean - half, mean + half]


def test_intervals_are_those_of_the_normal_approximation():
    found, kinds = scores(), torch.zeros(600, dtype=torch.long)
    sums = resampled(found, kinds, 800)
    assert sums.shape == (800, 1, 4) and (sums[..., 3] == 600).all()
    means = sums[:, 0, :3] / 600
    for method in (0, 1):
        assert interval(means[:, method]) == pytest.approx(normal(found[:, method]), abs=0.006)
    low, high = interval(means[:, 0] - means[:, 1])
    assert [low, high] == pytest.approx(normal(found[:, 0] - found[:, 1]), abs=0.004)
    assert high - low < 0.5 * (interval(means[:, 0])[1] - interval(means[:, 0])[0])  # paired: much surer
    assert interval(means[:, 2]) == [1, 1]


def test_seed_decides_and_the_global_generator_is_left_alone():
    found, kinds = scores(40), torch.arange(40) % 3
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once = resampled(found, kinds, 20, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(resampled(found, kinds, 20, seed=1), once)
    assert not torch.equal(resampled(found, kinds, 20, seed=2), once)
    assert (once[..., -1].sum(1) == 40).all() and once[..., -1].std(0).min() > 0  # kinds are drawn, too


def test_sums_are_per_kind():
    metric = Sums(2, 1)
    metric.update(torch.tensor([[1.0], [0.5], [0.25]], dtype=torch.float64), torch.tensor([0, 1, 1]))
    assert metric.compute().tolist() == [[1.0, 1.0], [0.75, 2.0]]


def test_a_resampling_without_a_kind_counts_for_nothing():
    assert interval(torch.tensor([float("nan"), 0.5, 0.5])) == [0.5, 0.5]
