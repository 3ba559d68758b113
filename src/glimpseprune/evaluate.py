"""Evaluate: ``python -m src.evaluate ckpt=runs/demo``.

Scores a pruner beside its controls, all on the same samples. Prints one table and writes ``scores.json`` (a row per
method and kind of question) and ``predictions.jsonl`` (a line per method, sample and draw). ``ckpt`` is a run folder,
or a published pruner (folder or hub id); then ``backbone.path`` and ``data.path`` may be needed.

Methods of a stage-1 run: ``none`` (unpruned), the pruner by its name, ``random`` (as many tokens as the pruner kept,
sample by sample), ``oracle`` (the ground-truth boxes) and ``zero`` (no visual token survives).

A run that trained the language model, or reinforced the pruner of another run, has a ``+`` behind its name. Then
``none`` and what ``relative`` divides by is the *base*, which is the language model as it was before: without the run's
adapters, or read once more from its folder if the run tuned its own weights. ``glimpse`` is the pruner that the run
started from (``init_from``), on the base. ``random`` (at the count of ``glimpse+``), ``oracle`` and ``zero`` are run on
the trained language model, and so is ``none+``, the unpruned one, if ``controls`` names it. Adapters are not merged
here, which costs a little time to the first token; ``src.export`` merges them.

``samples=8 temperature=1`` and ``sample_keep=true`` are about the pruner alone: it answers k times, its accuracy is the
mean over the k, and ``pass_at_k`` is that of the best of them (at least one is right).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from operator import or_
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, TextIO

from glimpseprune import config
from glimpseprune.config import MISSING, UserError, option
from glimpseprune.options import PrunerOptions, TrainConfig

if TYPE_CHECKING:
    from glimpseprune.backbones import LVLM
    from glimpseprune.checkpoint import GlimpsePrune
    from glimpseprune.types import Encoded, Inputs, Prefill, Rollout, Sample

CONTROLS = ("none", "glimpse", "random", "oracle", "zero")


@dataclass
class PrunerChoice:
    name: str | None = option(None, "another pruning method than the checkpoint's")
    options: dict[str, Any] = option({}, "its options; for the checkpoint's own method they are merged over the saved")


@dataclass
class BackboneChoice:
    path: str | None = option(None, "another folder or hub id than the checkpoint names")
    dtype: str | None = option(None, "auto, float32, bfloat16 or float16")
    attention: str | None = option(None, "sdpa, eager or flash_attention_2")


@dataclass
class DataChoice:
    path: str | None = option(None, "folder of shards (default: the one the run was trained on)")
    split: str = option("test", "split to score")
    batch_size: int = option(16, "samples per batch")
    workers: int = option(1, "loader processes")


@dataclass
class EvaluateConfig:
    ckpt: str = option(MISSING, "run folder, published folder or hub id")
    out: str | None = option(None, "where scores.json and predictions.jsonl go (default: the run folder)")
    limit: int | None = option(None, "score only so many samples")
    metric: str = option("exact_match", "a function of metrics.py")
    max_new_tokens: int = option(64, "tokens per answer at most")
    controls: list[str] = option(list(CONTROLS), f"methods beside the pruner, of {(*CONTROLS, 'none+')}")
    samples: int = option(1, "answers of the pruner per sample, k")
    temperature: float = option(0.0, "of the pruner's answers; 0 is greedy")
    sample_keep: bool = option(False, "draw the pruner's keep masks from its gate instead of by threshold")
    seed: int = option(0, "of what is drawn")
    device: str = option("auto", "auto, cpu, cuda")
    pictures: int = option(8, "samples drawn into kept.png")
    pruner: PrunerChoice = option(PrunerChoice)
    backbone: BackboneChoice = option(BackboneChoice)
    data: DataChoice = option(DataChoice)

    @property
    def draws(self) -> bool:
        """Whether anything about the pruner's answers is random."""
        return self.temperature > 0 or self.sample_keep


@dataclass
class Method:
    """A row of the table: a pruner on a language model, which is ``backbone`` within ``context``."""

    name: str
    pruner: Any
    backbone: LVLM
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Tally:
    """Sums over the samples of one method and kind."""

    n: int = 0
    score: float = 0.0
    best: float = 0.0  # of the k answers to a sample
    kept: float = 0.0
    kept_tokens: float = 0.0
    mean_tokens: float = 0.0
    flops: float = 0.0

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@config.entry(EvaluateConfig)
def main(cfg: EvaluateConfig) -> None:
    run(cfg)


def run(cfg: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluate, print the table, write the files; the rows of scores.json."""
    check(cfg)

    import torch

    from glimpseprune.data.collate import Collator
    from glimpseprune.data.stream import ShardDataset, ShardLoader
    from glimpseprune.lookup import function
    from glimpseprune.pictures import grid

    metric = function("glimpseprune.metrics", cfg.metric, "prediction")
    saved = checkpoint_config(cfg)
    path = cfg.data.path or saved.data.path
    if path == MISSING:
        raise UserError(f"'{cfg.ckpt}' does not name its data: give data.path=<folder of shards>")
    dataset = ShardDataset(path, cfg.data.split, limit=cfg.limit)
    model = load_model(cfg, saved)
    methods, own = line_up(cfg, saved, model)
    loader = ShardLoader(dataset, Collator(model.backbone), cfg.data.batch_size, workers=cfg.data.workers)
    out = Path(cfg.out or (cfg.ckpt if (Path(cfg.ckpt) / "config.yaml").is_file() else "runs/evaluate"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as stream:
        evaluation = Evaluation(cfg, methods, own, metric, stream)
        evaluation.over(loader)
    rows = evaluation.rows()
    (out / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if evaluation.panels:
        grid(evaluation.panels).save(out / "kept.png")
    print_table(rows, evaluation.skipped)
    if summary := over_needing_kinds(rows):
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"over the kinds that need the tokens ({', '.join(summary['kinds'])}):")
        for name, scores in summary["methods"].items():
            print(
                f"  {name:8} {scores['accuracy']:6.1%} = {scores['relative']:6.1%} of unpruned, "
                f"{scores['kept']:.1%} kept"
            )
    print(f"scores.json, predictions.jsonl and kept.png are in {out}")
    return rows


def check(cfg: EvaluateConfig) -> None:
    """Raises UserError where options contradict each other."""
    choices = (*CONTROLS, "none+")
    if wrong := [name for name in cfg.controls if name not in choices]:
        raise UserError(f"controls={wrong}: choose from {', '.join(choices)}")
    if cfg.samples < 1 or cfg.temperature < 0:
        raise UserError(f"samples={cfg.samples} temperature={cfg.temperature}: give at least 1 and at least 0")
    if cfg.samples > 1 and not cfg.draws:
        raise UserError(f"samples={cfg.samples} would all be alike: give temperature=1, or sample_keep=true, or both")


def checkpoint_config(cfg: Any) -> TrainConfig:
    """The configuration of ``cfg.ckpt`` with what ``cfg.backbone`` (a :class:`BackboneChoice`) replaces."""
    from glimpseprune.checkpoint import read_config

    saved = read_config(cfg.ckpt)
    for name, value in vars(cfg.backbone).items():
        if value is not None:
            setattr(saved.backbone, name, value)
    return saved


def load_model(cfg: EvaluateConfig, saved: TrainConfig) -> GlimpsePrune:
    """The checkpoint's backbone with its own pruner, or with the one that the command line asks for."""
    import torch

    from glimpseprune import checkpoint

    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    pruner = None
    if cfg.pruner.name not in (None, saved.pruner.name):
        shared = () if cfg.pruner.name == "none" else ("prune_layer",)
        depth = {name: saved.pruner.options[name] for name in shared if name in saved.pruner.options}
        pruner = PrunerOptions(cfg.pruner.name, depth | cfg.pruner.options)
    elif cfg.pruner.options:
        pruner = PrunerOptions(saved.pruner.name, saved.pruner.options | cfg.pruner.options)
    model = checkpoint.load(cfg.ckpt, backbone=saved.backbone, pruner=pruner, device=device)
    if cfg.sample_keep and not hasattr(model.pruner, "logits"):
        raise UserError(f"sample_keep=true: the pruner '{model.name}' has no gate to draw from, as glimpse has")
    return model


def line_up(cfg: EvaluateConfig, saved: TrainConfig, model: GlimpsePrune) -> tuple[list[Method], Method]:
    """The methods in the order in which they run, and the one that is evaluated.

    Those on the base come first, so that a batch is encoded once per backbone; ``random`` comes after the pruner whose
    counts it takes.

    Raises:
        UserError: as ``checkpoint.load`` on the base; or ``none+`` where no language model was trained.
    """
    from glimpseprune import pruners

    plus = bool(model.backbone.restored) or (saved.stage == "grpo" and saved.init_from is not None)
    if "none+" in cfg.controls and not plus:
        raise UserError(f"controls: there is no none+, for '{cfg.ckpt}' is not a stage-2 run (none is the same)")
    base, context = base_of(saved, model)
    own = Method(model.name + "+" * plus, model.pruner, model.backbone)
    methods = []

    def control(name: str, pruner: str, options: dict[str, Any], where: LVLM, within: Any = nullcontext) -> None:
        if name in cfg.controls and name != own.name:
            methods.append(Method(name, pruners.build(pruner, options, where), where, within))

    control("none", "none", {}, base, context)
    if plus and "glimpse" in cfg.controls and (first := first_stage(saved, base)):
        methods.append(Method(*first, base, context))
    control("none+", "none", {}, model.backbone)
    methods.append(own)
    if model.pruner.stops:
        layer = {"prune_layer": model.pruner.stops[0].depth - 1}
        control("random", "random", layer, model.backbone)
        control("oracle", "oracle", layer, model.backbone)
        control("zero", "random", layer | {"keep": 0.0, "min_keep": 0}, model.backbone)
    return methods, own


def base_of(saved: TrainConfig, model: GlimpsePrune) -> tuple[LVLM, Callable[[], AbstractContextManager]]:
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


def first_stage(saved: TrainConfig, base: LVLM) -> tuple[str, Any] | None:
    """Name and pruner of the run that this one started from; None, and a line that says why, where it has gone."""
    from glimpseprune.checkpoint import load_pruner

    try:
        if saved.init_from is None:
            raise UserError("this run started from no other (init_from=null)")
        if not Path(saved.init_from).is_dir():  # a folder that has gone is not to be looked for on the hub
            raise UserError(f"there is no folder '{saved.init_from}' (init_from)")
        return load_pruner(saved.init_from, base)
    except UserError as error:
        print(f"the stage-1 pruner is left out: {error}")
        return None


class Evaluation:
    """Methods over a stream of batches; all that share a backbone see the same encoded batch."""

    def __init__(self, cfg: EvaluateConfig, methods: list[Method], own: Method, metric: Any, stream: TextIO):
        self.cfg, self.methods, self.own, self.metric, self.stream = cfg, methods, own, metric, stream
        self.shapes = own.backbone.shapes
        self.tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.seconds: dict[str, list[float]] = defaultdict(list)  # time to first token per batch
        self.panels: list[Any] = []
        self.skipped = 0

    def over(self, loader: Any) -> None:
        import torch
        from rich.progress import track

        for number, inputs in enumerate(track(loader, description="evaluating", total=len(loader))):
            if number == 0 and all(sample.boxes is None for sample in inputs.samples):
                self.methods = [method for method in self.methods if method is self.own or method.name != "oracle"]
            with torch.inference_mode():
                self.batch(inputs)

    def batch(self, inputs: Inputs) -> None:
        """Answer one batch by every method."""
        counts = None
        for backbone, group in groupby(self.methods, key=lambda method: method.backbone):
            methods = list(group)
            needs = reduce(or_, (method.pruner.needs for method in methods))
            began = time.perf_counter()
            encoded = backbone.encode(inputs.prompt, needs, inputs.targets)
            seconds = time.perf_counter() - began
            for method in methods:
                if method.name == "random" and method is not self.own:
                    method.pruner.counts = [counts]
                with method.context():
                    rollout = self.answer(method, encoded, seconds)
                times = len(rollout.keep) // len(inputs.samples)
                kept = [int(keep.sum()) for keep in rollout.keep]
                if method is self.own:
                    counts = [round(mean(kept[row : row + times])) for row in range(0, len(kept), times)]
                self.account(method, inputs, encoded, rollout, kept)

    def answer(self, method: Method, encoded: Encoded, seconds: float) -> Rollout:
        """Prefill and decode a batch; the rows of one prompt are next to each other, k of them for the pruner."""
        from glimpseprune.decoder import prefill
        from glimpseprune.generate import continue_from

        cfg, backbone, own = self.cfg, method.backbone, method is self.own
        options: dict[str, Any] = {"do_sample": False}
        if own and cfg.temperature:
            options = {"do_sample": True, "temperature": cfg.temperature, "top_k": 0, "top_p": 1.0}
        if own and cfg.sample_keep:
            encoded, state = self.draw(encoded)
        else:
            options["num_return_sequences"] = cfg.samples if own else 1
            began = time.perf_counter()
            state = prefill(backbone, encoded, method.pruner)
            backbone.logits(state.hidden[:, -1]).argmax(-1).tolist()  # waits for the device
            self.seconds[method.name].append(seconds + time.perf_counter() - began)
        return continue_from(backbone, encoded, state, max_new_tokens=cfg.max_new_tokens, **options)

    def draw(self, encoded: Encoded) -> tuple[Encoded, Prefill]:
        """Every prompt k times, each with a keep mask of its own, which is drawn from the gate: [B k, S]."""
        import torch

        from glimpseprune.decoder import View, advance, approach, cut, start
        from glimpseprune.rollout import sample_keep

        backbone, pruner = self.own.backbone, self.own.pruner
        state = approach(backbone, start(encoded), pruner)
        index = torch.arange(len(encoded.mask), device=backbone.device).repeat_interleave(self.cfg.samples)  # [B k]
        keep, _ = sample_keep(state, pruner.logits(View(state, encoded, backbone)), index)
        state = cut(state, keep, pruner.stops[0], index=index)
        return encoded, advance(backbone, encoded, state, pruner)

    def scores(self, texts: Sequence[str], samples: Sequence[Sample]) -> list[float]:
        """How right each answer to its sample is, 0 to 1. A judge, who wants many at once, belongs here."""
        return [float(self.metric(text, sample.answers)) for text, sample in zip(texts, samples)]

    def account(self, method: Method, inputs: Inputs, encoded: Encoded, rollout: Rollout, kept: list[int]) -> None:
        """Score, count and write down every sample of a batch; each row of the rollout ``kept`` so many tokens."""
        from glimpseprune.pictures import panel

        own, times = method is self.own, len(kept) // len(inputs.samples)
        texts = method.backbone.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
        scores = self.scores(texts, [sample for sample in inputs.samples for _ in range(times)])
        for row, sample in enumerate(inputs.samples):
            if sample.stands_in:
                self.skipped += own
                continue
            draws = range(row * times, (row + 1) * times)
            tally = self.cost(encoded, row, rollout, draws)
            tally.score, tally.best = mean(scores[draw] for draw in draws), max(scores[draw] for draw in draws)
            for kind in {"all", sample.kind}:
                self.tallies[method.name, kind].add(tally)
            for draw in draws:
                record = {
                    "method": method.name,
                    "key": sample.key,
                    "kind": sample.kind,
                    "question": sample.question,
                    "prediction": texts[draw],
                    "answers": list(sample.answers),
                    "score": scores[draw],
                    "kept": kept[draw],
                    "visual": encoded.counts[row],
                }
                self.stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            if own and len(self.panels) < self.cfg.pictures:
                text, ratio = texts[draws[0]], kept[draws[0]] / encoded.counts[row]
                lines = [sample.question, f"{text}   (answer: {sample.answers[0]})", f"kept {ratio:.1%}"]
                self.panels.append(panel(sample, rollout.keep_maps()[draws[0]], lines))

    def cost(self, encoded: Encoded, row: int, rollout: Rollout, draws: Sequence[int]) -> Tally:
        """What one sample cost, without its score: the mean over its draws, rows of the rollout."""
        from glimpseprune import cost

        layouts, visual = encoded.layouts[row], encoded.counts[row]
        text = int(encoded.mask[row].sum()) - visual
        trace = rollout.prefill.trace
        accounts = [cost.account(self.shapes, text, layouts, cost.steps_of(trace, draw)) for draw in draws]
        return Tally(
            n=1,
            kept=mean(account.kept for account in accounts) / visual,
            kept_tokens=mean(account.kept for account in accounts),
            mean_tokens=mean(account.mean_tokens for account in accounts),
            flops=mean(account.ratio for account in accounts),
        )

    def rows(self) -> list[dict[str, Any]]:
        """scores.json: one row per method and kind of question, ``all`` first."""
        kinds = sorted({kind for _, kind in self.tallies}, key=lambda kind: (kind != "all", kind))
        rows = []
        for kind in kinds:
            base = self.tallies.get(("none", kind))
            for method in dict.fromkeys(method for method, _ in self.tallies):
                tally = self.tallies.get((method, kind))
                if tally is None:
                    continue
                row = {
                    "method": method,
                    "kind": kind,
                    "accuracy": round(tally.score / tally.n, 4),
                    "relative": round(tally.score / base.score, 4) if base and base.score else None,
                    "kept": round(tally.kept / tally.n, 4),
                    "kept_tokens": round(tally.kept_tokens / tally.n, 2),
                    "mean_tokens": round(tally.mean_tokens / tally.n, 2),
                    "prefill_flops": round(tally.flops / tally.n, 4),
                    "n": tally.n,
                }
                if method == self.own.name and self.cfg.draws:
                    row |= {"pass_at_k": round(tally.best / tally.n, 4), "k": self.cfg.samples}
                if kind == "all" and self.seconds[method]:
                    row["time_to_first_token"] = round(median(self.seconds[method]), 4)
                rows.append(row)
        return rows


def over_needing_kinds(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Each method over the kinds whose accuracy without any visual token after K is below a third of the full one.

    The other kinds say nothing about pruning: the text had read their answer before. None where there is no such kind,
    or no ``none`` and ``zero`` to tell by.
    """
    by = {(row["method"], row["kind"]): row for row in rows if row["kind"] != "all"}
    kinds = [
        kind
        for method, kind in by
        if method == "none" and ("zero", kind) in by and 3 * by["zero", kind]["accuracy"] < by["none", kind]["accuracy"]
    ]
    if not kinds:
        return None
    means: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(method for method, _ in by):
        chosen = [by[method, kind] for kind in kinds]
        total = sum(row["n"] for row in chosen)
        means[method] = {key: sum(row[key] * row["n"] for row in chosen) / total for key in ("accuracy", "kept")}
    for scores in means.values():
        scores["relative"] = scores["accuracy"] / means["none"]["accuracy"]
        scores.update({key: round(value, 4) for key, value in scores.items()})
    return {"kinds": kinds, "methods": means}


def print_table(rows: list[dict[str, Any]], skipped: int = 0) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="accuracy and cost of pruned prefill" + (f" ({skipped} damaged samples skipped)" if skipped else "")
    )
    for heading in ("kind", "method"):
        table.add_column(heading)
    passed = [f"pass@{k}" for k in {row["k"] for row in rows if "k" in row}]
    for heading in ("accuracy", *passed, "relative", "kept", "mean tokens", "prefill FLOPs", "first token", "samples"):
        table.add_column(heading, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["kind"]):
            table.add_section()
        relative, seconds = row["relative"], row.get("time_to_first_token")
        table.add_row(
            row["kind"] if row["kind"] != last else "",
            row["method"],
            f"{row['accuracy']:.1%}",
            *(f"{row['pass_at_k']:.1%}" if "k" in row else "" for _ in passed),
            "-" if relative is None else f"{relative:.1%}",
            f"{row['kept']:.1%} ({row['kept_tokens']:.1f})",
            f"{row['mean_tokens']:.1f}",
            f"{row['prefill_flops']:.3f}",
            "-" if seconds is None else f"{seconds * 1e3:.0f} ms",
            str(row["n"]),
        )
        last = row["kind"]
    Console(width=max(128, Console().width)).print(table)
