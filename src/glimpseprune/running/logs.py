"""What a person sees of a run: a bar on a terminal, lines in a log file, metrics.jsonl, and the loggers' curves.

A step is the number of optimiser updates that are done, everywhere: on the bar, in metrics.jsonl, on TensorBoard's axis
and in a checkpoint's name. Left out: Lightning's own bar (it counts batches of an epoch that has no end), its table of
modules, and what it and others say that a user can do nothing about.
"""

from __future__ import annotations

import html
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from glimpseprune import files, sharded
from glimpseprune.config import UserError
from glimpseprune.legible import legible
from glimpseprune.running.callbacks import collapsed

METRICS = "metrics.jsonl"
FIRST = {f"val/{name}": f"answers/{name}" for name in ("accuracy", "accuracy_full", "score", "keep_ratio")}
"""TensorBoard sorts groups by name: these come before all others, beside the pictures ``answers/kept``."""
SHOWN = ("loss", "kl", "reward", "keep_ratio", "keep_ratio/sampled")


def quiet() -> None:
    """Keep to ourselves what libraries say of a training and its user can do nothing about."""
    for library in ("lightning.pytorch", "lightning.fabric"):  # hardware that is not there, adverts, seeds
        logging.getLogger(library).setLevel(logging.WARNING)
    for said in (
        ".*in eval mode at the start of training.*",  # the frozen LVLM is meant to be
        ".*when logging on epoch level.*",  # means were taken over ranks before
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*does not have many workers which may be a bottleneck.*",
        ".*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", said)
    threading.excepthook = partial(_told_otherwise, threading.excepthook)
    if not Console().is_terminal:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _told_otherwise(hook: Callable[[Any], Any], what: Any) -> None:
    """As ``threading.excepthook``: a disk's error in TensorBoard's thread is raised again where one writes next, and
    told there."""
    if type(what.thread).__name__ != "_AsyncWriterThread" or files.trouble(what.exc_value) is None:
        hook(what)


class Board(TensorBoardLogger):
    """``<out>/tensorboard/<name of the run>``, so that a run has a name wherever TensorBoard is started."""

    def __init__(self, out: Path, again: int | None = None) -> None:
        """``again``: the first step that a resumed run does once more, whose points are forgotten."""
        folder = out / "tensorboard"
        earlier = sorted(path.name for path in folder.glob("*/") if path.is_dir())
        name = earlier[0] if earlier else out.resolve().name
        super().__init__(out, name="tensorboard", version=name, purge_step=again)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({FIRST.get(name, name): value for name, value in metrics.items()}, step)

    def log_image(self, key: str, images: Sequence[np.ndarray], step: int | None = None) -> None:
        """As WandbLogger's: images of [rows, cols, RGB]."""
        for image in images:
            self.experiment.add_image(key, image, step, dataformats="HWC")

    def log_text(
        self, key: str, columns: Sequence[str], data: Sequence[Sequence[str]], step: int | None = None
    ) -> None:
        """As WandbLogger's: a table."""
        rows = [columns, ["---"] * len(columns), *([cell(text) for text in row] for row in data)]
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(row)} |" for row in rows), step)


def cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table, whatever a model said."""
    return html.escape(legible(text.replace("\n", " ")), quote=False).replace("|", "\\|")


def loggers(names: Sequence[str], out: Path, again: int | None) -> list[Logger]:
    """The loggers that ``trainer.logger`` names, all writing below the run folder.

    Raises:
        UserError: one whose package is not installed.
    """
    made: list[Logger] = []
    for name in names:
        if name == "wandb" and find_spec("wandb") is None:
            raise UserError("trainer.logger: wandb is not installed: pip install wandb")
        if name == "tensorboard":
            made.append(Board(out, again))
        elif name == "csv":
            made.append(CSVLogger(out, name=None, version="csv"))
        else:
            made.append(WandbLogger(name=out.resolve().name, project="glimpseprune", save_dir=out, resume="allow"))
    return made


class Journal(L.Callback):
    """The bar on a terminal, else a line now and then; and metrics.jsonl, one line per step: the first step, every
    ``every`` steps, and every validation with what came of it."""

    def __init__(self, out: str | Path, total: int, every: int, console: Console | None = None) -> None:
        self.file, self.total, self.every = Path(out) / METRICS, total, every
        self.console = console or Console()
        self.bar: Progress | None = None
        self.seen = 0
        self.lines: dict[int, str] = {}
        self.began = (0.0, 0)  # when, at which step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen = trainer.global_step
        self.began = time.perf_counter(), trainer.global_step
        if not trainer.is_global_zero:
            return
        self.forget(trainer.global_step)
        self.console.print(describe(trainer, module), highlight=False, markup=False, soft_wrap=True)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            rest = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[said]}", markup=False))
            self.bar = Progress(*columns, *rest, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.total, completed=trainer.global_step, said="")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self.seen:
            return
        due = self.seen == 0 or step // self.every > self.seen // self.every or step >= self.total
        values = rounded(trainer, ("train/", "perf/", "lr/"))
        if self.bar is not None:
            self.bar.update(self.task, total=self.total, completed=step, said=say(values))
        if due:
            self.write({"step": step} | values)
            if self.bar is None:
                self.console.print(self.line(step, values), highlight=False, markup=False, soft_wrap=True)
        self.seen = step

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description="validating")
            self.bar.refresh()
        flush(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        flush(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or collapsed(trainer):
            return
        if self.bar is not None:
            self.bar.update(self.task, description="training")
        self.write({"step": trainer.global_step} | rounded(trainer, ("train/", "perf/", "lr/", "val/")))
        values = rounded(trainer, ("val/",))
        said = "  ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in values.items())
        self.console.print(f"validation at step {trainer.global_step}: {said}", highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.teardown(trainer, module, "fit")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """``step 40/480 (8%)  loss 0.12  keep_ratio 0.05  left 0:02:10``."""
        began, first = self.began
        left = (time.perf_counter() - began) / max(step - first, 1) * (self.total - step)
        return f"step {step}/{self.total}  {say(values)}  left {timedelta(seconds=round(left))}"

    def forget(self, step: int) -> None:
        """Keep what was written up to ``step``; what came after it is done again. A torn last line was, too."""
        if self.file.is_file():
            lines = filter(None, map(parsed, self.file.read_text(encoding="utf-8").splitlines()))
            self.lines = {line["step"]: json.dumps(line) for line in lines if line["step"] <= step}

    def write(self, line: dict[str, float]) -> None:
        """Add a line, in the place of one of the same step; the file is there as a whole at any time."""
        self.lines[line["step"]] = json.dumps(line)
        files.write(self.file, "".join(f"{text}\n" for text in self.lines.values()), sync=False)


def parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def rounded(trainer: L.Trainer, groups: tuple[str, ...]) -> dict[str, float]:
    """What is logged last of these groups of metrics, by name."""
    found = sorted(trainer.callback_metrics.items())
    return {name: round(float(value), 6) for name, value in found if name.startswith(groups)}


def say(values: Mapping[str, float]) -> str:
    """The few values that a line has room for."""
    named = ((name, values.get(f"train/{name}")) for name in SHOWN)
    return "  ".join(f"{name} {value:.4g}" for name, value in named if value is not None)


def count(parameters: Iterable[Tensor]) -> int:
    return sum(sharded.shape(parameter).numel() for parameter in parameters)


def describe(trainer: L.Trainer, module: L.LightningModule) -> str:
    """What trains, of what, on what: one line."""
    parts = {part: count(module.parameters_of(part)) for part in module.config.train}
    whole = count(module.lvlm.parameters())
    trained = ", ".join(f"{part} ({number:,} parameters)" for part, number in parts.items())
    where = f"{trainer.world_size} x {module.device.type}, {trainer.precision}"
    steps = module.config.trainer.max_steps
    return f"training {trained} on a {type(module.lvlm).__name__} of {whole:,}: {steps} steps, {where}"


def flush(trainer: L.Trainer) -> None:
    """Write what the loggers still hold."""
    for logger in trainer.loggers:
        logger.save()
