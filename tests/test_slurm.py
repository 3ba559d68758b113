"""The requeue callback with a trainer that only says what it is asked; the real one: test_training, tests/slurm."""

from types import SimpleNamespace

import pytest

from glimpseprune.running import interrupts, slurm
from glimpseprune.running.interrupts import Interrupts


class Trainer(SimpleNamespace):
    """One rank; ``others``: whether another one was told."""

    def __init__(self, others: bool = False, rank: int = 0):
        super().__init__(global_step=0, max_steps=10, others=others, is_global_zero=rank == 0, log=[])
        self.strategy = SimpleNamespace(
            reduce_boolean_decision=lambda own, all: own or self.others, barrier=lambda: self.log.append("barrier")
        )
        self.loggers = [SimpleNamespace(save=lambda: self.log.append("logged"))]


class Checkpoints(SimpleNamespace):
    def save(self, trainer):
        trainer.log.append(f"saved at {trainer.global_step}")
        return "x"


@pytest.fixture
def queue(monkeypatch):
    asked = []
    monkeypatch.setattr(slurm.signal, "signal", lambda *_: None)
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, check: asked.append(command))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return asked


def run(callback: slurm.Requeue, trainer: Trainer, batches: int, accumulate: int = 1) -> int:
    """How many batches begin before the callback stops the run."""
    callback.on_train_start(trainer, None)
    for batch in range(batches):
        try:
            callback.on_train_batch_start(trainer)
        except SystemExit as stop:
            assert stop.code == slurm.EXIT_CODE
            return batch
        trainer.global_step += (batch + 1) % accumulate == 0
        callback.on_train_batch_end(trainer)
    return batches


def test_ctrl_c_is_agreed_on_saved_and_told_once(queue, capsys):
    """Of two ranks, one of which got the signal."""
    for rank in (0, 1):
        trainer, callback = Trainer(others=rank == 1, rank=rank), Interrupts(Checkpoints())
        callback.on_train_start(trainer, None)
        if rank == 0:
            callback.listen(interrupts.signal.SIGINT)
        trainer.global_step = 1
        callback.on_train_batch_end(trainer)
        with pytest.raises(SystemExit) as stop:
            callback.on_train_batch_start(trainer)
        assert stop.value.code == (143 if rank else 130)
        assert trainer.log == ["saved at 1", "logged", "barrier"] and queue == []
    assert capsys.readouterr().err.count("go on with: ") == 1


def test_nothing_happens_without_a_signal(queue):
    trainer = Trainer()
    assert run(slurm.Requeue(Checkpoints()), trainer, 10) == 10
    assert trainer.log == queue == []


def test_a_signal_saves_then_requeues_then_stops(queue):
    trainer, callback = Trainer(), slurm.Requeue(Checkpoints())
    callback.listen()
    assert run(callback, trainer, 10) == 1
    assert trainer.log == ["saved at 1", "logged", "barrier"]
    assert queue == [["scontrol", "requeue", "17"]]


def test_ranks_agree_and_only_the_first_asks_scontrol(queue):
    trainer = Trainer(others=True, rank=1)
    assert run(slurm.Requeue(Checkpoints()), trainer, 10) == 1
    assert trainer.log == ["saved at 1", "logged", "barrier"] and queue == []


def test_gradients_that_are_accumulating_are_not_lost(queue):
    trainer, callback = Trainer(), slurm.Requeue(Checkpoints())
    callback.listen()
    assert run(callback, trainer, 10, accumulate=4) == 4
    assert trainer.log[0] == "saved at 1"


def test_a_run_that_has_finished_is_not_requeued(queue):
    trainer, callback = Trainer(), slurm.Requeue(Checkpoints())
    trainer.max_steps = 1
    callback.listen()
    assert run(callback, trainer, 1) == 1
    assert trainer.log == queue == []


def test_a_task_of_an_array_requeues_itself_alone(queue, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    slurm.requeue()
    assert queue == [["scontrol", "requeue", "16_2"]]


def test_a_requeue_that_fails_says_how_to_go_on(queue, monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr(slurm.subprocess, "run", fail)
    with pytest.warns(match="resume=true"):
        slurm.requeue()


def test_places_come_from_srun(monkeypatch):
    for name in ("SLURM_STEP_ID", "RANK", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert not slurm.launched()
    step = {"STEP_ID": 0, "STEP_NUM_NODES": 2, "NTASKS": 8, "NTASKS_PER_NODE": 4, "JOB_NAME": "stage1"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert slurm.launched()
    places = slurm.placement()
    assert (places["num_nodes"], places["devices"], places["plugins"][0].auto_requeue) == (2, 4, False)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # a shell on a node, in which somebody types
    assert not slurm.launched()
