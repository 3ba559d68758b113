"""Stage 1: train the glimpse token and the visual importance predictor against the frozen LVLM (docs/method.md §2).

Teacher and student are one model and share one prefill. The prompt runs through layers < K once, without gradients,
and is cached. The glimpse is a decode step on that cache; its keep gate then weighs the visual keys of the student:
for answer tokens in all layers, for prompt tokens from layer K on. So the gradient passes only through the glimpse
position below K, and through what depends on the gate.

Questions on one image share what of that does not depend on them (:mod:`glimpseprune.prefix`). Under ``loss.dropped``
the student is made of the tokens that matter to its gradient (:mod:`._student`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from glimpseprune import attention, decoder, losses, prefix
from glimpseprune.attention import Gate
from glimpseprune.config import UserError
from glimpseprune.cost import Vip
from glimpseprune.host import Columns
from glimpseprune.options import TrainConfig
from glimpseprune.training import _flops as flops
from glimpseprune.training._stage import StageModule, mask_scores, mask_values
from glimpseprune.training._student import behind, follow
from glimpseprune.types import Encoded, Inputs, Prefill

NO_TEACHER = (
    "val/accuracy_full is 0: of the validation questions the unpruned model answers none as its reference says. What "
    "stage 1 learns from it is what that model looks at while it errs: take a model or data with which "
    "`python -m src.evaluate ... methods=[none]` scores, or train with loss.answer"
)
"""Where the teacher of the KL knows nothing of the user's task."""


@dataclass
class Shared:
    """What teacher and student have in common: the prompt below K, and what the glimpse made of it."""

    encoded: Encoded
    state: Prefill  # at depth K
    logits: Tensor  # [outputs, N] keep logits; the last row counts
    whole: Prefill | None = None  # the same prompts behind all layers, unpruned: what the teacher answers from
    through: Tensor | None = None  # [B, T, vocabulary] answer logits through the glimpse, for the answer loss

    @property
    def counts(self) -> list[int]:
        return self.encoded.counts


class GlimpseModule(StageModule):
    """The frozen LVLM with its trainable glimpse and VIP."""

    scores = ("kl", "accuracy", "accuracy_full", "keep_ratio", "box_iou", "box_recall", "mask_overlap")
    best = ("val/loss", "min")

    def __init__(self, config: TrainConfig, backbone: Any, pruner: nn.Module):
        if not hasattr(pruner, "all_logits"):
            raise UserError(f"stage=glimpse trains the pruner 'glimpse' or 'early', not '{config.pruner.name}'")
        super().__init__(config, backbone, pruner)
        if "vision" in config.train:
            raise UserError("train: stage=glimpse leaves the vision tower as it is; train vision with stage=grpo")
        self.told = False
        self.private = hasattr(pruner, "private")
        if config.loss.answer_kl and not self.private:
            raise UserError("loss.answer_kl needs a method with private layers, such as pruner.name=early")
        if self.private and (config.loss.answer or config.loss.answer_kl) and not pruner.options.complete:
            raise UserError(
                "loss.answer and loss.answer_kl take an answer out of the private layers: pruner.options.complete=true"
            )
        if config.loss.attention and not self.depth <= self.looked_at < backbone.num_layers:
            raise UserError(
                f"loss.attention_layer={config.loss.attention_layer}: give one of the decoder's layers from K on, "
                f"{self.depth} to {backbone.num_layers - 1}"
            )

    @property
    def looked_at(self) -> int:
        """The decoder layer whose attention the look is to imitate."""
        layer, layers = self.config.loss.attention_layer, self.backbone.num_layers
        return 2 * layers // 3 if layer is None else layer

    # ------------------------------------------------------------------------------------------------- one step

    def share(self, inputs: Inputs) -> Shared:
        """Encode the prompt, run it through layers < K and, where it is asked, on through the others (no gradients),
        and take one glimpse (with gradients)."""
        encoded, state = self.prompt(inputs)
        config, whole = self.config.loss, None
        through, looked = config.answer or config.answer_kl, (self.looked_at,) if config.attention else ()
        if config.kl or through or looked or not self.training:
            with torch.no_grad():
                alike = self.alike(inputs, encoded, state)
                whole = prefix.run(self.backbone, state, self.backbone.num_layers, alike, probes=looked)
        if self.training and through:
            view = self.view(encoded, state if self.private else whole)
            logits, through = self.pruner.with_answer(view, inputs.answer_ids, inputs.answer_mask)
            return Shared(encoded, state, logits, whole, through)
        return Shared(encoded, state, self.pruner.all_logits(self.view(encoded, state)), whole)

    def answer_logits(self, state: Prefill, ids: Tensor, mask: Tensor, gate: Gate | None = None) -> Tensor:
        """Logits that predict the answer ``ids`` [B, T], given a prompt at depth K: [B, T, vocabulary]."""
        return decoder.follow(self.learner, state, ids, mask, gate=gate)

    @torch.no_grad()
    def teach(self, shared: Shared, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unpruned model's logits for the answer ``ids`` [B, T, vocabulary], and what it looks at while it answers:
        of each row a distribution over its visual tokens, [N], mean over heads and the answer's tokens."""
        if not self.config.loss.attention:
            return behind(self.backbone, shared.whole, ids, mask), None
        visual = shared.state.visual
        size, seen = visual.shape[1], [shared.whole.probes[self.looked_at].transpose(1, 2)[:, :, None]]  # [B, H, 1, S]

        def see(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
            if layer == self.looked_at:
                seen.append(attention.logits(query, key[:, :, :size], scaling))  # [B, H, T - 1, S]

        teacher = behind(self.backbone, shared.whole, ids, mask, see)
        rows = torch.cat(seen, 2).masked_fill(~visual[:, None, None], -torch.inf).softmax(-1).mean(1)  # [B, T, S]
        rows = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return teacher, rows[visual]

    def kl(self, shared: Shared, teacher: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """KL(teacher || student) on the answer ``ids`` [B, T], of which ``teacher`` are the logits."""
        dropped, exact = self.config.loss.dropped, self.config.loss.exact
        gate = self.gate(shared, self.estimator)
        if dropped is None or gate.estimator != "stc":
            return losses.kl(teacher, self.answer_logits(shared.state, ids, mask, gate), mask)
        student = follow(self.learner, shared.state, ids, mask, gate, shared.whole.cache, dropped)
        few = losses.kl(teacher, student, mask)
        # On all ranks the same steps, or some would wait for others.
        if np.random.default_rng((self.config.seed, self.global_step)).random() >= exact:
            return few
        every = losses.kl(teacher, self.answer_logits(shared.state, ids, mask, gate), mask)
        return few + (every - few) / exact

    def gate(self, shared: Shared, estimator: str) -> Gate:
        """The keep probabilities as weights of the prompt's columns [B, S]; text weighs 1."""
        visual = shared.state.visual
        weight = torch.ones(visual.shape, device=visual.device, dtype=torch.float32)  # also under bf16-true
        return Gate(weight.masked_scatter(visual, shared.logits[-1].float().sigmoid()), estimator)

    @property
    def estimator(self) -> str:
        """Of the gate's gradient, at this step."""
        return "value" if self.progress < self.config.loss.value_until else "stc"

    def training_step(self, inputs: Inputs, index: int) -> Tensor:
        """The sum of what ``loss`` weighs: KL to the unpruned answer, pruning pressure, mask and answer loss, and what
        a look may learn from the unpruned model's attention, private layers from its answer. Means are over all ranks'
        answer tokens or samples, so that the number of ranks changes nothing."""
        config, progress = self.config.loss, self.progress
        shared = self.share(inputs)
        logits, counts = shared.logits[-1], shared.counts
        ids, mask = inputs.answer_ids, inputs.answer_mask
        # The mean of the ranks' losses is what one process would compute with the samples of all of them.
        gates = torch.stack([row.float().sigmoid().mean() for row in logits.detach().split(counts)]).mean()  # []
        own = torch.stack([mask.sum().float(), gates])  # [2]
        self.own_work_ends()
        mean = self.mean_over_ranks(own)
        share = own[0] / mean[0].clamp(min=1)  # of all answer tokens
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.kl or config.answer_kl or config.attention:
            teacher, looked = self.teach(shared, ids, mask)
        if config.kl:
            terms["kl"] = config.kl, self.kl(shared, teacher, ids, mask) * share
        if config.pressure:
            ramp = min(1.0, max(0.0, progress - config.pressure_from) / max(config.pressure_ramp, 1e-6))
            others = mean[1] - own[1] if config.pressure_kind == "budget" else 0.0  # the budget is one for all
            target = config.target - others
            push = losses.pressure(logits.sigmoid(), counts, config.pressure_kind, target)
            terms["pressure"] = config.pressure * ramp, push
        targets = self.targets(inputs, shared.encoded.layouts)
        if config.mask:
            boxed = [sample.boxes is not None for sample in inputs.samples]
            lies = losses.mask_loss(shared.logits, targets, counts, config.dice, config.bce, boxed=boxed)
            terms["mask"] = config.mask, lies
        if config.answer:
            terms["answer"] = config.answer, losses.answer_loss(shared.through, ids, mask) * share
        if config.answer_kl:
            terms["answer_kl"] = config.answer_kl, losses.kl(teacher, shared.through, mask) * share
        if config.attention:
            terms["attention"] = config.attention, losses.attention_kl(looked, logits, counts)
        loss = sum(weight * value for weight, value in terms.values())
        keep = self.pruner.mask(logits.detach(), counts)
        values = {name: value for name, (_, value) in terms.items()} | {"keep_ratio": keep.float().mean()}
        everywhere = self.mean_over_ranks(torch.stack([*values.values(), loss]).detach())
        self.log_dict({f"train/{name}": value for name, value in zip(values, everywhere)}, prog_bar=True)
        self.log("train/loss", everywhere[-1])
        self.log_dict({f"train/{name}": value for name, value in mask_scores(keep, targets, inputs, counts).items()})
        return loss

    def flops(self, inputs: Inputs) -> float:
        """As :mod:`.flops` counts them."""
        vip, trains = Vip.of(self.pruner), "decoder" in self.config.train
        probed, asks = max(self.pruner.probe_layers) + 1, getattr(self.pruner.options, "sight", "") == "question"
        private = len(self.pruner.private) if self.private else 0
        work = flops.Work(
            self.backbone.shapes, vip, self.pruner.window, self.depth, probed, self.config.loss, trains, asks, private
        )
        ids, mask = inputs.prompt["input_ids"], inputs.prompt["attention_mask"].bool()
        layouts = self.backbone.layouts(inputs.prompt)
        rows = zip(mask.sum(1), layouts, inputs.answer_mask.sum(1), self.pruner.looks(ids, mask, self.backbone))
        known = Columns(*(x.cpu() for x in (mask, mask & (ids == self.backbone.image_token_id), ids)))
        shared = None if hasattr(self.pruner, "look") else prefix.alike(known, prefix.pictures(inputs.prompt, layouts))
        total = 0.0
        for row, (length, images, answer, looks) in enumerate(rows):
            text = int(length) - sum(layout.count for layout in images)
            begun = 0 if shared is None or row in shared.first else int(known.mask[row, : shared.end[row]].sum())
            total += flops.of_sample(work, text, images, int(answer), self.estimator, int(looks), begun)
        return total

    def begin_anew(self, number: int) -> None:
        """What trains of the pruner gets weights of an untrained one, others for each ``number``; on all ranks the
        same."""
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, number)).generate_state(1, np.uint64)[0]))
        fresh = type(self.pruner)(self.backbone, self.pruner.options)
        trained = {name: x for name, x in fresh.state_dict().items() if name.partition(".")[0] in self.config.train}
        self.pruner.load_state_dict(trained, strict=False)

    # ----------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validation_step(self, inputs: Inputs, index: int) -> None:
        """Teacher-forced: the pruned model's answer tokens against the full model's and against the references.

        ``accuracy``: every token of the reference answer is the pruned model's first choice, which greedy decoding
        would therefore produce.
        """
        shared = self.share(inputs)
        ids, mask, counts = inputs.answer_ids, inputs.answer_mask, shared.counts
        keep = self.pruner.mask(shared.logits[-1], counts)
        weight = torch.ones(shared.state.visual.shape, device=ids.device, dtype=torch.float32).masked_scatter(
            shared.state.visual, keep.float()
        )
        full = behind(self.backbone, shared.whole, ids, mask)
        pruned = follow(self.backbone, shared.state, ids, mask, Gate(weight), shared.whole.cache, 0)
        real = torch.tensor([not sample.stands_in for sample in inputs.samples], device=ids.device)  # [B]
        tokens = mask & real[:, None]
        values = {
            "accuracy": ((pruned.argmax(-1) == ids) | ~mask).all(1).float()[real],
            "accuracy_full": ((full.argmax(-1) == ids) | ~mask).all(1).float()[real],
            "keep_ratio": torch.stack([row.float().mean() for row in keep.split(counts)])[real],
        }
        targets = self.targets(inputs, shared.encoded.layouts)
        values |= mask_values(keep, targets, inputs, counts)
        scores = {name: (each.mean(), len(each)) for name, each in values.items()}
        self.tally(scores | {"kl": (losses.kl(full, pruned, tokens), int(tokens.sum()))})
        self.remember(inputs)

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """The training's loss at the masks of inference; with box targets and no KL, what they miss."""
        config = self.config.loss
        if not {"kl", "keep_ratio"} <= means.keys():  # all samples stood in for damaged ones
            return {}
        if config.kl and means.get("accuracy_full") == 0 and not self.told:
            self.told = True
            rank_zero_warn(NO_TEACHER)
        loss = config.kl * means["kl"] + config.pressure * max(0.0, means["keep_ratio"] - config.target)
        return {"loss": loss + config.mask * (1 - means.get("box_iou", 1.0))}


Stage = GlimpseModule
