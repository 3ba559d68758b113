"""The scripts of slurm/ on a real SLURM: two nodes on this machine, without GPUs (cluster.sh). Minutes, and root."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
PATIENCE = 600  # seconds; everything here is limited by how fast two processes start on a busy machine
BEGUN = re.compile(r"preflight: \w+ (starts in|continues from)")


class Slurm:
    """A cluster, and a folder for everything that its jobs write."""

    def __init__(self, folder: Path):
        self.folder, self.nodes = folder, ("127.0.0.1", "127.0.0.2")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = clean | {"SLURM_CONF": f"{folder}/cluster/slurm.conf", "OMP_NUM_THREADS": "1"}
        self.env["SBATCH_OUTPUT"] = (
            f"{folder}/%x-%j.out"  # wins over the scripts, which write to logs/ of the repository
        )

    def run(self, *command: str, code: int = 0, **env: str) -> str:
        """What a command on the login node prints."""
        done = subprocess.run(command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def cluster(self, action: str, *more: str) -> None:
        # With its output in a pipe, the daemons that it leaves behind would keep us waiting.
        subprocess.run([CLUSTER, action, self.folder / "cluster", *more], env=self.env, check=True, timeout=60)

    def sbatch(self, *arguments: str) -> str:
        return self.run("sbatch", "--parsable", *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def log(self, number: str) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob(f"*-{number}.out"))

    def wait(self, number: str, *states: str) -> dict[str, str]:
        """The job once it is in one of the states."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(lambda: self.job(number)["JobState"] in final | set(states), number)
        job = self.job(number)
        assert job["JobState"] in states, self.log(number)
        return job

    def until(self, condition: Callable[[], object], number: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log(number)
            time.sleep(0.5)

    def processes(self, number: str, node: str) -> list[int]:
        """Those of a job's tasks on a node."""
        wanted = {f"SLURM_JOB_ID={number}", f"SLURMD_NODENAME={node}"}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                has = wanted <= set(path.read_text(errors="replace").split("\0"))
            except OSError:  # it has ended
                continue
            if has:
                found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("the daemons of a SLURM with several nodes on one machine need root")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    slurm.cluster("start")
    yield slurm
    slurm.cluster("stop")


def smoke(slurm: Slurm, name: str, *more: str) -> list[str]:
    """The command of the README, on folders of our own."""
    return ["slurm/stage1.sh", "conf/smoke.yaml", f"out={slurm.folder}/{name}", f"data.path={slurm.folder}/data", *more]


def metrics(slurm: Slurm, name: str) -> list[int]:
    """Steps after which the run was validated."""
    file = slurm.folder / name / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else []
    return [line["step"] for line in lines if "val/loss" in line]


def logged(slurm: Slurm, name: str) -> list[int]:
    """Steps in TensorBoard's curve of the loss, as it shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(f"{slurm.folder}/{name}/tensorboard/{name}").Reload()
    return [event.step for event in log.Scalars("train/kl")]


def test_smoke_from_submission_to_evaluated_run_folder(slurm):
    number = slurm.sbatch(*smoke(slurm, "smoke"))
    job = slurm.wait(number, "COMPLETED")
    assert (job["NumNodes"], job["Restarts"]) == ("2", "0")
    log = slurm.log(number)
    for rank, node in enumerate(slurm.nodes):
        assert f"rank {rank} of 2 on {node}" in log
    assert log.count("making it as data.prepare says") == 1
    assert metrics(slurm, "smoke") == [12, 24] and logged(slurm, "smoke") == [4, 8, 12, 16, 20, 24]
    said = slurm.run("slurm/evaluate.sh", f"ckpt={slurm.folder}/smoke", "limit=16")
    slurm.wait(re.search(r"Submitted batch job (\d+)", said)[1], "COMPLETED")
    rows = json.loads((slurm.folder / "smoke" / "scores.json").read_text())
    assert {row["method"] for row in rows} == {"none", "glimpse", "random", "oracle", "zero"}


def test_zero3_splits_the_model_between_the_nodes(slurm):
    pytest.importorskip("deepspeed")
    number = slurm.sbatch(
        *smoke(slurm, "zero3", "trainer.strategy=zero3", "trainer.max_steps=4", "trainer.val_every=2")
    )
    slurm.wait(number, "COMPLETED")
    assert metrics(slurm, "zero3") == [2, 4] and (slurm.folder / "zero3" / "best" / "trainable.safetensors").is_file()


def test_usr1_saves_requeues_and_continues(slurm):
    number = slurm.sbatch(*smoke(slurm, "requeued", "trainer.max_steps=36"))
    slurm.until(lambda: metrics(slurm, "requeued") or slurm.job(number)["JobState"] == "FAILED", number)
    slurm.run("scancel", "--signal=USR1", number)  # as --signal=USR1@600 does
    job = slurm.wait(number, "COMPLETED")
    log = slurm.log(number)
    stopped = int(re.search(r"SIGUSR1: stopped after step (\d+)", log)[1])
    assert job["Restarts"] == "1" and 12 <= stopped < 36
    assert BEGUN.findall(log) == ["starts in", "continues from"]
    assert metrics(slurm, "requeued") == [12, 24, 36]
    assert logged(slurm, "requeued") == list(range(4, 37, 4))  # one curve, without a gap or a step twice


def test_a_node_that_dies_requeues_and_continues(slurm):
    number, (_, node) = slurm.sbatch(*smoke(slurm, "died", "trainer.max_steps=36")), slurm.nodes
    slurm.until(lambda: metrics(slurm, "died") or slurm.job(number)["JobState"] == "FAILED", number)
    # Like a node without power: its daemon is silent, its tasks neither answer nor hang up.
    lost = slurm.processes(number, node)
    for process in lost:
        os.kill(process, signal.SIGSTOP)
    os.kill(int((slurm.folder / "cluster" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
    slurm.until(lambda: slurm.job(number)["Restarts"] == "1", number)
    for process in lost:
        os.kill(process, signal.SIGKILL)
    slurm.cluster("node", node)
    slurm.wait(number, "COMPLETED")
    assert BEGUN.findall(slurm.log(number)) == ["starts in", "continues from"]
    assert metrics(slurm, "died") == [12, 24, 36]
    assert logged(slurm, "died") == list(range(4, 37, 4))  # what was logged after the checkpoint is not shown twice


def test_pipeline_runs_three_stages_in_order(slurm):
    out, data = f"{slurm.folder}/chain", f"data.path={slurm.folder}/data"
    short = ["trainer.max_steps=4", "trainer.val_every=4"]
    rollouts = ["grpo.num_generations=4", "grpo.max_completion_length=6", "data.batch_size=4", "data.val_samples=8"]
    said = slurm.run(
        "slurm/pipeline.sh", f"out={out}", "conf/smoke.yaml", data, *short, "--", *short, *rollouts,
        "guard.keep_floor=0", "--", "limit=8",
    )  # fmt: skip
    jobs = [slurm.wait(number, "COMPLETED") for number in re.findall(r"(?:stage \d|evaluation) (\d+)", said)]
    ends, begins = [job["EndTime"] for job in jobs], [job["StartTime"] for job in jobs]
    assert len(jobs) == 3 and ends[0] <= begins[1] and ends[1] <= begins[2]
    rows = json.loads(Path(out, "stage2", "scores.json").read_text())
    assert {"none", "glimpse", "glimpse+"} <= {row["method"] for row in rows}


def test_a_stage_that_fails_takes_the_others_off_the_queue(slurm):
    said = slurm.run(
        "slurm/pipeline.sh",
        f"out={slurm.folder}/fails",
        "conf/smoke.yaml",
        f"data.path={slurm.folder}/data",
        "trainer.precision=nonsense",
    )
    first, second, third = re.findall(r"(?:stage \d|evaluation) (\d+)", said)
    slurm.wait(first, "FAILED")
    slurm.wait(second, "CANCELLED")
    slurm.wait(third, "CANCELLED")


def test_what_is_missing_is_told_before_the_queue_and_by_the_job(slurm):
    def queued() -> str:
        return slurm.run("squeue", "--noheader", "--states=all")

    before, nowhere = queued(), ["data.path=nowhere", "data.prepare=null"]
    said = slurm.run(*smoke(slurm, "missing", *nowhere), code=2)
    assert said.startswith("error: no usable shards in nowhere: there is no such folder")
    assert "hf download" in slurm.run(*smoke(slurm, "missing", "backbone.path=org/model"), code=2)
    assert "make install" in slurm.run(*smoke(slurm, "missing"), code=2, PYTHON="/nowhere/python")
    assert queued() == before
    number = slurm.sbatch(*smoke(slurm, "missing", *nowhere))  # sbatch itself checks nothing
    assert slurm.wait(number, "FAILED")["ExitCode"] == "2:0"
    assert "error: no usable shards in nowhere" in slurm.log(number) and "srun" not in slurm.log(number)
