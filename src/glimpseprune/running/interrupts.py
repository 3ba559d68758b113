"""Ctrl-C and SIGTERM in a training: a checkpoint after the step, the line that resumes, and the end.

A handler only takes a note, and the ranks agree on it between two batches: from within one they would wait for each
other for ever. A second signal ends a process at once. Before the first step of a training, and after its last, signals
do what they do to any command (:func:`.config.answering`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

import lightning as L

from glimpseprune import config
from glimpseprune.running.checkpoints import Checkpoints
from glimpseprune.running.logs import flush
from glimpseprune.running.strategies import leave


class Interrupts(L.Callback):
    """On a signal, whichever rank it reaches: write a checkpoint after the step, and stop.

    It stops where the next batch would begin, so that what belongs to the step is logged, and a validation that is due
    still takes place.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.told, self.saved = 0, None
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:  # now, for Lightning has set its own; it also puts back those before
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    signal.signal(number, self.listen)
        self.step = trainer.global_step
        self.told = config.received()

    def listen(self, number: int = signal.SIGINT, *_: Any) -> None:
        self.told = number
        signal.signal(number, signal.SIG_DFL)
        with suppress(OSError):  # print may not be called from within itself
            os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once, without\n")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stepped, self.step = trainer.global_step > self.step, trainer.global_step  # else gradients are accumulating
        told = stepped and self.step < trainer.max_steps
        if told and trainer.strategy.reduce_boolean_decision(bool(self.told), all=False):
            self.saved = self.checkpoints.save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.saved is not None:
            flush(trainer)
            self.stop(trainer)

    def stop(self, trainer: L.Trainer) -> None:
        number = self.told or signal.SIGTERM
        if trainer.is_global_zero:
            said = f"\ninterrupted ({signal.Signals(number).name}) after step {self.step}, saved {self.saved}"
            print(f"{said}; go on with:", config.command("resume=true"), file=sys.stderr, flush=True)
        trainer.strategy.barrier()  # a rank that has gone would take the others with it
        leave()
        raise SystemExit(128 + number)
