"""Whole runs that are watched: what stages count and score, what stops one before it is spoiled, who is named when
nothing moves any more. (The callbacks one by one: test_throughput.py, test_nonfinite.py, test_stalls.py)"""

from __future__ import annotations

import json
import math
import os
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
from glimpseprune.data.shards import write
from glimpseprune.data.stream import PADDING
from glimpseprune.options import (
    BackboneOptions,
    DataOptions,
    GRPOOptions,
    LossOptions,
    RewardOptions,
    TrainConfig,
)
from glimpseprune.pruners import build
from glimpseprune.running.stalls import EXIT_CODE
from glimpseprune.running.throughput import Throughput
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
EARLY = {name: GLIMPSE[name] for name in ("vision_layers", "width", "cond_width", "num_heads")}
SAMPLES = [
    Sample("a", "what?", ("ab",), [picture(140, 112)], [[(0, 0, 30, 30)]], scene="one"),
    Sample("b", "why?", ("c",), [picture(140, 112)], [[(80, 60, 139, 111)]], scene="one"),
    Sample("c", "how many?", ("def",), [picture(112, 112), picture(84, 112)], [[(0, 0, 30, 30)], []]),
]


def stage(
    name: str = "qwen2_5_vl",
    kind: type = GlimpseModule,
    sight: str = "one",
    early: dict[str, Any] | None = None,
    **loss: float,
) -> Any:
    backbone = TINY[name]("sdpa")
    torch.manual_seed(1)
    config = TrainConfig(
        out="",
        train=["glimpse", "vip"] if early is None else ["private", "vip"],
        backbone=BackboneOptions(path=""),
        data=DataOptions(path=""),
        loss=LossOptions(**loss),
        grpo=GRPOOptions(max_completion_length=4),
        rewards=RewardOptions({"format": 1.0}),
    )
    pruner = (
        build("glimpse", GLIMPSE | {"sight": sight}, backbone) if early is None else build("early", early, backbone)
    )
    module = kind(config, backbone, pruner)
    module.log = module.log_dict = lambda *_, **__: None
    return module


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize(
    ("loss", "progress"),
    [
        ({}, 0.9),
        ({}, 0.1),
        ({"kl": 0.0, "pressure": 0.0, "mask": 1.0, "answer": 1.0}, 0.9),
        ({"kl": 0.0, "pressure": 0.0, "mask": 1.0}, 0.9),
        ({"kl": 1.0, "answer": 1.0}, 0.9),
        ({"sight": "question"}, 0.9),
        ({"sight": "question", "kl": 1.0, "answer": 1.0}, 0.9),
        ({"dropped": 4}, 0.9),
        ({"early": EARLY}, 0.9),
        ({"early": EARLY | {"private_layers": 2}, "kl": 0.0, "mask": 1.0, "attention": 1.0}, 0.9),
        ({"early": EARLY | {"private_layers": 2, "complete": True}, "answer": 1.0, "answer_kl": 1.0}, 0.1),
    ],
    ids=["stc", "value", "boxes", "mask", "both", "question", "question, both", "dropped"]
    + ["early", "early, attention", "early, answers"],
)
def test_flops_of_a_step_against_torch(monkeypatch, name, loss, progress):
    monkeypatch.setattr(GlimpseModule, "progress", progress)
    module = stage(name, **loss)
    long = Sample("a", "what is it? " * 4, ("abcdefgh" * 3,), [picture(196, 196)], [[(0, 0, 30, 30)]])
    inputs = Collator(module.backbone)([long])
    with torch.no_grad():  # what is kept is what the pressure aims at
        module.config.loss.target = float((module.share(inputs).logits[-1] > 0).float().mean())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.training_step(inputs, 0).backward()
    # The predictor pads its values to the width of its keys: not in the account, but run.
    vip, layouts = Vip.of(module.pruner), module.backbone.layouts(inputs.prompt)[0]
    pairs = sum(len(part.cells) ** 2 for layout in layouts for part in layout.parts)
    padding = 6 * vip.blocks * pairs * vip.cond_width
    assert module.flops(inputs) + padding == pytest.approx(counter.get_total_flops(), rel=0.02)
    short = Collator(module.backbone)(SAMPLES[1:2])
    padded = Collator(module.backbone)([long, SAMPLES[1]])
    assert module.flops(padded) == pytest.approx(module.flops(inputs) + module.flops(short))


def test_flops_of_questions_on_one_image(monkeypatch):
    monkeypatch.setattr(GlimpseModule, "progress", 0.9)
    module = stage("llava1_5", dropped=0)
    pair = [replace(SAMPLES[0], question=question) for question in ("what is it?", "where is it?")]
    inputs = Collator(module.backbone)(pair)
    with torch.no_grad():
        module.config.loss.target = float((module.share(inputs).logits[-1] > 0).float().mean())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.training_step(inputs, 0).backward()
    apart = sum(module.flops(Collator(module.backbone)([sample])) for sample in pair)
    assert module.flops(inputs) < 0.9 * apart
    assert module.flops(inputs) == pytest.approx(counter.get_total_flops(), rel=0.08)  # which the padding is part of


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
    """Of its validations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("val/") for name in line)]


def curves(run: Path) -> dict[str, list[int]]:
    """Steps of each curve in the one event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (run / "tensorboard" / run.name).glob("events.out.tfevents.*")
    log = EventAccumulator(str(file)).Reload()
    return {tag: [event.step for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


PERF = {"samples_per_s", "visual_tokens_per_s", "step_s", "data_wait", "rank_skew", "mfu"}


def test_a_run_logs_its_speed_and_leaves_no_heartbeats(alone):
    found = curves(alone)
    for name in PERF:
        assert found[f"perf/{name}"] == [2, 4] == found["train/kl"]
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
    loss, before, modules = GRPOModule.masks_loss, {}, []

    def bad(module: GRPOModule, *args: Any) -> Tensor:
        if module.global_step == 1:
            modules.append(module)
            before.update({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
            return loss(module, *args) * math.nan
        return loss(module, *args)

    parted: list[int] = []
    monkeypatch.setattr(Throughput, "on_own_work_end", lambda self, trainer, _: parted.append(trainer.global_step))
    monkeypatch.setattr(GRPOModule, "masks_loss", bad)
    grpo = ["stage=grpo", "train=[glimpse, vip]", "grpo.num_generations=2", "grpo.max_completion_length=3"]
    error = refused([*args, *grpo, "rewards.functions={format: 1.0}", f"out={tmp_path}"], capsys)
    report = json.loads((tmp_path / "bad-batch-1-rank0.json").read_text())
    assert "loss is nan" in error and len(report["batches"][0]["samples"]) == 2
    assert parted == [0, 1]  # when the rollouts are done, once per update
    now = dict(modules[0].named_parameters())
    assert before and all(torch.equal(value, now[name]) for name, value in before.items())


def test_weights_that_are_lost_are_not_saved(args, tmp_path, capsys, monkeypatch):
    """An update may be too large though all gradients were in order."""
    step = torch.optim.AdamW.step

    def lost(self, closure=None):
        loss = step(self, closure)
        self.param_groups[0]["params"][0].data.fill_(math.inf)
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", lost)
    error = refused([*args, f"out={tmp_path}", "trainer.val_every=1"], capsys)
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
    module._trainer = SimpleNamespace(strategy=Strategy(sums=sums), global_step=4)
    module.log_dict = logged.update
    module.tally({"kl": (torch.tensor(1.0), 4), "accuracy": (torch.tensor(0.5), 4)})
    module.tally({"kl": (torch.tensor(6.0), 1), "accuracy": (torch.tensor(1.0), 1)})
    module.tally({"mask_overlap": (torch.tensor(math.nan), 0)})
    module.log_tally()
    assert logged == pytest.approx({"step": 4, "val/kl": 18 / 6, "val/accuracy": 3 / 5, "val/box_iou": 0.5})
    assert module.trainer.strategy.shape == (size, 2) and module.sums == {}
    with pytest.raises(ValueError, match="'box_iuo' is not one of"):
        module.tally({"box_iuo": (torch.tensor(1.0), 1)})


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
    assert curves(run)["perf/samples_per_s"] == [2, 4]  # the one event file
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
