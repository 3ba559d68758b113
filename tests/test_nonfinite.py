"""Non-finite and exploding losses: what stops a run, and what a healthy one may do. (Whole runs: test_watch.py)"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from glimpseprune.options import WatchOptions
from glimpseprune.running.nonfinite import StopOnNonFinite, Usual


def stopper(**options: Any) -> StopOnNonFinite:
    return StopOnNonFinite("", WatchOptions(**options))


def test_what_is_not_finite_stops_at_once_and_names_its_ranks():
    fine, nan, inf = [1.0, 2.0], [math.nan, math.nan], [math.inf, 2.0]
    assert stopper().verdict([fine, fine], signed=False) == (None, [])
    reason, ranks = stopper().verdict([[1.0, math.nan], nan], signed=False)  # gradients are exchanged: all have it
    assert "loss is nan" in reason and ranks == [1]
    assert stopper(explode=None).verdict([inf, fine, inf], signed=True)[1] == [0, 2]
    reason, ranks = stopper().verdict([[1.0, math.inf], [1.0, math.inf]], signed=False)
    assert "gradient" in reason and ranks == [0, 1]


def test_an_explosion_is_far_above_what_is_usual():
    callback = stopper(explode=20.0)
    for step in range(30):
        assert callback.verdict([[2.0 + step % 3, 1.0], [1.0, 1.0]], signed=False) == (None, [])
    assert callback.verdict([[50.0, 1.0], [1.0, 1.0]], signed=False) == (None, [])  # mean 25.5
    reason, ranks = callback.verdict([[500.0, 1.0], [1.0, 1.0]], signed=False)
    assert "the loss explodes: 250.5" in reason and ranks == [0]
    again = stopper(explode=20.0)
    again.load_state_dict(callback.state_dict())
    assert again.verdict([[500.0, 1.0], [1.0, 1.0]], signed=False)[1] == [0]
    never = stopper(explode=None)
    never.load_state_dict(callback.state_dict())
    assert never.verdict([[1e9, 1.0], [1.0, 1.0]], signed=False) == (None, [])


def test_a_signed_loss_explodes_by_its_gradient():
    callback = stopper(explode=20.0)
    for step in range(40):  # every other group agrees, and teaches nothing
        assert callback.verdict([[(-1) ** step * 1e-3, float(step % 2)]], signed=True) == (None, [])
    assert callback.verdict([[-5.0, 1.0]], signed=True) == (None, [])
    assert "gradient norm explodes" in callback.verdict([[1e-3, 50.0]], signed=True)[0]


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_a_healthy_run_is_left_alone(spread):
    """Losses that fall by a factor of 1000 and differ between batches, up to orders of magnitude."""
    for seed in range(5):
        draw, usual = random.Random(seed), Usual(20.0)
        for step in range(2000):
            loss = 10 ** (-3 * step / 2000) * math.exp(draw.gauss(0, spread))
            assert loss <= usual.limit(), (seed, step)
            usual.add(loss)
        assert usual.limit() < 1e6
