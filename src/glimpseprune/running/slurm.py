"""Training under SLURM: places from srun, and a checkpoint and a requeue before the time limit (SIGUSR1).

Lightning's own requeue is left out: it talks to the other ranks from within the signal handler, which can wait for
ever. Here the handler only takes a note, and the ranks agree on it between two batches.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from glimpseprune.running.interrupts import Interrupts
from glimpseprune.running.strategies import leave

EXIT_CODE = 75
"""Of a training that was interrupted: not 0, or what waits for its end would start."""


def launched() -> bool:
    """Whether srun started this process as one task of a training (in a shell of srun's, SLURM_JOB_NAME is bash)."""
    return "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ and SLURMEnvironment.detect()


def placement() -> dict[str, Any]:
    """What Lightning's Trainer must be told of nodes and devices: one device per task, as srun started them."""
    nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
    tasks = int(os.environ["SLURM_NTASKS"])
    return {"num_nodes": nodes, "devices": tasks // nodes, "plugins": [SLURMEnvironment(auto_requeue=False)]}


class Requeue(Interrupts):
    """On SIGUSR1, whichever rank it reaches: write a checkpoint after the step, put the job back in the queue, stop.

    The signal must come earlier than the time limit by more than a validation.
    """

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGUSR1, self.listen)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # While Python shuts down it forgets its handlers, and the signal would kill a run that has all but ended well.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def listen(self, *_: Any) -> None:
        self.told = signal.SIGUSR1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # SIGTERM (a requeue, a dead node, scancel) may end us at once: what is unsaved is lost anyway, and the handler
        # of Lightning would wait for the other ranks, who may have gone.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.step = trainer.global_step

    def stop(self, trainer: L.Trainer) -> None:
        rank_zero_info(f"SIGUSR1: stopped after step {self.step}, saved {self.saved}")
        if trainer.is_global_zero:
            requeue()
        trainer.strategy.barrier()  # a rank that has gone would take the others with it before the job is in the queue
        leave()
        raise SystemExit(EXIT_CODE)


def requeue() -> None:
    """Put this job back in the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # where SLURM_JOB_ID may mean all tasks
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"job {job} could not be requeued ({error}): submit it again with resume=true")
