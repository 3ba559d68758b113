"""The end of a run in which nothing happens any more, with the name of the rank that is to blame."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from glimpseprune import files

EXIT_CODE = 70
"""Of a process that has stalled."""


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
        files.write_json(self.folder / f"rank-{self.rank}", {"rank": self.rank} | own, sync=False)

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
