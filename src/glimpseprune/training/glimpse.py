"""Stage 1: train the glimpse token and the visual importance predictor against the frozen LVLM (method.md §2).

Teacher and student are one model and share one prefill. The prompt runs through layers < K once, without gradients,
and is cached. The glimpse is a decode step on that cache; its keep gate then weighs the visual keys of the student:
for answer tokens in all layers, for prompt tokens from layer K on. So the gradient passes only through the glimpse
position below K, and through what depends on the gate.

Left out: a batch that asks several questions of one image behind one shared image prefix (a factor on small models,
where the vision tower is a large part of a step, and none at 7B).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glimpseprune import decoder, losses
from glimpseprune.attention import Gate
from glimpseprune.config import UserError
from glimpseprune.training._stage import StageModule, mask_scores
from glimpseprune.training.options import TrainConfig
from glimpseprune.types import Encoded, Inputs, Prefill


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


class GlimpseModule(StageModule):
    """The frozen LVLM with its trainable glimpse and VIP."""

    def __init__(self, config: TrainConfig, backbone: Any, pruner: nn.Module):
        if not hasattr(pruner, "all_logits"):
            raise UserError(f"stage=glimpse trains the pruner 'glimpse', not '{config.pruner.name}'")
        super().__init__(config, backbone, pruner)

    # ------------------------------------------------------------------------------------------------- one step

    def share(self, inputs: Inputs) -> Shared:
        """Encode the prompt, run it through layers < K (no gradients) and take one glimpse (with gradients)."""
        encoded, state = self.prompt(inputs)
        if self.training and self.config.loss.answer:
            with torch.no_grad():
                whole = decoder.run_layers(self.backbone, decoder.branch(state), self.backbone.num_layers)
            through = self.pruner.with_answer(self.view(encoded, whole), inputs.answer_ids, inputs.answer_mask)
            return Shared(encoded, state, *through)
        return Shared(encoded, state, self.pruner.all_logits(self.view(encoded, state)))

    def answer_logits(self, state: Prefill, ids: Tensor, mask: Tensor, gate: Gate | None = None) -> Tensor:
        """Logits that predict the answer ``ids`` [B, T], given a prompt at depth K: [B, T, vocabulary]."""
        return decoder.follow(self.backbone, state, ids, mask, gate=gate)

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
        self.remember(inputs)


Stage = GlimpseModule
