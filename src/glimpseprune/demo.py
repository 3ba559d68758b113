"""Prepare a small data set, train stage 1 on the shipped tiny LVLM, evaluate, and say where to look.

``python -m src.demo`` is ``make demo``. ``python -m src.demo plus=true`` (``make demo-plus``) goes on from there:
GlimpsePrune+ on a harder task (larger images, more distractors, worn handwriting), where the base is weak. Each runs on
two CPU cores in less than ten minutes and downloads nothing. Every step is one of the ordinary commands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from glimpseprune import config
from glimpseprune.config import option

EASY = ["image_format=jpg", "workers=2"]
HARD = [*EASY, "options.size=476", "options.wear=0.1", "options.min_tags=12", "options.kinds=[number,pair]"]


@dataclass
class DemoConfig:
    plus: bool = option(False, "stage 2 on the harder task, from the stage-1 run (which is trained first if need be)")
    out: str = option("runs/demo", "stage-1 run folder; replaced if it is there, but kept by plus=true")
    data: str = option("runs/demo-data", "folder of shards; made anew")
    train_samples: int = option(3840, "training questions", least=1, most=10**8)
    test_samples: int = option(510, "test questions", least=1, most=10**8)
    overrides: list[str] = option([], "further key=value for `python -m src.train`")


@config.entry(DemoConfig)
def main(cfg: DemoConfig) -> None:
    began = time.perf_counter()
    if not cfg.plus:
        out = stage1(cfg)
    else:
        if not (Path(cfg.out) / "trainable.safetensors").is_file():
            stage1(cfg)
            began = time.perf_counter()
        out = stage2(cfg)
    print(f"\ndone in {(time.perf_counter() - began) / 60:.1f} min")
    print(f"curves:   tensorboard --logdir {out}/tensorboard")
    print(f"pictures: {out}/kept.png")


def stage1(cfg: DemoConfig) -> str:
    from glimpseprune import evaluate, prepare, train

    count = f"options.count={{train: {cfg.train_samples}, val: 126, test: {cfg.test_samples}}}"
    say("1/3 prepare: real handwriting on real photographs", f"python -m src.prepare source=tags out={cfg.data}")
    prepare.main(["source=tags", f"out={cfg.data}", "overwrite=true", *EASY, count])
    say("2/3 stage 1: train glimpse and VIP with KL, no boxes", f"python -m src.train conf/demo.yaml out={cfg.out}")
    train.main(["conf/demo.yaml", f"out={cfg.out}", f"data.path={cfg.data}", "overwrite=true", *cfg.overrides])
    say("3/3 evaluate beside the controls", f"python -m src.evaluate ckpt={cfg.out}")
    evaluate.main([f"ckpt={cfg.out}", "overwrite=true"])
    return cfg.out


def stage2(cfg: DemoConfig) -> str:
    from glimpseprune import evaluate, prepare, train

    out, data = f"{cfg.out}-plus", f"{cfg.data}-hard"
    count = f"options.count={{train: 1536, val: 126, test: {cfg.test_samples}}}"
    say("1/3 prepare the harder task", f"python -m src.prepare source=tags out={data} {' '.join(HARD[2:])}")
    prepare.main(["source=tags", f"out={data}", "overwrite=true", *HARD, "options.questions=2", count])
    say("2/3 stage 2: reinforce on the pruned sequence", f"python -m src.train conf/demo_plus.yaml init_from={cfg.out}")
    train.main(
        ["conf/demo_plus.yaml", f"init_from={cfg.out}", f"out={out}", f"data.path={data}", "overwrite=true"]
        + cfg.overrides
    )
    say("3/3 evaluate: base, stage 1, stage 2", f"python -m src.evaluate ckpt={out}")
    evaluate.main([f"ckpt={out}", "overwrite=true"])
    return out


def say(what: str, command: str) -> None:
    from rich.console import Console

    Console().print(f"\n[bold]{what}[/bold]\n    [dim]{config.as_typed(command)}[/dim]", highlight=False)
