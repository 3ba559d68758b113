"""The student on what matters says what the student on everything says, and its gradient comes to the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TINY, picture, watched_layers
from glimpseprune import decoder, losses, prefix
from glimpseprune.attention import Gate
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator
from glimpseprune.options import BackboneOptions, DataOptions, LossOptions, TrainConfig
from glimpseprune.pruners import build
from glimpseprune.training import _student
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.types import Inputs, Sample

SAMPLES = [
    Sample("a", "what?", ("abcd",), [picture(140, 112)], [[(0, 0, 30, 30)]]),
    Sample("b", "how many of them?", ("c",), [picture(112, 112, 1), picture(84, 112, 2)], [[], []]),
]


class Case:
    """Two prompts that wait at depth K, a gate, and what the teacher makes of them."""

    def __init__(self, name: str, depth: int, samples: list[Sample] = SAMPLES) -> None:
        self.backbone = TINY[name]("sdpa")
        inputs = Collator(self.backbone)(samples)
        self.ids, self.mask = inputs.answer_ids, inputs.answer_mask
        with torch.no_grad():
            self.state = decoder.run_layers(self.backbone, decoder.start(self.backbone.encode(inputs.prompt)), depth)
            self.whole = prefix.run(self.backbone, self.state, self.backbone.num_layers, None)
            self.teacher = _student.behind(self.backbone, self.whole, self.ids, self.mask)
        generator = torch.Generator().manual_seed(depth)
        self.keep_logits = torch.randn(int(self.state.visual.sum()), generator=generator) * 2 - 1

    def run(self, dropped: int | None) -> tuple[Tensor, Tensor]:
        """The student's logits, and the gradient of the KL with respect to the keep logits [N]."""
        logits = self.keep_logits.clone().requires_grad_()
        gate = Gate(torch.ones(self.state.visual.shape).masked_scatter(self.state.visual, logits.sigmoid()))
        if dropped is None:
            said = decoder.follow(self.backbone, self.state, self.ids, self.mask, gate=gate)
        else:
            given = self.ids, self.mask, gate, self.whole.cache, dropped
            said = _student.follow(self.backbone, self.state, *given)
        loss = losses.kl(self.teacher, said, self.mask)
        return said.detach(), torch.autograd.grad(loss, logits)[0]


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_teacher_answers_as_one_pass_would(name):
    case = Case(name, 2)
    with torch.no_grad():
        expected = decoder.follow(case.backbone, case.state, case.ids, case.mask)
    torch.testing.assert_close(case.teacher[case.mask], expected[case.mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("dropped", [0, 2, 1000])
def test_a_thinned_student_says_the_same(name, dropped):
    case = Case(name, 2)
    ours, theirs = case.run(dropped)[0], case.run(None)[0]
    torch.testing.assert_close(ours[case.mask], theirs[case.mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(TINY))
def test_its_gradient_is_that_of_all_where_none_is_left_out(name):
    case = Case(name, 1)
    assert off(case.run(1000)[1], case.run(None)[1]) < 1e-5


@pytest.mark.parametrize("name", sorted(TINY))
def test_its_gradient_is_that_of_all_where_dropped_tokens_are_what_the_teacher_has(name):
    """In the first layer that prunes, every token's key and value come from what the whole prompt left."""
    case = Case(name, TINY[name]().num_layers - 1)
    full = case.run(None)[1]
    for dropped in (0, 3):
        assert off(case.run(dropped)[1], full) < 1e-4


def test_the_more_dropped_tokens_run_the_closer_it_comes():
    case = Case("qwen2_5_vl", 1)
    full = case.run(None)[1]
    far = [off(case.run(dropped)[1], full) for dropped in (0, 8, 16, 1000)]
    assert far[0] < 0.6  # nor is the teacher's word for all of them far off, on a model of random weights
    assert far == sorted(far, reverse=True) and far[-1] < 1e-5


def test_nothing_but_what_matters_runs_above():
    case = Case("qwen2_5_vl", 2)
    weight = torch.ones(case.state.visual.shape).masked_scatter(case.state.visual, case.keep_logits.sigmoid())
    left, gate = _student.thinned(case.state, Gate(weight), case.whole.cache, 3)
    kept = (weight > 0.5) & case.state.mask
    assert left.mask.sum(1).tolist() == (kept.sum(1) + 3).tolist()
    assert torch.equal(gate.columns[left.mask], left.source[left.mask])
    there = torch.zeros_like(kept).scatter(1, gate.columns, left.mask)
    extra = there & ~kept
    for row in range(len(weight)):  # those of the greatest weights
        gone = (~kept & case.state.visual)[row]
        assert weight[row, extra[row]].min() >= weight[row, gone & ~extra[row]].max()


# ------------------------------------------------------------------------------------------------------- in the stage


def stage(samples: list[Sample], **loss: float) -> tuple[GlimpseModule, Inputs]:
    backbone = TINY["qwen2_5_vl"]("sdpa")
    torch.manual_seed(1)
    options = {"prune_layer": 0, "vision_layers": [2, 1], "width": 16, "cond_width": 16, "num_heads": 2, "dropout": 0}
    config = TrainConfig(out="", backbone=BackboneOptions(path=""), data=DataOptions(path=""), loss=LossOptions(**loss))
    module = GlimpseModule(config, backbone, build("glimpse", options, backbone))
    module.log = module.log_dict = lambda *_, **__: None
    module._fabric = module._trainer = None
    return module, Collator(backbone)(samples)


def gradient(module: GlimpseModule, inputs: Inputs) -> Tensor:
    module.zero_grad()
    module.training_step(inputs, 0).backward()
    return torch.cat([p.grad.flatten() for p in module.pruner.vip.parameters() if p.grad is not None])


def test_steps_that_run_everything_set_the_gradient_right_on_average(monkeypatch):
    monkeypatch.setattr(GlimpseModule, "progress", 0.9)
    (full, inputs), (few, _) = stage(SAMPLES, pressure=0.0), stage(SAMPLES, pressure=0.0, dropped=0)
    mixed, _ = stage(SAMPLES, pressure=0.0, dropped=0, exact=0.25)
    wanted, cheap = gradient(full, inputs), gradient(few, inputs)
    assert off(cheap, wanted) > 1e-3
    seen: dict[bool, Tensor] = {}
    for step in range(400):
        monkeypatch.setattr(GlimpseModule, "global_step", step)
        hit = np.random.default_rng((0, step)).random() < 0.25
        if hit not in seen:
            seen[hit] = gradient(mixed, inputs)
        seen[f"count of {hit}"] = seen.get(f"count of {hit}", 0) + 1
    torch.testing.assert_close(seen[False], cheap)
    assert off(0.25 * seen[True] + 0.75 * seen[False], wanted) < 1e-4
    assert abs(seen["count of True"] / 400 - 0.25) < 0.07


def test_exact_steps_are_for_those_that_are_not():
    with pytest.raises(UserError, match="without loss.dropped every step is exact"):
        LossOptions(exact=0.5)


def test_the_value_gate_runs_all(monkeypatch):
    monkeypatch.setattr(GlimpseModule, "progress", 0.1)
    (full, inputs), (few, _) = stage(SAMPLES), stage(SAMPLES, dropped=0)
    assert torch.equal(gradient(full, inputs), gradient(few, inputs))


@torch.no_grad()
def test_validation_prunes_for_real():
    module, inputs = stage(SAMPLES)
    module.eval()
    with watched_layers(module.backbone) as columns:
        module.tally, module.remember = lambda scores: None, lambda inputs: None
        module.validation_step(inputs, 0)
    keep = module.pruner.mask(module.share(inputs).logits[-1], module.share(inputs).counts)
    text = (inputs.prompt["input_ids"] != module.backbone.image_token_id) & inputs.prompt["attention_mask"].bool()
    counts = [int(row.sum()) for row in keep.split(module.share(inputs).counts)]
    left = max(int(count) + own for count, own in zip(text.sum(1), counts))
    assert columns[-1] == left + inputs.answer_ids.shape[1] - 1


@pytest.mark.parametrize("dropped", [None, 4])
def test_under_mixed_precision_the_predictor_multiplies_in_bfloat16(monkeypatch, dropped):
    """Forward and backward, while RoPE, the residual stream and the logits stay float32; and it learns the same."""
    monkeypatch.setattr(GlimpseModule, "progress", 0.9)
    (module, inputs), (plain, _) = stage(SAMPLES, dropped=dropped), stage(SAMPLES, dropped=dropped)
    seen: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            made = call(*args, **(kwargs or {}))
            product = call.__name__.split(".")[0] in ("mm", "addmm", "bmm") or "attention" in call.__name__
            if product and getattr(made, "shape", (0,))[-1] != 1:  # but for the logits themselves
                seen.update(x.dtype for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor))
            return made

    run = module.pruner.vip.forward
    monkeypatch.setattr(module.pruner.vip, "forward", lambda *given: watched(run, *given))

    def watched(run, *given):
        with Watch():
            return run(*given)

    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(inputs, 0)
    assert seen == {torch.bfloat16}
    loss.backward()
    ours = torch.cat([p.grad.flatten() for p in module.pruner.vip.parameters() if p.grad is not None])
    assert all(p.dtype == torch.float32 for p in module.pruner.parameters())
    assert off(ours, gradient(plain, inputs)) < 0.3
