"""Evaluate: ``python -m src.evaluate ckpt=runs/demo``, or several methods on one model, ``methods=[glimpse,fastv]``.

Scores pruners beside their controls, all on the same samples. Prints one table and writes ``scores.json`` (a row per
method and kind of question), ``predictions.jsonl`` (a line per method, sample and draw), ``evaluation.yaml`` (what was
asked for) and pictures of what was kept; ``src.report`` and ``src.compare`` go on from there. ``ckpt`` is a run folder,
or a published pruner (folder or hub id); then ``backbone.path`` and ``data.path`` may be needed. Methods without
weights need no ``ckpt``: ``backbone.path=<model> data.path=<shards> methods=[random]``.

Rows of a stage-1 run: ``none`` (unpruned); the pruner by its name, or ``methods``, each with its
``options.<method>.<key>``; and controls, which decide where the pruner does (of several the checkpoint's own, else the
first one that prunes in the decoder): ``random`` (as many tokens as it kept, sample by sample and stop by stop),
``oracle`` (the ground-truth boxes) and ``zero`` (no visual token survives).

A budget sets every method but the controls to one cost, as measured on the first samples. What a method cannot reach is
refused; what has no knob (``none``, ``oracle``) is reported as it is. ``budget.kept=.11`` is the share of the visual
tokens that is left for decoding, ``budget.mean_tokens=64`` the number that a layer sees, mean over layers (up to 1: a
share of all), ``budget.kv=.3`` the share in the cache; ``budget.decoder_flops=.5`` (decisions included) and
``budget.prefill_flops=.7`` (vision tower and lm_head, too) are ratios to the unpruned model.

A run that trained the language model, or reinforced the pruner of another run, has a ``+`` behind its name. Then
``none`` and what ``relative`` divides by is the *base*, which is the language model as it was before: without the run's
adapters, or read once more from its folder if the run tuned its own weights. ``glimpse`` is the pruner that the run
started from (``init_from``), on the base. Other methods (``fastv+``), ``random``, ``oracle`` and ``zero`` are run on
the trained language model, and so is ``none+``, the unpruned one, if ``controls`` names it. Adapters are not merged
here, which costs a little time to the first token; ``src.export`` merges them.

``samples=8 temperature=1`` and ``sample_keep=true`` are about the methods alone, not their controls: they answer k
times, their accuracy is the mean over the k, and ``pass_at_k`` is that of the best of them (at least one is right).

``tasks=[docvqa,textvqa]`` evaluates several tasks in one run, files of ``tasks/`` that name data, suffix, metric and
length of each; rows have a ``task`` then. ``data.paths.docvqa=<folder>`` says where data are that lie elsewhere.
``tasks=viscot``, and any ``metric=judge``, need a judge (``judge.base_url``, ``judge.model``): it is asked when all
answers are there, its verdicts are kept, and those that are missing are asked for again with ``resume=true``.

Several processes (``torchrun --nproc-per-node 8 -m src.evaluate ...``, or srun) share the samples, a device each.
``resume=true`` goes on with an evaluation that was interrupted: what is done is read again, but not run. A finished
evaluation that is in ``out`` is kept in ``out/earlier/1`` and so on, or replaced with ``overwrite=true``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from glimpseprune import config, judging, lookup, report, resources, tasks
from glimpseprune.budget import BUDGETS, Budget, Calibration, afford, rebuilt
from glimpseprune.config import MISSING, SEEDS, START, UserError, option
from glimpseprune.evaluation import Evaluation, Method, Record, build, naming
from glimpseprune.options import Attention, DataOptions, Dtype, JudgeOptions, PrunerOptions, TrainConfig
from glimpseprune.processes import Processes, together
from glimpseprune.results import Earlier, Folder, plain
from glimpseprune.scores import Scores
from glimpseprune.scores import over_needing_kinds as over_needing_kinds
from glimpseprune.tasks import JUDGE, Task

if TYPE_CHECKING:
    from glimpseprune.backbones import LVLM
    from glimpseprune.checkpoint import GlimpsePrune
    from glimpseprune.data.stream import ShardDataset

    Base = tuple[LVLM, Callable[[], AbstractContextManager]]

CONTROLS = ("none", "glimpse", "random", "oracle", "zero")


@dataclass
class PrunerChoice:
    name: str | None = option(None, "another pruning method than the checkpoint's; several: methods")
    options: dict[str, Any] = option({}, "its options; for the checkpoint's own method they are merged over the saved")


@dataclass
class BackboneChoice:
    path: str | None = option(None, "another folder or hub id than the checkpoint names; enough without a checkpoint")
    dtype: Dtype | None = option(None, "of its weights; auto: as stored")
    attention: Attention | None = option(None, "attention backend")


@dataclass
class DataChoice:
    path: str | None = option(None, "folder of shards (default: the one the run was trained on, or the task's)")
    paths: dict[str, str] = option({}, "folders of shards of tasks, by their names (default: as their files say)")
    split: str | None = option(None, "split to score (default: test, or the task's)")
    batch_size: int = option(16, "samples per batch and process", least=1, most=65536)
    workers: int = option(1, "loader processes", least=0, most=256)
    fields: dict[str, str] | None = option(None, "where things stand in shards of others (default: as in training)")
    storage: dict[str, Any] | None = option(None, "options of fsspec's filesystem (default: as in training)")
    cache: str | None = option(None, "folder for shards that come from an address (default: as in training)")
    cache_gb: float | None = option(None, "GB of it at most (default: as in training)", above=0, most=1e6)


@dataclass
class BudgetChoice:
    kept: float | None = option(None, "visual tokens left for decoding, as a share of all", above=0, most=1)
    mean_tokens: float | None = option(
        None, "visual tokens that a layer sees, mean over layers; up to 1: as a share of all", above=0, most=10**6
    )
    kv: float | None = option(None, "visual tokens in the cache, mean over layers, as a share of all", above=0, most=1)
    decoder_flops: float | None = option(
        None, "FLOPs of decoder and decisions, as a ratio to the unpruned model's", above=0, most=1
    )
    prefill_flops: float | None = option(
        None, "FLOPs of the whole prefill, as a ratio to the unpruned model's", above=0, most=1
    )
    samples: int = option(16, "first samples of the data on which costs are measured", least=1, most=10**6)
    tolerance: float = option(
        0.02, "relative deviation that passes as met; in tokens, one token does, too", least=0, most=1
    )


@dataclass
class EvaluateConfig:
    ckpt: str | None = option(None, "run folder, published folder or hub id")
    out: str | None = option(None, "where the results go (default: the run folder)")
    limit: int | None = option(None, "score only so many samples", least=1, most=10**9)
    tasks: Any = option(
        None, "a file of tasks/, or of your own, or a list of them: what is asked, and how it is scored"
    )
    metric: Any = option(
        None,
        "a function of metrics.py, judge, or a list of them, the first one is the accuracy "
        "(default: exact_match, or the task's)",
    )
    judge: JudgeOptions | None = option(None, "server for the metric `judge`")
    max_new_tokens: int | None = option(
        None, "tokens per answer at most (default: 64, or the task's)", least=1, most=32768
    )
    methods: list[str] = option([], "pruning methods, files of pruners/ (default: the checkpoint's own)")
    options: dict[str, Any] = option({}, "options of each method: options.fastv.layer=3")
    controls: list[str] = option(list(CONTROLS), f"methods beside the pruner, of {(*CONTROLS, 'none+')}")
    samples: int = option(1, "answers of the pruner per sample, k", least=1, most=4096)
    temperature: float = option(0.0, "of the pruner's answers; 0 is greedy", least=0, most=100)
    sample_keep: bool = option(False, "draw the pruner's keep masks from its gate instead of by threshold")
    bootstrap: int = option(1000, "resamplings behind the 95% intervals; 0: no intervals", least=0, most=10**6)
    seed: int = option(0, "of what is drawn", least=0, most=SEEDS)
    device: str = option("auto", "auto, cpu, cuda", form=(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu or cuda"))
    pictures: int = option(8, "samples drawn into kept.png and kept/<method>.png", least=0, most=1024)
    resume: bool = option(False, "go on with the evaluation in `out`; where there is none, begin", role=START)
    overwrite: bool = option(
        False, "replace the evaluation in `out` (with resume: where it is another one)", role=START
    )
    budget: BudgetChoice = option(BudgetChoice)
    pruner: PrunerChoice = option(PrunerChoice)
    backbone: BackboneChoice = option(BackboneChoice)
    data: DataChoice = option(DataChoice)

    @property
    def draws(self) -> bool:
        """Whether anything about the pruner's answers is random."""
        return self.temperature > 0 or self.sample_keep

    @property
    def metrics(self) -> list[str]:
        """Those that are given, or what they are without tasks."""
        if self.metric is None:
            return [] if self.task_names else ["exact_match"]
        return [self.metric] if isinstance(self.metric, str) else self.metric

    @property
    def task_names(self) -> list[str]:
        return [self.tasks] if isinstance(self.tasks, str) else [] if self.tasks is None else self.tasks

    @property
    def place(self) -> Path:
        """Where the results go."""
        run = self.ckpt is not None and (Path(self.ckpt) / "config.yaml").is_file()
        return Path(self.out or (self.ckpt if run else "runs/evaluate"))


@config.entry(EvaluateConfig)
def main(cfg: EvaluateConfig) -> None:
    run(cfg)


def run(cfg: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluate, print the table, write the files; the rows of scores.json (in the first process)."""
    check(cfg)
    with together() as processes:
        return evaluate(cfg, processes)


def evaluate(cfg: EvaluateConfig, processes: Processes) -> list[dict[str, Any]]:
    saved = checkpoint_config(cfg)
    plan = planned(cfg, saved)
    require_device(cfg.device)
    asked = asked_tasks(cfg, saved.data.path)
    datasets = {name: opened(name, task, cfg.limit, saved.data) for name, task in asked.items()}
    with Folder(cfg.place, describe(cfg, saved, plan, asked) if processes.first else {}) as folder:
        processes.agree(folder.claim)
        # Before it has begun, what is there is another one's.
        with config.advising(lambda: f"go on with: {config.command('resume=true')}" if folder.streams else ""):
            return answered(cfg, saved, plan, asked, datasets, folder, processes)


def answered(
    cfg: EvaluateConfig,
    saved: TrainConfig,
    plan: Mapping[str, Any],
    asked: Mapping[str, Task],
    datasets: Mapping[str, ShardDataset],
    folder: Folder,
    processes: Processes,
) -> list[dict[str, Any]]:
    """All methods on all samples of all tasks, batch by batch; the rows, in the first process."""
    from glimpseprune.data.collate import Collator

    earlier = processes.agree(lambda: folder.earlier(resume=cfg.resume, overwrite=cfg.overwrite, draws=cfg.samples))
    require_fit(cfg, saved, plan)
    processes.agree(lambda: folder.is_done or judging.require(cfg.judge, asked))
    model = load_model(cfg, saved, plan, processes)
    collate = Collator(model.backbone)
    base = base_of(saved, model)
    trials = {}
    for name, task in asked.items():  # of all before the first, lest a budget that cannot be met ends the last
        at = (datasets[name], tasks.asking(task, collate))
        methods, settings = chosen(cfg, saved, plan, model, base, *at, earlier, processes, name)
        folder.description.setdefault("settings", {}).update(settings)
        trials[name] = Trial(name, task, methods, *at)
    records, panels = list(earlier.records), {}
    for trial in trials.values():
        for new in trial.run(cfg, earlier.of(trial.name), folder, processes):
            records += new
        panels |= {trial.picture(name): drawn for name, drawn in trial.panels.items()}
    return finish(cfg, folder, trials, records, panels) if processes.first else []


@dataclass
class Trial:
    """One task of an evaluation, or the one of an evaluation without any, which has no name."""

    name: str
    task: Task
    methods: list[Method]
    dataset: ShardDataset
    collate: Callable

    def run(
        self, cfg: EvaluateConfig, earlier: Earlier, folder: Folder, processes: Processes
    ) -> Iterator[list[Record]]:
        """Answer what was not answered before; the new records, batch by batch, in the first process."""
        from rich.progress import track

        from glimpseprune.data.stream import PADDING, ShardLoader

        loader = ShardLoader(
            self.dataset,
            self.collate,
            cfg.data.batch_size,
            workers=cfg.data.workers,
            rank=processes.rank,
            world=processes.world,
        )
        metrics = {name: metric_of(name) for name in self.task.metrics}
        asked = replace(cfg, max_new_tokens=self.task.max_new_tokens)
        evaluation = Evaluation(asked, self.methods, metrics, earlier, self.name)
        self.panels, self.skipped = evaluation.panels, 0
        drawn = {method.name: cfg.samples for method in self.methods if method.listed and cfg.draws}
        names = [method.name for method in self.methods]
        self.scores = Scores(self.task.metrics, drawn, cfg.bootstrap, cfg.seed, names)
        self.scores.add(earlier.records, earlier.timings)
        saying = f"evaluating {self.name}".strip()
        todo = [] if self.is_answered(earlier) else loader
        for inputs in track(todo, description=saying, total=len(todo), disable=not processes.first):
            damaged = sum(sample.stands_in not in ("", PADDING) for sample in inputs.samples)
            new = evaluation.batch(inputs)
            if processes.first:
                folder.draw(evaluation.new_panels())
            for records, timings, more in processes.gather((*new, damaged)):
                folder.add(records, timings)
                self.scores.add(records, timings)
                self.skipped += more
                yield records
        loader.close()

    def is_answered(self, earlier: Earlier) -> bool:
        """Whether all methods have answered all samples before, so that none has to be read again."""
        keys: dict[str, set[str]] = {method.name: set() for method in self.methods}
        for record in earlier.records:
            keys[record["method"]].add(record["key"])
        return all(len(answered) == len(self.dataset) for answered in keys.values())

    def picture(self, method: str) -> str:
        """The name of a method's picture."""
        return f"{self.name}-{method}" if self.name else method

    def rows(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Those of scores.json, and the summary."""
        rows = self.scores.rows()
        summary = self.scores.summary(rows)
        rows += self.scores.averages(rows, self.task.groups)
        return ([{"task": self.name, **row} for row in rows] if self.name else rows), summary

    def say_left_out(self) -> None:
        """What has no row, and why."""
        of = f"{self.name}: " * bool(self.name)
        for name, (some, all_) in self.scores.left_out().items():
            print(f"{of}{name}: no row, for only {some} of {all_} samples have boxes")
        for group, kinds in self.scores.lacking(self.task.groups).items():
            print(f"{of}no row of the {group}, for there is no question of {', '.join(kinds)}")


def finish(
    cfg: EvaluateConfig,
    folder: Folder,
    trials: Mapping[str, Trial],
    records: list[Record],
    panels: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Have a judge speak where there is one, write the rows and print them."""
    told = judging.judge(records, {name: trial.task for name, trial in trials.items()}, cfg.judge, folder.out)
    rows, summaries = [], {}
    for name, trial in trials.items():
        own, summaries[name] = trial.rows()
        rows += own
    summary = summaries[""] if "" in summaries else {"tasks": summaries} if any(summaries.values()) else None
    pictures = {name: png(list(drawn.values())) for name, drawn in panels.items() if drawn}
    folder.finish(rows, summary, pictures, records if told.new else None)
    report.print_table(rows, sum(trial.skipped for trial in trials.values()))
    for trial in trials.values():
        trial.say_left_out()
    for line in (told.said, report.say_cut(rows), report.say_summary(summary)):
        if line:
            print(line)
    print(f"scores.json, predictions.jsonl and kept.png are in {folder.out}")
    if folder.aside is not None:
        print(f"the evaluation that was there is kept in {folder.aside}")
    print(f"tables, plot and a page of them: python -m src.report {folder.out}")
    return rows


# ------------------------------------------------------------------------------------------------------ what was asked


def check(cfg: EvaluateConfig) -> None:
    """Raises UserError where options are out of their range or contradict each other."""
    config.check(cfg)
    choices = (*CONTROLS, "none+")
    if wrong := [name for name in cfg.controls if name not in choices]:
        raise UserError(f"controls={wrong}: choose from {', '.join(choices)}")
    if cfg.samples > 1 and not cfg.draws:
        raise UserError(f"samples={cfg.samples} would all be alike: give temperature=1, or sample_keep=true, or both")
    given = cfg.metrics
    if not (isinstance(given, list) and (given or cfg.task_names) and all(isinstance(name, str) for name in given)):
        raise UserError(f"metric={cfg.metric}: give the name of a metric, or a list of names")
    for name in given:
        metric_of(name)
    check_tasks(cfg)
    check_methods(cfg)
    check_budget(cfg.budget)


def check_tasks(cfg: EvaluateConfig) -> None:
    """Raises UserError where it is not clear what is asked, or who scores it."""
    if not (isinstance(cfg.task_names, list) and all(isinstance(name, str) for name in cfg.task_names)):
        raise UserError(f"tasks={cfg.tasks}: give the name of a task, or a list of names")
    named = [tasks.label(name) for name in cfg.task_names]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UserError(f"tasks: {twice[0]} is there twice")
    if unknown := [name for name in cfg.data.paths if name not in named]:
        raise UserError(f"data.paths.{unknown[0]}: the tasks are {', '.join(named) or 'none, give data.path'}")
    if len(named) > 1 and cfg.data.path is not None:
        raise UserError(f"data.path: of several tasks give data.paths.{named[0]}=<folder> and so on")
    for name, task in asked_tasks(cfg, "").items():
        if JUDGE in task.metrics and cfg.judge is None:
            said = f"the task {name} is scored by a judge" if name else "metric=judge needs one"
            raise UserError(f"{said}: give judge.base_url=<OpenAI-compatible server> and judge.model=<its name there>")


def asked_tasks(cfg: EvaluateConfig, path: str) -> dict[str, Task]:
    """What is asked for by the names of its tasks, with what ``cfg`` says itself; without tasks the data in ``path``,
    under no name."""
    if not cfg.task_names:
        return {
            "": Task(
                path, cfg.data.split or "test", metrics=tuple(cfg.metrics), max_new_tokens=cfg.max_new_tokens or 64
            )
        }
    found = {}
    for given in cfg.task_names:
        name, task = tasks.label(given), tasks.find(given)
        found[name] = replace(
            task,
            data=cfg.data.paths.get(name) or cfg.data.path or task.data,
            split=cfg.data.split or task.split,
            metrics=tuple(cfg.metrics) or task.metrics,
            max_new_tokens=cfg.max_new_tokens or task.max_new_tokens,
        )
    return found


def metric_of(name: str) -> Callable[..., float] | None:
    """None of a judge, who is asked later; raises UserError where there is no such metric."""
    return None if name == JUDGE else lookup.function("glimpseprune.metrics", name, "prediction")


def opened(name: str, task: Task, limit: int | None, data: DataOptions) -> ShardDataset:
    """The samples of a task, from where and as ``data`` says.

    Raises:
        UserError: as :func:`require_data`, or its metrics are not for such answers.
    """
    from glimpseprune.data.stream import ShardDataset, Store

    require_data(name, task)
    dataset = ShardDataset(task.data, task.split, limit=limit, store=Store.of(data))
    for metric in filter(None, map(metric_of, task.metrics)):
        answers = dataset[0].answers
        try:
            metric(answers[0], answers)
        except UserError as error:
            raise UserError(f"{task.data}, split {task.split}: {error}") from None
    return dataset


def require_data(name: str, task: Task) -> None:
    """Raises UserError where there are no data of a task; it says what makes them."""
    from glimpseprune.data.remote import is_remote

    if name and not is_remote(task.data) and not Path(task.data).exists():
        raise UserError(
            f"the data of the task {name} are not in {task.data}: make them ({task.command}), "
            f"or give data.paths.{name}=<folder of shards>"
        )


def check_methods(cfg: EvaluateConfig) -> None:
    """Raises UserError where it is not clear which methods run on what."""
    if cfg.ckpt is None and (cfg.backbone.path is None or not (cfg.methods or cfg.pruner.name)):
        raise UserError(
            "give ckpt=<run folder or published pruner>, or backbone.path=<folder or hub id> and methods=[...] "
            "that need no weights"
        )
    if cfg.ckpt is None and cfg.data.path is None and not cfg.tasks:
        raise UserError("give data.path=<folder of shards>: without a checkpoint nothing else names it")
    if cfg.methods and (cfg.pruner.name or cfg.pruner.options):
        raise UserError("methods and pruner say the same thing: give methods=[...] and options.<method>.<key>=...")
    if cfg.options and cfg.pruner.options:
        raise UserError("options and pruner.options say the same thing: give options.<method>.<key>=...")
    if twice := sorted({name for name in cfg.controls if cfg.controls.count(name) > 1}):
        raise UserError(f"controls: {twice[0]} is there twice")
    if twice := sorted({name for name in cfg.methods if cfg.methods.count(name) > 1}):
        raise UserError(f"methods: {twice[0]} is there twice: a row of the table is one method with one set of options")
    if unknown := [name for name in cfg.options if cfg.methods and name not in cfg.methods]:
        raise UserError(f"options.{unknown[0]}: methods={cfg.methods} has no such method")


def check_budget(budget: BudgetChoice) -> None:
    """Raises UserError where there is more than one budget."""
    given = [name for name in BUDGETS if getattr(budget, name) is not None]
    if len(given) > 1:
        raise UserError(f"budget: {' and '.join(given)} are given: a method has one knob, so give one of them")


def checkpoint_config(cfg: Any) -> TrainConfig:
    """The configuration of ``cfg.ckpt`` (a bare one without) with what ``cfg.backbone`` (a :class:`BackboneChoice`) and
    ``cfg.data`` replace.

    Raises:
        UserError: as ``checkpoint.read_config``; or nothing says which backbone, or (for an evaluation) which data.
    """
    from glimpseprune.checkpoint import read_config

    saved = TrainConfig(out="", pruner=PrunerOptions("none")) if cfg.ckpt is None else read_config(cfg.ckpt)
    for name, value in vars(cfg.backbone).items():
        if value is not None:
            setattr(saved.backbone, name, value)
    if saved.backbone.path == MISSING:
        raise UserError(f"'{cfg.ckpt}' does not name its backbone: give backbone.path=<folder or hub id>")
    if hasattr(cfg, "data"):
        replace_data(saved.data, cfg.data)
        if saved.data.path == MISSING and not cfg.tasks:
            raise UserError(f"'{cfg.ckpt}' does not name its data: give data.path=<folder of shards>")
    return saved


def replace_data(saved: Any, given: Any) -> None:
    """Write into the section ``data`` of a training what an evaluation says of where its data are."""
    for name in ("path", "fields", "storage", "cache", "cache_gb"):
        if (value := getattr(given, name, None)) is not None:
            setattr(saved, name, value)


def planned(cfg: EvaluateConfig, saved: TrainConfig) -> dict[str, dict[str, Any]]:
    """The methods that are asked for, each with its options; raises UserError for what a method does not have."""
    own = saved.pruner.name if cfg.ckpt is not None else None
    names = cfg.methods or [cfg.pruner.name or own]
    if unknown := [name for name in cfg.options if name not in names]:
        raise UserError(f"options.{unknown[0]}: what is evaluated is {', '.join(names)}")
    plan = {}
    for name in names:
        key = "pruner.options" if cfg.pruner.options else f"options.{name}"
        given = cfg.pruner.options or cfg.options.get(name, {})
        schema = lookup.find("glimpseprune.pruners", name).Options
        config.merge_options(schema, given, key)
        plan[name] = {**saved.pruner.options, **given} if name == own else dict(given)
        config.merge_options(schema, plan[name], key)
    return plan


def require_device(device: str) -> None:
    """Raises UserError where there is no such GPU."""
    import torch

    there = torch.cuda.device_count()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= there:
        raise UserError(f"device={device}: torch {torch.__version__} can use {there} GPUs here: give auto or cpu")


def require_fit(cfg: EvaluateConfig, saved: TrainConfig, plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError where a method does not fit the backbone, or has weights that nobody has given: before anything
    is loaded."""
    own = saved.pruner.name if cfg.ckpt is not None else None
    others = {name: dict(options) for name, options in plan.items() if name != own}
    if not others:
        return
    from glimpseprune import backbones, checkpoint

    architecture = backbones.architecture(saved.backbone.path)
    for name, options in others.items():
        with naming(name):
            outline = checkpoint.outline(architecture, saved.backbone, PrunerOptions(name, options))
        if any(True for _ in outline.pruner.parameters()):
            held = f"'{cfg.ckpt}' holds those of {own}" if own else "backbone.path has none"
            raise UserError(
                f"the method {name} has weights that are learned, and {held}: give ckpt=<run folder> of one"
            )


# ------------------------------------------------------------------------------------------------------ model, methods


def load_model(cfg: EvaluateConfig, saved: TrainConfig, plan: Mapping[str, Any], processes: Processes) -> GlimpsePrune:
    """The backbone, with the checkpoint's own pruner where there is one."""
    import torch

    from glimpseprune import checkpoint

    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if device == "cuda" and processes.world > 1:
        device = f"cuda:{processes.local % max(torch.cuda.device_count(), 1)}"
    pruner = PrunerOptions(saved.pruner.name, dict(plan.get(saved.pruner.name, saved.pruner.options)))
    return checkpoint.load(cfg.ckpt, backbone=saved.backbone, pruner=pruner, device=device)


def chosen(
    cfg: EvaluateConfig,
    saved: TrainConfig,
    plan: Mapping[str, Any],
    model: GlimpsePrune,
    base: Base,
    dataset: ShardDataset,
    collate: Callable,
    earlier: Earlier,
    processes: Processes,
    task: str = "",
) -> tuple[list[Method], dict[str, Any]]:
    """All methods on a task in the order in which they run, and what those with a budget were set to, by their names,
    those of a task behind ``<task>/``."""
    # Whether the run trained the language model, or reinforced the pruner of another run.
    plus = bool(model.backbone.restored) or (saved.stage == "grpo" and saved.init_from is not None)
    methods, of = evaluated(cfg, saved, model, plan, "+" * plus), f"{task}/" * bool(task)
    if plus and "glimpse" in cfg.controls:
        methods += first_stage(saved, base, processes.first)
    settings = processes.agree(lambda: earlier.settings or calibrated(cfg, methods, dataset, collate, of))
    settings = {name: setting for name, setting in settings.items() if name.startswith(of)}
    for method in methods:
        if of + method.name in settings:
            method.options = settings[of + method.name]["options"]
            method.pruner = rebuilt(method, method.options)
    if "oracle" in plan and all(sample.boxes is None for sample in dataset):
        raise UserError(f"methods: the oracle goes by boxes, and no sample of {dataset.shards.folder} has any")
    return line_up(cfg, model, methods, base, plus), settings


def evaluated(
    cfg: EvaluateConfig, saved: TrainConfig, model: GlimpsePrune, plan: Mapping[str, Mapping[str, Any]], suffix: str
) -> list[Method]:
    """The methods that are asked for; raises UserError where one has no gate for ``sample_keep``."""
    methods = []
    for name, options in plan.items():
        own = cfg.ckpt is not None and name == saved.pruner.name
        pruner = model.pruner if own else build(name, options, model.backbone)
        if hasattr(pruner, "mimic") and model.pruner.stops and pruner.stops == build(name, {}, model.backbone).stops:
            pruner.mimic(model.pruner.stops)  # in the checkpoint's place, unless its options say where
        if cfg.sample_keep and not hasattr(pruner, "logits"):
            raise UserError(f"sample_keep=true: the pruner '{name}' has no gate to draw from, as glimpse has")
        methods.append(Method(name + suffix, pruner, model.backbone, name, options, listed=True, budgeted=True))
    return methods


def line_up(
    cfg: EvaluateConfig, model: GlimpsePrune, methods: Sequence[Method], base: Base, plus: bool
) -> list[Method]:
    """All methods in the order in which they run: the ``methods`` that are asked for (and the first stage), controls.

    Those on the base come first, so that a batch is encoded once per backbone; ``random`` comes after the method whose
    counts it takes. The oracle has no row where no sample has boxes.

    Raises:
        UserError: ``none+`` where no language model was trained.
    """
    if "none+" in cfg.controls and not plus:
        raise UserError(f"controls: there is no none+, for '{cfg.ckpt}' is not a stage-2 run (none is the same)")
    listed = [method for method in methods if method.listed]
    pruning = sorted((m for m in listed if m.pruner.stops), key=lambda method: method.module != model.name)
    taken = {method.name for method in listed}

    def control(name: str, module: str, where: Base, **options: Any) -> list[Method]:
        if name not in cfg.controls or name in taken:
            return []
        return [Method(name, build(module, options, where[0]), where[0], module, options, where[1])]

    def behind(name: str, module: str, follows: bool = False, **options: Any) -> list[Method]:
        """A control that decides where the checkpoint's own method does, else the first one that prunes."""
        found = control(name, module, (model.backbone, nullcontext), **options) if pruning else []
        for method in found:
            method.pruner.mimic(pruning[0].pruner.stops)
            method.follows = pruning[0].name if follows else None
        return found

    return [
        *control("none", "none", base),
        *(method for method in methods if not method.listed),
        *control("none+", "none", (model.backbone, nullcontext)),
        *listed,
        *behind("random", "random", follows=True),
        *behind("oracle", "oracle"),
        *behind("zero", "random", keep=0.0, min_keep=0),
    ]


def base_of(saved: TrainConfig, model: GlimpsePrune) -> Base:
    """The language model as it was before the run, and the context in which it is that."""
    trained = model.backbone.restored
    if saved.lora is not None:
        from glimpseprune import lora

        if all(map(lora.is_adapter, trained)):
            return model.backbone, partial(lora.disabled, model.backbone.model)
    if not trained:
        return model.backbone, nullcontext

    from glimpseprune import checkpoint

    return checkpoint.load(backbone=saved.backbone, device=str(model.device)).backbone, nullcontext


def first_stage(saved: TrainConfig, base: Base, aloud: bool) -> list[Method]:
    """The pruner of the run that this one started from; none, and a line that says why, where it has gone."""
    from glimpseprune.checkpoint import load_pruner, read_config

    try:
        if saved.init_from is None:
            raise UserError("this run started from no other (init_from=null)")
        if not Path(
            resources.find(saved.init_from)
        ).is_dir():  # a folder that has gone is not to be looked for on the hub
            raise UserError(f"there is no folder '{saved.init_from}' (init_from)")
        name, pruner = load_pruner(saved.init_from, base[0])
    except UserError as error:
        if aloud:
            print(f"the stage-1 pruner is left out: {error}")
        return []
    options = read_config(saved.init_from).pruner.options
    return [Method(name, pruner, base[0], name, options, base[1], budgeted=True)]


# ------------------------------------------------------------------------------------------------------------- budgets


def calibrated(
    cfg: EvaluateConfig, methods: Sequence[Method], dataset: Sequence[Any], collate: Callable, of: str = ""
) -> dict[str, Any]:
    """What each method is set to for ``cfg.budget``, by its name behind ``of``; nothing where there is no budget."""
    given = {name: getattr(cfg.budget, name) for name in BUDGETS if getattr(cfg.budget, name) is not None}
    if not given:
        return {}
    (budget,) = (Budget(name, value, cfg.budget.tolerance) for name, value in given.items())
    samples = [dataset[index] for index in range(min(cfg.budget.samples, len(dataset)))]
    size = cfg.data.batch_size
    calibration = Calibration([collate(samples[at : at + size]) for at in range(0, len(samples), size)])
    settings = {}
    for method in methods:
        if method.budgeted and (setting := afford(method, budget, calibration)) is not None:
            settings[of + method.name] = plain(setting.plain())
            print(f"budget {budget.what}={budget.wanted:g}: {of}{method.name} {setting.said()}")
    return settings


# ----------------------------------------------------------------------------------------------------- what is written


def describe(
    cfg: EvaluateConfig, saved: TrainConfig, plan: Mapping[str, Any], tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """evaluation.yaml: ``asked``, all that decides what comes out, and ``trained``, how the checkpoint was made. Of
    several tasks what is theirs stands by their names."""
    data = {
        name: {
            "path": task.data,
            "split": task.split,
            "limit": cfg.limit,
            "manifest": digest(Path(task.data), "manifest.json"),
        }
        for name, task in tasks.items()
    }
    theirs = {
        "data": data,
        "metric": {name: list(task.metrics) for name, task in tasks.items()},
        "max_new_tokens": {name: task.max_new_tokens for name, task in tasks.items()},
    }
    if "" in tasks:
        theirs = {key: of[""] for key, of in theirs.items()}
    else:
        theirs["tasks"] = list(tasks)
        theirs["suffix"] = {name: task.suffix for name, task in tasks.items() if task.suffix}
    if any(JUDGE in task.metrics for task in tasks.values()):
        theirs["judge"] = judging.described(cfg.judge, tasks)
    budget = {name: value for name, value in vars(cfg.budget).items() if value is not None}
    asked = {
        "ckpt": cfg.ckpt,
        "weights": None if cfg.ckpt is None else digest(Path(cfg.ckpt), "trainable.safetensors", "new_modules_gp.pt"),
        "backbone": vars(saved.backbone),
        **theirs,
        "methods": list(plan),
        "options": dict(plan),
        "controls": cfg.controls,
        "samples": cfg.samples,
        "temperature": cfg.temperature,
        "sample_keep": cfg.sample_keep,
        "bootstrap": cfg.bootstrap,
        "seed": cfg.seed,
        "budget": budget if set(budget) & set(BUDGETS) else None,
    }
    return plain({"asked": asked, "settings": {}, "trained": None if cfg.ckpt is None else lineage(saved)})


def lineage(saved: TrainConfig, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """How a run was configured, and in place of ``init_from`` how that one was, as far as it is there."""
    described = yaml.safe_load(config.to_yaml(saved))
    first = saved.init_from
    if first is not None and first not in seen and (Path(first) / "config.yaml").is_file():
        earlier = config.read(TrainConfig, Path(first) / "config.yaml")
        described["init_from"] = lineage(earlier, (*seen, first))
    return described


def digest(folder: Path, *names: str) -> str | None:
    """sha256 of the first of these files that is there."""
    for path in (folder / name for name in names):
        if path.is_file():
            found = hashlib.sha256()
            with open(path, "rb") as stream:
                while block := stream.read(1 << 22):
                    found.update(block)
            return found.hexdigest()
    return None


def png(panels: Sequence[Any]) -> bytes:
    """Panels side by side."""
    from glimpseprune.pictures import grid

    found = io.BytesIO()
    grid(panels).save(found, format="png")
    return found.getvalue()
