"""Throughput: what is logged of a run's speed, on a clock of the test's; and that loaders know what they cost."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import picture
from glimpseprune.data.shards import write
from glimpseprune.data.stream import ShardDataset, ShardLoader
from glimpseprune.options import WatchOptions
from glimpseprune.running.throughput import Interval, Throughput, peak_tflops, rates
from glimpseprune.types import Inputs, Sample

SAMPLES = [Sample(key, "what?", ("ab",), [picture(140, 112)]) for key in "abc"]


class Loader(SimpleNamespace):
    waited = 0.0


class Trainer(SimpleNamespace):
    """A rank of several that all measure the same but for ``others``: a change to each interval that is gathered."""

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


def test_rates_of_an_interval():
    timed = Timed(Trainer())
    timed.batch(wait=50, alone=2, rest=1)  # the workers start: no wait that will come again
    timed.batch(wait=1, alone=2, rest=1)
    (step, values), *more = timed.trainer.lines
    assert (step, more) == (2, [])
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
        own[list(vars(Interval())).index("alone")] *= 2
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
    assert peak_tflops(torch.device("cuda")) == peak
    assert peak_tflops(torch.device("cpu")) is None


def test_loaders_know_how_long_they_were_waited_for(tmp_path):
    write(SAMPLES, tmp_path, split="train")

    def slow(samples: list[Sample]) -> int:
        time.sleep(0.02)
        return len(samples)

    loader = ShardLoader(ShardDataset(tmp_path, "train"), slow, 1)
    for _ in loader:
        time.sleep(0.2)
    assert 0.06 <= loader.waited < 0.6
