"""Stalls: when a process is given up, and who is named as behind. (Whole runs: test_watch.py)"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glimpseprune.running import stalls
from glimpseprune.running.stalls import Stall, verdict


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
    monkeypatch.setattr(stalls.time, "monotonic", lambda clock=time.monotonic: clock() + later[0])
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
from glimpseprune.running.stalls import Stall

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
