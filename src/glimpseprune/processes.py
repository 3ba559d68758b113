"""The processes that torchrun or srun started for one command, and what they tell each other (over gloo).

For commands that share work without sharing weights, such as an evaluation. Training has Lightning's, in ``running/``.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from glimpseprune.config import UserError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""For which the others are waited for. A launcher ends all processes where one has failed."""


def end_with(parent: int) -> None:
    """Have this process, which the main thread of ``parent`` has started, end with it, however that ends."""
    try:
        asked = ctypes.CDLL(None).prctl(1, signal.SIGKILL) == 0  # PR_SET_PDEATHSIG, of Linux
    except (OSError, AttributeError):
        asked = False
    if not asked:
        threading.Thread(target=_watch, args=[parent], daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def serve(parent: int, _: int = 0) -> None:
    """As :func:`end_with`, for a worker: a signal to all processes of a terminal (Ctrl-C), of a job (scancel) or of a
    name (pkill) is the parent's affair, which may have to save what it has, and needs its workers until then."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1
    local: int = 0
    """Rank among those on this machine."""

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """What every process has, by rank; empty but on the first."""
        if self.world == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(mine, found)
        return found or []

    def agree(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all; its UserError ends them all, and it alone tells it."""
        if self.world == 1:
            return make()
        import torch.distributed as dist

        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said)
        if said[1] is not None:
            raise UserError(said[1]) if self.first else SystemExit(2)
        return said[0]


@contextmanager
def together() -> Iterator[Processes]:
    """The group of all processes; it ends with the block."""
    mine = placed(os.environ)
    if mine.world == 1:
        yield mine
        return
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://{meeting(os.environ)}", rank=mine.rank, world_size=mine.world, timeout=PATIENCE
    )
    try:
        yield mine
    finally:
        dist.destroy_process_group()


def placed(env: Mapping[str, str]) -> Processes:
    """This process among those that torchrun, or else srun, started; alone without them."""
    if "WORLD_SIZE" in env and "RANK" in env:
        return Processes(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if "SLURM_STEP_NUM_TASKS" in env:  # of srun's; a batch script has the job's SLURM_NTASKS and runs once
        rank, local = int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", "0"))
        return Processes(rank, int(env["SLURM_STEP_NUM_TASKS"]), local)
    return Processes()


def meeting(env: Mapping[str, str]) -> str:
    """host:port where they meet: as launchers say, else on the first node of srun's step."""
    step = int(env.get("SLURM_JOB_ID", "0")) * 7 + int(env.get("SLURM_STEP_ID", "0"))  # two of a job may run at a time
    port = env.get("MASTER_PORT", str(15000 + step % 10000))
    return f"{env.get('MASTER_ADDR') or first_host(env.get('SLURM_STEP_NODELIST', 'localhost'))}:{port}"


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes them: ``gpu[03-05,9],login`` -> ``gpu03``."""
    found = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups())
