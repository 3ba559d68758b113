"""Stage 1: train the glimpse token and the visual importance predictor against the frozen LVLM (method.md §2).

Teacher and student are one model and share one prefill. The prompt runs through layers < K once, without gradients,
and is cached. The glimpse is a decode step on that cache; its keep gate then weighs the visual keys of the student:
for answer tokens in all layers, for prompt tokens from layer K on. So the gradient passes only through the glimpse
position below K, and through what depends on the gate.

Left out: a batch that asks several questions of one image behind one shared image prefix (a factor on small models,
where the vision tower is a large part of a step, and none at 7B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from glimpseprune import decoder, losses, pruners
from glimpseprune.attention import Gate
from glimpseprune.decoder import View
from glimpseprune.generate import generate
from glimpseprune.pictures import grid, panel
from glimpseprune.pruners.glimpse import decide
from glimpseprune.training.options import TrainConfig
from glimpseprune.types import Encoded, Inputs, Prefill, Rollout


@dataclass
class Shared:
    """What teacher and student have in common: the prompt below K, and what the glimpse made of it."""

    encoded: Encoded
    state: Prefill  # at depth K
    logits: Tensor  # [outputs, N] keep logits; the last row counts
    through: Tensor | None = None  # [B, T, vocabulary] answer logits through the glimpse, for the answer loss

    @property
    def counts(self) -> list[int]:
        return self.encoded.counts


class GlimpseModule(L.LightningModule):
    """The frozen LVLM with its trainable glimpse and VIP; ``pruner`` is the very object that inference uses."""

    def __init__(self, config: TrainConfig, backbone: Any, pruner: nn.Module):
        super().__init__()
        self.config, self.backbone, self.pruner = config, backbone, pruner
        self.lvlm = backbone.model.requires_grad_(False).eval()
        self.pruner.train()
        self.unpruned = pruners.build("none", {}, backbone)
        self.strict_loading = False  # checkpoints hold what trains, never the LVLM
        self.pictured: list[Inputs] = []

    def train(self, mode: bool = True) -> GlimpseModule:
        super().train(mode)
        self.lvlm.eval()
        return self

    # ------------------------------------------------------------------------------------------------- one step

    def share(self, inputs: Inputs) -> Shared:
        """Encode the prompt, run it through layers < K (no gradients) and take one glimpse (with gradients)."""
        with torch.no_grad():
            encoded = self.backbone.encode(inputs.prompt, self.pruner.vision_layers, inputs.targets)
            state = decoder.run_layers(self.backbone, decoder.start(encoded), self.pruner.layers[0])
            if self.training and self.config.loss.answer:
                whole = decoder.run_layers(self.backbone, decoder.branch(state), self.backbone.num_layers)
        if self.training and self.config.loss.answer:
            view = View(whole, encoded, self.backbone)
            return Shared(encoded, state, *self.pruner.with_answer(view, inputs.answer_ids, inputs.answer_mask))
        return Shared(encoded, state, self.pruner.all_logits(View(state, encoded, self.backbone)))

    def decide(self, logits: Tensor, counts: list[int]) -> Tensor:
        """The keep mask [N] of inference."""
        options = self.pruner.options
        return decide(logits, counts, options.threshold, options.max_keep, options.min_keep)

    def answer_logits(self, state: Prefill, ids: Tensor, mask: Tensor, gate: Gate | None = None) -> Tensor:
        """Logits that predict the answer ``ids`` [B, T], given a prompt at depth K: [B, T, vocabulary]."""
        backbone, prompt = self.backbone, decoder.branch(state)
        if ids.shape[1] > 1:
            answer = decoder.append(prompt, backbone.embed(ids[:, :-1]), mask[:, :-1])
            answer = decoder.run_layers(backbone, answer, prompt.depth, gate=gate)
            prompt = replace(answer, hidden=torch.cat([prompt.hidden, answer.hidden], 1))  # [B, S + T - 1, D]
        final = decoder.run_layers(backbone, prompt, backbone.num_layers, gate=gate)
        return backbone.logits(final.hidden[:, -ids.shape[1] :])

    def gate(self, shared: Shared, estimator: str) -> Gate:
        """The keep probabilities as weights of the prompt's columns [B, S]; text weighs 1."""
        visual = shared.state.visual
        weight = torch.ones(visual.shape, device=visual.device)
        return Gate(weight.masked_scatter(visual, shared.logits[-1].float().sigmoid()), estimator)

    def training_step(self, inputs: Inputs, index: int) -> Tensor:
        config, progress = self.config.loss, self.progress
        shared = self.share(inputs)
        logits, counts = shared.logits[-1], shared.counts
        ids, mask = inputs.answer_ids, inputs.answer_mask
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.kl:
            with torch.no_grad():
                teacher = self.answer_logits(shared.state, ids, mask)
            gate = self.gate(shared, "value" if progress < config.value_until else "stc")
            terms["kl"] = config.kl, losses.kl(teacher, self.answer_logits(shared.state, ids, mask, gate), mask)
        if config.pressure:
            ramp = min(1.0, max(0.0, progress - config.pressure_from) / max(config.pressure_ramp, 1e-6))
            push = losses.pressure(logits.sigmoid(), counts, config.pressure_kind, config.target)
            terms["pressure"] = config.pressure * ramp, push
        targets = torch.cat(inputs.targets).to(logits.device) if inputs.targets else None
        if config.mask:
            boxed = losses.mask_loss(shared.logits, targets, counts, dice=config.dice, bce=config.bce)
            terms["mask"] = config.mask, boxed
        if config.answer:
            terms["answer"] = config.answer, losses.answer_loss(shared.through, ids, mask)
        loss = sum(weight * value for weight, value in terms.values())
        self.log_dict({f"train/{name}": value.detach() for name, (_, value) in terms.items()}, prog_bar=True)
        keep = self.decide(logits.detach(), counts)
        self.log("train/keep_ratio", keep.float().mean(), prog_bar=True)
        self.log("train/loss", loss.detach())
        self.log_dict({f"train/{name}": value for name, value in mask_scores(keep, targets, inputs, counts).items()})
        return loss

    @property
    def progress(self) -> float:
        """Fraction of the optimiser steps that are done."""
        return self.global_step / self.config.trainer.max_steps

    # ----------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validation_step(self, inputs: Inputs, index: int) -> None:
        """Teacher-forced: the pruned model's answer tokens against the full model's and against the references.

        ``accuracy``: every token of the reference answer is the pruned model's first choice, which greedy decoding
        would therefore produce.
        """
        shared = self.share(inputs)
        ids, mask, counts = inputs.answer_ids, inputs.answer_mask, shared.counts
        keep = self.decide(shared.logits[-1], counts)
        weight = torch.ones(shared.state.visual.shape, device=ids.device).masked_scatter(
            shared.state.visual, keep.float()
        )
        full = self.answer_logits(shared.state, ids, mask)
        pruned = self.answer_logits(shared.state, ids, mask, Gate(weight))
        scores = {
            "kl": losses.kl(full, pruned, mask),
            "accuracy": ((pruned.argmax(-1) == ids) | ~mask).all(1).float().mean(),
            "accuracy_full": ((full.argmax(-1) == ids) | ~mask).all(1).float().mean(),
            "keep_ratio": torch.stack([row.float().mean() for row in keep.split(counts)]).mean(),
        }
        targets = torch.cat(inputs.targets).to(keep.device) if inputs.targets else None
        scores |= mask_scores(keep, targets, inputs, counts)
        self.log_dict({f"val/{k}": v for k, v in scores.items()}, prog_bar=False, batch_size=len(ids), sync_dist=True)
        if not self.pictured and self.trainer.is_global_zero:
            self.pictured.append(inputs)

    def on_validation_epoch_end(self) -> None:
        pictured, self.pictured = self.pictured, []
        board = getattr(self.logger, "experiment", None)
        if board is None or self.trainer.sanity_checking:
            return
        for inputs in pictured:
            pruned, full = self.answers(inputs, self.pruner), self.answers(inputs, self.unpruned)
            decode = self.backbone.processor.tokenizer.batch_decode
            texts = [decode(rollout.tokens, skip_special_tokens=True) for rollout in (pruned, full)]
            panels = []
            for row, sample in enumerate(inputs.samples[:8]):
                keep = pruned.keep[row].float().mean()
                lines = [sample.question, f"pruned: {texts[0][row]}   full: {texts[1][row]}"]
                lines.append(f"answer: {sample.answers[0]}   kept {keep:.1%}")
                panels.append(panel(sample, pruned.keep_maps()[row], lines))
            board.add_image("val/kept", np.asarray(grid(panels)), self.global_step, dataformats="HWC")

    def answers(self, inputs: Inputs, pruner: nn.Module) -> Rollout:
        """Greedy answers to a batch."""
        return generate(self.backbone, pruner, inputs.prompt, max_new_tokens=inputs.answer_ids.shape[1])

    # ------------------------------------------------------------------------------------------------ optimiser

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW in four groups: glimpse and VIP, matrices with weight decay and the rest without."""
        options = self.config.optim
        groups = []
        for part, rate in ((self.pruner.glimpse, options.glimpse_lr), (self.pruner.vip, options.vip_lr)):
            matrices = [p for p in part.parameters() if p.ndim == 2]
            others = [p for p in part.parameters() if p.ndim != 2]
            groups.append({"params": matrices, "lr": rate, "weight_decay": options.weight_decay})
            groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, betas=tuple(options.betas))
        total = self.config.trainer.max_steps

        def scale(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            return min(1.0, (step + 1) / max(1, options.warmup)) * (options.final_lr + (1 - options.final_lr) * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for p in self.pruner.parameters() if p.grad is not None]
        self.log("train/grad_norm", nn.utils.get_total_norm(grads))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("lvlm.")}


def mask_scores(keep: Tensor, targets: Tensor | None, inputs: Inputs, counts: list[int]) -> dict[str, Tensor]:
    """How the keep mask [N] lies to the evidence, mean over rows.

    ``box_iou`` and ``box_recall`` against the boxes where there are any; ``mask_overlap``: IoU of the masks of two
    questions on one image whose evidence has no token in common (high: the mask ignores the question).
    """
    scores: dict[str, Tensor] = {}
    rows = keep.split(counts)
    if targets is not None:
        boxed = [i for i, sample in enumerate(inputs.samples) if sample.boxes is not None]
        boxes = targets.split(counts)
        if boxed:
            both = torch.stack([(rows[i] & boxes[i]).sum() for i in boxed]).float()
            either = torch.stack([(rows[i] | boxes[i]).sum() for i in boxed])
            scores["box_iou"] = (both / either.clamp(min=1)).mean()
            scores["box_recall"] = (both / torch.stack([boxes[i].sum() for i in boxed]).clamp(min=1)).mean()
        overlaps = []
        for i in boxed:
            for j in boxed:
                scene = inputs.samples[i].scene
                if i < j and scene and scene == inputs.samples[j].scene and not (boxes[i] & boxes[j]).any():
                    overlaps.append((rows[i] & rows[j]).sum() / (rows[i] | rows[j]).sum().clamp(min=1))
        if overlaps:
            scores["mask_overlap"] = torch.stack(overlaps).mean()
    return scores


Stage = GlimpseModule
