"""Budgets on a method whose cost is known: what is reached is what arithmetic says, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

from conftest import TINY, picture
from glimpseprune import cost, pruners
from glimpseprune.budget import LEAST, Budget, Calibration, Cost, afford, fit, rebuilt
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator
from glimpseprune.evaluation import Method, build
from glimpseprune.types import Sample
from staged import FLOPS

SIZES = [(140, 112), (112, 168), (84, 84), (196, 112), (112, 112)]
QUESTIONS = ["what?", "why is it so?", "how many?", "which one is left of the other?", "where?"]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    samples = [Sample(f"{i}", q, ("a",), [picture(*s, i)]) for i, (q, s) in enumerate(zip(QUESTIONS, SIZES))]
    collate = Collator(TINY["qwen2_5_vl"]())
    return Calibration([collate(samples[:3]), collate(samples[3:])])


def method(name: str, **options) -> Method:
    backbone = TINY["qwen2_5_vl"]()
    return Method(name, build(name, options, backbone), backbone, name, options, budgeted=True)


def known(calibration: Calibration, keep: float, first: int = 1) -> Cost:
    """What ``staged`` costs, counted here."""
    backbone, found = TINY["qwen2_5_vl"](), []
    layers = backbone.num_layers
    for inputs in calibration.batches:
        for row, layouts in enumerate(backbone.layouts(inputs.prompt)):
            visual = layouts[0].count
            half, last = round((1 + keep) / 2 * visual), round(keep * visual)
            seen = [visual] * first + [half] + [last] * (layers - first - 1)
            held = [half] * (first + 1) + [last] * (layers - first - 1)  # the second stop leaves the cache alone
            text = int(inputs.prompt["attention_mask"][row].sum()) - visual
            ran = cost.prefill_flops(backbone.shapes, text, layouts, [(1, tokens) for tokens in seen], 2 * FLOPS)
            full = cost.prefill_flops(backbone.shapes, text, layouts, [(layers, visual)])
            mean = sum(seen) / layers
            ratios = (ran.decoder + 2 * FLOPS) / full.decoder, ran.total / full.total
            found.append((last / visual, mean, mean / visual, sum(held) / layers / visual, *ratios, 1 / visual))
    return Cost(*(sum(column) / len(column) for column in zip(*found)))


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_cost_is_read_from_what_happened(keep, staged, calibration):
    one = method(staged, keep_ratio=keep)
    with torch.inference_mode():
        found = calibration.cost(one.backbone, one.pruner)
    assert vars(found) == pytest.approx(vars(known(calibration, keep)), rel=1e-9)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [("kept", 0.25), ("mean_tokens", 0.5), ("mean_tokens", 12.0), ("kv", 0.5), ("decoder_flops", 0.85)]
    + [("prefill_flops", 0.9)],
)
def test_knob_is_set_to_the_budget(what, wanted, staged, calibration):
    budget = Budget(what, wanted, 0.02)
    setting = afford(method(staged), budget, calibration)
    reached = known(calibration, setting.options["keep_ratio"])
    assert vars(setting.cost) == pytest.approx(vars(reached))
    # No other fraction comes nearer than by the grain of whole tokens.
    grid = [budget.of(known(calibration, keep / 200)) for keep in range(201)]
    assert abs(budget.of(reached) - wanted) <= min(abs(found - wanted) for found in grid) + 0.01 * wanted
    assert budget.met(reached) and setting.options == setting.knob == {"keep_ratio": setting.keep}


def test_options_that_are_no_knob_stay(staged, calibration):
    setting = afford(method(staged, first=2), Budget("kept", 0.5, 0.02), calibration)
    assert setting.options["first"] == 2 and setting.cost.mean_share > known(calibration, 0.5, first=1).mean_share


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget("decoder_flops", 0.2, 0.02),
            r"decoder_flops=0.2: staged reaches 0\.\d+ \(keep -> 0\) to .*options.staged",
        ),
        (Budget("prefill_flops", 0.5, 0.02), "budget in between"),
        (Budget("mean_tokens", 900, 0.02), "staged reaches"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(budget, message, staged, calibration):
    with pytest.raises(UserError, match=message):
        afford(method(staged), budget, calibration)


def test_a_knob_that_is_too_coarse_is_refused(staged, calibration, monkeypatch):
    module = pruners.find("glimpseprune.pruners", staged)
    monkeypatch.setattr(module, "to_budget", lambda keep, backbone: {"keep_ratio": 1.0 if keep > 0.5 else 0.0})
    with pytest.raises(UserError, match="nearest is"):
        afford(method(staged), Budget("decoder_flops", 0.85, 0.02), calibration)


def test_what_the_method_itself_refuses_is_told_with_its_name(staged, calibration, monkeypatch):
    def refuse(keep, backbone):
        raise UserError("no more than half")

    monkeypatch.setattr(pruners.find("glimpseprune.pruners", staged), "to_budget", refuse)
    with pytest.raises(UserError, match="budget.kept: staged: no more than half"):
        afford(method(staged), Budget("kept", 0.5, 0.02), calibration)


def test_methods_without_a_knob_are_left_as_they_are(calibration):
    for name in ("none", "oracle"):
        assert afford(method(name), Budget("kept", 0.5, 0.02), calibration) is None


def test_weights_are_kept_and_the_best_tokens_chosen(calibration):
    one = method("glimpse", width=16, cond_width=16, num_heads=2, threshold=0.9)
    setting = afford(one, Budget("kept", 0.4, 0.02), calibration)
    assert setting.cost.kept == pytest.approx(0.4, abs=setting.cost.token)
    again = rebuilt(one, setting.options)
    assert again.options.max_keep == pytest.approx(setting.keep) and again.options.width == 16
    assert all(map(torch.equal, again.state_dict().values(), one.pruner.state_dict().values()))


def test_a_control_in_place_of_a_method_stays_where_that_decides(staged):
    one = method("random")
    one.pruner.mimic(method(staged).pruner.stops)
    assert rebuilt(one, {"keep_ratio": 0.5}).stops == one.pruner.stops


def test_a_method_that_looks_before_the_tower_looks_anew_each_time(staged, calibration, monkeypatch):
    """Its options may decide what it sees; what the look costs counts."""
    module, looks = pruners.find("glimpseprune.pruners", staged), []

    def look(self, backbone, prompt):
        looks.append(self.options.keep_ratio)
        return prompt, [5e6] * len(prompt["input_ids"])

    monkeypatch.setattr(module.Pruner, "look", look, raising=False)
    setting = afford(method(staged), Budget("kept", 0.25, 0.02), calibration)
    assert setting.keep in looks and len(set(looks)) > 2
    assert setting.cost.decoder_flops > known(calibration, setting.keep).decoder_flops + 0.01


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("wanted", [0.02, 0.11, 0.5, 0.93])
def test_search_finds_what_is_there(wanted):
    calls = []

    def curve(keep: float) -> float:
        calls.append(keep)
        return keep**3 + 0.01

    assert curve(fit(curve, wanted, 0.002)) == pytest.approx(wanted, abs=0.004)
    assert len(calls) < 16 and all(LEAST <= keep <= 1 for keep in calls)


def test_search_on_steps_takes_the_nearest():
    assert int(fit(lambda keep: int(20 * keep) / 20, 0.11, 0.0) * 20) == 2
    assert int(fit(lambda keep: int(20 * keep) / 20, 0.14, 0.0) * 20) == 3


def test_search_beyond_the_ends_is_the_end():
    assert fit(lambda keep: keep, 2.0, 0.01) == 1 and fit(lambda keep: keep + 0.5, 0.1, 0.01) == LEAST
