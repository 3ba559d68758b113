"""What is watched while a run goes on: its speed, its numbers, and that it goes on at all.

:class:`Throughput` logs perf/*; :class:`StopOnNonFinite` ends a run whose loss or gradient is lost, before that reaches
the weights, and writes down the samples; :class:`Stall` ends one in which nothing happens any more, and says which rank
is to blame. All ranks take part in the same collectives at the same steps: one small gather per log line, one per
optimiser step.

Left out: timings of single kernels (torch.profiler has them), and a figure for the network: what ranks wait for each
other is in perf/rank_skew and perf/step_s.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from glimpseprune.config import UserError
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

EXIT_CODE = 70
"""Of a process that has stalled."""


def peak_tflops(device: torch.device) -> float | None:
    """What ``device`` could do, dense bf16; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    return next((peak for part, peak in PEAK_TFLOPS.items() if set(part.split()) <= set(words)), None)


# ---------------------------------------------------------------------------------------------------------- speed


@dataclass
class Window:
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
    ``perf/mfu``: FLOPs of the step (:mod:`.flops`) / what the accelerators could have done, dense bf16, whatever the
    run's precision. Only where that is known, and the stage counts its FLOPs.

    ``clock``: seconds, as ``time.perf_counter``.
    """

    def __init__(self, options: WatchOptions, every: int, clock: Callable[[], float] = time.perf_counter):
        self.options, self.every, self.clock = options, every, clock
        self.window = Window()
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
            self.window.waited += waited
            self.window.seconds += waited if self.paused else now - self.ended
        self.began, self.parted, self.paused = now, None, False

    def on_own_work_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """This rank has done what it does alone (a hook of our own, see :meth:`.StageModule.own_work_ends`)."""
        if module.device.type == "cuda" and trainer.world_size > 1:
            torch.cuda.synchronize(module.device)  # or its work would count as waiting for others
        self.parted = self.parted or self.clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Inputs, index: int
    ) -> None:
        now, window = self.clock(), self.window
        window.seconds += now - self.began
        window.alone += (self.parted or now) - self.began
        window.samples += len(batch.samples)
        window.visual_tokens += int((batch.prompt["input_ids"] == module.backbone.image_token_id).sum())
        if self.peak is not None:
            window.flops += module.flops(batch) or 0.0
        self.ended, self.fetched = now, trainer.train_dataloader.waited
        if trainer.global_step // self.every > self.logged // self.every:
            self.log_window(trainer, module)

    def log_window(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            self.window.memory = torch.cuda.max_memory_allocated(module.device)
        own = torch.tensor([getattr(self.window, item.name) for item in fields(Window)], device=module.device)
        ranks = trainer.strategy.all_gather(own).reshape(-1, len(own)).double().cpu()
        values = rates(ranks, trainer.global_step - self.logged, self.peak)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self.logged = trainer.global_step
        self.forget(module)

    def forget(self, module: L.LightningModule) -> None:
        self.window = Window()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)


def rates(ranks: Tensor, steps: int, peak: float | None = None) -> dict[str, float]:
    """What :class:`Throughput` logs, from the windows [ranks, fields of Window] of ``steps`` optimiser steps."""
    of = {item.name: column for item, column in zip(fields(Window), ranks.unbind(1))}
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


# --------------------------------------------------------------------------------------------------------- numbers


class StopOnNonFinite(L.Callback):
    """Ends the run on all ranks before an update of which one of them has a loss or a gradient norm that is not finite,
    or that explodes (:class:`Usual`): the weights stay as they were, and so do all files of the run.

    What explodes is the loss, mean over ranks; in manual optimisation, where it is signed and near 0, the norm. Each
    rank concerned (all, if only the norm is lost) leaves ``<folder>/bad-batch-<step>-rank<rank>.json``. Weights that
    have become non-finite all the same are never written to a checkpoint. Where a scaler of the precision 16-mixed
    leaves out such updates by itself, only the loss is looked at; where DeepSpeed holds the gradients, likewise.

    Raises:
        UserError: on all ranks; it names the files and says what to do.
    """

    def __init__(self, folder: str | Path, options: WatchOptions):
        self.folder = Path(folder)
        self.usual = Usual(options.explode)
        self.batches: list[dict[str, Any]] = []  # of the update to come
        self.losses: list[Tensor] = []
        self.step = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Inputs, index: int) -> None:
        if trainer.global_step != self.step:
            self.step, self.batches = trainer.global_step, []
        samples = [{"key": each.key, "dataset": each.dataset, "stands_in": each.stands_in} for each in batch.samples]
        self.batches.append({"samples": samples})

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if module.automatic_optimization:
            self.batches[-1]["loss"] = loss.detach() * trainer.accumulate_grad_batches  # of which it is a share

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        zero = torch.zeros((), device=module.device)
        loss, norm = sum(self.losses, zero).float(), module.gradient_norm().detach().float().to(module.device)
        self.losses = []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            norm = zero
        ranks = trainer.strategy.all_gather(torch.stack([loss, norm])).reshape(-1, 2).tolist()
        reason, concerned = self.verdict(ranks, signed=not module.automatic_optimization)
        if reason is not None:
            self.stop(trainer, reason, concerned, *ranks[trainer.global_rank])

    def verdict(self, ranks: list[list[float]], signed: bool) -> tuple[str | None, list[int]]:
        """What is wrong, if anything, and the ranks with which it is, from (loss, gradient norm) of each."""
        lost = [rank for rank, (loss, _) in enumerate(ranks) if not math.isfinite(loss)]
        if lost:
            return f"the loss is {ranks[lost[0]][0]}", lost
        if not all(math.isfinite(norm) for _, norm in ranks):
            return "the gradient is not finite", list(range(len(ranks)))
        values = [norm if signed else loss for loss, norm in ranks]
        mean, limit = statistics.fmean(values), self.usual.limit()
        if mean <= limit:
            self.usual.add(mean)
            return None, []
        what = "gradient norm" if signed else "loss"
        reason = f"the {what} explodes: {mean:.4g}, usual are up to {self.usual.high:.4g}"
        return reason, [rank for rank, value in enumerate(values) if value >= min(limit, max(values))]

    def stop(self, trainer: L.Trainer, reason: str, concerned: list[int], loss: float, norm: float) -> None:
        step, rank = trainer.global_step, trainer.global_rank
        files = [self.folder / f"bad-batch-{step}-rank{each}.json" for each in concerned]
        if rank in concerned:
            for batch in self.batches:
                batch["loss"] = float(batch["loss"]) if "loss" in batch else None
            report = {"step": step, "rank": rank, "reason": reason, "loss": loss, "grad_norm": norm}
            text = json.dumps(report | {"batches": self.batches}, indent=2)
            files[concerned.index(rank)].write_text(text + "\n", encoding="utf-8")
        trainer.strategy.barrier()  # the first process to end may take the others with it
        more = f" (and {len(files) - 1} more, one per rank)" if len(files) > 1 else ""
        raise UserError(
            f"stopped at step {step}: {reason}. The samples are in {files[0]}{more}; neither weights nor "
            "checkpoints were changed. Lower the learning rate (optim.*_lr) or take the samples out of the data, then "
            "go on with resume=true"
        )

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.check_weights(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.check_weights(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check_weights(trainer, module)

    def check_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        bad = not all(bool(p.isfinite().all()) for p in module.trainable())
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            raise UserError(
                f"the weights are no longer finite at step {trainer.global_step}, and are not saved: lower the "
                "learning rate (optim.*_lr), then go on with resume=true"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"usual": list(self.usual.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual.values = deque(state["usual"], maxlen=Usual.LAST)


class Usual:
    """What values a run has had lately, to tell from it what is none of them.

    Losses of a healthy run may differ by orders of magnitude from batch to batch, above all when most samples have been
    learnt: single ones are 40 times their median. So a value explodes that is ``factor`` times ``high``, which
    nine in ten of the last values stayed below; where they spread further than that, (high / low) ** 1.5 times, low
    being what nine in ten were above: five standard deviations, if logarithms are normal. Before there are ``LEAST``
    values, and with ``factor`` None, nothing does.
    """

    LAST, LEAST = 100, 20

    def __init__(self, factor: float | None):
        self.factor = factor
        self.values: deque[float] = deque(maxlen=self.LAST)
        self.high = 0.0

    def add(self, value: float) -> None:
        if value > 0:  # 0 is no value: nothing was learnt from that batch
            self.values.append(value)

    def limit(self) -> float:
        """Above it, a value explodes."""
        if self.factor is None or len(self.values) < self.LEAST:
            return math.inf
        ordered = sorted(self.values)
        low, self.high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return self.high * max(self.factor, (self.high / low) ** 1.5)


# --------------------------------------------------------------------------------------------------------- standstill


class Stall(L.Callback):
    """Ends a process when for ``minutes`` nothing has moved in it, having said which rank is behind, and where.

    A rank that hangs keeps all others waiting in a collective, for hours. Each rank counts its ``beats``: it passes the
    same points of a training (a batch begins, the exchange of gradients, a validation batch, a checkpoint ...) in the
    same order as the others. So the one that has passed the fewest is the one they wait for. A thread writes them every
    few seconds to ``<folder>/rank-<rank>``; when the time is up on one rank, all of them notice (file ``stalled``),
    add the line at which they are, print their stack and the verdict, and exit with ``EXIT_CODE``. Under srun
    --kill-on-bad-exit the job ends with the first of them. The folder goes when a run ends well.

    Writing a checkpoint, within which there is no sign of life, may take ``SAVING`` times as long. Time counts while
    this process may run: a suspended one does not wake up as stalled. If even the thread does not get to run, because a
    library holds on to the interpreter, faulthandler ends the process with its stack.
    """

    SAVING = 4

    def __init__(self, folder: str | Path, minutes: float):
        self.folder, self.allowed = Path(folder), 60 * minutes
        self.tick = min(10.0, self.allowed / 20)
        self.beats, self.phase, self.step, self.since = 0, "starts", 0, 0.0
        self.rank, self.world = 0, 1
        self.main = threading.main_thread()
        self.thread: threading.Thread | None = None
        self.over = threading.Event()

    # ------------------------------------------------------------------------------------------- signs of life

    def beat(self, phase: str, trainer: L.Trainer) -> None:
        self.phase, self.step, self.since = phase, trainer.global_step, time.time()
        self.beats += 1  # last: by it the thread knows

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.rank, self.world = trainer.global_rank, trainer.world_size
        if trainer.is_global_zero:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that ended badly
        trainer.strategy.barrier()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.main = threading.current_thread()
        self.over.clear()
        self.beat("starts", trainer)
        self.thread = threading.Thread(target=self.watch, name="stall", daemon=True)
        self.thread.start()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("computes", trainer)

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        if module.automatic_optimization:  # else ranks may have different numbers of them
            self.beat("runs backward", trainer)

    def on_own_work_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.beat("computes with the others", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("updates", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("waits for data", trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("validates", trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("validates", trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("waits for data", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("writes a checkpoint", trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.beat("ends", trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop()
        (self.folder / f"rank-{self.rank}").unlink(missing_ok=True)
        with suppress(OSError):  # not empty: others are still at it, and the last of them succeeds
            self.folder.rmdir()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.phase = f"failed ({type(exception).__name__})"  # for ranks that go on waiting for this one
        self.stop()
        with suppress(OSError):
            self.write()

    def stop(self) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()
        self.thread = None

    # ---------------------------------------------------------------------------------------------- the thread

    def watch(self) -> None:
        still, seen, before = 0.0, 0, time.monotonic()
        while True:
            with suppress(OSError, ValueError):  # a full disk is no standstill; nor has every process a stderr
                self.write()
                self.arm()
            if self.over.wait(self.tick):
                return
            now = time.monotonic()
            still = 0.0 if self.beats != seen else still + min(now - before, 3 * self.tick)
            seen, before = self.beats, now
            allowed = self.allowed * (self.SAVING if self.phase == "writes a checkpoint" else 1)
            if still >= allowed or (self.folder / "stalled").exists():
                self.give_up()

    def arm(self) -> None:
        """Unless this is called again in time, the process ends, whatever its interpreter is doing."""
        faulthandler.dump_traceback_later(self.allowed, exit=True, file=sys.__stderr__)

    def write(self, **more: Any) -> None:
        """Put down how far this rank is; readers see all of it or what was there before."""
        own = {"host": socket.gethostname(), "pid": os.getpid(), "beats": self.beats, "step": self.step}
        own |= {"phase": self.phase, "since": self.since, "time": time.time()} | more
        partial = self.folder / f".rank-{self.rank}"
        partial.write_text(json.dumps({"rank": self.rank} | own), encoding="utf-8")
        os.replace(partial, self.folder / f"rank-{self.rank}")

    def give_up(self) -> None:
        """Say who is behind, and end this process."""
        with suppress(OSError):
            self.write(where=place(self.main))
            (self.folder / "stalled").touch()
        say(f"rank {self.rank}: nothing has moved for {self.allowed / 60:g} min; its stack:")
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        time.sleep(3 * self.tick)  # until the others have noticed, and written where they are
        say(f"rank {self.rank}: stalled, {verdict(self.read(), self.world, self.allowed / 2)}")
        os._exit(EXIT_CODE)

    def read(self) -> list[dict[str, Any]]:
        """What each rank wrote last."""
        found = []
        for rank in range(self.world):
            with suppress(OSError, ValueError):
                found.append(json.loads((self.folder / f"rank-{rank}").read_text(encoding="utf-8")))
        return found


def verdict(ranks: list[dict[str, Any]], world: int, patience: float) -> str:
    """Which of ``world`` ranks is behind, from what each wrote last; one that has not written for ``patience``
    seconds is dead, or cut off."""
    now = max(each["time"] for each in ranks) if ranks else 0.0
    missing = sorted(set(range(world)) - {each["rank"] for each in ranks})
    dead = [each for each in ranks if now - each["time"] > patience]
    fewest = min((each["beats"] for each in ranks), default=0)
    behind = [each for each in ranks if each["beats"] == fewest]
    if missing:
        return f"rank {', '.join(map(str, missing[:8]))} never wrote to this folder: did it start?"
    if dead:
        return "; ".join(f"{_name(each)} has shown no sign of life for {now - each['time']:.0f} s" for each in dead[:8])
    told = "; ".join(map(_tell, behind[:8])) + (" ..." if len(behind) > 8 else "")
    if world == 1:
        return told
    if len(behind) == world:
        return f"all ranks are at the same point: {told}"
    return f"behind is {told}; all others wait for that"


def place(thread: threading.Thread) -> str:
    """The line of our package at which ``thread`` is, and what it called there."""
    frame = sys._current_frames().get(thread.ident)
    if frame is None:
        return "nowhere"
    called, package = frame.f_code.co_name, str(Path(__file__).parents[1])
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return called
    own = frame.f_code
    inside = f", in {called}" if called != own.co_name else ""
    return f"{Path(own.co_filename).name}:{frame.f_lineno} {own.co_name}{inside}"


def say(line: str) -> None:
    """To stderr at once, past every buffer and progress bar."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"\nstall: {line}", file=sys.__stderr__, flush=True)


def _name(heart: dict[str, Any]) -> str:
    return f"rank {heart['rank']} ({heart['host']}, pid {heart['pid']})"


def _tell(heart: dict[str, Any]) -> str:
    where = f" at {heart['where']}" if "where" in heart else ""
    minutes = (heart["time"] - heart["since"]) / 60
    return f"{_name(heart)}, which at step {heart['step']} {heart['phase']} for {minutes:.1f} min{where}"
