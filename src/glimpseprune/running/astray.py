"""Stage 1 that has gone astray: said, and begun anew if asked.

The KL alone may lead to masks that ignore the question, a few tokens of every object (docs/method.md §5.4). The sign is
``val/mask_overlap``, how much the masks of two questions on one image have in common: it is high while next to nothing
is pruned, and stays high only then. Needs questions on one image with evidence boxes among the validation samples;
without any nothing is said. Left out: changing the loss or the data; another start is what has helped.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from glimpseprune.config import UserError
from glimpseprune.options import TrainConfig
from glimpseprune.running.logs import Journal
from glimpseprune.running.nonfinite import StopOnNonFinite
from glimpseprune.running.strategies import Zero

OVERLAP = "val/mask_overlap"


class Astray(L.Callback):
    """Looks at two validations in a row, once the whole pressure is on. Stands before what writes checkpoints: a kill
    between a validation and the restart that it calls for changes nothing.

    Raises:
        UserError: restarts where the predictor is not all that trains, or where its weights are split.
    """

    def __init__(self, config: TrainConfig, strategy: Any = None):
        self.config, self.watch = config, config.watch
        self.high = self.restarts = self.origin = 0
        if self.watch.restarts and (config.stage != "glimpse" or set(config.train) - {"glimpse", "private", "vip"}):
            raise UserError(
                "watch.restarts: only glimpse, private layers and vip can begin anew, in stage=glimpse, where nothing "
                "else trains"
            )
        if self.watch.restarts and isinstance(strategy, Zero):
            raise UserError("watch.restarts: weights that ZeRO splits cannot begin anew: give trainer.strategy=ddp")

    @property
    def due(self) -> bool:
        """Whether the predictor is to begin anew."""
        return self.high >= 2 and self.restarts < self.watch.restarts

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.extend(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.watch.overlap is None or OVERLAP not in trainer.callback_metrics:
            return
        loss, overlap = self.config.loss, float(trainer.callback_metrics[OVERLAP])
        whole = module.progress >= loss.pressure_from + loss.pressure_ramp
        self.high = self.high + 1 if whole and overlap > self.watch.overlap else 0
        if self.high == 2:
            rank_zero_warn(
                f"step {trainer.global_step}: {OVERLAP} is {overlap:.2f}, and has been above "
                f"watch.overlap={self.watch.overlap} twice: masks of different questions are alike, so tokens are kept "
                f"whatever is asked. {'The predictor begins anew' if self.due else ADVICE}"
            )

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.due:
            self.high, self.restarts, self.origin = 0, self.restarts + 1, trainer.global_step
            module.begin_anew(self.restarts)
            trainer.strategy.setup_optimizers(trainer)  # its state, and the schedule from the beginning
            self.extend(trainer, module)
            for callback in trainer.callbacks:
                if isinstance(callback, StopOnNonFinite):
                    callback.usual.values.clear()

    def extend(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """All steps are still to come after a restart."""
        module.origin = self.origin
        if self.origin:
            total = trainer.fit_loop.epoch_loop.max_steps = self.origin + self.config.trainer.max_steps
            for callback in trainer.callbacks:
                if isinstance(callback, Journal):
                    callback.total = total

    def state_dict(self) -> dict[str, Any]:
        return {"high": self.high, "restarts": self.restarts, "origin": self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.high, self.restarts, self.origin = state["high"], state["restarts"], state["origin"]


ADVICE = (
    "Train with another seed, let the glimpse see the whole question (pruner.options.sight=question), or begin anew by "
    "itself (watch.restarts=1)"
)
