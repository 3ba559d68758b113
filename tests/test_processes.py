"""Who one is among the processes of torchrun or srun, and what they tell each other."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from glimpseprune.config import UserError
from glimpseprune.processes import Processes, first_host, meeting, placed, serve, together

SRUN = {"SLURM_JOB_ID": "31", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
SRUN |= {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "sim[1-2]"}


def test_places():
    assert placed({}) == Processes()
    assert placed({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Processes(3, 8, 1)
    assert placed(SRUN) == Processes(3, 4, 1)
    # A batch script, and a shell that srun started, are alone, whatever their job has.
    assert placed({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Processes()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("n[7,9]", "n7"),
        ("r[1-2]-x,b", "r1-x"),
        ("a-1", "a-1"),
    ],
)
def test_first_of_a_list_of_nodes(nodes, host):
    assert first_host(nodes) == host


def test_where_they_meet():
    assert meeting({"MASTER_ADDR": "h", "MASTER_PORT": "7"}) == "h:7"
    assert meeting(SRUN) == "sim1:15219"
    assert meeting(SRUN | {"SLURM_STEP_ID": "3"}) != meeting(SRUN)


def _serve(parent: int, say) -> None:
    serve(parent)
    say.put(None)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_leaves_workers_to_their_parent(number):
    """As pkill and scancel send them; torch's loader would fail in the middle of a step that is to be saved."""
    context = multiprocessing.get_context("fork")
    say = context.Queue()
    worker = context.Process(target=_serve, args=(os.getpid(), say), daemon=True)
    worker.start()
    say.get(timeout=60)
    os.kill(worker.pid, number)
    worker.join(0.5)
    assert worker.is_alive()
    worker.kill()


def _work(rank: int, port: int, say) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def refuse():
        raise UserError("no")

    with together() as processes:
        say.put((rank, processes.gather(rank + 10), processes.agree(lambda: rank + 20)))
        processes.agree(refuse)


def test_two_gather_agree_and_fail_together(capfd):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    say = context.Queue()
    both = [context.Process(target=_work, args=(rank, port, say), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    found = sorted(say.get(timeout=60) for _ in both)
    for process in both:
        process.join(60)
    assert found == [(0, [10, 11], 20), (1, [], 20)]
    assert [process.exitcode for process in both] == [1, 2]  # the first tells what is wrong, the other ends silently
    assert capfd.readouterr().err.count("UserError: no") == 1


def test_a_worker_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    """And takes no notice of Ctrl-C, which a terminal sends to both."""
    code = """
import os, pathlib, signal, sys, time
from glimpseprune import processes
parent = os.getpid()
if not os.fork():
    processes.serve(parent)
    os.kill(os.getpid(), signal.SIGINT)
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(60)
time.sleep(60)
"""
    file = tmp_path / "worker"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
    )
    wait_for(lambda: file.is_file() and file.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(int(file.read_text())))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_for(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
