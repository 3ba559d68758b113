"""The plan's numbers are those of real training steps: weights to the byte, activations to a tenth."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import picture
from glimpseprune import backbones, config, lora, memory, plan
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator
from glimpseprune.pruners import build
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.types import Inputs, Sample
from test_grpo import Untrained

BASE = "data/tiny-qwen2_5_vl"
STAGE2 = ["conf/demo_plus.yaml", "conf/backbones/tiny.yaml", "data.path=-", "init_from=null", "data.batch_size=3"]
SIZES = {
    "qwen2_5_vl_3b": (3.75, 13_723_137),
    "qwen2_5_vl_7b": (8.29, 22_406_657),
    "llava1_5_7b": (7.06, 25_847_297),
    "llava1_5_13b": (13.35, 35_362_305),
}
"""Billions of parameters, and how many train in stage 1 (docs/method.md §1)."""


class Driven(GlimpseModule):
    """Without a trainer, at a step where the `stc` estimator is used."""

    progress = 0.9

    def log(self, *_: Any, **__: Any) -> None: ...

    def log_dict(self, *_: Any, **__: Any) -> None: ...


def load(*arguments: str) -> plan.PlanConfig:
    return config.load(plan.PlanConfig, [*arguments, "out=-", "data.path=-", "image=336x336"])


def world(cfg: plan.PlanConfig) -> tuple[Any, Inputs, memory.Model, memory.Load]:
    """A real module with a batch, and what the plan thinks of them."""
    torch.manual_seed(0)
    backbone = backbones.load(BASE, dtype=cfg.backbone.dtype)
    pruner = build(cfg.pruner.name, cfg.pruner.options, backbone)
    if cfg.lora is not None:
        lora.inject(backbone, cfg.lora, pruner.stops[0].depth)
    module = {"glimpse": Driven, "grpo": Untrained}[cfg.stage](cfg, backbone, pruner)
    module._fabric = module._trainer = None
    samples = [
        Sample(str(i), "number on the red tag ?", ("27",), [picture(336, 336, i)], [[(0, 0, 60, 60)]])
        for i in range(cfg.data.batch_size)
    ]
    inputs = Collator(backbone)(samples)
    found = plan.architecture(BASE)
    size = plan.load_of(cfg, found, backbone.lm_head.weight.element_size())
    text = inputs.prompt["input_ids"].shape[1] - size.visual
    size = replace(size, text=text, answer=inputs.answer_ids.shape[1])
    return module, inputs, plan.describe(plan.skeleton(cfg, found)), size


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what is saved for the backward pass, each storage once, the model's own weights not at all."""

    def __init__(self, module: nn.Module) -> None:
        self.storages: dict[int, Tensor] = {}  # kept, so that no address is used twice
        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if (address := tensor.untyped_storage().data_ptr()) not in own:
                self.storages[address] = tensor
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moment(name: str, *world: Any) -> memory.Peak:
    return next(peak for peak in memory.moments(*world) if peak.moment == name)


# -------------------------------------------------------------------------------------------- against a training step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sight", ["one", "question"])
@pytest.mark.parametrize("recipe", [[], ["loss.kl=0", "loss.pressure=0", "loss.mask=1", "loss.answer=1"]])
def test_a_step_of_stage_1(dtype, batch, sight, recipe):
    sized = [f"backbone.dtype={dtype}", f"data.batch_size={batch}", f"pruner.options.sight={sight}"]
    cfg = load("conf/demo.yaml", *sized, *recipe)
    module, inputs, model, size = world(cfg)
    with (saved := Saved(module)):
        loss = module.training_step(inputs, 0)
    assert moment("loss", cfg, model, size).saved == pytest.approx(saved.bytes, rel=0.1)
    loss.backward()
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.step()
    held = memory.held("ddp", model.counts, 1)
    assert held.weights == size_of(module.parameters())
    assert held.gradients == size_of(p.grad for p in module.parameters() if p.grad is not None)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert held.optimizer == size_of(moments) and held.buffers == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("recipe", [[], ["pruner.options.private_layers=3", "loss.attention=1"], ["loss.answer_kl=1"]])
def test_a_step_of_stage_1_with_private_layers(dtype, batch, recipe):
    answers = ["pruner.options.complete=true"] if "loss.answer_kl=1" in recipe else []
    cfg = load("conf/early.yaml", f"backbone.dtype={dtype}", f"data.batch_size={batch}", *recipe, *answers)
    module, inputs, model, size = world(cfg)
    with (saved := Saved(module)):
        module.training_step(inputs, 0)
    assert moment("loss", cfg, model, size).saved == pytest.approx(saved.bytes, rel=0.1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("name", "progress", "more"),
    [
        ("loss of the first steps", 0.1, []),
        ("loss", 0.9, ["loss.dropped=8"]),
        ("loss", 0.9, ["trainer.checkpointing=true"]),
    ],
    ids=["value", "dropped", "checkpointing"],
)
def test_a_step_of_stage_1_in_other_ways(monkeypatch, batch, name, progress, more):
    monkeypatch.setattr(Driven, "progress", progress)
    cfg = load("conf/demo.yaml", f"data.batch_size={batch}", *more)
    module, inputs, model, size = world(cfg)
    with torch.no_grad():
        cfg.loss.target = float((module.share(inputs).logits[-1] > 0).float().mean())
    with (saved := Saved(module)):
        module.training_step(inputs, 0)
    # Recomputed layers hold nothing of their own until the backward pass.
    near = 0.5 if cfg.trainer.checkpointing else 0.1
    assert moment(name, cfg, model, size).saved == pytest.approx(saved.bytes, rel=near)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "trains",
    [[], ["lora.first_layer=0"], ["lora.dropout=0.1"], ["lora=null", "train=[decoder,glimpse,vip]"]],
    ids=["lora", "lora below K", "dropout", "decoder"],
)
def test_a_step_of_stage_2(dtype, trains):
    cfg = load(*STAGE2, f"backbone.dtype={dtype}", "grpo.num_generations=4", "grpo.micro_batch=8", *trains)
    module, inputs, model, size = world(cfg)
    torch.manual_seed(0)
    batch = module.collect(inputs)
    actions, meter = batch.actions, defaultdict(list)
    rows = torch.arange(8)
    kept = int(actions.keep[rows].sum(1).max())
    keep = (kept - size.text) / size.visual
    size = replace(size, answer=max(int(batch.mask[rows].sum(1).max()), 1), keep=keep)
    for name, run in {
        "masks' loss": lambda: module.masks_loss(batch, 1, meter),
        "tokens' loss": lambda: module.token_loss(batch, rows, torch.ones(actions.tokens.shape), meter),
    }.items():
        with (saved := Saved(module)):
            run()
        near = 0.25 if "lora.dropout=0.1" in trains else 0.1  # a CPU's dropout masks are float32, a GPU's are bytes
        assert moment(name, cfg, model, size).saved == pytest.approx(saved.bytes, rel=near), name


@pytest.mark.parametrize("stage", ["conf/demo.yaml", "conf/early.yaml", "conf/demo_plus.yaml"])
def test_the_skeleton_is_the_module(stage):
    more = ["conf/backbones/tiny.yaml"] if "early" not in stage else []
    cfg = load(stage, *more, "init_from=null", "data.batch_size=1")
    module, _, model, _ = world(cfg)
    assert plan.describe(module) == model


# ---------------------------------------------------------------------------------------------------- published models


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    cfg = load("conf/stage1.yaml", f"conf/backbones/{name}.yaml")
    found = published(cfg)
    counts = plan.describe(plan.skeleton(cfg, found)).counts
    billions, trained = SIZES[name]
    assert counts[True, 4] == trained
    assert counts[False, 2] / 1e9 == pytest.approx(billions, abs=0.005)


def published(cfg: plan.PlanConfig) -> Any:
    return plan.architecture("none/" + cfg.backbone.path.rpartition("/")[2])


@pytest.mark.parametrize("file", sorted(Path("conf/backbones").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_backbone_can_be_planned(file):
    """Its options fit the model that it names."""
    cfg = load("conf/stage1.yaml", str(file))
    found = plan.architecture(BASE) if Path(cfg.backbone.path).is_dir() else published(cfg)
    stage = plan.skeleton(cfg, found)
    assert stage.pruner.options.vision_layers[0] == stage.backbone.feature_layer
    model = plan.describe(stage)
    rows = plan.compare(cfg, model, plan.load_of(cfg, found, 2))
    assert len(rows) == len(plan.STRATEGIES) and all(row.total > 0 for row in rows)


def test_visual_tokens_are_those_of_the_processor():
    found, options = plan.architecture(BASE), load("conf/demo.yaml").backbone
    processor = backbones.load(BASE)
    for width, height in ((336, 336), (500, 300), (30, 900)):
        ((layout,),) = processor.layouts(processor.prepare(["?"], [[picture(width, height)]]))
        assert plan.visual_tokens(found, options, f"{width}x{height}") == layout.count
    assert plan.visual_tokens(found, replace(options, max_pixels=100 * 28**2), "1344x1344") == 100
    llava = backbones.published()["llava-1.5-7b"]()
    assert plan.visual_tokens(llava, options, "1344x1344") == 576


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_zero_splits_what_it_says():
    counts = {(False, 2): 3 * 10**9, (True, 4): 10**9}
    full = memory.held("ddp", counts, 1)
    assert (full.weights, full.gradients, full.optimizer, full.buffers) == (10e9, 4e9, 8e9, 0)
    assert memory.held("ddp", counts, 8).buffers == 4e9
    first, second, third, away = (memory.held(name, counts, 8, "bf16-mixed") for name in plan.STRATEGIES[1:])
    assert first.weights == second.weights == 8e9 and third.weights == 1e9 and away.weights == 0
    assert first.gradients == 2e9 and second.gradients == third.gradients == 2e9 / 8
    assert first.optimizer == second.optimizer == third.optimizer == 12e9 / 8
    assert away.host == third.weights + third.gradients + third.optimizer
    assert third.buffers == second.buffers + 2 * (memory.LIVE + memory.BUCKET)
    assert memory.held("ddp", counts, 1, "bf16-true").weights == 8e9
    assert memory.held("ddp", counts, 1, "bf16-mixed") == full


def test_a_pruner_that_leaves_the_early_cache_alone_needs_more_of_it():
    cfg = load("conf/demo.yaml", "gpus=1")
    found = plan.architecture(BASE)
    model = plan.describe(plan.skeleton(cfg, found))  # prunes after 3 of 6 layers, cache included
    given = replace(plan.load_of(cfg, found, 4), text=10, visual=100, keep=0.1)
    assert model.held_columns(given) == 20
    assert replace(model, steps=[(3, False)]).held_columns(given) == 10 + (3 * 100 + 3 * 10) / 6
    assert replace(model, steps=[]).held_columns(given) == 110


@pytest.mark.parametrize("knob", ["data.batch_size=8", "image=672x672", "answer=64", "gpus=8"])
def test_more_of_anything_is_more(knob):
    cfg = load("conf/demo.yaml", "data.batch_size=4", "gpus=1")
    more = config.load(plan.PlanConfig, ["conf/demo.yaml", "data.batch_size=4", "out=-", "image=336x336", knob])
    model = plan.describe(plan.skeleton(cfg, found := plan.architecture(BASE)))
    few, many = ([row.total for row in plan.compare(c, model, plan.load_of(c, found, 4))] for c in (cfg, more))
    if knob == "gpus=8":  # what is split weighs less
        assert all(a >= b for a, b in zip(few[1:], many[1:])) and few[0] < many[0]
    else:
        assert all(a < b for a, b in zip(few, many))


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["conf/gpu1_3b.yaml", "gpu_memory=24"], "fits: trainer.strategy=auto"),
        (["conf/node8_7b.yaml"], "fits: trainer.strategy=ddp"),
        (["conf/nodes4x8_7b.yaml"], "fits: trainer.strategy=ddp"),
        (["conf/node8_7b.yaml", "trainer.strategy=auto"], "fits: trainer.strategy=auto (zero2)"),
        (["conf/node8_7b.yaml", "gpu_memory=32"], "fits: trainer.strategy=zero3"),
        (["conf/gpu1_3b.yaml", "gpu_memory=24", "data.batch_size=16"], "data.batch_size=4 trainer.accumulate=32"),
        (["conf/node8_7b.yaml", "data.batch_size=1", "gpu_memory=6"], "lower backbone.max_pixels"),
        (["conf/nodes4x8_7b.yaml", "grpo.micro_batch=64", "data.batch_size=8"], "lower grpo.micro_batch=32"),
        (
            ["conf/node8_7b.yaml", "train=[decoder]", "trainer.precision=bf16-mixed"],
            "trainer.strategy=ddp, as configured, does not",
        ),
        (
            ["conf/stage1.yaml", "conf/backbones/llava1_5_13b.yaml", "gpu_memory=20", "data.batch_size=1"],
            "CPU memory per node",
        ),
    ],
)
def test_verdicts(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan.main(arguments)
    out = capsys.readouterr().out
    assert said in out and out.strip().splitlines()[-1].startswith(("fits: ", "does not fit: "))
    assert all(name in out for name in plan.STRATEGIES[1:])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("gpu_memry=24", "did you mean 'gpu_memory'"),
        ("backbone.path=some/model", "hf download some/model"),
        ("backbone.path=conf", "backbone.path=conf: no folder with config.json"),
        ("backbone.dtype=int3", "backbone.dtype: expected 'auto' | 'float32'"),
        ("image=large", "width x height"),
        ("image=1344x0", "width x height"),
        ("stage=pretrain", "choices are glimpse, grpo"),
        ("train=[lora]", "there are no adapters"),
        ("keep=2", "keep: give 0 to 1, got 2"),
        ("train=[vision]", "leave vision out"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong, said, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["conf/stage1.yaml", "conf/backbones/tiny.yaml", wrong])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_pruner_without_a_gate(capsys):
    base = [f"backbone.path={BASE}", "pruner.name=none", "train=[decoder]"]
    plan.main([*base, "stage=grpo"])
    assert "fits: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(base)
    assert "stage=glimpse trains the pruner 'glimpse' or 'early', not 'none'" in capsys.readouterr().err


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    cfg = load("conf/demo.yaml", f"backbone.path={tmp_path}")
    with pytest.raises(UserError, match="is a 'bert' model, which no backbone knows"):
        plan.skeleton(cfg, plan.architecture(str(tmp_path)))


def test_what_limits_would_leave_out_is_said(tmp_path, capsys, monkeypatch):
    from glimpseprune.data.shards import write
    from test_shards import make, picture

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = [(280, 280), (112, 56), (56, 56)]  # 100, 8 and 4 tokens
    write((make(n, images=[picture(n, sizes[n % 3])], boxes=None) for n in range(24)), tmp_path / "a", split="train")
    write((make(n, images=[picture(n)]) for n in range(8)), tmp_path / "b", split="train")
    given = ["conf/stage1.yaml", "backbone.path=data/tiny-qwen2_5_vl", "data.batch_size=4", f"data.path={tmp_path}/a"]
    plan.main([*given, "limits=[50,4]"])
    said = capsys.readouterr().out
    assert "24 training samples" in said
    assert "896 visual tokens, median 8, most 100" in said
    assert said.index("data.max_tokens=4 leaves out 16 samples (66.7%) with 96.4%") < said.index(
        "data.max_tokens=50 leaves out 8"
    )
    found = re.search(r"in batches of 4, ([\d.]+)% .* are padding \(([\d.]+)% with data.bucket=256\)", said)
    assert float(found[1]) > 30
    assert float(found[2]) == 0
    plan.main([*given, "limits=[50]", f"data.mix={{{tmp_path}/b: 1}}"])
    assert "32 training samples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["conf/stage1.yaml", "backbone.path=data/tiny-qwen2_5_vl", "limits=[50]"])
    assert "limits: give data.path" in capsys.readouterr().err
