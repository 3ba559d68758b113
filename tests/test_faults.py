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

from glimpseprune.config import UserError
from glimpseprune.running import checkpoints
from glimpseprune.running.checkpoints import Checkpoints, newest

SCRIPT = Path(__file__).with_name("training_script.py")
KILLS = int(os.environ.get("KILLS", 2))
PLACES = ["write", "rename", "enter"] if "KILLS" in os.environ else ["rename"]  # all of them: make test-faults


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

    def curve(self) -> dict[str, dict[int, float]]:
        """The first step after a checkpoint may be there twice."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(self.path / "tensorboard" / self.path.name)).Reload()
        names = {"train/grad_norm", "val/loss", "val/reward"} & set(log.Tags()["scalars"])
        return {name: {event.step: event.value for event in log.Scalars(name)} for name in names}

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


@pytest.fixture
def short(whole, args, tmp_path) -> Folder:
    """A run that was stopped after step 12; keeps two checkpoints, and the best."""
    folder = Folder(tmp_path / "run", args)
    assert folder.train(KILL_AT=13).returncode == -9
    return folder


def index(folder: Folder) -> dict[str, dict]:
    return json.loads((folder.path / checkpoints.FOLDER / checkpoints.INDEX).read_text())


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(short, whole):
    last = newest(short.path)
    assert last.name == "step-00000012.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    done = short.train()
    assert done.returncode == 0 and "step-00000012.ckpt is damaged" in done.stderr
    same(short, whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_while_a_checkpoint_is_written_leaves_those_before(short, whole, place):
    """Half a file; a whole one under its name that the index does not know; an index that is half written."""
    folder = short.path / checkpoints.FOLDER
    last = newest(short.path)
    if place == "write":
        (folder / "step-00000016.ckpt.partial").write_bytes(last.read_bytes()[:1000])
    elif place == "rename":
        (folder / "step-00000016.ckpt").write_bytes(last.read_bytes()[:1000])
    else:
        (folder / f"{checkpoints.INDEX}.partial").write_text("{")
    assert newest(short.path) == last
    assert short.train().returncode == 0
    same(short, whole)
    assert {path.name for path in folder.iterdir()} == {*index(short), checkpoints.INDEX}


def test_the_last_and_the_best_stay(whole):
    kept = index(whole)
    names = sorted(kept)
    assert names[-2:] == ["step-00000020.ckpt", "step-00000024.ckpt"]
    losses = {line["step"]: line["val/loss"] for line in whole.metrics() if "val/loss" in line}
    best = min(losses, key=losses.get)
    assert {entry["step"] for entry in kept.values()} == {20, 24, best}
    assert {path.name for path in (whole.path / checkpoints.FOLDER).iterdir()} == {*kept, checkpoints.INDEX}
    assert all(kept[f"step-{step:08d}.ckpt"]["score"] == pytest.approx(losses[step], abs=1e-5) for step in (20, 24))


def test_best_stays_when_it_is_old(tmp_path):
    """Scores 3, 1, 2, 4: the second is the best of all, and of the others the last two stay."""
    callback = Checkpoints(tmp_path, last=2, monitor=("val/loss", "min"))
    (tmp_path / "config.yaml").write_text("backbone: {path: b}\ndata: {path: d}\n")
    trainer = Saver()
    for step, score in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
        trainer.global_step, trainer.callback_metrics = step, {"val/loss": torch.tensor(score)}
        (tmp_path / "trainable.safetensors").write_text(str(step))
        callback.on_validation_end(trainer, None)
    assert sorted(json.loads((tmp_path / "checkpoints" / "checkpoints.json").read_text())) == [
        f"step-0000000{step}.ckpt" for step in (2, 3, 4)
    ]
    assert (tmp_path / "best" / "trainable.safetensors").read_text() == "2"
    assert newest(tmp_path).name == "step-00000004.ckpt"
    for name in ("step-00000004.ckpt", "step-00000003.ckpt"):
        (tmp_path / "checkpoints" / name).write_text("x")
    with pytest.warns(match="is damaged"):
        assert newest(tmp_path).name == "step-00000002.ckpt"
    (tmp_path / "checkpoints" / "step-00000002.ckpt").unlink()
    with pytest.warns(), pytest.raises(UserError, match="all 3 checkpoints"):
        newest(tmp_path)


def test_the_best_is_there_before_its_checkpoint_is_entered(tmp_path, monkeypatch):
    """Who goes on from that checkpoint after a kill does not validate once more."""
    (tmp_path / "config.yaml").write_text("backbone: {path: b}\ndata: {path: d}\n")
    (tmp_path / "trainable.safetensors").write_text("best")
    trainer = Saver()
    trainer.global_step, trainer.callback_metrics = 1, {"val/loss": torch.tensor(1.0)}
    monkeypatch.setattr(checkpoints.files, "write_json", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Checkpoints(tmp_path, last=2, monitor=("val/loss", "min")).on_validation_end(trainer, None)
    assert (tmp_path / "best" / "trainable.safetensors").read_text() == "best"
    assert (tmp_path / "best" / "config.yaml").is_file() and newest(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[1]", '{"step-00000001.ckpt": 3}', '{"step-00000001.ckpt": {}}'])
def test_a_damaged_index_says_so(tmp_path, text):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoints.json").write_text(text)
    with pytest.raises(UserError, match=r"checkpoints\.json is damaged"):
        newest(tmp_path)


def test_an_index_cannot_point_elsewhere(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    entry = {"../../elsewhere.ckpt": {"sha256": "0", "step": 1}}
    (tmp_path / "checkpoints" / "checkpoints.json").write_text(json.dumps(entry))
    assert newest(tmp_path) is None


class Saver:
    """As much of a trainer as the callback asks for."""

    is_global_zero, sanity_checking, world_size, callbacks = True, False, 1, ()

    class strategy:
        barrier = staticmethod(lambda: None)

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"step {self.global_step}")


@pytest.mark.slow
def test_reinforcement_draws_what_it_would_have_drawn(recipe, tmp_path):
    """Masks and tokens are sampled: a run that is killed and goes on says the same to the last character."""
    more = ["stage=grpo", "train=[lora, glimpse, vip]", "lora={rank: 4, alpha: 8, dropout: 0.1}", "data.batch_size=2"]
    more += ["grpo.num_generations=4", "grpo.max_completion_length=4", "rewards.functions={format: 1.0}"]
    more += ["rewards.pruning_when=always", "trainer.max_steps=6", "trainer.val_every=3"]
    once, again = Folder(tmp_path / "once", [*recipe, *more]), Folder(tmp_path / "again", [*recipe, *more])
    assert once.train().returncode == 0
    assert again.train(KILL_AT=4).returncode == -9
    assert again.train().returncode == 0
    assert len({json.dumps(what) for what in once.steps().values()}) == 6
    same(once, again)


@pytest.mark.slow
def test_two_ranks_go_on_where_one_stopped(short, whole):
    """No sample twice, none left out: the two take turns where the one had come to."""
    short.diary.unlink()
    assert short.train("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2").returncode == 0
    seen = sorted((step, rank, keys) for (rank, step), (keys, *_) in short.steps().items())
    pairs = [first + second for (*_, first), (*_, second) in zip(seen[::2], seen[1::2])]
    assert pairs == [whole.steps()[0, step][0] for step in range(12, 24)]
