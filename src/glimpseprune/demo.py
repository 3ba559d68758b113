"""``make demo``: prepare a small data set, train stage 1 on the shipped tiny LVLM, evaluate, and say where to look.

Runs on two CPU cores in less than ten minutes, downloads nothing. Every step is one of the ordinary commands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from glimpseprune import config
from glimpseprune.config import option


@dataclass
class DemoConfig:
    out: str = option("runs/demo", "run folder; replaced if it is there")
    data: str = option("runs/demo-data", "folder of shards; made anew")
    train_samples: int = option(3840, "training questions")
    test_samples: int = option(510, "test questions")
    overrides: list[str] = option([], "further key=value for `python -m src.train`")


@config.entry(DemoConfig)
def main(cfg: DemoConfig) -> None:
    from glimpseprune import evaluate, prepare, train

    began = time.perf_counter()
    count = f"{{train: {cfg.train_samples}, val: 126, test: {cfg.test_samples}}}"
    say(1, "prepare: real handwriting on real photographs", f"python -m src.prepare source=tags out={cfg.data}")
    prepare.main(
        ["source=tags", f"out={cfg.data}", "overwrite=true", "workers=2", "image_format=jpg", f"options.count={count}"]
    )
    say(2, "stage 1: train glimpse and VIP with KL, no boxes", f"python -m src.train conf/demo.yaml out={cfg.out}")
    train.main(["conf/demo.yaml", f"out={cfg.out}", f"data.path={cfg.data}", "overwrite=true", *cfg.overrides])
    say(3, "evaluate beside the controls", f"python -m src.evaluate ckpt={cfg.out}")
    evaluate.main([f"ckpt={cfg.out}"])
    print(f"\ndone in {(time.perf_counter() - began) / 60:.1f} min")
    print(f"curves:   tensorboard --logdir {cfg.out}/tensorboard")
    print(f"pictures: {cfg.out}/kept.png")


def say(step: int, what: str, command: str) -> None:
    from rich.console import Console

    Console().print(f"\n[bold]{step}/3 {what}[/bold]\n    [dim]{command}[/dim]")
