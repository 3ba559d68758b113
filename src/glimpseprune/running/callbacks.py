"""Lightning callbacks: what a run folder receives while training goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from glimpseprune import checkpoint, config, files, runs
from glimpseprune.config import UserError
from glimpseprune.options import GuardOptions, TrainConfig
from glimpseprune.sharded import gathered


class Begin(L.Callback):
    """When the first step is done: the run takes the folder, in which until then the one before is whole.

    ``run``: in the process that takes care of the folder; ``anew``: whether what is there is another run.
    """

    def __init__(self, cfg: Any, run: runs.Run | None, anew: bool):
        self.cfg, self.run, self.anew = cfg, run, anew
        self.first = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.first = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.run is not None and not self.run.begun and trainer.global_step > self.first:
            self.run.begin(self.anew)
            if "SLURM_JOB_ID" in os.environ:
                files.write(self.run.out / runs.JOB, os.environ["SLURM_JOB_ID"])
            config.save(self.cfg, self.run.out / runs.CONFIG)


class RunFolder(L.Callback):
    """After every validation and at the end: trainable.safetensors.

    Nothing more is written once :class:`GuardRails` has stopped the run: what is there is the last good model.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.out)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking and not collapsed(trainer):
            self.write_weights(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not collapsed(trainer):
            self.write_weights(trainer, module)

    def write_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = gathered(checkpoint.trained(module.pruner, module.backbone), wanted=trainer.is_global_zero)
        if trainer.is_global_zero:
            checkpoint.save(self.folder, self.config, weights)


class GuardRails(L.Callback):
    """Stops reinforcement that has gone wrong, before it has spoiled more than the last validation's weights.

    Gone wrong: the smoothed reward has lost the fraction ``drop`` of its best while pruning has run away (keep ratio
    below ``keep_floor``) or answers are empty. And at the start: a gate that keeps almost nothing, from which nothing
    can be learnt.
    """

    def __init__(self, options: GuardOptions):
        self.options = options
        self.means: dict[str, float] = {}
        self.best = float("-inf")
        self.reason: str | None = None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        names = {"reward": "train/reward", "keep": "train/keep_ratio/sampled", "empty": "train/completions/empty_ratio"}
        own = [float(trainer.callback_metrics[name]) for name in names.values()]
        everyone = trainer.strategy.reduce(torch.tensor(own, device=module.device), reduce_op="mean")  # stop together
        found = dict(zip(names, everyone.tolist()))
        first = not self.means
        a = self.options.smoothing
        self.means = {name: a * self.means.get(name, value) + (1 - a) * value for name, value in found.items()}
        if first and self.means["keep"] < self.options.keep_floor:
            raise UserError(
                f"the gate keeps {self.means['keep']:.2%} of the visual tokens before the first update, less than "
                f"guard.keep_floor={self.options.keep_floor}: train it first (stage=glimpse, conf/stage1.yaml)"
            )
        self.best = max(self.best, self.means["reward"])
        fallen = self.means["reward"] < self.best - self.options.drop * abs(self.best)
        if fallen and self.means["keep"] < self.options.keep_floor:
            self.reason = f"pruning ran away: {self.means['keep']:.2%} of the visual tokens are kept"
        elif fallen and self.means["empty"] > self.options.empty:
            self.reason = f"answers collapsed: {self.means['empty']:.0%} of them are empty"
        if self.reason is not None:
            trainer.should_stop = True
            rank_zero_warn(
                f"stopped at step {trainer.global_step}: {self.reason}, and the reward fell from {self.best:.3f} to "
                f"{self.means['reward']:.3f}. The weights of the last validation are kept"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means, self.best = state["means"], state["best"]


def collapsed(trainer: L.Trainer) -> bool:
    return any(isinstance(callback, GuardRails) and callback.reason for callback in trainer.callbacks)
