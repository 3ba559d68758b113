"""Prepare a small data set, train stage 1 on the shipped tiny LVLM, evaluate, and say where to look.

``python -m src.demo`` is ``make demo``. ``python -m src.demo plus=true`` (``make demo-plus``) goes on from there:
GlimpsePrune+ on a harder task (larger images, more distractors, worn handwriting), where the base is weak. Each runs on
two CPU cores in less than ten minutes and downloads nothing. ``early=true`` trains a private look on the same
questions, too, about as long again, and ends with both in one table. Every step is one of the ordinary commands,
shown as it is run. What is done already is not done again: a demo that was interrupted goes on, a finished one shows
its table.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from glimpseprune import config, files, results, runs, tasks
from glimpseprune.config import START, UserError, option
from glimpseprune.options import TrainConfig

IMAGES = ["image_format=jpg", "workers=2"]
HARD = ["options.size=476", "options.wear=0.1", "options.min_tags=12", "options.kinds=[number,pair]"]
HARD += ["options.questions=2"]
TASK = "tags"
"""What is learned and evaluated, a file of tasks/."""


@dataclass
class DemoConfig:
    plus: bool = option(False, "stage 2 on the harder task, from the stage-1 run (which is trained first if need be)")
    early: bool = option(False, "a private look (conf/early.yaml) beside the glimpse, in <out>-early: as long again")
    out: str = option("runs/demo", "stage-1 run folder")
    data: str = option("runs/demo-data", "folder of shards")
    overwrite: bool = option(False, "do again what is done already (plus=true: only stage 2)", role=START)
    train_samples: int = option(3840, "training questions", least=1, most=10**8)
    test_samples: int = option(510, "test questions", least=1, most=10**8)
    overrides: list[str] = option([], "further key=value for `python -m src.train`")


@config.entry(DemoConfig)
def main(cfg: DemoConfig) -> None:
    began = time.perf_counter()
    recipe = "conf/demo_plus.yaml" if cfg.plus else "conf/demo.yaml"
    if cfg.plus and cfg.early:
        raise UserError("give one of plus=true and early=true")
    config.load(TrainConfig, [recipe, "backbone.path=x", *cfg.overrides])  # what is wrong there is said at once
    files.require_folder(cfg.data)
    if not cfg.plus:
        out = stage1(cfg, cfg.overwrite)
        if cfg.early:
            beside(cfg, out)
    else:
        if not (Path(cfg.out) / "trainable.safetensors").is_file():
            stage1(cfg, overwrite=False)
            began = time.perf_counter()
        out = stage2(cfg)
    print(f"\ndone in {(time.perf_counter() - began) / 60:.1f} min")
    print(f"curves:   tensorboard --logdir {out}/tensorboard")
    print(f"pictures: {out}/kept.png")
    if not cfg.overwrite:
        print(f"again:    make demo{'-plus' if cfg.plus else ''} ARGS=overwrite=true")


def stage1(cfg: DemoConfig, overwrite: bool) -> str:
    data = prepared(cfg.data, IMAGES, counts(cfg, cfg.train_samples), overwrite)
    title = "2/3 stage 1: train glimpse and VIP with KL, no boxes"
    trained(title, cfg.out, ["conf/demo.yaml", f"data.path={data}", *cfg.overrides], overwrite)
    step("3/3 evaluate beside the controls", "evaluate", evaluation(cfg.out, data))
    return cfg.out


def beside(cfg: DemoConfig, out: str) -> None:
    """The private look, trained and evaluated as the glimpse in ``out``, and both in one table."""
    early = f"{out}-early"
    title = "a private look: train its layer and VIP with KL, no boxes"
    trained(title, early, ["conf/early.yaml", f"data.path={cfg.data}", *cfg.overrides], cfg.overwrite)
    step("evaluate it beside the controls", "evaluate", [f"ckpt={early}", "resume=true"])
    step("both", "compare", [out, early, f"out={early}/compare"])


def stage2(cfg: DemoConfig) -> str:
    out = f"{cfg.out}-plus"
    data = prepared(f"{cfg.data}-hard", [*IMAGES, *HARD], counts(cfg, 1536), cfg.overwrite)
    args = ["conf/demo_plus.yaml", f"init_from={cfg.out}", f"data.path={data}", *cfg.overrides]
    trained("2/3 stage 2: reinforce on the pruned sequence", out, args, cfg.overwrite)
    step("3/3 evaluate: base, stage 1, stage 2", "evaluate", evaluation(out, data))
    return out


def evaluation(out: str, data: str) -> list[str]:
    """Of a run on its data as the task is evaluated; one of before there were tasks is shown as it is."""
    asked = [f"tasks=[{TASK}]", f"data.path={data}"]
    if (Path(out) / results.SCORES).is_file() and "tasks" not in results.read(out).description.get("asked", {}):
        asked = []
    return [f"ckpt={out}", *asked, "resume=true"]


def counts(cfg: DemoConfig, train: int) -> dict[str, int]:
    return {"train": train, "val": 126, "test": cfg.test_samples}


def prepared(folder: str, options: list[str], counts: dict[str, int], overwrite: bool) -> str:
    """The folder, made unless it is there.

    Raises:
        UserError: another data set is there.
    """
    manifest = Path(folder) / "manifest.json"
    if manifest.is_file() and not overwrite:
        there = {name: split["count"] for name, split in json.loads(manifest.read_text())["splits"].items()}
        if there != counts:
            raise UserError(f"other data are in {folder} ({there}, not {counts}): give overwrite=true or data=<folder>")
        say(f"1/3 the data are in {folder}")
        return folder
    number = f"options.count={{{', '.join(f'{split}: {n}' for split, n in counts.items())}}}"
    title = "1/3 prepare: real handwriting on real photographs"
    how = again(overwrite) or ["resume=true"]
    source = f"source={tasks.find(TASK).prepare['source']}"
    step(title, "prepare", [source, f"out={folder}", *options, number, *how])
    return folder


def trained(title: str, out: str, args: list[str], overwrite: bool) -> None:
    """Train, or go on with a training that has a checkpoint; one that was killed before its first begins anew."""
    there = {name for name in (runs.CONFIG, runs.WEIGHTS, runs.INDEX, runs.ASIDE) if (Path(out) / name).exists()}
    begun = runs.INDEX in there and not overwrite
    anew = overwrite or there == {runs.CONFIG}
    step(title, "train", [*args, f"out={out}", *(["resume=true"] if begun else again(anew))])


def again(overwrite: bool) -> list[str]:
    return ["overwrite=true"] if overwrite else []


def step(title: str, verb: str, args: list[str]) -> None:
    """Show a command, then run it."""
    say(title, config.as_typed(f"python -m src.{verb} {shlex.join(args)}"))
    import_module(f"glimpseprune.{verb}").main(args)


def say(title: str, command: str = "") -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{title}", style="bold")
    if command:
        console.print(f"    {command}", style="dim")
