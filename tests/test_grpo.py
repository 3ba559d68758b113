"""Stage 2: on policy to the last digit, gradients that are the policy's and go where they should; runs end to end."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import TINY, picture, prompts
from contracts._masked import masked, rolled_out
from contracts._methods import METHODS
from devices import put
from glimpseprune import checkpoint, config, decoder, lora, losses, train
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator
from glimpseprune.data.shards import write
from glimpseprune.generate import generate
from glimpseprune.options import (
    BackboneOptions,
    DataOptions,
    GRPOOptions,
    GuardOptions,
    LoraOptions,
    PrunerOptions,
    RewardOptions,
    TrainConfig,
)
from glimpseprune.pruners import build
from glimpseprune.rewards import Rewards
from glimpseprune.rewards import format as form
from glimpseprune.running.callbacks import GuardRails
from glimpseprune.training import grpo
from glimpseprune.training.grpo import Actions, Batch, GRPOModule
from glimpseprune.types import Inputs, Sample
from test_lora import adapters
from test_rollout import masked_logits

GLIMPSE = {
    "prune_layer": 1,
    "probe_layers": [0, 1],
    "vision_layers": [2, 1],
    "width": 16,
    "cond_width": 16,
    "num_heads": 2,
    "dropout": 0.1,  # must not act: masks are drawn from the gate that is updated
}
PRUNERS = {"glimpse": GLIMPSE, "oracle": {"prune_layer": 1}}
SAMPLES = [
    Sample("a", "what?", ("ab",), [picture(140, 112)], [[(0, 0, 30, 30)]]),
    Sample("b", "why?", ("c",), [picture(140, 112)], [[(80, 60, 139, 111)]]),
    Sample("c", "how many?", ("def",), [picture(112, 112), picture(84, 112)], [[(0, 0, 30, 30)], []]),
]
PARTS = ["lora", "glimpse", "vip"]
ENDS = [2, *range(20, 40)]
"""Ends of which an untrained model soon says one."""
G = 4


class Untrained(GRPOModule):
    """Driven step by step, without a trainer."""

    progress = 0.5
    is_sharded = False

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.logs = getattr(self, "logs", {}) | {name: float(value) for name, value in values.items()}

    def manual_backward(self, loss: Tensor) -> None:
        self.backwards = getattr(self, "backwards", 0) + 1
        loss.backward()


def randomised(backbone: LVLM, seed: int = 3) -> None:
    """Adapters that do something, so that nothing holds only because B is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters(backbone).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def stage(
    backbone: LVLM | None = None,
    train: list[str] = PARTS,
    first_layer: int | None = None,
    pruner: str = "glimpse",
    adapted: bool = True,
    rewards: Callable | None = None,
    reward: RewardOptions | None = None,
    **grpo: Any,
) -> tuple[Untrained, Inputs]:
    """A module on a copy of a tiny backbone, and a batch of three prompts. ``rewards(completions) -> values``."""
    backbone = copy.deepcopy(backbone or TINY["qwen2_5_vl"]())
    torch.manual_seed(1)
    given, kind = PRUNERS.get(pruner, {}), METHODS.get(pruner)
    method = build(pruner, given, backbone) if kind is None else put(kind.Pruner(backbone, kind.Options()).eval())
    options = LoraOptions(rank=4, alpha=8, first_layer=first_layer) if adapted else None
    if options is not None:
        lora.inject(backbone, options, method.stops[0].depth)
        randomised(backbone)
    config = TrainConfig(
        out="",
        stage="grpo",
        backbone=BackboneOptions(path=""),
        pruner=PrunerOptions(pruner, given),
        data=DataOptions(path=""),
        train=list(train),
        lora=options,
        grpo=GRPOOptions(**{"num_generations": G, "max_completion_length": 8} | grpo),
        rewards=reward or RewardOptions(functions={"format": 1.0}, pruning_when="always"),
    )
    module = Untrained(config, backbone, method)
    module._fabric = module._trainer = None
    module.ends = ENDS
    if rewards is not None:
        module.rewards = Rewards({"given": lambda completions, **_: rewards(completions)}, {"given": 1.0})
    return module, Collator(backbone)(SAMPLES)


def collect(module: Untrained, inputs: Inputs, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return module.collect(inputs)


def drift(batch: Batch, by: float = 0.3) -> Batch:
    """As if the policy had been another when it spoke and drew: ratios on both sides of 1, some of them clipped."""
    actions, generator = batch.actions, torch.Generator().manual_seed(5)
    for name in ("log_probs", "keep_log_probs"):
        old = getattr(actions, name)
        setattr(actions, name, old + by * torch.randn(old.shape, generator=generator) * (old != 0))
    return batch


def gradients(module: Untrained, *batches: Batch) -> dict[str, Tensor]:
    """Of all that has one, after a backward pass over the batches."""
    module.zero_grad(set_to_none=True)
    module.logs, module.backwards = {}, 0
    module.backward_all(list(batches))
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **{"atol": 1e-6, "rtol": 1e-4} | tolerance)


def step(module: Untrained, *batches: Batch, rate: float = 0.02) -> None:
    module.zero_grad(set_to_none=True)
    module.backward_all(list(batches))
    with torch.no_grad():
        for parameter in module.trainable():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()


# ----------------------------------------------------------------------------------------------------------- on policy


def ratios(module: Untrained, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of all tokens that were said and all decisions that were taken, recomputed as an update does."""
    actions, state = batch.actions, batch.state
    with torch.no_grad():
        said, _ = module.score(batch, actions.index, actions.keep, actions.tokens, actions.mask)
        logits = module.pruner.logits(module.view(batch.encoded, state))
    kept = torch.zeros(state.visual.shape).masked_scatter(state.visual, logits)[actions.index]
    kept = losses.keep_log_probs(kept / module.config.grpo.mask_temperature, actions.keep)
    visual = state.visual[actions.index]
    return (said - actions.log_probs)[actions.mask].exp(), (kept - actions.keep_log_probs)[visual].exp()


@pytest.mark.parametrize("first_layer", [None, 0], ids=["above K", "all layers"])
def test_ratio_is_one_until_an_update(backbone, first_layer) -> None:
    """The log-probability pass is the distribution that was sampled: prefix shared or not, on every backend."""
    module, inputs = stage(backbone, first_layer=first_layer, temperature=1.2, mask_temperature=0.8)
    assert module.trains_below == (first_layer == 0)
    module.train()
    batch = collect(module, inputs)
    assert batch.actions.ended.any() and not batch.actions.keep.all()
    for found in ratios(module, batch):
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)
    step(module, batch)
    if first_layer == 0:  # as backward_all does before the next iteration
        module.backward_all([batch], iteration=1)
    for found in ratios(module, batch):
        assert (found - 1).abs().max() > 1e-3
    fresh = collect(module, inputs)
    for found in ratios(module, fresh):
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("train", [PARTS, ["decoder", "glimpse", "vip"]], ids=["adapters", "decoder"])
def test_answers_may_share_a_mask(train) -> None:
    """Then they share the pruned prompt, too, and its gradient is the sum of what each has alone."""
    module, inputs = stage(train=train, adapted="lora" in train, num_masks=2)
    batch = collect(module, inputs)
    keep, said = batch.actions.keep.view(3, 2, 2, -1), batch.actions.tokens.view(3, 2, 2, -1)
    assert torch.equal(keep[:, :, 0], keep[:, :, 1]) and (keep[:, 0, 0] != keep[:, 1, 0]).any(1).all()
    assert not torch.equal(said[:, :, 0], said[:, :, 1])
    for found in ratios(module, batch):
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)
    together = gradients(module, drift(batch))
    module.config.grpo.micro_batch = 1
    same(gradients(module, batch), together)


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_ratio_is_one_while_the_lvlm_itself_trains(part) -> None:
    module, inputs = stage(train=[part], adapted=False)
    batch = collect(module, inputs)
    assert (ratios(module, batch)[0] - 1).abs().max() < 1e-5
    step(module, batch, rate=1e-3)
    assert (ratios(module, batch)[0] - 1).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", sorted(TINY))
def test_gradient_of_the_vision_tower_is_that_of_what_inference_does(name) -> None:
    """A step along it against the change of the loss, when prompts are encoded as they are for rollouts."""
    module, inputs = stage(TINY[name]("sdpa"), train=["vision"], adapted=False, micro_batch=5)
    module.double()
    inputs.prompt["pixel_values"] = inputs.prompt["pixel_values"].double()
    batch = drift(collect(module, inputs))
    found = gradients(module, batch)
    assert found and all(name.startswith("lvlm.") and "language_model" not in name for name in found)

    def loss() -> float:
        with torch.no_grad():
            encoded, state = module.prompt(inputs)
            module.trains_below, before = False, module.trains_below
            rolled = replace(batch, encoded=encoded, state=state)
            weights = losses.token_weights(batch.mask, module.config.grpo.loss_type, 8)
            total = module.token_loss(rolled, torch.arange(3 * G), weights, defaultdict(list))
            module.trains_below = before
        return float(total)

    own = dict(module.named_parameters())
    slope = float(torch.cat([gradient.flatten() for gradient in found.values()]).norm())
    values = []
    for steps in (1, -2):  # of length 1e-4, in its direction
        for key, gradient in found.items():
            own[key].data += steps * 1e-4 * gradient / slope
        values.append(loss())
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gradient_does_not_depend_on_micro_batches(loss_type) -> None:
    """Over two pending batches of answers of different lengths, with every term of the loss."""
    module, inputs = stage(first_layer=0, loss_type=loss_type, beta=0.1, entropy_coef=0.05, mask_entropy_coef=0.05)
    batches = [drift(collect(module, inputs, seed)) for seed in (0, 1)]
    assert batches[0].mask.shape[1] > 1 and not batches[0].mask.all()
    found, logs = [], []
    for size in (1, 4, 100):
        module.config.grpo.micro_batch = size
        found.append(gradients(module, *batches))
        logs.append(module.logs)
        assert module.backwards == 2 * (math.ceil(3 * G / size) + 1)
    for other, log in zip(found[1:], logs[1:]):
        same(other, found[0])
        assert log == pytest.approx(logs[0], abs=1e-5, rel=1e-4)
    assert logs[0]["train/clip_ratio/region_mean"] > 0 and logs[0]["train/kl"] > 0


@pytest.mark.parametrize(("name", "pruner"), [*((name, "glimpse") for name in sorted(TINY)), ("qwen2_5_vl", "coarse")])
def test_vision_of_few_prompts_at_a_time_is_that_of_all(name, pruner) -> None:
    """One of them has two images; a micro-batch encodes only its own."""
    module, inputs = stage(TINY[name]("sdpa"), train=["vision", "lora"], pruner=pruner)
    batch = drift(collect(module, inputs))
    found = []
    for size in (1, 100):
        module.config.grpo.micro_batch = size
        found.append(gradients(module, batch))
    assert any("visual" in name or "vision" in name for name in found[0])
    same(found[1], found[0])


def test_batches_that_are_accumulated_are_one_batch() -> None:
    module, inputs = stage()
    whole = drift(collect(module, inputs))
    halves = [part(whole, whole.actions.index == 0), part(whole, whole.actions.index != 0)]
    same(gradients(module, *halves), gradients(module, whole))


def part(batch: Batch, chosen: Tensor) -> Batch:
    """Some rollouts of a batch."""
    actions = Actions(**{name: value[chosen] for name, value in vars(batch.actions).items()})
    return replace(batch, actions=actions, advantages=batch.advantages[chosen], mask=batch.mask[chosen])


@pytest.mark.parametrize("name", sorted(TINY))
def test_where_adapters_begin_changes_neither_loss_nor_gradient(name) -> None:
    """Adapters on all layers, those below K without effect, against adapters above K: prefix run again or shared."""
    options = {"beta": 0.1, "entropy_coef": 0.05}
    above, inputs = stage(TINY[name]("sdpa"), **options)
    every, _ = stage(TINY[name]("sdpa"), first_layer=0, **options)
    own, theirs = adapters(above.backbone), adapters(every.backbone)
    for key, parameter in theirs.items():
        parameter.data.copy_(own[key] if key in own else torch.zeros(()))
    batch = drift(collect(above, inputs))
    ours = gradients(above, batch)
    found = gradients(every, batch)
    assert set(ours) < set(found)
    same({key: value for key, value in found.items() if key in ours}, ours)
    assert every.logs == pytest.approx(above.logs, abs=1e-5)
    assert abs(above.logs["train/policy_loss"]) > 0.001


@pytest.mark.parametrize("train", [["lora"], ["glimpse", "vip"], ["decoder"], ["lora", "glimpse", "vip", "decoder"]])
@pytest.mark.parametrize("first_layer", [None, 0])
def test_gradients_reach_what_trains_and_nothing_else(train, first_layer) -> None:
    module, inputs = stage(train=train, first_layer=first_layer)
    found = gradients(module, drift(collect(module, inputs)))
    names = {id(p): name for name, p in module.named_parameters()}
    wanted = {names[id(p)] for part in train for p in module.parameters_of(part)}
    assert set(found) <= wanted
    # e_i of layers behind the probe are never used, and some biases have no influence on a softmax
    idle = {name for name in wanted - set(found)} | {name for name, value in found.items() if not value.any()}
    assert all(name.endswith("k_proj.bias") for name in idle), idle
    for part in train:
        grads = [p.grad for p in module.parameters_of(part) if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads) and sum(grad.norm() for grad in grads) > 0, part


@pytest.mark.parametrize("name", sorted(TINY))
def test_gradient_is_that_of_a_naive_implementation(name, attn) -> None:
    """Adapters on all layers against one masked forward per rollout, in which no prefix is shared."""
    module, inputs = stage(TINY[name](attn), first_layer=0, train=["lora"], loss_type="grpo")
    batch = collect(module, inputs)
    ours = gradients(module, batch)
    module.zero_grad(set_to_none=True)
    actions = batch.actions
    for i, row in enumerate(actions.index.tolist()):
        sample = SAMPLES[row]
        with torch.no_grad():
            one = module.backbone.encode(module.backbone.prepare([sample.question], [sample.images]))
        own = actions.tokens[i, actions.mask[i]]
        logits = masked_logits(module.backbone, one, actions.keep[i, -one.mask.shape[1] :], own, module.depth)
        log_probs = logits.log_softmax(-1).gather(1, own[:, None])[:, 0]
        loss = -(batch.advantages[i] * (log_probs - log_probs.detach()).exp()).mean() / len(actions.index)
        loss.backward()
    naive = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    same(ours, naive, atol=1e-4 * max(float(value.norm()) for value in naive.values()), rtol=0)
    assert max(float(value.abs().max()) for value in naive.values()) > 1e-3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("first_layer", [None, 0], ids=["above K", "all layers"])
def test_any_method_is_reinforced(name, first_layer) -> None:
    """Staged, merging, numbering anew, keeping earlier K/V, looking before the tower: log-probabilities and gradient
    are those of one masked forward per rollout, and an update moves them."""
    module, inputs = stage(pruner=name, train=["lora"], first_layer=first_layer, loss_type="grpo")
    backbone, pruner, seen = module.backbone, module.pruner, {}
    batch = collect(module, inputs)
    ours, actions = gradients(module, batch), batch.actions
    module.zero_grad(set_to_none=True)
    for i, row in enumerate(actions.index.tolist()):
        prompt = backbone.prepare([SAMPLES[row].question], [SAMPLES[row].images])
        encoded, first = decoder.see(backbone, pruner, prompt), torch.zeros(1, dtype=torch.long)
        keep = actions.keep[i : i + 1, -encoded.mask.shape[1] :] if module.replays_masks else None
        taken, own = rolled_out(backbone, encoded, pruner, first, keep), actions.tokens[i, actions.mask[i]]
        hidden = masked(backbone, encoded, first, taken, backbone.embed(own[None, :-1])).hidden
        logits = backbone.logits(hidden[0, -len(own) :]) / module.config.grpo.temperature
        log_probs = logits.log_softmax(-1).gather(1, own[:, None])[:, 0]
        torch.testing.assert_close(log_probs.detach(), actions.log_probs[i, : len(own)], atol=2e-5, rtol=1e-4)
        (-(batch.advantages[i] * (log_probs - log_probs.detach()).exp()).mean() / len(actions.index)).backward()
    naive = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    if not any(decision.merged is not None for decision in taken):  # which the oracle writes down as constants
        same(ours, naive, atol=1e-4 * max(float(value.norm()) for value in naive.values()), rtol=0)
    assert max(float(value.abs().max()) for value in naive.values()) > 1e-3
    step(module, batch)
    said, _ = module.score(batch, actions.index, actions.keep, actions.tokens, actions.mask)
    assert ((said - actions.log_probs)[actions.mask]).abs().max() > 1e-3
    fresh = collect(module, inputs)
    assert all(abs(ratio - 1) < 1e-5 for ratio in ratios_of_tokens(module, fresh))
    module.tally, module.remember = seen.update, lambda _: None
    module.validation_step(inputs, 0)
    assert seen["box_recall"][1] == len(SAMPLES)


def test_mask_loss_is_reinforce_on_the_decisions() -> None:
    """On policy its gradient on the keep logits is -A (decision - p) / temperature / sqrt(V) / R."""
    module, inputs = stage(train=["glimpse", "vip"], mask_norm="sqrt", mask_weight=3.0, mask_temperature=0.5)
    batch = collect(module, inputs)
    actions, state = batch.actions, batch.state
    logits = module.pruner.logits(module.view(batch.encoded, state)).detach().requires_grad_()
    module.pruner.logits = lambda view: logits
    module.masks_loss(batch, len(actions.index), {name: [] for name in METERS}).backward()
    counts = state.visual.sum(1).tolist()
    for row, (grad, own) in enumerate(zip(logits.grad.split(counts), logits.detach().split(counts))):
        mine = actions.index == row
        drawn = actions.keep[mine][:, state.visual[row]].float()  # [G, V]
        expected = -(batch.advantages[mine, None] * (drawn - (own / 0.5).sigmoid())).sum(0) / 0.5 / counts[row] ** 0.5
        torch.testing.assert_close(grad, 3 * expected / len(actions.index))


METERS = ("mask_entropy", "mask_clip_ratio", "mask_loss")


def test_a_second_iteration_does_not_reach_the_prompt_through_the_gate() -> None:
    """Iterations differ in the weights only: what has a gradient in one has it in the other, and no graph is kept."""
    module, inputs = stage(train=["lora"], first_layer=0)
    module.trains_masks = True  # the gate's loss alone, through adapters that the glimpse passes
    batch = collect(module, inputs)
    batch.mask &= False
    first = gradients(module, batch)
    module.zero_grad(set_to_none=True)
    module.backward_all([batch], iteration=1)
    assert not batch.state.hidden.requires_grad
    same({name: p.grad for name, p in module.named_parameters() if p.grad is not None}, first)


def test_entropy_is_the_mean_over_what_was_scored() -> None:
    """However few groups have an advantage, and however the loss is normalised."""
    values = iter([0.0, 1.0, 0.0, 1.0] + [1.0] * 2 * G)
    module, inputs = stage(train=["lora"], rewards=lambda said: [next(values) for _ in said], loss_type="dr_grpo")
    batch = collect(module, inputs)
    batch.advantages[G:] = 0.0
    gradients(module, batch)
    actions, chosen = batch.actions, slice(0, G)
    with torch.no_grad():
        _, entropy = module.score(
            batch, actions.index[chosen], actions.keep[chosen], actions.tokens[chosen], actions.mask[chosen]
        )
    expected = entropy.sum() / actions.mask[chosen].sum()
    assert module.logs["train/entropy"] == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- rewards


def test_pruning_reward() -> None:
    pruned, task = torch.tensor([0.2, 0.9, 0.9, 0.5]), torch.tensor([1.0, 1.0, 0.0, 2.0])

    def found(progress: float = 1.0, **options: Any) -> list[float]:
        module.config.rewards = RewardOptions(functions={"format": 1.0}, **options)
        module.progress = progress
        return [round(value, 6) for value in module.pruning_reward(pruned, task).tolist()]

    module, _ = stage()
    assert found() == [0.1, 0.45, 0.0, 0.25]
    assert found(pruning=1.0, pruning_when="always") == [0.2, 0.9, 0.9, 0.5]
    assert found(pruning_target=0.4) == [0.1, 0.2, 0.0, 0.2]
    ramped = {"pruning": 1.0, "pruning_when": "always", "pruning_ramp": 0.5}
    assert found(0.25, **ramped) == [0.1, 0.45, 0.45, 0.25]
    assert found(0.5, **ramped) == found(1.0, **ramped) == [0.2, 0.9, 0.9, 0.5]
    assert found(0.0, **ramped) == [0, 0, 0, 0]


def test_a_reward_is_the_score_and_the_pruning_of_its_own_mask() -> None:
    scores = [float(i % 3 == 0) for i in range(3 * G)]
    module, inputs = stage(rewards=lambda said: scores, reward=RewardOptions(pruning=0.7, functions={"format": 1.0}))
    actions = collect(module, inputs).actions
    visual = collect(module, inputs).state.visual[actions.index]
    pruned = (~actions.keep & visual).sum(1) / visual.sum(1)
    torch.testing.assert_close(actions.pruned, pruned)
    torch.testing.assert_close(actions.reward, torch.tensor(scores) * (1 + 0.7 * pruned))
    assert actions.valid.all() and len(pruned.unique()) > 3


def test_rollouts_without_a_verdict_do_not_count() -> None:
    """They have no advantage, leave the mean of their group, and nothing of them is in the gradient."""
    given = torch.tensor([math.nan, 1.0, 0.0, 3.0, math.nan, math.nan, math.nan, 2.0, 0.5, 0.0, 0.0, 1.0])
    module, inputs = stage(rewards=lambda said: given.tolist(), reward=RewardOptions(pruning=0.0), num_generations=4)
    batch = drift(collect(module, inputs))
    lost = given.isnan()
    assert torch.equal(batch.actions.valid, ~lost) and not batch.mask[lost].any()
    assert not batch.advantages[lost].any() and batch.advantages.isfinite().all()
    expected = (given[1:4] - given[1:4].mean()) / (given[1:4].std() + 0.1)
    torch.testing.assert_close(batch.advantages[1:4], expected)
    assert batch.advantages[7] == 0  # alone in its group
    assert module.logs["train/invalid_rollouts"] == pytest.approx(4 / 12)
    assert module.logs["train/reward"] == pytest.approx(float(given[~lost].mean()))
    with_lost = gradients(module, batch)
    same(gradients(module, part(batch, ~lost)), with_lost)
    batch.actions.log_probs[lost] += 1.0
    batch.actions.keep_log_probs[lost] += 1.0
    same(gradients(module, batch), with_lost)


def test_nobody_has_a_verdict() -> None:
    module, inputs = stage(rewards=lambda said: [math.nan] * len(said))
    batch = collect(module, inputs)
    assert all(not value.any() for value in gradients(module, batch).values())
    assert module.logs == {} or all(math.isfinite(value) for value in module.logs.values())


@pytest.mark.parametrize("value", [1.0, 0.3])
def test_groups_that_agree_are_skipped(value) -> None:
    """No backward pass for them, though the mean of their rewards may be off by a rounding error."""
    values = [value] * 8 + [0.0] * 7 + [1.0] + [value] * 8
    module, inputs = stage(
        train=["lora"], rewards=lambda said: values, reward=RewardOptions(pruning=0.0), num_generations=8, micro_batch=1
    )
    batch = collect(module, inputs)
    found = gradients(module, batch)
    assert module.backwards == 8
    assert all(value.isfinite().all() for value in found.values())
    values[:] = [value] * 24
    batch = collect(module, inputs)
    assert not gradients(module, batch) and module.backwards == 0
    assert batch.actions.reward.unique().numel() == 1


def test_groups_that_agree_are_rolled_out_again() -> None:
    """Up to ``resample_tries`` times, they alone, with answers that may be longer or shorter than the others'."""
    calls: list[int] = []
    script = iter(
        [
            [1.0] * G + [0.0, 1.0, 0.0, 0.0] + [math.nan] * G,  # the first and the last say nothing
            [0.5] * G + [1.0, 0.0, 0.0, 0.0],  # the first again nothing
            [0.0] * G,
        ]
    )

    def rewards(said: list[str]) -> list[float]:
        calls.append(len(said))
        return next(script)

    options = {"reward": RewardOptions(pruning=0.0), "zero_variance": "resample", "resample_tries": 2}
    module, inputs = stage(rewards=rewards, **options)
    batch = collect(module, inputs)
    assert calls == [3 * G, 2 * G, G]
    actions = batch.actions
    assert actions.reward.tolist() == [0.0] * G + [0.0, 1.0, 0.0, 0.0] + [1.0, 0.0, 0.0, 0.0]
    assert actions.index.tolist() == [0] * G + [1] * G + [2] * G and actions.valid.all()
    assert not batch.advantages[:G].any() and batch.advantages[G:].all()
    for found in ratios(module, batch):  # each row is whole: mask, tokens and log-probabilities of one rollout
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)
    assert (actions.mask.any(0)).all()


def test_replaced_rows_are_counted_as_they_are() -> None:
    """Of empty answers, too, all rollouts are counted, not only those rolled out last."""
    module, inputs = stage(rewards=lambda said: [1.0] * len(said), zero_variance="resample", resample_tries=1)
    texts = iter([["", "x"] * G + ["x"] * G, ["x"] * 3 * G])
    tokenizer = module.backbone.processor.tokenizer
    module.config.rewards.pruning = 0.0
    rewards = iter([[1.0] * G + [0.0, 1.0] * G, [0.0, 1.0] * (G // 2)])
    module.rewards = Rewards({"given": lambda said, **_: next(rewards)}, {"given": 1.0})
    original = tokenizer.batch_decode
    try:
        tokenizer.batch_decode = lambda tokens, **_: next(texts)[: len(tokens)]
        collect(module, inputs)
    finally:
        tokenizer.batch_decode = original
    # of the second and third prompt 2 of 8 were empty, and none of the first's when it was asked again
    assert module.logs["train/completions/empty_ratio"] == pytest.approx(2 / 12)


@pytest.mark.parametrize("cut", [False, True])
def test_validation_and_training_say_alike_what_was_cut(cut) -> None:
    """And end an answer alike, at any of ``ends``; a reward that never applies is counted and says why."""
    module, inputs = stage(max_completion_length=2)
    module.ends = [10**6] if cut else list(range(module.backbone.lm_head.weight.shape[0]))
    told, seen = [], {}

    def given(completions, truncated, **fields):
        told.append(truncated)
        return [None] * len(completions)

    module.rewards = Rewards({"given": given, "format": form}, {"given": 1.0, "format": 1.0})
    with pytest.warns(UserWarning, match="reward 'given' gave no value for 12 of 12 answers: it returned None"):
        collect(module, inputs)
    module.tally, module.remember = seen.update, lambda _: None
    module.validation_step(inputs, 0)
    assert told == [[cut] * 3 * G, [cut] * 3]
    assert seen["clipped_ratio"] == (float(cut), 3) and module.logs["train/completions/clipped_ratio"] == cut
    assert not cut or seen["score"][0] == module.logs["train/rewards/format/mean"] == 0
    assert module.logs["train/rewards/given/none"] == 1 and module.logs["train/rewards/given/missing"] == 0
    assert module.logs["train/rewards/format/none"] == 0


def test_cut_answers_can_be_left_out() -> None:
    module, inputs = stage(mask_truncated_completions=True, max_completion_length=4)
    drawn = (collect(module, inputs, seed) for seed in range(20))
    batch = next(batch for batch in drawn if batch.actions.ended.any() and not batch.actions.ended.all())
    ended = batch.actions.ended
    assert 0 < int(ended.sum()) < len(ended)
    assert not batch.mask[~ended].any() and torch.equal(batch.mask[ended], batch.actions.mask[ended])
    found = gradients(module, batch)
    batch.actions.log_probs[~ended] += 1.0
    same(gradients(module, batch), found)
    module.config.grpo.mask_truncated_completions = False
    assert torch.equal(collect(module, inputs).mask, batch.actions.mask)


# ------------------------------------------------------------------------------------------------------------ reference


def test_kl_to_the_policy_without_adapters() -> None:
    module, inputs = stage(train=["lora"], beta=0.5, rewards=lambda said: [1.0] * len(said))
    module.config.rewards.pruning = 0.0
    for name, parameter in adapters(module.backbone).items():
        if ".lora_B." in name:
            parameter.data.zero_()
    batch = collect(module, inputs)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(not value.any() for value in gradients(module, batch).values())  # equal rewards, equal policies
    assert module.logs["train/kl"] == 0
    randomised(module.backbone)
    batch = collect(module, inputs)
    found = gradients(module, batch)
    actions = batch.actions
    with torch.no_grad(), lora.disabled(module.lvlm):
        reference, _ = module.score(batch, actions.index, actions.keep, actions.tokens, actions.mask)
    expected = losses.k3(actions.log_probs, reference)[actions.mask].mean()
    assert module.logs["train/kl"] == pytest.approx(float(expected), rel=1e-3) and expected > 0.01
    assert any(value.any() for value in found.values())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == trainable
    for found in ratios_of_tokens(module, batch):  # the adapters are on again
        assert abs(found - 1) < 1e-5


def ratios_of_tokens(module: Untrained, batch: Batch) -> list[float]:
    actions = batch.actions
    with torch.no_grad():
        said, _ = module.score(batch, actions.index, actions.keep, actions.tokens, actions.mask)
    return (said - actions.log_probs)[actions.mask].exp().tolist()


@pytest.mark.parametrize(
    ("options", "metric", "rises"),
    [
        ({"entropy_coef": 1.0}, "train/entropy", True),
        ({"mask_entropy_coef": 1.0}, "train/mask_entropy", True),
        ({"beta": 1.0}, "train/kl", False),
    ],
)
def test_bonus_and_penalty_point_the_right_way(options, metric, rises) -> None:
    """Where rewards are equal they are all that is left of the loss."""
    module, inputs = stage(rewards=lambda said: [1.0] * len(said), reward=RewardOptions(pruning=0.0), **options)
    batch = collect(module, inputs)
    module.config.grpo.beta = module.config.grpo.beta or 1e-12  # what has no advantage is measured, too
    gradients(module, batch)
    before = module.logs[metric]
    step(module, batch, rate=1e-3)
    gradients(module, batch)
    assert (module.logs[metric] > before + 1e-4) if rises else (module.logs[metric] < before - 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1, "adapted": False, "train": ["decoder"]}, "beta > 0.*lora"),
        ({"num_masks": 3}, "num_masks=3.*divide.*num_generations=4"),
        ({"adapted": False}, "no adapters"),
        ({"train": ["lora", "glimpse"], "pruner": "oracle"}, "'oracle' has no glimpse"),
        ({"train": ["everything"]}, "no part 'everything'.*glimpse, private, vip, lora, decoder"),
    ],
)
def test_wrong_settings_are_told(options, message) -> None:
    with pytest.raises(UserError, match=message):
        stage(**options)


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("options", [{"pruner": "oracle"}, {"masks": "boxes"}], ids=str)
def test_box_masks_are_those_of_the_published_recipe(options) -> None:
    """Every rollout keeps the evidence, nothing is drawn, and only the adapters train."""
    module, inputs = stage(train=["lora"], beta=0.04, **options)
    assert not (module.samples_masks or module.trains_masks)
    batch = collect(module, inputs)
    actions, visual = batch.actions, batch.state.visual
    for row, target in enumerate(inputs.targets):
        for keep in actions.keep[actions.index == row]:
            assert torch.equal(keep[visual[row]], target) and keep[~visual[row]].all()
    assert not actions.keep_log_probs.any()
    found = gradients(module, batch)
    assert found and all(lora.is_adapter(name) for name in found)
    assert all(abs(ratio - 1) < 1e-5 for ratio in ratios_of_tokens(module, batch))


def test_masks_as_at_inference() -> None:
    module, inputs = stage(masks="greedy")
    assert module.gated and not module.trains_masks
    batch = collect(module, inputs)
    greedy = generate(module.backbone, module.pruner, inputs.prompt, max_new_tokens=1).keep
    for row, expected in enumerate(greedy):
        for keep in batch.actions.keep[batch.actions.index == row]:
            assert torch.equal(keep[batch.state.visual[row]], expected)


def test_reinforcement_makes_rewarded_answers_and_masks_likelier() -> None:
    """A step along the gradient raises the log-probability of what had an advantage: the sign of it all."""
    values = [float(i % G == 0) for i in range(3 * G)]
    module, inputs = stage(rewards=lambda said: values, reward=RewardOptions(pruning=0.0), mask_weight=5.0)
    batch = collect(module, inputs)

    def gain() -> tuple[float, float]:
        actions = batch.actions
        with torch.no_grad():
            said, _ = module.score(batch, actions.index, actions.keep, actions.tokens, actions.mask)
            meter: dict[str, list[Tensor]] = {name: [] for name in METERS}
            kept = -module.masks_loss(batch, len(actions.index), meter)
        return float((batch.advantages[:, None] * said).sum()), float(kept)

    before = gain()
    step(module, batch, rate=1e-3)
    after = gain()
    assert after[0] > before[0] + 0.1 and after[1] > before[1]


# ---------------------------------------------------------------------------------------------------------- run folders


@pytest.mark.parametrize("train", [["lora", "glimpse", "vip"], ["decoder"]], ids=["lora", "decoder"])
def test_what_was_trained_is_what_is_loaded(train, tiny_folder, tmp_path) -> None:
    module, inputs = stage(train=train, adapted="lora" in train)
    module.config.backbone.path = tiny_folder
    questions = prompts(module.backbone)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    before = generate(module.backbone, module.pruner.eval(), questions, **settings)
    for seed in range(3):
        step(module, collect(module, inputs, seed), rate=0.01)
    ours = generate(module.backbone, module.pruner.eval(), questions, **settings)
    assert not torch.equal(ours.tokens, before.tokens)
    checkpoint.save(tmp_path, module.config, checkpoint.trained(module.pruner, module.backbone))
    loaded = checkpoint.load(tmp_path)
    theirs = loaded.generate(**questions, **settings)
    assert torch.equal(theirs.tokens, ours.tokens)
    torch.testing.assert_close(theirs.extra["logits"], ours.extra["logits"], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(mine, his) for mine, his in zip(ours.keep, theirs.keep))
    checkpoint.save(
        tmp_path / "again", checkpoint.read_config(tmp_path), checkpoint.trained(loaded.pruner, loaded.backbone)
    )  # carried
    again = checkpoint.load(tmp_path / "again").generate(**questions, **settings)
    assert torch.equal(again.tokens, ours.tokens)


def test_adapters_of_another_rank_are_refused(tiny_folder, tmp_path) -> None:
    module, _ = stage()
    module.config.backbone.path = tiny_folder
    checkpoint.save(tmp_path, module.config, checkpoint.trained(module.pruner, module.backbone))
    with pytest.raises(UserError, match=r"'lvlm\..*lora_A.*' of shape \[4, .*\] is \[6, .*\]"):
        checkpoint.load(tmp_path, lora=LoraOptions(rank=6, alpha=8))
    wrong = replace(module.config, lora=LoraOptions(rank=4, alpha=8, modules=["q_proj"]))
    checkpoint.save(tmp_path, wrong, checkpoint.trained(module.pruner, module.backbone))
    with pytest.raises(UserError, match=r"lvlm\..*not in this backbone"):
        checkpoint.load(tmp_path)


# ---------------------------------------------------------------------------------------------------- several processes


def test_ranks_that_share_weights_run_the_model_equally_often(monkeypatch) -> None:
    """Where another rank has more micro-batches or more groups to roll out again; what is added has no effect."""
    asked: list[int] = []
    values = [1.0] * G + [0.0, 1.0] * G
    module, inputs = stage(
        train=["lora"], rewards=lambda said: asked.append(len(said)) or values[: len(said)], zero_variance="resample"
    )
    module.config.rewards.pruning = 0.0
    batch = drift(collect(module, inputs))
    assert asked == [3 * G, G, G]
    alone, logs = gradients(module, batch), module.logs
    values[:G] = [0.0, 1.0] * (G // 2)
    monkeypatch.setattr(Untrained, "is_sharded", True)
    expected: list[bool] = []
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(expect_step=expected.append))
    monkeypatch.setattr(
        grpo,
        "dist",
        SimpleNamespace(
            is_initialized=lambda: False,
            all_reduce=lambda found, op: found.clamp_(min=5),
            ReduceOp=SimpleNamespace(MAX=0),
        ),
    )
    same(gradients(module, batch), alone)
    assert module.backwards == 5 and module.logs == pytest.approx(logs)
    assert expected == [False] * 4 + [True]
    batch.advantages.zero_()
    assert not any(value.any() for value in gradients(module, batch).values()) and module.backwards == 5
    asked.clear()
    found = collect(module, inputs)
    assert asked == [3 * G, 1, 1] and found.actions.reward.tolist() == values


class Ranks:
    """Stands in for torch.distributed: this process and one that holds ``other``, tensors in the order of the calls."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, other: list[Tensor]):
        self.other = iter(other)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, tensor: Tensor) -> None:
        tensor += next(self.other)


def test_two_ranks_have_the_gradient_of_one_with_all_rollouts(monkeypatch) -> None:
    """dapo: tokens are counted over all processes, gradients averaged."""
    module, inputs = stage(train=["lora"])
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(block_backward_sync=None))
    whole = drift(collect(module, inputs))
    expected = gradients(module, whole)
    halves = [part(whole, whole.actions.index == 0), part(whole, whole.actions.index != 0)]
    counts = [half.mask.sum().float() for half in halves]
    assert counts[0] != counts[1]
    found = []
    for half, count in zip(halves, reversed(counts)):
        monkeypatch.setattr(grpo, "dist", Ranks([count]))
        found.append(gradients(module, half))
    flat = torch.cat([found[0][name].flatten() for name, _ in trainable(module)])
    monkeypatch.setattr(grpo, "dist", Ranks([flat]))
    module.average_gradients()
    same({name: p.grad for name, p in trainable(module)}, expected)


def trainable(module: Untrained) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


# --------------------------------------------------------------------------------------------- the command, end to end


@pytest.fixture(scope="module")
def args(tiny_folder, tmp_path_factory) -> list[str]:
    """Settings of a run of two steps on a few samples, with a model whose answers are often short."""
    data, model = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_folder, model, dirs_exist_ok=True)
    described = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(described | {"eos_token_id": ENDS}))
    samples = [
        replace(SAMPLES[i % 2], key=f"{i}", images=[picture(112, 84, i)], boxes=[[(9 * (i % 4), 8, 60, 50)]])
        for i in range(12)
    ]
    write(samples[:8], data, split="train")
    write(samples[8:], data, split="val")
    return [
        f"backbone.path={model}",
        f"data.path={data}",
        "data.batch_size=2",
        "data.val_samples=2",
        "data.workers=0",
        "trainer.max_steps=2",
        "trainer.val_every=1",
        "trainer.log_every=1",
        "trainer.devices=1",
        "grpo.num_generations=4",
        "grpo.max_completion_length=5",
        "rewards.functions={format: 1.0}",
        "rewards.pruning_when=always",
        "optim.warmup=0",
        "optim.lora_lr=0.01",
    ]


GATE = [f"pruner.options={json.dumps(GLIMPSE)}", "pruner.name=glimpse"]
REINFORCE = ["stage=grpo", "train=[lora, glimpse, vip]", "lora={rank: 4, alpha: 8}"]


@pytest.fixture(scope="module")
def published(args, tmp_path_factory) -> str:
    """The published recipe's first stage: box masks, adapters, KL to the policy without them."""
    run = str(tmp_path_factory.mktemp("runs") / "published")
    recipe = ["stage=grpo", "train=[lora]", "lora={rank: 4, alpha: 8}", "pruner.name=oracle", "grpo.beta=0.04"]
    train.main([*args, *recipe, "pruner.options.prune_layer=1", "optim.clip=1e-4", f"out={run}"])
    return run


@pytest.fixture(scope="module")
def second(published, tmp_path_factory) -> str:
    """The published recipe's second stage: the glimpse, on the adapters of the first."""
    run = str(tmp_path_factory.mktemp("runs") / "glimpse")
    steps = ["trainer.max_steps=2", "trainer.val_every=1", "data.batch_size=2", "data.val_samples=2", "data.workers=0"]
    device = ["trainer.devices=1", "trainer.log_every=1"]
    train.main([*GATE, *steps, *device, f"init_from={published}", f"out={run}"])
    return run


def weights(run: str | Path) -> dict[str, Tensor]:
    return load_file(Path(run) / "trainable.safetensors")


def metrics(run: str | Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("val/") for name in line)]


def test_published_recipe_runs_reinforcement_first(published) -> None:
    saved = weights(published)
    assert saved and all(name.startswith("lvlm.") and lora.is_adapter(name) for name in saved)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
    last = metrics(published)[-1]
    assert last["step"] == 2
    assert {"train/kl", "train/reward", "train/policy_loss", "val/score", "val/keep_ratio"} <= set(last)
    assert last["val/box_recall"] == last["val/box_iou"] == 1.0
    assert last["train/grad_norm"] > 1e-4  # the norm before clipping


def test_then_the_glimpse_with_the_adapters_carried(published, second) -> None:
    """Frozen, and saved with it: the run is a whole model."""
    before, after = weights(published), weights(second)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(after) - set(before) and all(name.startswith(("glimpse.", "vip.")) for name in set(after) - set(before))
    model = checkpoint.load(second)
    questions = prompts(model.backbone, 1)
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    found = generate(model.backbone, model.pruner, questions, **settings)
    with lora.disabled(model.backbone.model):
        plain = generate(model.backbone, model.pruner, questions, **settings)
    assert (found.extra["logits"] - plain.extra["logits"]).abs().max() > 1e-3


def test_the_shipped_configs_of_the_published_recipe_run(args, tmp_path) -> None:
    """Reinforcement leaves the glimpse as it is; then the glimpse trains on the reinforced model, which stays."""
    rl, gaze, small = tmp_path / "rl", tmp_path / "gaze", [x for x in args if x.startswith(("trainer.", "data."))]
    train.main(["conf/stage2_published.yaml", *args, *GATE, "lora.rank=4", f"out={rl}"])
    train.main(["conf/stage1_boxes.yaml", *small, f"init_from={rl}", f"out={gaze}"])
    before, after = weights(rl), weights(gaze)
    assert before.keys() == after.keys() and any(".layers.0." in name for name in before)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("lvlm."), name
    assert checkpoint.read_config(gaze).lora == checkpoint.read_config(rl).lora
    assert metrics(gaze)[-1]["step"] == 2


def configured(*argv: str) -> TrainConfig:
    return config.load(TrainConfig, argv, under=train.inherited)


def test_a_run_takes_over_what_it_starts_from(published, second, args) -> None:
    start, old = f"init_from={second}", checkpoint.read_config(second)
    new = configured("conf/stage2.yaml", start, "out=x")
    assert new.stage == "grpo" and new.train == ["lora", "glimpse", "vip"] and new.data.batch_size == 8
    assert new.backbone == old.backbone and new.data.path == old.data.path and new.pruner == old.pruner
    assert f"backbone.path={new.backbone.path}" in args and new.pruner.options == GLIMPSE
    assert (old.lora.rank, new.lora.rank, new.lora.alpha) == (4, 32, 64)  # the file says so
    assert configured(start, "out=x").lora == old.lora
    other = ["backbone.attention=eager", "data.path=there", "pruner.options.threshold=0.3", "lora.rank=2"]
    told = configured("conf/stage2.yaml", start, "out=x", *other)
    assert told.backbone == replace(old.backbone, attention="eager") and told.data.path == "there"
    assert told.pruner.options == GLIMPSE | {"threshold": 0.3} and told.lora.rank == 2
    changed = configured(start, "out=x", "pruner.name=random")
    assert changed.pruner == PrunerOptions("random") and changed.backbone == old.backbone
    with pytest.raises(UserError, match="no run folder"):
        configured("conf/stage2.yaml", "init_from=nowhere", "out=x")


def refused(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    """The one line that the command answers with, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.strip().splitlines()[-1].startswith("error: ")
    return captured.err.strip().splitlines()[-1]


def test_refused_starts(second, args, tmp_path, capsys) -> None:
    out, start = f"out={tmp_path / 'run'}", f"init_from={second}"
    assert "'lvlm." in refused(capsys, [*args, *GATE, *REINFORCE, start, out, "lora.rank=6"])
    blind = json.dumps(GLIMPSE | {"init_bias": -30.0})
    few = [*args, *GATE, *REINFORCE, f"pruner.options={blind}", out]
    assert "guard.keep_floor" in refused(capsys, few)


def test_an_interrupted_run_goes_on(second, args, tmp_path, monkeypatch) -> None:
    """From the weights of the last validation, to the end."""
    seen: list[dict[str, Tensor]] = []
    collect = GRPOModule.collect

    def watch(module: GRPOModule, inputs: Inputs) -> Batch:
        seen.append({name: p.detach().clone() for name, p in adapters(module.backbone).items()})
        if len(seen) == 3:
            raise RuntimeError("the plug was pulled")
        return collect(module, inputs)

    monkeypatch.setattr(GRPOModule, "collect", watch)
    run = [*args, *GATE, *REINFORCE, f"init_from={second}", f"out={tmp_path}", "trainer.max_steps=4"]
    with pytest.raises(RuntimeError, match="plug"):
        train.main(run)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    train.main([*run, "resume=true"])
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(seen) == 5 and all(torch.equal(seen[3][name], value) for name, value in seen[2].items())
    assert any(not torch.equal(seen[3][name], value) for name, value in seen[0].items())
    initial, final = weights(second), weights(tmp_path)
    assert set(initial) == set(final)
    for head in ("lvlm.", "glimpse.", "vip."):
        assert any(not torch.equal(final[name], initial[name]) for name in final if name.startswith(head)), head


def test_learning_rate_falls_with_the_updates(args, tmp_path) -> None:
    """Two updates per batch of rollouts count twice, in the steps as in the schedule."""
    more = ["grpo.num_iterations=2", "trainer.max_steps=4", "optim.final_lr=0.0", "optim.lora_lr=0.01"]
    train.main([*args, *GATE, *REINFORCE, *more, f"out={tmp_path}"])
    last = metrics(tmp_path)[-1]
    assert last["step"] == 4
    assert last["lr/lora"] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 0.5)))  # as the batch began
    assert last["train/clip_ratio/region_mean"] >= 0


def test_guard_rails_stop_a_collapse(args, tmp_path, monkeypatch) -> None:
    """The third step reports one: the run stops, and the weights of the second step's validation stay."""
    steps: list[dict[str, Tensor]] = []

    def report(module: GRPOModule, *_: Any) -> None:
        steps.append({f"lvlm.{name}": p.detach().clone() for name, p in adapters(module.backbone).items()})
        good = len(steps) < 3
        module.log("train/reward", torch.tensor(1.0 if good else 0.2))
        module.log("train/keep_ratio/sampled", torch.tensor(0.5 if good else 0.0))
        module.log("train/completions/empty_ratio", torch.tensor(0.0))

    monkeypatch.setattr(GRPOModule, "report", report)
    run = [*args, *GATE, *REINFORCE, f"out={tmp_path}", "trainer.max_steps=4", "guard.smoothing=0.0"]
    with pytest.warns(UserWarning, match="stopped at step 3: pruning ran away"):
        train.main(run)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2] and len(steps) == 3
    final = weights(tmp_path)
    assert all(torch.equal(final[name], value) for name, value in steps[2].items())
    assert any(not torch.equal(steps[1][name], value) for name, value in steps[2].items())


class Guarded:
    """Guard rails without a trainer, told what was measured."""

    def __init__(self, guard: GuardRails):
        self.guard, self.module = guard, SimpleNamespace(device="cpu")
        strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
        self.trainer = SimpleNamespace(strategy=strategy, should_stop=False, global_step=7)

    def after(self, reward: float, kept: float = 0.5, empty: float = 0.0) -> bool:
        """Whether a step with these metrics stops the run."""
        names = ("train/reward", "train/keep_ratio/sampled", "train/completions/empty_ratio")
        self.trainer.callback_metrics = dict(zip(names, (reward, kept, empty)))
        self.guard.on_train_batch_end(self.trainer, self.module)
        return self.trainer.should_stop


@pytest.mark.parametrize(
    ("kept", "empty", "reason"), [(0.0, 0.0, "pruning ran away: 0.00%"), (0.5, 0.8, "answers collapsed: 80%")]
)
def test_guard_rails_know_a_collapse(kept, empty, reason) -> None:
    guarded = Guarded(GuardRails(GuardOptions(smoothing=0.0)))
    assert not guarded.after(1.0)
    assert not guarded.after(1.0, kept, empty)  # the reward is as good as ever
    assert not guarded.after(0.2)  # it falls, but of itself
    with pytest.warns(UserWarning, match=f"stopped at step 7: {reason}"):
        assert guarded.after(0.2, kept, empty)


def test_guard_rails_are_patient() -> None:
    """One bad step is no collapse; what was seen before is remembered over a resume."""
    options = GuardOptions(smoothing=0.5, keep_floor=0.01)
    guarded = Guarded(GuardRails(options))
    assert not any(guarded.after(1.0, 0.02) for _ in range(3))
    assert not guarded.after(0.6, 0.0)  # 0.8 and 0.01, smoothed
    again = Guarded(GuardRails(options))
    again.guard.load_state_dict(guarded.guard.state_dict())
    with pytest.warns(UserWarning, match="fell from 1.000 to 0.500"):
        assert again.after(0.2, 0.0)
    forgetful = Guarded(GuardRails(options))
    with pytest.raises(UserError, match="guard.keep_floor=0.01"):
        forgetful.after(0.2, 0.0)


def test_a_reference_that_trains_is_none() -> None:
    with pytest.raises(UserError, match="without adapters"):
        stage(train=["lora", "vision"], beta=0.1)


def test_adapters_are_not_left_out_by_accident(args, published, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit):
        train.main([*args, f"init_from={published}", "stage=grpo", "lora=null", f"out={tmp_path / 'run'}"])
    assert "has adapters: leave lora out" in capsys.readouterr().err and not (tmp_path / "run").exists()


SCRIPT = """
import sys, torch
from glimpseprune import train
from glimpseprune.training.grpo import GRPOModule

def on_train_end(self):
    own = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
    torch.save({"weights": own, "said": self.said}, f"{self.config.out}.{self.global_rank}.pt")

GRPOModule.on_train_end = on_train_end
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(args, tmp_path) -> None:
    """Lightning's ddp on two CPU processes, each with prompts and rollouts of its own."""
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.val_every=2", f"out={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), *args, *GATE, *REINFORCE, *two],
        env=env,
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(f"{out}.{rank}.pt") for rank in range(2)]
    assert ranks[0]["said"] != ranks[1]["said"]
    for name, value in ranks[0]["weights"].items():
        assert value.isfinite().all() and torch.equal(value, ranks[1]["weights"][name]), name
    saved = weights(out)
    assert any("lora_B" in name and value.any() for name, value in saved.items())
    assert [line["step"] for line in metrics(out)] == [2]
