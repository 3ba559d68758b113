"""Watching: what is measured, what stops a run before it is spoiled, and who is named when nothing moves any more."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, picture
from glimpseprune import train
from glimpseprune.cost import Vip
from glimpseprune.data.collate import Collator
from glimpseprune.data.module import PADDING, ShardDataset, ShardLoader
from glimpseprune.data.shards import write
from glimpseprune.options import (
    BackboneOptions,
    DataOptions,
    GRPOOptions,
    LossOptions,
    RewardOptions,
    TrainConfig,
    WatchOptions,
)
from glimpseprune.pruners import build
from glimpseprune.running import watch
from glimpseprune.running.watch import EXIT_CODE, Stall, StopOnNonFinite, Throughput, Usual, Window, rates, verdict
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.training.grpo import GRPOModule
from glimpseprune.types import Inputs, Sample

GLIMPSE = {
    "prune_layer": 1,
    "probe_layers": [0, 1],
    "vision_layers": [2, 1],
    "width": 16,
    "cond_width": 16,
    "num_heads": 2,
    "dropout": 0.0,
}
SAMPLES = [
    Sample("a", "what?", ("ab",), [picture(140, 112)], [[(0, 0, 30, 30)]], scene="one"),
    Sample("b", "why?", ("c",), [picture(140, 112)], [[(80, 60, 139, 111)]], scene="one"),
    Sample("c", "how many?", ("def",), [picture(112, 112), picture(84, 112)], [[(0, 0, 30, 30)], []]),
]


def stage(name: str = "qwen2_5_vl", kind: type = GlimpseModule, **loss: float) -> Any:
    backbone = TINY[name]("sdpa")
    torch.manual_seed(1)
    config = TrainConfig(
        out="",
        backbone=BackboneOptions(path=""),
        data=DataOptions(path=""),
        loss=LossOptions(**loss),
        grpo=GRPOOptions(max_completion_length=4),
        rewards=RewardOptions({"format": 1.0}),
    )
    module = kind(config, backbone, build("glimpse", GLIMPSE, backbone))
    module.log = module.log_dict = lambda *_, **__: None
    return module


# ------------------------------------------------------------------------------------------------------------- speed


class Loader(SimpleNamespace):
    waited = 0.0


class Trainer(SimpleNamespace):
    """A rank of several that all measure the same but for ``others``: a change to each window that is gathered."""

    def __init__(self, ranks: int = 1, others: Any = None):
        self.gathered: list[Tensor] = []
        self.lines: list[tuple[int, dict[str, float]]] = []

        def gather(own: Tensor) -> Tensor:
            self.gathered.append(own)
            others_of = others or (lambda own: own)
            return own if ranks == 1 else torch.stack([own, *[others_of(own.clone()) for _ in range(ranks - 1)]])

        logger = SimpleNamespace(log_metrics=lambda values, step: self.lines.append((step, values)))
        super().__init__(
            global_step=0,
            train_dataloader=Loader(),
            strategy=SimpleNamespace(all_gather=gather),
            loggers=[logger],
            callback_metrics={},
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
        )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


IMAGE = 7
MODULE = SimpleNamespace(
    device=torch.device("cpu"),
    automatic_optimization=True,
    backbone=SimpleNamespace(image_token_id=IMAGE),
    flops=lambda batch: 5e12,
)
BATCH = Inputs({"input_ids": torch.tensor([[1, IMAGE, IMAGE], [IMAGE, 1, 1]])}, SAMPLES[:2])


class Timed:
    """A callback that is driven batch by batch, on a clock of ours."""

    def __init__(self, trainer: Trainer, every: int = 2, **options: Any):
        self.trainer, self.clock = trainer, Clock()
        self.callback = Throughput(WatchOptions(**options), every, self.clock)
        self.callback.on_train_start(trainer, MODULE)

    def batch(self, wait: float, alone: float, rest: float, steps: bool = True, between: float = 0.0) -> None:
        self.clock.now += wait + between
        self.trainer.train_dataloader.waited += wait
        self.callback.on_train_batch_start(self.trainer, MODULE, BATCH, 0)
        self.clock.now += alone
        self.callback.on_own_work_end(self.trainer, MODULE)
        self.clock.now += rest
        self.trainer.global_step += steps
        self.callback.on_train_batch_end(self.trainer, MODULE, None, BATCH, 0)


def test_rates_of_a_window():
    timed = Timed(Trainer())
    timed.batch(wait=50, alone=2, rest=1)  # the workers start: no wait that will come again
    timed.batch(wait=1, alone=2, rest=1)
    (step, values), *more = timed.trainer.lines
    assert (step, more) == (0, [])
    assert values == pytest.approx(
        {
            "perf/samples_per_s": 4 / 7,
            "perf/visual_tokens_per_s": 6 / 7,
            "perf/step_s": 3.5,
            "perf/data_wait": 1 / 7,
            "perf/rank_skew": 0,
        }
    )
    timed.batch(wait=6, alone=2, rest=1)
    timed.batch(wait=6, alone=2, rest=1, between=2)  # a progress bar, say: neither wait nor work, but time
    assert timed.trainer.lines[1][1]["perf/data_wait"] == pytest.approx(12 / 20)
    assert {name: float(value) for name, value in timed.trainer.callback_metrics.items()} == pytest.approx(
        timed.trainer.lines[1][1]
    )


@pytest.mark.parametrize("pause", ["on_validation_start", "on_save_checkpoint"])
def test_validations_and_checkpoints_do_not_count(pause):
    timed = Timed(Trainer())
    timed.batch(wait=0, alone=2, rest=2)
    getattr(timed.callback, pause)(timed.trainer, MODULE, *([{}] if "save" in pause else []))
    timed.batch(wait=1, alone=2, rest=2, between=1000)
    values = timed.trainer.lines[0][1]
    assert values["perf/step_s"] == pytest.approx(9 / 2) and values["perf/data_wait"] == pytest.approx(1 / 9)
    timed.batch(wait=0, alone=2, rest=2, between=3)  # only once
    timed.batch(wait=0, alone=2, rest=2, between=3)
    assert timed.trainer.lines[1][1]["perf/step_s"] == pytest.approx(7)


def test_ranks_gather_once_per_line_and_batches_that_accumulate_are_one_step():
    timed = Timed(Trainer(), every=2)
    for batch in range(8):
        timed.batch(wait=0, alone=1, rest=0, steps=batch % 2 == 1)
    assert len(timed.trainer.gathered) == 2
    assert [values["perf/step_s"] for _, values in timed.trainer.lines] == pytest.approx([2, 2])
    timed = Timed(Trainer(), every=3)  # two updates per batch, as grpo.num_iterations makes them
    for _ in range(6):
        timed.batch(wait=0, alone=1, rest=0, steps=2)
    assert len(timed.trainer.gathered) == 4
    assert [values["perf/step_s"] for _, values in timed.trainer.lines] == pytest.approx([0.5] * 4)


def test_skew_is_that_of_the_ranks_own_work():
    def slow(own: Tensor) -> Tensor:  # the batch takes all ranks equally long, since they wait for each other
        own[list(vars(Window())).index("alone")] *= 2
        return own

    timed = Timed(Trainer(2, slow))
    timed.batch(wait=0, alone=1, rest=3)
    timed.batch(wait=0, alone=1, rest=3)
    values = timed.trainer.lines[0][1]
    assert timed.trainer.gathered[0].tolist() == [8, 0, 2, 4, 6, 0, 0]
    assert values["perf/rank_skew"] == pytest.approx(2 / 1.5 - 1)
    assert values["perf/samples_per_s"] == pytest.approx(8 / 8) and values["perf/step_s"] == pytest.approx(4)


def test_mfu_and_memory_where_they_are_known():
    columns = torch.tensor([[10.0, 2, 4, 32, 640, 4e15, 3 * 2**30], [10.0, 4, 4, 32, 640, 4e15, 2 * 2**30]])
    values = rates(columns.double(), steps=5, peak=1000.0)
    assert values["perf/mfu"] == pytest.approx(8e15 / (10 * 2 * 1e15))
    assert values["perf/gpu_memory_gib"] == pytest.approx(3) and values["perf/data_wait"] == pytest.approx(0.4)
    assert "perf/mfu" not in rates(columns, 5)
    columns[:, 5:] = 0
    assert not {"perf/mfu", "perf/gpu_memory_gib"} & set(rates(columns, 5, 1000.0))
    timed = Timed(Trainer(), peak_tflops=10.0)
    timed.batch(wait=0, alone=1, rest=0)
    timed.batch(wait=0, alone=1, rest=0)
    assert timed.trainer.lines[0][1]["perf/mfu"] == pytest.approx(0.5)  # 5 of 10 TFLOP/s


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GH200 480GB", 989),
        ("Some H2000 of the future", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert watch.peak_tflops(torch.device("cuda")) == peak
    assert watch.peak_tflops(torch.device("cpu")) is None


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize(
    ("loss", "progress"),
    [
        ({}, 0.9),
        ({}, 0.1),
        ({"kl": 0.0, "pressure": 0.0, "mask": 1.0, "answer": 1.0}, 0.9),
        ({"kl": 0.0, "pressure": 0.0, "mask": 1.0}, 0.9),
        ({"kl": 1.0, "answer": 1.0}, 0.9),
    ],
    ids=["stc", "value", "boxes", "mask", "both"],
)
def test_flops_of_a_step_against_torch(monkeypatch, name, loss, progress):
    monkeypatch.setattr(GlimpseModule, "progress", progress)
    module = stage(name, **loss)
    long = Sample("a", "what is it? " * 4, ("abcdefgh" * 3,), [picture(196, 196)], [[(0, 0, 30, 30)]])
    inputs = Collator(module.backbone)([long])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.training_step(inputs, 0).backward()
    # The predictor pads grids to the largest of an image, and values to the width of keys: not in the account, but run.
    sizes = [len(part.cells) for layout in module.backbone.layouts(inputs.prompt)[0] for part in layout.parts]
    vip = Vip.of(module.pruner)
    wide, pairs = vip.width + vip.cond_width, sum(size**2 for size in sizes)
    padding = 6 * vip.blocks * (len(sizes) * max(sizes) ** 2 * 2 * wide - pairs * (wide + vip.width))
    assert module.flops(inputs) + padding == pytest.approx(counter.get_total_flops(), rel=0.02)
    short = Collator(module.backbone)(SAMPLES[1:2])
    padded = Collator(module.backbone)([long, SAMPLES[1]])
    assert module.flops(padded) == pytest.approx(module.flops(inputs) + module.flops(short))


def test_loaders_know_how_long_they_were_waited_for(tmp_path):
    write(SAMPLES, tmp_path, split="train")

    def slow(samples: list[Sample]) -> int:
        time.sleep(0.02)
        return len(samples)

    loader = ShardLoader(ShardDataset(tmp_path, "train"), slow, 1)
    for _ in loader:
        time.sleep(0.2)
    assert 0.06 <= loader.waited < 0.6


# ----------------------------------------------------------------------------------------------------------- numbers


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


# --------------------------------------------------------------------------------------------------- the command, once


@pytest.fixture(scope="module")
def args(tiny_folder, tmp_path_factory) -> list[str]:
    """Settings of a run of four steps; of the five validation samples, the third and fourth have no boxes."""
    data = tmp_path_factory.mktemp("data")
    samples = [
        replace(SAMPLES[i % 2], key=f"s{i}", images=[picture(112, 84, i)], boxes=[[(9 * (i % 4), 8, 60, 50)]], scene="")
        for i in range(21)
    ]
    write(samples[:16], data, split="train")
    write([replace(x, boxes=None) if i in (2, 3) else x for i, x in enumerate(samples[16:])], data, split="val")
    return [
        f"backbone.path={tiny_folder}",
        f"data.path={data}",
        "data.batch_size=2",
        "data.workers=0",
        "trainer.max_steps=4",
        "trainer.val_every=2",
        "trainer.log_every=2",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        f"pruner.options={json.dumps(GLIMPSE)}",
        "optim.warmup=0",
    ]


STILL = ["optim.glimpse_lr=0", "optim.vip_lr=0"]
"""Nothing is learnt, so that runs may be compared whatever their number of processes."""


@pytest.fixture(scope="module")
def alone(args, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    train.main([*args, *STILL, f"out={run}", "watch.peak_tflops=0.001"])
    return run


def scores(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves(run: Path) -> dict[str, list[int]]:
    """Steps of each curve in the one event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (run / "tensorboard").glob("events.out.tfevents.*")
    log = EventAccumulator(str(file)).Reload()
    return {tag: [event.step for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


PERF = {"samples_per_s", "visual_tokens_per_s", "step_s", "data_wait", "rank_skew", "mfu"}


def test_a_run_logs_its_speed_and_leaves_no_heartbeats(alone):
    found = curves(alone)
    for name in PERF:
        assert found[f"perf/{name}"] == [1, 3] == found["train/kl"]
    assert {f"perf/{name}" for name in PERF} <= set(scores(alone)[-1])
    assert scores(alone)[-1]["perf/rank_skew"] == 0 and 0 <= scores(alone)[-1]["perf/data_wait"] <= 1
    assert not (alone / "heartbeats").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "stall"]


def refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one-line error with which a training ends."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in captured.out + captured.err
    return captured.err.strip().splitlines()[-1]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "trainable.safetensors")


def checkpoints(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_of_a_bad_batch_reaches_weights_or_files(args, tmp_path, monkeypatch, capsys, what):
    """The fourth of eight batches, two per update, is bad: the first update stays."""
    step, seen, modules = GlimpseModule.training_step, [], []

    def bad(module: GlimpseModule, inputs: Inputs, index: int) -> Tensor:
        loss = step(module, inputs, index)
        seen.append([sample.key for sample in inputs.samples])
        modules.append(module)
        if len(seen) < 4:
            return loss
        seen.append({name: p.detach().clone() for name, p in module.pruner.named_parameters()})
        seen.append(checkpoints(tmp_path))
        if what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss
        return loss * math.nan

    monkeypatch.setattr(GlimpseModule, "training_step", bad)
    run = [*args, f"out={tmp_path}", "trainer.accumulate=2", "trainer.val_every=1"]
    error = refused(run, capsys)
    *keys, before, files = seen
    file = tmp_path / "bad-batch-1-rank0.json"
    assert str(file) in error and "resume=true" in error and ("loss is nan" in error) == (what == "loss")
    report = json.loads(file.read_text())
    assert (report["step"], report["rank"]) == (1, 0)
    assert [[sample["key"] for sample in batch["samples"]] for batch in report["batches"]] == keys[2:]
    assert math.isnan(report["batches"][1]["loss"]) == (what == "loss")
    assert math.isfinite(report["batches"][0]["loss"]) and math.isnan(report["grad_norm"])
    mean = sum(batch["loss"] for batch in report["batches"]) / 2  # of this update alone
    assert report["loss"] == pytest.approx(mean, nan_ok=True)
    assert all(torch.equal(before[name], p) for name, p in modules[0].pruner.named_parameters())
    assert checkpoints(tmp_path) == files and len(scores(tmp_path)) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    monkeypatch.setattr(GlimpseModule, "training_step", step)
    train.main([*run, "resume=true"])
    assert [line["step"] for line in scores(tmp_path)] == [1, 2, 3, 4]


def test_losses_of_batches_that_accumulate_are_their_own(args, tmp_path, monkeypatch, capsys):
    step, losses = GlimpseModule.training_step, []

    def bad(module: GlimpseModule, inputs: Inputs, index: int) -> Tensor:
        loss = step(module, inputs, index)
        losses.append(float(loss.detach()))
        if len(losses) == 2:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(GlimpseModule, "training_step", bad)
    refused([*args, f"out={tmp_path}", "trainer.accumulate=2"], capsys)
    report = json.loads((tmp_path / "bad-batch-0-rank0.json").read_text())
    assert [batch["loss"] for batch in report["batches"]] == pytest.approx(losses)
    assert report["loss"] == pytest.approx(sum(losses) / 2)


def test_reinforcement_stops_before_the_update_too(args, tmp_path, monkeypatch, capsys):
    loss, before, modules = GRPOModule.keep_loss, {}, []

    def bad(module: GRPOModule, *args: Any) -> Tensor:
        if module.global_step == 1:
            modules.append(module)
            before.update({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
            return loss(module, *args) * math.nan
        return loss(module, *args)

    parted: list[int] = []
    monkeypatch.setattr(Throughput, "on_own_work_end", lambda self, trainer, _: parted.append(trainer.global_step))
    monkeypatch.setattr(GRPOModule, "keep_loss", bad)
    grpo = ["stage=grpo", "train=[glimpse, vip]", "grpo.num_generations=2", "grpo.max_completion_length=3"]
    error = refused([*args, *grpo, "rewards.functions={format: 1.0}", f"out={tmp_path}"], capsys)
    report = json.loads((tmp_path / "bad-batch-1-rank0.json").read_text())
    assert "loss is nan" in error and len(report["batches"][0]["samples"]) == 2
    assert parted == [0, 1]  # when the rollouts are done, once per update
    now = dict(modules[0].named_parameters())
    assert before and all(torch.equal(value, now[name]) for name, value in before.items())


def test_weights_that_are_lost_are_not_saved(args, tmp_path, capsys):
    """An update may be too large though all gradients were in order."""
    error = refused([*args, f"out={tmp_path}", "trainer.val_every=1", "optim.glimpse_lr=.inf"], capsys)
    assert "no longer finite at step 1" in error
    assert not list((tmp_path / "checkpoints").glob("step-*")) and not (tmp_path / "trainable.safetensors").exists()


# -------------------------------------------------------------------------------------------------------- validation


class Strategy(SimpleNamespace):
    """Of one rank of two; the other one has ``sums``."""

    def reduce(self, own: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        self.shape = own.shape
        return own + torch.tensor(self.sums, device=own.device)


@pytest.mark.parametrize("kind", [GlimpseModule, GRPOModule])
@torch.no_grad()
def test_samples_that_stand_in_are_not_scored(kind, monkeypatch):
    """Neither damaged ones nor padding; all scores are what they would be without."""
    module = stage(kind=kind)
    module._trainer = SimpleNamespace(is_global_zero=False, strategy=None)
    module.eval()
    collate = Collator(module.backbone)
    found = []
    for samples in (
        [SAMPLES[2], *(replace(x, stands_in="damaged") for x in SAMPLES[:2])],
        [replace(SAMPLES[0], stands_in=PADDING), SAMPLES[2]],
        [SAMPLES[2]],
    ):
        module.sums = {}
        module.validation_step(collate(samples), 0)
        found.append(module.sums)
    assert set(found[2]) <= set(module.scores) and found[2]["box_iou"][1] == found[2]["keep_ratio"][1] == 1
    for sums in found[:2]:
        assert sums.keys() == found[2].keys() and "mask_overlap" not in sums
        for name, (total, count) in sums.items():
            assert count == found[2][name][1] and total == pytest.approx(found[2][name][0], abs=1e-4), name
    module.sums = {}
    module.validation_step(collate([replace(SAMPLES[0], stands_in=PADDING)]), 0)
    assert module.sums == {}


def test_means_are_over_samples_of_all_ranks():
    """Whatever batches and ranks they came in; a score that another rank has alone is logged here, too."""
    module, logged = stage(), {}
    size = len(module.scores)
    sums = [[0.0, 0.0] for _ in range(size)]
    sums[module.scores.index("kl")] = [8.0, 1.0]
    sums[module.scores.index("box_iou")] = [1.5, 3.0]
    module._trainer = SimpleNamespace(strategy=Strategy(sums=sums))
    module.log_dict = logged.update
    module.tally({"kl": (torch.tensor(1.0), 4), "accuracy": (torch.tensor(0.5), 4)})
    module.tally({"kl": (torch.tensor(6.0), 1), "accuracy": (torch.tensor(1.0), 1)})
    module.tally({"mask_overlap": (torch.tensor(math.nan), 0)})
    module.log_tally()
    assert logged == pytest.approx({"val/kl": 18 / 6, "val/accuracy": 3 / 5, "val/box_iou": 0.5})
    assert module.trainer.strategy.shape == (size, 2) and module.sums == {}
    with pytest.raises(ValueError, match="'box_iuo' is not one of"):
        module.tally({"box_iuo": (torch.tensor(1.0), 1)})


# -------------------------------------------------------------------------------------------------------- standstill


def heart(rank: int, beats: int, phase: str = "computes", time: float = 1000.0, **more: Any) -> dict[str, Any]:
    own = {"rank": rank, "host": f"node{rank}", "pid": 7, "beats": beats, "step": 3, "phase": phase}
    return own | {"since": 100.0, "time": time} | more


def test_verdict_names_who_is_behind():
    late = heart(1, 8, where="glimpse.py:90 training_step")
    said = verdict([heart(0, 9, "runs backward"), late, heart(2, 9, "runs backward")], 3, 300)
    assert "behind is rank 1 (node1, pid 7)" in said and "glimpse.py:90 training_step" in said
    assert "at step 3 computes for 15.0 min" in said and "rank 0" not in said and "rank 2" not in said
    dead = verdict([heart(0, 9), heart(1, 9, time=100.0)], 2, 300)
    assert "rank 1 (node1, pid 7) has shown no sign of life for 900 s" in dead and "rank 0" not in dead
    assert "rank 1, 2 never wrote" in verdict([heart(0, 9)], 3, 300)
    assert "all ranks are at the same point: rank 0" in verdict([heart(0, 9), heart(1, 9)], 2, 300)
    assert verdict([heart(0, 9)], 1, 300).startswith("rank 0 (node0, pid 7), which at step 3")
    assert len(verdict([heart(rank, rank // 500) for rank in range(512)], 512, 300)) < 1500


class Watched(Stall):
    """Takes note instead of ending the process."""

    def __init__(self, folder: Path, seconds: float):
        super().__init__(folder, seconds / 60)
        self.gave_up = threading.Event()

    def give_up(self) -> None:
        self.gave_up.set()
        self.over.set()

    def arm(self) -> None:
        pass


@pytest.fixture
def watched(tmp_path):
    found = []

    def start(seconds: float) -> tuple[Watched, Any]:
        callback = Watched(tmp_path / "heartbeats", seconds)
        strategy = SimpleNamespace(barrier=lambda: None)
        trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, global_step=3, strategy=strategy)
        callback.on_fit_start(trainer, None)
        found.append(callback)
        return callback, trainer

    yield start
    for callback in found:
        callback.stop()


def test_a_run_that_moves_is_left_alone_until_it_does_not(watched):
    callback, trainer = watched(1.0)
    for _ in range(10):  # together longer than it may stand still
        time.sleep(0.2)
        callback.on_validation_batch_end(trainer)
        assert not callback.gave_up.is_set()
    (own,) = callback.read()
    assert (own["rank"], own["step"], own["phase"], own["pid"]) == (0, 3, "validates", os.getpid())
    assert callback.gave_up.wait(10)


def test_a_checkpoint_takes_longer(watched):
    callback, trainer = watched(1.0)
    callback.on_save_checkpoint(trainer)
    time.sleep(2)
    assert not callback.gave_up.is_set()
    assert callback.gave_up.wait(20)


def test_who_was_suspended_has_not_stalled(watched, monkeypatch):
    later = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda clock=time.monotonic: clock() + later[0])
    callback, _ = watched(4.0)
    time.sleep(0.5)
    later[0] = 1e6
    time.sleep(1)
    assert not callback.gave_up.is_set()


def test_the_others_notice_and_a_new_run_does_not(watched):
    callback, trainer = watched(600.0)
    callback.tick = 0.1
    (callback.folder / "stalled").touch()
    callback.stop()
    callback.on_fit_start(trainer, None)  # what an earlier run has left is no news
    assert not callback.gave_up.wait(0.5)
    (callback.folder / "stalled").touch()
    assert callback.gave_up.wait(10)


def test_a_rank_that_fails_says_so_and_is_no_longer_watched(watched):
    callback, trainer = watched(1.0)
    callback.on_exception(trainer, None, RuntimeError("no"))
    assert "failed (RuntimeError)" in verdict(callback.read(), 1, 300)
    assert not callback.gave_up.wait(2)


GRASP = """
import ctypes, sys, time
from types import SimpleNamespace
from glimpseprune.running.watch import Stall

strategy = SimpleNamespace(barrier=lambda: None)
trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, global_step=3, strategy=strategy)
Stall(sys.argv[1], 0.05).on_fit_start(trainer, None)
time.sleep(1)

def hold():
    ctypes.PyDLL(None).sleep(200)  # and with it the interpreter

hold()
"""


@pytest.mark.slow
def test_not_even_the_thread_can_run(tmp_path):
    """Then there is no verdict, but an end, and a stack."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", GRASP, str(tmp_path)], env=env, timeout=150, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Timeout" in done.stderr and "in hold" in done.stderr


# ----------------------------------------------------------------------------------------------------- two processes


def together(folder: Path, code: str, args: list[str], seconds: float = 240) -> tuple[list[int], list[str]]:
    """Exit codes and stderr of two processes that train with gloo, started as torchrun does; each ends by itself.

    ``code`` is run first, with ``rank`` set, in a world in which everything of glimpseprune can be replaced.
    """
    (folder / "script.py").write_text(
        "import math, os, sys, time\nfrom glimpseprune import train\n"
        "from glimpseprune.training.glimpse import GlimpseModule\nrank = int(os.environ['RANK'])\n"
        f"{code}\ntrain.main(sys.argv[1:])\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(folder / "script.py"), *args, "trainer.devices=2", "trainer.strategy=ddp"]
    processes = []
    for rank in range(2):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with open(folder / f"{rank}.err", "w") as errors:
            processes.append(subprocess.Popen(command, env=os.environ | own, stdout=errors, stderr=errors))
    try:
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(deadline - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [(folder / f"{rank}.err").read_text() for rank in range(2)]


SLOW = """
step, validate = GlimpseModule.training_step, GlimpseModule.validation_step

def training_step(self, *args):
    time.sleep(1.5)
    return step(self, *args)

def validation_step(self, *args):
    time.sleep(5)
    return validate(self, *args)

GlimpseModule.training_step, GlimpseModule.validation_step = training_step, validation_step
"""


@pytest.mark.slow
def test_two_slow_processes_end_well_and_say_what_one_says(args, alone, tmp_path):
    """Slower than the watchdog's patience as a whole, but never for so long without a batch. Rank 1 has no boxes to
    validate, and in the end but padding."""
    run = tmp_path / "run"
    codes, errors = together(tmp_path, SLOW, [*args, *STILL, f"out={run}", "watch.stall_minutes=0.15"])
    assert codes == [0, 0], errors
    assert curves(run)["perf/samples_per_s"] == [1, 3]  # the one event file
    assert not (run / "heartbeats").exists() and not list(run.glob("bad-batch-*"))
    for ours, theirs in zip(scores(run), scores(alone), strict=True):
        names = {name for name in theirs if name.startswith("val/")}
        assert names == {name for name in ours if name.startswith("val/")} and "val/box_iou" in names
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


BAD = """
import torch
step = GlimpseModule.training_step

def training_step(self, inputs, index):
    loss = step(self, inputs, index)
    if self.global_step == 2:
        print("KEYS", *[sample.key for sample in inputs.samples], flush=True)
    return loss * (math.nan if rank == 1 and self.global_step == 2 else 1)

GlimpseModule.training_step = training_step
"""


@pytest.mark.slow
def test_a_bad_batch_on_one_rank_ends_both(args, tmp_path):
    run = tmp_path / "run"
    codes, errors = together(tmp_path, BAD, [*args, f"out={run}"])
    assert codes == [2, 2], errors
    assert [file.name for file in run.glob("bad-batch-*")] == ["bad-batch-2-rank1.json"]
    for said in errors:
        assert "Traceback" not in said and "error: stopped at step 2: the loss is nan" in said
        assert "bad-batch-2-rank1.json" in said
    report = json.loads((run / "bad-batch-2-rank1.json").read_text())
    keys = errors[1].partition("KEYS ")[2].splitlines()[0].split()
    assert [sample["key"] for sample in report["batches"][0]["samples"]] == keys
    assert [line["step"] for line in scores(run)] == [2]
    assert all(value.isfinite().all() for value in weights(run).values())


HANG = """
step = GlimpseModule.training_step

def hang(self, inputs, index):
    if rank == 1 and self.global_step == 1:
        time.sleep(1000)
    return step(self, inputs, index)

GlimpseModule.training_step = hang
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_both_end(args, tmp_path):
    run = tmp_path / "run"
    codes, errors = together(tmp_path, HANG, [*args, f"out={run}", "watch.stall_minutes=0.2"])
    assert codes == [EXIT_CODE, EXIT_CODE], errors
    for rank, said in enumerate(errors):
        assert f"stall: rank {rank}: stalled, behind is rank 1 (" in said
        assert "at step 1 computes for" in said and "in hang" in said and "behind is rank 0" not in said
    assert "in hang" in errors[1].partition("its stack:")[2].partition("stalled, ")[0]  # of the very line
    assert {path.name for path in (run / "heartbeats").iterdir()} == {"rank-0", "rank-1", "stalled"}
