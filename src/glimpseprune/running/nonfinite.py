"""The end of a run whose loss or gradient is lost, before that reaches the weights; the samples are written down.

All ranks take part in one small gather per optimiser step, so that all of them end, and at the same step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from glimpseprune import files
from glimpseprune.config import UserError
from glimpseprune.options import WatchOptions
from glimpseprune.types import Inputs


class StopOnNonFinite(L.Callback):
    """Ends the run on all ranks before an update of which one of them has a loss or a gradient norm that is not finite,
    or that explodes (:class:`Usual`): the weights stay as they were, and so do all files of the run.

    What explodes is the loss, mean over ranks; in manual optimisation, where it is signed and near 0, the norm. Each
    rank concerned (all, if only the norm is lost) leaves ``<folder>/bad-batch-<step>-rank<rank>.json``. Weights that
    have become non-finite all the same are never written to a checkpoint. Where a scaler of the precision 16-mixed
    leaves out such updates by itself, only the loss is looked at; where DeepSpeed holds the gradients, likewise.

    Raises:
        UserError: on all ranks; it names the files and says what to do.
    """

    def __init__(self, folder: str | Path, options: WatchOptions):
        self.folder = Path(folder)
        self.usual = Usual(options.explode)
        self.batches: list[dict[str, Any]] = []  # of the update to come
        self.losses: list[Tensor] = []
        self.step = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Inputs, index: int) -> None:
        if trainer.global_step != self.step:
            self.step, self.batches = trainer.global_step, []
        samples = [{"key": each.key, "dataset": each.dataset, "stands_in": each.stands_in} for each in batch.samples]
        self.batches.append({"samples": samples})

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if module.automatic_optimization:
            self.batches[-1]["loss"] = loss.detach() * trainer.accumulate_grad_batches  # of which it is a share

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        zero = torch.zeros((), device=module.device)
        loss, norm = sum(self.losses, zero).float(), module.gradient_norm().detach().float().to(module.device)
        self.losses = []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            norm = zero
        ranks = trainer.strategy.all_gather(torch.stack([loss, norm])).reshape(-1, 2).tolist()
        reason, concerned = self.verdict(ranks, signed=not module.automatic_optimization)
        if reason is not None:
            self.stop(trainer, reason, concerned, *ranks[trainer.global_rank])

    def verdict(self, ranks: list[list[float]], signed: bool) -> tuple[str | None, list[int]]:
        """What is wrong, if anything, and the ranks with which it is, from (loss, gradient norm) of each."""
        lost = [rank for rank, (loss, _) in enumerate(ranks) if not math.isfinite(loss)]
        if lost:
            return f"the loss is {ranks[lost[0]][0]}", lost
        if not all(math.isfinite(norm) for _, norm in ranks):
            return "the gradient is not finite", list(range(len(ranks)))
        values = [norm if signed else loss for loss, norm in ranks]
        mean, limit = statistics.fmean(values), self.usual.limit()
        if mean <= limit:
            self.usual.add(mean)
            return None, []
        what = "gradient norm" if signed else "loss"
        reason = f"the {what} explodes: {mean:.4g}, usual are up to {self.usual.high:.4g}"
        return reason, [rank for rank, value in enumerate(values) if value >= min(limit, max(values))]

    def stop(self, trainer: L.Trainer, reason: str, concerned: list[int], loss: float, norm: float) -> None:
        step, rank = trainer.global_step, trainer.global_rank
        reports = [self.folder / f"bad-batch-{step}-rank{each}.json" for each in concerned]
        if rank in concerned:
            for batch in self.batches:
                batch["loss"] = float(batch["loss"]) if "loss" in batch else None
            report = {"step": step, "rank": rank, "reason": reason, "loss": loss, "grad_norm": norm}
            files.write_json(reports[concerned.index(rank)], report | {"batches": self.batches}, indent=2)
        trainer.strategy.barrier()  # the first process to end may take the others with it
        more = f" (and {len(reports) - 1} more, one per rank)" if len(reports) > 1 else ""
        raise UserError(
            f"stopped at step {step}: {reason}. The samples are in {reports[0]}{more}; neither weights nor "
            "checkpoints were changed. Start another run with a lower learning rate (optim.*_lr) or without these "
            f"samples, from the last weights if you like (init_from={self.folder}); resume=true only helps where "
            "a machine was at fault"
        )

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.check_weights(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.check_weights(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check_weights(trainer, module)

    def check_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        bad = not all(bool(p.isfinite().all()) for p in module.trainable())
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            raise UserError(
                f"the weights are no longer finite at step {trainer.global_step}, and are not saved: start another run "
                f"with a lower learning rate (optim.*_lr), from the last weights if you like (init_from={self.folder})"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"usual": list(self.usual.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usual.values = deque(state["usual"], maxlen=Usual.LAST)


class Usual:
    """What values a run has had lately, to tell from it what is none of them.

    Losses of a healthy run may differ by orders of magnitude from batch to batch, above all when most samples have been
    learnt: single ones are 40 times their median. So a value explodes that is ``factor`` times ``high``, which
    nine in ten of the last values stayed below; where they spread further than that, (high / low) ** 1.5 times, low
    being what nine in ten were above: five standard deviations, if logarithms are normal. Before there are ``LEAST``
    values, and with ``factor`` None, nothing does.
    """

    LAST, LEAST = 100, 20

    def __init__(self, factor: float | None):
        self.factor = factor
        self.values: deque[float] = deque(maxlen=self.LAST)
        self.high = 0.0

    def add(self, value: float) -> None:
        if value > 0:  # 0 is no value: nothing was learnt from that batch
            self.values.append(value)

    def limit(self) -> float:
        """Above it, a value explodes."""
        if self.factor is None or len(self.values) < self.LEAST:
            return math.inf
        ordered = sorted(self.values)
        low, self.high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return self.high * max(self.factor, (self.high / low) ** 1.5)
