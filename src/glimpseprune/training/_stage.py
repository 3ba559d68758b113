"""What the stages share: one frozen LVLM with the parts of it that train, validation with pictures, the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from glimpseprune import decoder, lora, prefix, pruners
from glimpseprune.config import UserError, check
from glimpseprune.data.collate import sample_targets
from glimpseprune.decoder import View
from glimpseprune.generate import generate
from glimpseprune.options import PARTS, TrainConfig
from glimpseprune.pictures import grid, panel
from glimpseprune.running.strategies import Zero
from glimpseprune.sharded import is_split
from glimpseprune.training._layers import checkpointed, compile_parts
from glimpseprune.types import Encoded, Inputs, Layout, Prefill, Rollout

NO_DECAY = "_no_decay"


class StageModule(L.LightningModule):
    """The LVLM and the very pruner that inference uses; ``config.train`` says which parts of them train."""

    scores: tuple[str, ...] = ()
    """What a validation may log, as val/<name>; the same on every rank, whatever its samples have to say."""
    best: tuple[str, str]
    """Metric of the validation that says which checkpoint is best, and whether its ``min`` or ``max`` is."""

    def __init__(self, config: TrainConfig, backbone: Any, pruner: nn.Module):
        super().__init__()
        for section in ("loss", "grpo", "rewards", "guard", "optim"):  # of a config that was made in Python
            check(getattr(config, section), f"{section}.")
        self.config, self.backbone, self.pruner = config, backbone, pruner
        self.lvlm = backbone.model.requires_grad_(False).eval()
        self.learner = checkpointed(backbone) if config.trainer.checkpointing else backbone
        """The model as passes run it whose gradient goes through its layers."""
        self.unpruned = pruners.build("none", {}, backbone)
        self.origin = 0  # the step at which the training began, or began anew
        self.strict_loading = False  # checkpoints hold what trains, never the rest of the LVLM
        self.pictured: list[Inputs] = []
        self.sums: dict[str, tuple[float, int]] = {}
        self.pruner.requires_grad_(False)
        for part in config.train:
            for parameter in self.parameters_of(part):
                parameter.requires_grad_(True)
        if config.trainer.compile:
            layers = backbone.text_model.layers[self.depth :]
            compile_parts(config.trainer.compile, layers, getattr(pruner, "vip", None))
        self.train()

    def parameters_of(self, part: str) -> list[nn.Parameter]:
        """Parameters of one of ``PARTS``.

        Raises:
            UserError: there is no such part in this model.
        """
        if part not in PARTS:
            raise UserError(f"train: no part '{part}', choose from {', '.join(PARTS)}")
        if part in ("glimpse", "private", "vip"):
            if not hasattr(self.pruner, part):
                raise UserError(f"train: the pruner '{self.config.pruner.name}' has no {part} to train")
            return list(getattr(self.pruner, part).parameters())
        if part == "lora":
            if self.config.lora is None:
                raise UserError("train: there are no adapters, give lora={} or lora.rank=...")
            return [p for name, p in self.lvlm.named_parameters() if lora.is_adapter(name)]
        text = self.backbone.text_model
        if part == "vision":
            language = {id(p) for module in (text, self.backbone.lm_head) for p in module.parameters()}
            return [p for p in self.lvlm.parameters() if id(p) not in language]
        own = [*text.layers.named_parameters(), *text.norm.named_parameters()]
        return [p for name, p in own if not lora.is_adapter(name)]

    def train(self, mode: bool = True) -> StageModule:
        super().train(mode)
        self.lvlm.eval()
        for module in self.lvlm.modules():
            if isinstance(module, BaseTunerLayer):
                module.lora_dropout.train(mode)
        return self

    def on_train_batch_start(self, batch: Inputs, index: int) -> None:
        """Random numbers of a batch (masks and tokens that are sampled, dropout) are a function of the run's seed, the
        number of the batch and the rank: a resumed run draws those it would have drawn, and no two ranks the same."""
        place = (self.config.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        for schedule in self.trainer.lr_scheduler_configs:
            for group in schedule.scheduler.optimizer.param_groups:
                if not group["name"].endswith(NO_DECAY):
                    self.log(f"lr/{group['name']}", group["lr"])

    def on_train_batch_end(self, *_: Any) -> None:
        """Loggers are told the number of updates that are done, and not Lightning's count of batches."""
        self.log("step", float(self.global_step))

    # ----------------------------------------------------------------------------------------------- the prompt

    @property
    def depth(self) -> int:
        """K, how many decoder layers see every token."""
        return self.pruner.stops[0].depth if self.pruner.stops else 0

    @torch.no_grad()
    def prompt(self, inputs: Inputs) -> tuple[Encoded, Prefill]:
        """The batch of prompts, encoded and run to the pruner's first stop; what begins alike, once."""
        encoded = decoder.see(self.backbone, self.pruner, inputs.prompt, inputs.targets)
        if hasattr(self.pruner, "look") and inputs.targets:
            encoded.targets = list(self.targets(inputs, encoded.layouts).split(encoded.counts))
        state = decoder.start(encoded)
        shared = self.alike(inputs, encoded, state)
        if shared is None:
            return encoded, decoder.approach(self.backbone, state, self.pruner)
        return encoded, prefix.run(self.backbone, state, self.depth, shared, probes=self.pruner.needs.probes)

    def alike(self, inputs: Inputs, encoded: Encoded, state: Prefill) -> prefix.Alike | None:
        """Which of the prompts begin alike; None where none do, where a look has given each its own images, and where
        ZeRO-3 splits the weights: all processes must call the layers equally often."""
        if hasattr(self.pruner, "look") or is_split(self.backbone.lm_head.weight):
            return None
        return prefix.alike(state.known, prefix.pictures(inputs.prompt, encoded.layouts))

    def targets(self, inputs: Inputs, layouts: Sequence[Sequence[Layout]]) -> Tensor | None:
        """Visual tokens under an evidence box, [N], of images that lie as ``layouts`` say: a look before the tower may
        have made others of them than the collator knew."""
        if not inputs.targets:
            return None
        rows = inputs.targets
        if hasattr(self.pruner, "look"):
            rows = [sample_targets(sample, row) for sample, row in zip(inputs.samples, layouts)]
        return torch.cat(rows).to(self.backbone.device)

    def view(self, encoded: Encoded, state: Prefill) -> View:
        return View(state, encoded, self.backbone, self.pruner.stops[0] if self.pruner.stops else None)

    @property
    def progress(self) -> float:
        """Fraction of the optimiser steps that are done."""
        return (self.global_step - self.origin) / self.config.trainer.max_steps

    # ----------------------------------------------------------------------------------------------- validation

    def tally(self, scores: Mapping[str, tuple[Tensor, int]]) -> None:
        """Add to the means of this validation: per score its mean over a batch, and over how many samples (pairs,
        tokens ...) that is. Samples that stand in for others must not be among them."""
        for name, (mean, count) in scores.items():
            if name not in self.scores:
                raise ValueError(f"validation score '{name}' is not one of {', '.join(self.scores)}")
            if count:
                total, number = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + float(mean) * count, number + count

    def log_tally(self) -> None:
        """Log the means over everything that any rank has seen, in one exchange of a fixed size: a score that only some
        ranks have would otherwise keep the others waiting."""
        own = torch.tensor([self.sums.get(name, (0.0, 0)) for name in self.scores], device=self.device)
        self.sums = {}
        totals = self.trainer.strategy.reduce(own, reduce_op="sum").tolist()
        means = {name: total / count for name, (total, count) in zip(self.scores, totals) if count}
        means |= self.summary(means)
        self.log_dict({f"val/{name}": value for name, value in means.items()} | {"step": float(self.global_step)})

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What a validation's mean scores come to: the one that ``best`` names."""
        raise NotImplementedError

    def own_work_ends(self) -> None:
        """Tell the callbacks that this rank has done what it does alone, and from now on may wait for the others. Ranks
        call it equally often."""
        for callback in [] if self._trainer is None else self.trainer.callbacks:
            if hasattr(callback, "on_own_work_end"):
                callback.on_own_work_end(self.trainer, self)

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        if self._trainer is None:
            return values
        return self.trainer.strategy.reduce(values.clone(), reduce_op="mean")  # which works in place

    def remember(self, inputs: Inputs) -> None:
        """Keep the first validation batch for the pictures."""
        if not self.pictured and (self.trainer.is_global_zero or self.is_sharded):
            self.pictured.append(inputs)

    def on_validation_epoch_start(self) -> None:
        self.sums = {}

    def on_validation_epoch_end(self) -> None:
        self.log_tally()
        pictured, self.pictured = self.pictured, []
        boards = [logger for logger in self.loggers if hasattr(logger, "log_image")]
        if not boards or self.trainer.sanity_checking:
            return
        for inputs in pictured:
            pruned, full = self.answers(inputs, self.pruner), self.answers(inputs, self.unpruned)
            panels = []
            for row, (sample, said, meant) in enumerate(zip(inputs.samples[:8], self.texts(pruned), self.texts(full))):
                lines = [sample.question, f"pruned: {said}   full: {meant}"]
                lines.append(f"answer: {sample.answers[0]}   kept {pruned.keep[row].float().mean():.1%}")
                panels.append(panel(sample, pruned.keep_maps()[row], lines))
            for board in boards:
                board.log_image("answers/kept", [np.asarray(grid(panels))], step=self.global_step)

    def answers(self, inputs: Inputs, pruner: nn.Module, length: int | None = None, **options: Any) -> Rollout:
        """Greedy answers to a batch, at most ``length`` tokens (default: those of the longest reference); ``options``
        of :func:`.generate.generate`."""
        length = inputs.answer_ids.shape[1] if length is None else length
        return generate(
            self.backbone,
            pruner,
            inputs.prompt,
            targets=inputs.targets,
            synced=self.is_sharded,
            max_new_tokens=length,
            **options,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold parts of the weights for each other (ZeRO), so that all must run the model alike."""
        return self._trainer is not None and isinstance(self.trainer.strategy, Zero)

    def texts(self, rollout: Rollout) -> list[str]:
        return self.backbone.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)

    # ------------------------------------------------------------------------------------------------ optimiser

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, each part that trains in two groups: matrices with weight decay, the rest without."""
        options = self.config.optim
        groups = []
        for part in self.config.train:
            rate, parameters = getattr(options, f"{part}_lr"), self.parameters_of(part)
            for name, decay, chosen in (
                (part, options.weight_decay, [p for p in parameters if p.ndim == 2]),
                (part + NO_DECAY, 0.0, [p for p in parameters if p.ndim != 2]),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "name": name})
        optimizer = torch.optim.AdamW(groups, betas=tuple(options.betas))
        total = self.config.trainer.max_steps

        def scale(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            return min(1.0, (step + 1) / max(1, options.warmup)) * (options.final_lr + (1 - options.final_lr) * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def batches(self, steps: int) -> int:
        """How many batches so many optimiser steps take."""
        return steps * self.config.trainer.accumulate

    def trainable(self) -> Iterator[nn.Parameter]:
        return (p for p in self.parameters() if p.requires_grad)

    def gradient_norm(self) -> Tensor:
        """Of the gradients that an update is about to use, before they are clipped."""
        if self.is_sharded:
            return self.trainer.strategy.gradient_norm()
        return nn.utils.get_total_norm([p.grad for p in self.trainable() if p.grad is not None])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("train/grad_norm", self.gradient_norm())

    def flops(self, inputs: Inputs) -> float | None:
        """FLOPs of a training step on a batch, forward and backward; None where they are not counted."""
        return None

    def saved(self) -> dict[str, Tensor]:
        """What of this module's state a checkpoint holds, by its names there: all but the LVLM's frozen weights."""
        lvlm = [f"lvlm.{name}" for name in self.lvlm.state_dict(keep_vars=True)]
        frozen = set(lvlm) - {f"lvlm.{name}" for name in self.backbone.changed()}
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if name not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted = self.saved()
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in wanted}


def mask_scores(keep: Tensor, targets: Tensor | None, inputs: Inputs, counts: list[int]) -> dict[str, Tensor]:
    """:func:`mask_values`, each as its mean."""
    return {name: values.mean() for name, values in mask_values(keep, targets, inputs, counts).items()}


def mask_values(keep: Tensor, targets: Tensor | None, inputs: Inputs, counts: list[int]) -> dict[str, Tensor]:
    """How the keep mask [N] lies to the evidence; samples that stand in for others are left out.

    ``box_iou`` and ``box_recall`` of each row with boxes; ``mask_overlap`` of each two questions on one image whose
    evidence has no token in common: IoU of their masks (high: the mask ignores the question). Without any, no entry.
    """
    scores: dict[str, Tensor] = {}
    rows = keep.split(counts)
    if targets is not None:
        boxed = [i for i, each in enumerate(inputs.samples) if each.boxes is not None and not each.stands_in]
        boxes = targets.split(counts)
        if boxed:
            both = torch.stack([(rows[i] & boxes[i]).sum() for i in boxed]).float()
            either = torch.stack([(rows[i] | boxes[i]).sum() for i in boxed])
            scores["box_iou"] = both / either.clamp(min=1)
            scores["box_recall"] = both / torch.stack([boxes[i].sum() for i in boxed]).clamp(min=1)
        overlaps = []
        for i in boxed:
            for j in boxed:
                scene = inputs.samples[i].scene
                if i < j and scene and scene == inputs.samples[j].scene and not (boxes[i] & boxes[j]).any():
                    overlaps.append((rows[i] & rows[j]).sum() / (rows[i] | rows[j]).sum().clamp(min=1))
        if overlaps:
            scores["mask_overlap"] = torch.stack(overlaps)
    return scores
