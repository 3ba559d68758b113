"""What a person sees of a run: lines and a bar, metrics.jsonl, loggers."""

import errno
import io
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from glimpseprune import config, files
from glimpseprune.config import UserError
from glimpseprune.options import TrainConfig
from glimpseprune.running import logs
from glimpseprune.running.logs import Board, Journal, loggers


class Run:
    """A trainer of four steps that are told one by one, with a validation at every second one."""

    def __init__(self, journal: Journal, step: int = 0) -> None:
        self.journal = journal
        self.trainer = SimpleNamespace(
            global_step=step,
            is_global_zero=True,
            sanity_checking=False,
            loggers=[],
            callbacks=[],
            callback_metrics={},
            world_size=1,
            precision="32-true",
        )
        linear = torch.nn.Linear(2, 3)
        config = SimpleNamespace(train=["vip"], trainer=SimpleNamespace(max_steps=4))
        parts = {"lvlm": linear, "device": torch.device("cpu"), "config": config}
        self.module = SimpleNamespace(parameters_of=lambda part: linear.parameters(), **parts)
        journal.on_train_start(self.trainer, self.module)

    def go(self, until: int) -> None:
        for step in range(self.trainer.global_step + 1, until + 1):
            self.trainer.global_step = step
            self.trainer.callback_metrics |= {"train/loss": torch.tensor(1 / step), "step": torch.tensor(float(step))}
            self.journal.on_train_batch_end(self.trainer, self.module)
            if step % 2 == 0:
                self.journal.on_validation_start(self.trainer, self.module)
                self.trainer.callback_metrics["val/accuracy"] = torch.tensor(0.5)
                self.journal.on_validation_end(self.trainer, self.module)
        self.journal.on_train_end(self.trainer, self.module)


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=200, **options)


def read(folder) -> list[dict]:
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def test_without_a_terminal_there_are_lines(tmp_path):
    to = console()
    Run(Journal(tmp_path, 4, 2, to)).go(4)
    first, *lines = to.file.getvalue().splitlines()
    assert first == "training vip (9 parameters) on a Linear of 9: 4 steps, 1 x cpu, 32-true"
    assert [line.partition("  ")[0] for line in lines] == [
        "step 1/4",
        "step 2/4",
        "validation at step 2: accuracy 0.5",
        "step 4/4",
        "validation at step 4: accuracy 0.5",
    ]
    assert "loss 0.25" in lines[3] and lines[3].endswith("left 0:00:00")


def test_on_a_terminal_there_is_one_bar_over_all_steps(tmp_path):
    to = console(force_terminal=True)
    journal = Journal(tmp_path, 4, 1, to)
    Run(journal).go(4)
    said = to.file.getvalue()
    assert "4/4" in said and "left" in said and "step 1/4" not in said and "validation at step 4" in said
    assert journal.bar is None  # and its thread is gone


def test_lines_of_the_first_step_every_other_one_and_each_validation(tmp_path):
    Run(Journal(tmp_path, 4, 3, console())).go(4)
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # 1: the first, 3: every third, 2 and 4: validations
    assert ["val/accuracy" in line for line in lines] == [False, True, False, True]
    assert lines[1] == {"step": 2, "train/loss": 0.5, "val/accuracy": 0.5}


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    Run(Journal(tmp_path, 4, 1, console())).go(4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "trai')  # torn by a kill
    run = Run(Journal(tmp_path, 4, 1, console()), step=2)
    run.go(3)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_a_run_has_its_name_in_tensorboard_and_keeps_it_when_moved(tmp_path):
    board = Board(tmp_path / "red")
    board.log_metrics({"val/keep_ratio": 0.5, "val/kl": 0.1}, 2)
    board.save()
    assert [path.name for path in (tmp_path / "red" / "tensorboard").iterdir()] == ["red"]
    (tmp_path / "red").rename(tmp_path / "blue")
    assert Board(tmp_path / "blue").version == "red"


def test_loggers_by_name(tmp_path):
    made = loggers(["tensorboard", "csv"], tmp_path, None)
    assert [type(logger).__name__ for logger in made] == ["Board", "CSVLogger"]
    assert not loggers([], tmp_path, None)
    with pytest.raises(UserError, match="trainer.logger: no 'tensorbord', choose from tensorboard, csv, wandb"):
        config.load(TrainConfig, ["out=a", "backbone.path=b", "data.path=c", "trainer.logger=[tensorbord]"])


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        loggers(["wandb"], tmp_path, None)


def test_a_full_disk_that_tensorboards_thread_finds_is_told_once(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = []
    monkeypatch.setattr(threading, "excepthook", lambda what: told.append(what.exc_value))
    logs.quiet()
    monkeypatch.setattr(RecordWriter, "write", fail)
    with pytest.raises((OSError, ValueError)) as error:
        Board(tmp_path / "run").log_metrics({"a": 1.0}, 1)
    assert files.trouble(error.value).errno == errno.ENOSPC and not told
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert len(told) == 1
