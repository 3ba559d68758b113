"""Lightning callbacks: what a run folder receives while training goes on."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from glimpseprune import checkpoint
from glimpseprune.training.options import TrainConfig


class RunFolder(L.Callback):
    """After every validation and at the end: trainable.safetensors, and a line of metrics.jsonl."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.out)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        checkpoint.save(self.folder, self.config, module.pruner)
        scores = {name: round(float(value), 6) for name, value in sorted(trainer.callback_metrics.items())}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": trainer.global_step} | scores) + "\n")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            checkpoint.save(self.folder, self.config, module.pruner)
