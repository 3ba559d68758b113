"""The cases of training: a step of stage 1 beside the published way, a step of reinforcement beside TRL's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Bench, case, rows
from benchmarks.clock import AGAIN, Spread
from benchmarks.counters import peak
from benchmarks.rows import Row
from benchmarks.world import MIB, World
from glimpseprune import attention, cost, decoder, losses
from glimpseprune.pruners import glimpse, none
from glimpseprune.types import Grid, Inputs, Sample

ANSWER = 12
"""Tokens of a reference answer."""
KL = {"kl": 1.0, "pressure": 1.0, "target": 0.05}
ROLLOUTS, TOKENS = 8, 32
BOXES = {"kl": 0.0, "pressure": 0.0, "mask": 1.0, "answer": 1.0}


@case(gpu=34, cpu=70)
def stage_1(bench: Bench) -> Iterator[Row]:
    """A step of stage 1, optimiser included, on one sample: against the KL (256 of the dropped tokens run, or all, with
    either estimator), and against boxes; beside the published way: prompt, glimpse and answer as one sequence through
    all layers, with gradients."""
    for number, grid in enumerate(bench.world.size.trained):
        yield from steps_on(bench, grid, bench.within(len(bench.world.size.trained) - number))


def steps_on(bench: Bench, grid: Grid, until: float) -> Iterator[Row]:
    world, name = bench.world, f"stage 1, {grid[0] * grid[1]:,} tokens"
    inputs = example(world, grid)
    sides = steps(world)
    runs = {side: partial(step, inputs) for side, (step, _) in sides.items()}
    turns = bench.take(runs, (time.monotonic() + until) / 2)
    bounds = {side: world.rates.ms(flops(inputs), 0) for side, (_, flops) in sides.items()}
    yield from rows(name, turns, bounds)
    first = None
    for side in [side for side in turns.sides if not side.endswith(AGAIN)]:
        most = peak(runs[side], world.device)[0] / MIB
        ratio = Spread.of([most / first]) if first else None
        first = first or most
        yield Row(f"{name}: peak", side, "MiB", Spread.of([most]), ratio=ratio)


def steps(world: World) -> dict[str, tuple[Callable[[Inputs], None], Callable[[Inputs], float]]]:
    """Name -> one step of training, and the FLOPs of one."""
    from glimpseprune.options import BackboneOptions, DataOptions, LossOptions, PrunerOptions, TrainConfig
    from glimpseprune.training.glimpse import GlimpseModule

    depth = world.size.depths[0]

    def module(progress: float, loss: dict[str, Any]) -> nn.Module:
        driven = type("Driven", (GlimpseModule,), {"progress": progress, "log": nothing, "log_dict": nothing})
        named = {"backbone": BackboneOptions(path="none"), "data": DataOptions(path="none"), "pruner": PrunerOptions()}
        config = TrainConfig(out="none", loss=LossOptions(**loss), **named)
        made = driven(config, world.backbone, world.pruner(depth, logit_cap=5.0, init_bias=2.0))
        return made.to(world.device).train()

    def ours(progress: float, loss: dict[str, Any], mixed: bool = False) -> tuple[Callable, Callable]:
        trained = module(progress, loss)
        return update(world, trained, lambda inputs: trained.training_step(inputs, 0), mixed), trained.flops

    thinned = KL | {"dropped": min(256, world.size.trained[-1][0] * world.size.trained[-1][1] // 8)}
    boxes = module(0.5, BOXES)
    step = update(world, boxes, lambda inputs: published(world, boxes.pruner, inputs), mixed=True)
    sides = {
        "published way": (step, partial(published_flops, world)),
        "KL": ours(0.8, thinned, mixed=True),
        "KL, value": ours(0.1, thinned, mixed=True),
        "KL, all dropped": ours(0.8, KL, mixed=True),
        "boxes": ours(0.5, BOXES, mixed=True),
    }
    return sides


def nothing(*_: Any, **__: Any) -> None:
    """In the place of what wants a trainer."""


def update(
    world: World, module: nn.Module, loss: Callable[[Inputs], Tensor], mixed: bool = False
) -> Callable[[Inputs], None]:
    """Forward, backward, clip, step; ``mixed``: under autocast, where the model is in bfloat16."""
    mixed = mixed and world.dtype == torch.bfloat16
    optimizer = module.configure_optimizers()["optimizer"]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step(inputs: Inputs) -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=mixed):
            value = loss(inputs)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def published(world: World, pruner: nn.Module, inputs: Inputs) -> Tensor:
    """The published recipe's loss, computed as its code does: one sequence, all columns differentiated, logits of every
    position in float32."""
    backbone, ids = world.backbone, inputs.answer_ids
    with torch.no_grad():
        encoded = decoder.see(backbone, pruner, inputs.prompt)
    vectors = pruner.glimpse().to(encoded.embeds.dtype)  # [L, 1, D]
    tail = torch.cat([vectors[:1], backbone.embed(ids)], 1)  # [1, 1 + T, D]
    size, behind = encoded.embeds.shape[1], ids.shape[1]
    state = decoder.append(decoder.start(encoded), tail)
    state = replace(state, hidden=torch.cat([encoded.embeds, tail], 1))  # [1, S + 1 + T, D]
    seen: dict[int, Tensor] = {}

    def see(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        if layer in pruner.probe_layers:
            row = attention.logits(query[:, :, size : size + 1], key, scaling)[:, :, 0, :size]  # [1, H, S]
            seen[layer] = row.transpose(1, 2)[encoded.visual]

    def injected(index: int) -> Callable[..., Tensor]:
        return lambda hidden, **more: backbone.text_model.layers[index](
            hidden + F.pad(vectors[index], (0, 0, size, behind)), **more
        )

    layers = {index: injected(index) for index in range(1, world.layers)}
    state = decoder.run_layers(backbone, state, world.layers, probe=see, layers=layers)
    states = [encoded.states[layer] for layer in pruner.vision_layers]
    grids = [grid for row in encoded.grids for grid in row]
    probe = torch.cat([seen[layer] for layer in pruner.probe_layers], -1)
    logits = pruner.vip(probe, states, grids, pruner.window).float()
    wanted = F.pad(ids, (size, 0), value=-100)  # what each position but the last predicts
    answer = F.cross_entropy(backbone.logits(state.hidden[:, :-1]).float().flatten(0, 1), wanted.flatten())
    return answer + losses.mask_loss(logits, torch.cat(inputs.targets), encoded.counts)


def published_flops(world: World, inputs: Inputs) -> float:
    """The tower forward, every layer and the head on every position forward and backward (to its input alone)."""
    shapes, prompt = world.backbone.shapes, inputs.prompt
    layouts = world.backbone.layouts(prompt)[0]
    columns = prompt["input_ids"].shape[1] + 1 + ANSWER
    flops = cost.prefill_flops(shapes, 0, layouts, [(world.layers, 0)])
    layers = world.layers * cost.layer_flops(shapes.decoder, columns, causal=True)
    head = 2 * shapes.decoder.width * shapes.decoder.vocab * columns
    return flops.tower + flops.projector + 2 * (layers + head)


def example(world: World, grid: Grid) -> Inputs:
    """One sample with a box and an answer."""
    random = torch.Generator().manual_seed(3)
    target = torch.zeros(grid, dtype=torch.bool)
    target[: max(1, grid[0] // 5), : max(1, grid[1] // 4)] = True
    ids = torch.randint(5, world.size.text["vocab_size"] - 5, (1, ANSWER), generator=random).to(world.device)
    sample = Sample("a", "?", ("a",), [], [[(0.0, 0.0, 1.0, 1.0)]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Inputs(world.prompts([grid]), [sample], ids, mask, [target.flatten().to(world.device)])


# ---------------------------------------------------------------------------------------------------------- stage 2


@case(gpu=14, cpu=60)
def rl(bench: Bench) -> Iterator[Row]:
    """A step of stage 2 on one prompt, 8 rollouts of 32 tokens, adapters above K; TRL beside it: benchmarks/grpo.py."""
    world = bench.world
    grid = world.size.trained[-1]
    inputs = example(world, grid)
    runs = {side: rl_step(world, inputs, side) for side in ("none", "glimpse")}
    yield from rows(f"RL, {grid[0] * grid[1]:,} tokens", bench.take(runs), samples=ROLLOUTS)
    yield Row("RL", "TRL", note="needs trl" if find_spec("trl") is None else "by --cases rl-trl")


@case(gpu=0, cpu=0)
def rl_trl(bench: Bench) -> Iterator[Row]:
    """A whole step of stage 2 beside one of TRL's GRPOTrainer, each in a process of its own, from images to updated
    adapters (wall time): benchmarks/grpo.py. Only where it is asked for."""
    import datasets  # noqa: F401 (which TRL needs)
    import trl  # noqa: F401

    from benchmarks import grpo

    setting = grpo.Setting.of(bench.world.size_name, steps=3, warm_up=1)
    sides = ("TRL", "ours", "ours (A/A)")
    log = grpo.measure(setting, sides)
    seconds = {name: [sum(wall for wall, _ in spent.values()) for spent, _ in log[name]] for name in sides}
    for name in sides:
        ratio = Spread.of([a / b for a, b in zip(seconds[name], seconds["TRL"])]) if name != "TRL" else None
        times = Spread.of([each * 1e3 for each in seconds[name]])
        rate = setting.rollouts / times.median * 1e3
        yield Row("RL beside TRL", name, value=times, ratio=ratio, rate=rate, rounds=setting.steps)
    for name in sides:
        held = max(facts["rss"] for _, facts in log[name])
        yield Row("RL beside TRL: peak", name, "MiB", Spread.of([held]))


def rl_step(world: World, inputs: Inputs, kind: str) -> Callable[[], None]:
    """A step that samples rollouts, scores and learns; under ``glimpse`` each has a mask of its own."""
    from glimpseprune import lora, rewards
    from glimpseprune.options import (
        BackboneOptions,
        DataOptions,
        GRPOOptions,
        LoraOptions,
        OptimOptions,
        PrunerOptions,
        RewardOptions,
        TrainConfig,
    )  # fmt: skip
    from glimpseprune.training.grpo import GRPOModule

    backbone, depth, adapters = world.again(), world.size.depths[0], LoraOptions(rank=32, alpha=64.0)
    words = SimpleNamespace(
        batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows.tolist()],
        eos_token_id=None,
        pad_token_id=0,
    )
    backbone.processor = SimpleNamespace(tokenizer=words)
    torch.manual_seed(0)
    if kind == "glimpse":
        options = replace(world.pruner(depth).options, max_keep=None, threshold=0.5, init_bias=-2.8)  # keeps 6%
        pruner = world.place(glimpse.Pruner(backbone, options))
    else:
        pruner = world.place(none.Pruner(backbone, none.Options()))
    with torch.device(world.device):
        lora.inject(backbone, adapters, depth)
    trains = ["lora", "glimpse", "vip"] if kind == "glimpse" else ["lora"]
    config = TrainConfig(
        out="none",
        stage="grpo",
        backbone=BackboneOptions(path="none"),
        data=DataOptions(path="none"),
        pruner=PrunerOptions(name=kind),
        train=trains,
        lora=adapters,
        grpo=GRPOOptions(num_generations=ROLLOUTS, max_completion_length=TOKENS),
        rewards=RewardOptions(pruning_when="always"),
        optim=OptimOptions(weight_decay=0.0),
    )
    own = {"progress": 0.5, "log": nothing, "log_dict": nothing, "manual_backward": lambda self, loss: loss.backward()}
    module = type("Driven", (GRPOModule,), own)(config, backbone, pruner).to(world.device)
    module.rewards, module.ends = rewards.Rewards({"spread": spread}, {"spread": 1.0}), [-1]
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        module.backward_all([module.collect(inputs)])
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def spread(completions: Any, **_: Any) -> list[float]:
    """A cheap reward that differs within nearly every group."""
    return [sum(map(ord, text)) % 11 / 10 for text in completions]
