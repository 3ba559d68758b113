"""How fast a run goes, and where its time goes: perf/* in the log.

All ranks take part in one small gather per log line. Left out: timings of single kernels (torch.profiler has them),
and a figure for the network: what ranks wait for each other is in perf/rank_skew and perf/step_s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import lightning as L
import torch
from torch import Tensor

from glimpseprune.options import WatchOptions
from glimpseprune.types import Inputs

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}
"""Part of a GPU's name -> dense bf16 TFLOP/s of its data sheet; the first match counts."""


def peak_tflops(device: torch.device) -> float | None:
    """What ``device`` could do, dense bf16; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    return next((peak for part, peak in PEAK_TFLOPS.items() if set(part.split()) <= set(words)), None)


@dataclass
class Interval:
    """What a rank has done since the last log line."""

    seconds: float = 0.0
    """Without validations, checkpoints, and the start of the loader."""
    waited: float = 0.0
    """Of these, for the loader."""
    alone: float = 0.0
    """Of these, at work that needs no other rank."""
    samples: float = 0.0
    visual_tokens: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    """Peak, in bytes."""


class Throughput(L.Callback):
    """Every ``every`` optimiser steps, over all ranks and the steps since the last time:

    ``perf/samples_per_s``, ``perf/visual_tokens_per_s``, ``perf/step_s`` (seconds per optimiser step);
    ``perf/data_wait``: share of the time spent waiting for the loader, of the rank that waits longest;
    ``perf/rank_skew``: the slowest rank's own work / the mean - 1. Own work is what comes before a batch's first
    exchange: the prompt and the glimpse (grpo: the rollouts). With ZeRO-3, whose ranks exchange weights all along, it
    says little;
    ``perf/gpu_memory_gib``: the most that torch had allocated on any rank (CUDA only);
    ``perf/mfu``: FLOPs of the step (:meth:`.StageModule.flops`) / what the accelerators could have done, dense bf16,
    whatever the run's precision. Only where that is known, and the stage counts its FLOPs.

    ``clock``: seconds, as ``time.perf_counter``.
    """

    def __init__(self, options: WatchOptions, every: int, clock: Callable[[], float] = time.perf_counter):
        self.options, self.every, self.clock = options, every, clock
        self.interval = Interval()
        self.peak: float | None = None
        self.logged = 0  # optimiser steps at the last log line
        self.began = 0.0
        self.ended: float | None = None  # when the last batch did
        self.parted: float | None = None  # when the work of this rank alone did
        self.fetched = 0.0
        self.paused = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.peak = self.options.peak_tflops or peak_tflops(module.device)
        self.logged, self.ended = trainer.global_step, None
        self.forget(module)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.paused = True

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.paused = True

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Inputs, index: int) -> None:
        now, fetched = self.clock(), trainer.train_dataloader.waited
        if self.ended is not None:  # the first batch waits for the workers to start
            waited = fetched - self.fetched
            self.interval.waited += waited
            self.interval.seconds += waited if self.paused else now - self.ended
        self.began, self.parted, self.paused = now, None, False

    def on_own_work_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """This rank has done what it does alone (a hook of our own, see :meth:`.StageModule.own_work_ends`)."""
        if module.device.type == "cuda" and trainer.world_size > 1:
            torch.cuda.synchronize(module.device)  # or its work would count as waiting for others
        self.parted = self.parted or self.clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Inputs, index: int
    ) -> None:
        now, interval = self.clock(), self.interval
        interval.seconds += now - self.began
        interval.alone += (self.parted or now) - self.began
        interval.samples += len(batch.samples)
        interval.visual_tokens += int((batch.prompt["input_ids"] == module.backbone.image_token_id).sum())
        if self.peak is not None:
            interval.flops += module.flops(batch) or 0.0
        self.ended, self.fetched = now, trainer.train_dataloader.waited
        if trainer.global_step // self.every > self.logged // self.every:
            self.log_interval(trainer, module)

    def log_interval(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            self.interval.memory = torch.cuda.max_memory_allocated(module.device)
        own = torch.tensor([getattr(self.interval, item.name) for item in fields(Interval)], device=module.device)
        ranks = trainer.strategy.all_gather(own).reshape(-1, len(own)).double().cpu()
        values = rates(ranks, trainer.global_step - self.logged, self.peak)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self.logged = trainer.global_step
        self.forget(module)

    def forget(self, module: L.LightningModule) -> None:
        self.interval = Interval()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)


def rates(ranks: Tensor, steps: int, peak: float | None = None) -> dict[str, float]:
    """What :class:`Throughput` logs, from the intervals [ranks, fields of Interval] of ``steps`` optimiser steps."""
    of = {item.name: column for item, column in zip(fields(Interval), ranks.unbind(1))}
    seconds = float(of["seconds"].mean())
    values = {
        "samples_per_s": float(of["samples"].sum()) / seconds,
        "visual_tokens_per_s": float(of["visual_tokens"].sum()) / seconds,
        "step_s": seconds / steps,
        "data_wait": float((of["waited"] / of["seconds"]).max()),
        "rank_skew": float(of["alone"].max() / of["alone"].mean()) - 1,
    }
    if of["memory"].any():
        values["gpu_memory_gib"] = float(of["memory"].max()) / 2**30
    if peak is not None and of["flops"].any():
        values["mfu"] = float(of["flops"].sum()) / (seconds * len(ranks) * peak * 1e12)
    return {f"perf/{name}": value for name, value in values.items()}
