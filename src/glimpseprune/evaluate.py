"""Evaluate: ``python -m src.evaluate ckpt=runs/demo``.

Scores a pruner beside its controls, all on the same samples: ``none`` (unpruned), ``random`` (as many tokens as the
pruner kept, sample by sample), ``oracle`` (the ground-truth boxes) and ``zero`` (no visual token survives). Prints one
table and writes ``scores.json`` (a row per method and kind of question) and ``predictions.jsonl`` (a line per method
and sample). ``ckpt`` is a run folder, or a published pruner (folder or hub id); then ``backbone.path`` and
``data.path`` may be needed.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TextIO

from glimpseprune import config
from glimpseprune.config import MISSING, UserError, option
from glimpseprune.training.options import PrunerOptions, TrainConfig

if TYPE_CHECKING:
    from glimpseprune.checkpoint import GlimpsePrune
    from glimpseprune.cost import Vip
    from glimpseprune.types import Encoded, Inputs, Rollout

CONTROLS = ("none", "random", "oracle", "zero")


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
    controls: list[str] = option(list(CONTROLS), f"methods to run beside the pruner, of {CONTROLS}")
    device: str = option("auto", "auto, cpu, cuda")
    pictures: int = option(8, "samples drawn into kept.png")
    pruner: PrunerChoice = option(PrunerChoice)
    backbone: BackboneChoice = option(BackboneChoice)
    data: DataChoice = option(DataChoice)


@dataclass
class Tally:
    """Sums over the samples of one method and kind."""

    n: int = 0
    score: float = 0.0
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
    from glimpseprune.data.collate import Collator
    from glimpseprune.data.module import ShardDataset, ShardLoader
    from glimpseprune.lookup import function
    from glimpseprune.pictures import grid

    score = function("glimpseprune.metrics", cfg.metric, "prediction")
    if wrong := [name for name in cfg.controls if name not in CONTROLS]:
        raise UserError(f"controls={wrong}: choose from {', '.join(CONTROLS)}")
    saved = checkpoint_config(cfg)
    path = cfg.data.path or saved.data.path
    if path == MISSING:
        raise UserError(f"'{cfg.ckpt}' does not name its data: give data.path=<folder of shards>")
    dataset = ShardDataset(path, cfg.data.split, limit=cfg.limit)
    model = load_model(cfg, saved)
    loader = ShardLoader(dataset, Collator(model.backbone), cfg.data.batch_size, workers=cfg.data.workers)
    out = Path(cfg.out or (cfg.ckpt if (Path(cfg.ckpt) / "config.yaml").is_file() else "runs/evaluate"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as stream:
        evaluation = Evaluation(cfg, model, score, stream)
        evaluation.over(loader)
    rows = evaluation.rows()
    (out / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if evaluation.panels:
        grid(evaluation.panels).save(out / "kept.png")
    print_table(rows, evaluation.skipped)
    if summary := over_needing_kinds(rows):
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"over the kinds that need the tokens ({', '.join(summary['kinds'])}):")
        for name, mean in summary["methods"].items():
            print(f"  {name:8} {mean['accuracy']:6.1%} = {mean['relative']:6.1%} of unpruned, {mean['kept']:.1%} kept")
    print(f"scores.json, predictions.jsonl and kept.png are in {out}")
    return rows


def checkpoint_config(cfg: EvaluateConfig) -> TrainConfig:
    """The checkpoint's configuration with what the command line replaces."""
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
        depth = {"prune_layer": saved.pruner.options["prune_layer"]} if cfg.pruner.name != "none" else {}
        pruner = PrunerOptions(cfg.pruner.name, depth | cfg.pruner.options)
    elif cfg.pruner.options:
        pruner = PrunerOptions(saved.pruner.name, saved.pruner.options | cfg.pruner.options)
    return checkpoint.load(cfg.ckpt, backbone=saved.backbone, pruner=pruner, device=device)


class Evaluation:
    """The pruner and its controls over a stream of batches; every method sees the same encoded batch."""

    def __init__(self, cfg: EvaluateConfig, model: GlimpsePrune, score: Any, stream: TextIO):
        from glimpseprune.cost import Shapes

        self.cfg, self.model, self.score, self.stream = cfg, model, score, stream
        self.shapes = Shapes.from_config(model.backbone.model.config)
        self.tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.seconds: dict[str, list[float]] = defaultdict(list)  # time to first token per batch
        self.panels: list[Any] = []
        self.skipped = 0

    def over(self, loader: Any) -> None:
        import torch
        from rich.progress import track

        methods = None
        for inputs in track(loader, description="evaluating", total=len(loader)):
            methods = methods or self.methods(any(sample.boxes is not None for sample in inputs.samples))
            with torch.inference_mode():
                began = time.perf_counter()
                encoded = self.model.backbone.encode(inputs.prompt, self.model.pruner.vision_layers, inputs.targets)
                seconds = time.perf_counter() - began
                counts = None
                for name, pruner in methods.items():
                    if name == "random":
                        pruner.counts = counts
                    rollout = self.answer(name, pruner, inputs, encoded, seconds)
                    if pruner is self.model.pruner:
                        counts = [int(keep.sum()) for keep in rollout.keep]

    def methods(self, boxes: bool) -> dict[str, Any]:
        """Name -> pruner, in the order in which they run: ``random`` takes the counts of the pruner before it."""
        from glimpseprune import pruners

        model, controls = self.model, self.cfg.controls
        layer = {"prune_layer": model.pruner.layers[0] - 1} if model.pruner.layers else None
        specs: dict[str, tuple[str, dict[str, Any]] | None] = {}
        if "none" in controls:
            specs["none"] = ("none", {})
        specs[model.name] = None
        if layer and "random" in controls:
            specs["random"] = ("random", layer)
        if layer and boxes and "oracle" in controls:
            specs["oracle"] = ("oracle", layer)
        if layer and "zero" in controls:
            specs["zero"] = ("random", layer | {"keep": 0.0, "min_keep": 0})
        return {name: pruners.build(*spec, model.backbone) if spec else model.pruner for name, spec in specs.items()}

    def answer(self, name: str, pruner: Any, inputs: Inputs, encoded: Encoded, seconds: float) -> Rollout:
        """Prefill and decode one batch by one method; count, score and write down every sample."""
        from glimpseprune.decoder import prefill
        from glimpseprune.generate import continue_from
        from glimpseprune.pictures import panel

        backbone = self.model.backbone
        began = time.perf_counter()
        state = prefill(backbone, encoded, pruner)
        backbone.logits(state.hidden[:, -1]).argmax(-1).tolist()  # waits for the device
        self.seconds[name].append(seconds + time.perf_counter() - began)
        rollout = continue_from(backbone, encoded, state, max_new_tokens=self.cfg.max_new_tokens, do_sample=False)
        texts = backbone.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
        for row, (sample, text, keep) in enumerate(zip(inputs.samples, texts, rollout.keep)):
            if sample.stands_in:
                self.skipped += name == self.model.name
                continue
            score = float(self.score(text, sample.answers))
            tally = self.cost(pruner, encoded, row, int(keep.sum()))
            tally.score = score
            for kind in {"all", sample.kind}:
                self.tallies[name, kind].add(tally)
            record = {
                "method": name,
                "key": sample.key,
                "kind": sample.kind,
                "question": sample.question,
                "prediction": text,
                "answers": list(sample.answers),
                "score": score,
                "kept": int(keep.sum()),
                "visual": len(keep),
            }
            self.stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            if pruner is self.model.pruner and len(self.panels) < self.cfg.pictures:
                lines = [sample.question, f"{text}   (answer: {sample.answers[0]})", f"kept {keep.float().mean():.1%}"]
                self.panels.append(panel(sample, rollout.keep_maps()[row], lines))
        return rollout

    def cost(self, pruner: Any, encoded: Encoded, row: int, kept: int) -> Tally:
        """What one sample cost, without its score."""
        from glimpseprune import cost

        layers, visual = self.shapes.decoder.layers, encoded.counts[row]
        schedule = cost.stages(layers, visual, [(depth, kept) for depth in pruner.layers])
        text = int(encoded.mask[row].sum()) - visual
        account = cost.account(self.shapes, text, encoded.grids[row], schedule, cost_of_vip(pruner))
        return Tally(1, 0.0, kept / visual, kept, account.mean_tokens, account.ratio)

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
                if kind == "all":
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
    for mean in means.values():
        mean["relative"] = mean["accuracy"] / means["none"]["accuracy"]
        mean.update({key: round(value, 4) for key, value in mean.items()})
    return {"kinds": kinds, "methods": means}


def cost_of_vip(pruner: Any) -> Vip | None:
    """The predictor's shape for the cost model; None for a method without one."""
    from glimpseprune.cost import Vip

    if not hasattr(pruner, "vip"):
        return None
    options = pruner.options
    return Vip(
        options.width, options.cond_width, len(options.vision_layers), len(options.probe_layers), window=options.window
    )


def print_table(rows: list[dict[str, Any]], skipped: int = 0) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="accuracy and cost of pruned prefill" + (f" ({skipped} damaged samples skipped)" if skipped else "")
    )
    for heading in ("kind", "method"):
        table.add_column(heading)
    for heading in ("accuracy", "relative", "kept", "mean tokens", "prefill FLOPs", "first token", "samples"):
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
            "-" if relative is None else f"{relative:.1%}",
            f"{row['kept']:.1%} ({row['kept_tokens']:.1f})",
            f"{row['mean_tokens']:.1f}",
            f"{row['prefill_flops']:.3f}",
            "-" if seconds is None else f"{seconds * 1e3:.0f} ms",
            str(row["n"]),
        )
        last = row["kind"]
    Console(width=max(112, Console().width)).print(table)
