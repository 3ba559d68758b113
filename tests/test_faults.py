"""Exact resume: a training that is killed anywhere ends as if nothing had happened (often: `make test-faults`)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glimpseprune.training import checkpoints

SCRIPT = Path(__file__).with_name("training_script.py")
KILLS = int(os.environ.get("KILLS", 3))


class Folder:
    """A run folder, and the diary of all the processes that have worked on it."""

    def __init__(self, path: Path, args: list[str]):
        self.path, self.args, self.diary = path, args, Path(f"{path}.diary")

    def train(self, *more: str, **env: object) -> subprocess.CompletedProcess:
        again = (self.path / checkpoints.FOLDER / checkpoints.INDEX).is_file()
        command = [*self.args, f"out={self.path}", "resume=true" if again else "overwrite=true", *more]
        env = {name: str(value) for name, value in env.items()}
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "DIARY": str(self.diary), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, SCRIPT, *command],
            env=os.environ | paths | env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def steps(self) -> dict[tuple[int, int], list]:
        """(rank, step) -> what it did; those that were done twice did the same."""
        done: dict[tuple[int, int], list] = {}
        for line in self.diary.read_text().splitlines():
            rank, step, *what = json.loads(line)
            assert done.setdefault((rank, step), what) == what, f"step {step} was another one the second time"
        return done

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "trainable.safetensors")

    def curve(self) -> list[tuple[int, float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(self.path / "tensorboard")).Reload()
        return [(event.step, event.value) for event in log.Scalars("train/grad_norm")]

    def metrics(self) -> list[dict]:
        """But for those that say how fast it was."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def same(one: Folder, other: Folder) -> None:
    """To the last bit: the same samples in the same order, losses, weights, curves and scores."""
    assert one.steps() == other.steps()
    mine, theirs = one.weights(), other.weights()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one.curve() == other.curve()
    assert one.metrics() == other.metrics()


@pytest.fixture(scope="module")
def args(recipe) -> list[str]:
    return [*recipe, "trainer.max_steps=24", "trainer.val_every=4", "pruner.options.dropout=0.1", "data.workers=1"]


@pytest.fixture(scope="module")
def whole(args, tmp_path_factory) -> Folder:
    """A run that nothing happened to."""
    folder = Folder(tmp_path_factory.mktemp("whole") / "run", args)
    done = folder.train()
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(whole, args, tmp_path):
    folder, rng = Folder(tmp_path / "run", args), random.Random(3)
    killed = 0
    while killed < KILLS:
        done = folder.train(KILL_AFTER=rng.uniform(0, 1.5))
        if done.returncode == 0:  # it was faster: another one, from the beginning
            same(folder, whole)
            folder = Folder(tmp_path / f"run-{killed}", args)
            continue
        assert done.returncode == -9, done.stderr[-3000:]
        killed += 1
    while (done := folder.train()).returncode:
        raise AssertionError(done.stderr[-3000:])
    same(folder, whole)
