"""Stage 2, GlimpsePrune+: reinforce the language model on its own pruned sequences (docs/method.md §3).

A step: every prompt of the batch runs through layers < K once; each of its G rollouts has a keep mask drawn from the
gate and draws an answer on the pruned cache; reward = task score + alpha x pruning ratio; advantages are relative to
the group. Then the policy loss over tokens and over keep decisions, two terms with weights, clips and normalisations of
their own, because there are V decisions to every few tokens. The log-probabilities are recomputed from exactly the
distribution that was sampled, so their ratio is 1 until the first update. Rollouts go through the backward pass in
micro-batches; loss weights are fixed before, so neither gradient nor memory depends on how they are cut.

What trains is ``config.train``: adapters or the decoder's own layers, glimpse, VIP, the vision tower. ``grpo.masks:
boxes`` prunes by the ground truth, as the published recipe does; a pruner without a gate (none, random) is reinforced
with its own masks. Gradients of all processes are averaged here, once an update, since ranks may have different numbers
of rollouts worth a backward pass.

Left out: gradients through the prompt's hidden states into the gate (the mask's term trains glimpse, VIP, and what
the glimpse itself passes through); a replay buffer of old rollouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glimpseprune import decoder, lora, losses, pruners, rewards
from glimpseprune.config import UserError
from glimpseprune.options import TrainConfig
from glimpseprune.rollout import answer, at_columns, prefilled, sample_keep, score
from glimpseprune.training._stage import StageModule, mask_scores, mask_values
from glimpseprune.types import Encoded, Inputs, Prefill

PER_TOKEN = {"entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
"""Metrics that are means over the tokens whose loss was computed, whatever the loss itself divides by."""


@dataclass
class Actions:
    """What R rollouts did, how likely that was, and what it earned."""

    index: Tensor  # [R] row of the batch of prompts that each rollout belongs to
    keep: Tensor  # [R, S] bool over the prompt's columns, True on text
    keep_log_probs: Tensor  # [R, S], 0 where nothing was drawn
    tokens: Tensor  # [R, T] right-padded, end of turn included
    log_probs: Tensor  # [R, T], 0 on padding
    mask: Tensor  # [R, T] bool
    ended: Tensor  # [R] bool, False where the answer was cut
    empty: Tensor  # [R] bool, True where there is nothing to read in it
    pruned: Tensor  # [R] fraction of the visual tokens that was pruned
    values: Tensor  # [R, F] each reward function, NaN where it does not apply or is missing
    applies: Tensor  # [R, F] bool
    reward: Tensor  # [R]
    valid: Tensor  # [R] bool, False where a verdict is missing

    def replace_rows(self, where: Tensor, other: Actions) -> None:
        """Put the rollouts of ``other`` in place of those at ``where`` [R'], widening T if need be."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if name in ("tokens", "log_probs", "mask"):
                mine, theirs = (nn.functional.pad(x, (0, width - x.shape[1])) for x in (mine, theirs))
            setattr(self, name, mine.index_copy(0, where, theirs))


@dataclass
class Batch:
    """A batch of prompts with its rollouts, waiting for updates."""

    inputs: Inputs
    encoded: Encoded
    state: Prefill  # unpruned, at depth K
    actions: Actions
    advantages: Tensor  # [R]
    mask: Tensor  # [R, T] tokens that count


class GRPOModule(StageModule):
    """Group-relative policy optimisation; names of options and metrics are TRL's."""

    scores = ("score", "clipped_ratio", "keep_ratio", "box_iou", "box_recall", "mask_overlap")
    best = ("val/reward", "max")

    def __init__(self, config: TrainConfig, backbone: Any, pruner: nn.Module):
        super().__init__(config, backbone, pruner)
        self.automatic_optimization = False
        self.rewards = rewards.build(config.rewards.functions, config.rewards.judge, config.rewards.task)
        self.gated = hasattr(pruner, "logits")
        self.samples_masks = self.gated and config.grpo.masks == "sampled"
        self.replays_masks = True
        """Whether a rollout's mask at the first stop is all that must be known to prune its prompt again."""
        boxes = {"prune_layer": self.depth - 1}
        self.greedy = pruners.build("oracle", boxes, backbone) if config.grpo.masks == "boxes" else pruner
        self.trains_masks = self.samples_masks and any(p.requires_grad for p in pruner.parameters())
        self.trains_lvlm = any(p.requires_grad for p in self.lvlm.parameters())
        below = backbone.text_model.layers[: self.depth]
        self.trains_vision = "vision" in config.train
        self.trains_below = self.trains_vision or any(p.requires_grad for p in below.parameters())
        self.pending: list[Batch] = []
        self.said: list[tuple[str, ...]] = []
        if config.grpo.beta and (config.lora is None or {"decoder", "vision"} & set(config.train)):
            raise UserError("grpo.beta > 0 compares with the policy without adapters: train=[lora, ...], or beta=0")
        rollouts = config.grpo.num_generations
        self.answers_per_mask = rollouts // (config.grpo.num_masks or rollouts)

    @cached_property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer: the tokenizer's and the model's own."""
        config = getattr(self.backbone.model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        if (own := self.backbone.processor.tokenizer.eos_token_id) is not None:
            ids.append(own)
        return sorted(set(ids))

    def train(self, mode: bool = True) -> GRPOModule:
        super().train(mode)
        self.pruner.eval()  # dropout on the glimpse would update another gate than the one that drew the masks
        return self

    # --------------------------------------------------------------------------------------------------- rollouts

    @torch.no_grad()
    def collect(self, inputs: Inputs) -> Batch:
        """Roll out a batch of prompts, judge the answers, and compare each with its group."""
        options = self.config.grpo
        encoded, state = self.prompt(inputs)
        logits = self.pruner.logits(self.view(encoded, state)) if self.gated else None  # [N]
        prompts = torch.arange(len(inputs.samples), device=self.device)  # [B]
        index = prompts.repeat_interleave(options.num_generations)  # [R]
        actions = self.roll_out(inputs, encoded, state, index, logits)
        for _ in range(options.resample_tries if options.zero_variance == "resample" else 0):
            same = self.advantages(actions)[1] < 1e-6  # [P]
            again = same[index].nonzero()[:, 0]  # [R']
            if not self.most(len(again)):
                break
            fresh = self.roll_out(inputs, encoded, state, index[again] if len(again) else index[:1], logits)
            if len(again):
                actions.replace_rows(again, fresh)
        advantages, std = self.advantages(actions)  # [R], [B]
        mask = actions.mask & actions.valid[:, None]  # [R, T]
        if options.mask_truncated_completions:
            mask = mask & actions.ended[:, None]
        self.report(inputs, encoded, logits, actions, std)
        return Batch(inputs, encoded, state, actions, advantages, mask)

    def roll_out(
        self, inputs: Inputs, encoded: Encoded, state: Prefill, index: Tensor, logits: Tensor | None
    ) -> Actions:
        """A mask and an answer for each prompt of ``index`` [R], and their reward; ``logits`` [N] of the gate."""
        options = self.config.grpo
        if self.samples_masks:
            each = self.answers_per_mask
            drawn = sample_keep(state, logits, index[::each], options.mask_temperature)
            keep, keep_log_probs = (x.repeat_interleave(each, dim=0)[: len(index)] for x in drawn)  # [R, S] each
        else:
            decision = self.greedy.decide(self.view(encoded, state))
            self.replays_masks = decision.merge is None
            keep = (decision.keep | ~state.visual)[index]  # [R, S]
            keep_log_probs = torch.zeros(keep.shape, device=self.device)  # [R, S]
        given = keep if self.replays_masks else None
        prompts = prefilled(self.backbone, encoded, self.pruner, state, index, given)
        tokens, log_probs, mask, ended = answer(
            self.backbone,
            prompts,
            options.max_completion_length,
            self.ends,
            temperature=options.temperature,
            synced=self.is_sharded,
        )  # [R, T] three times, [R]
        pruned = 1 - prompts.trace[-1].kept / prompts.trace[0].kept  # [R]
        rows = [inputs.samples[i] for i in index.tolist()]
        texts = self.backbone.processor.tokenizer.batch_decode(tokens.where(mask, self.pad), skip_special_tokens=True)
        scores = self.rewards(
            texts,
            samples=rows,
            answers=[row.answers for row in rows],
            questions=[row.question for row in rows],
            kinds=[row.kind for row in rows],
            truncated=(~ended).tolist(),
        )
        task, valid, values, applies = (
            x.to(self.device) for x in (scores.total, scores.valid, scores.values, scores.applies)
        )  # [R], [R], [R, F], [R, F]
        reward = task + self.pruning_reward(pruned, task)  # [R]
        self.said = [
            (row.question, text, row.answers[0], f"{1 - p:.1%}", f"{r:.3f}")
            for row, text, p, r in zip(rows, texts, pruned.tolist(), reward.tolist())
        ]
        empty = torch.tensor([not text.strip() for text in texts], device=self.device)  # [R]
        return Actions(
            index, keep, keep_log_probs, tokens, log_probs, mask, ended, empty, pruned, values, applies, reward, valid
        )  # fmt: skip

    def pruning_reward(self, pruned: Tensor, task: Tensor, ramped: bool = True) -> Tensor:
        """alpha x pruning ratio, for each of R rollouts; ``ramped``: with the alpha of this step, or the final one."""
        options = self.config.rewards
        ramp = min(1.0, self.progress / options.pruning_ramp) if ramped and options.pruning_ramp else 1.0
        alpha = options.pruning * ramp
        if options.pruning_target is not None:
            pruned = pruned.clamp(max=options.pruning_target)
        return alpha * pruned * (task.clamp(0, 1) if options.pruning_when == "correct" else 1.0)

    def advantages(self, actions: Actions) -> tuple[Tensor, Tensor]:
        """Of each rollout within its group [R], and the standard deviation of each group's rewards [B]."""
        options = self.config.grpo
        return losses.group_advantages(
            actions.reward, actions.index, actions.valid, options.scale_rewards, options.std_floor
        )

    # ---------------------------------------------------------------------------------------------------- updates

    def training_step(self, inputs: Inputs, index: int) -> None:
        """Roll out a batch; once ``trainer.accumulate`` of them wait, update ``grpo.num_iterations`` times on all of
        their rollouts: gradients in micro-batches, mean over the ranks, clip, step. Optimisation is manual, because
        ranks may have different numbers of micro-batches."""
        self.pending.append(self.collect(inputs))
        if len(self.pending) < self.config.trainer.accumulate:
            return
        pending, self.pending = self.pending, []
        self.own_work_ends()
        optimizer, clip = self.optimizers(), self.config.optim.clip
        for iteration in range(self.config.grpo.num_iterations):
            alone = dist.is_initialized() and not self.is_sharded
            with self.trainer.strategy.block_backward_sync() if alone else nullcontext():
                self.backward_all(pending, iteration)
            self.average_gradients()
            self.norm = super().gradient_norm()
            if clip > 0 and not self.is_sharded:  # DeepSpeed clips by itself
                nn.utils.clip_grads_with_norm_(list(self.trainable()), clip, self.norm)
            self.log("train/grad_norm", self.norm)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
            if self.global_step >= self.config.trainer.max_steps:
                break

    def gradient_norm(self) -> Tensor:
        return self.norm

    def batches(self, steps: int) -> int:
        return max(1, super().batches(steps) // self.config.grpo.num_iterations)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient's norm has been logged before it was clipped."""

    def backward_all(self, pending: list[Batch], iteration: int = 0) -> None:
        """Gradients of the loss over all rollouts of the pending batches, micro-batch by micro-batch."""
        options = self.config.grpo
        width = max(batch.mask.shape[1] for batch in pending)
        masks = [nn.functional.pad(batch.mask, (0, width - batch.mask.shape[1])) for batch in pending]  # [R, T] each
        weights = losses.token_weights(torch.cat(masks), options.loss_type, options.max_completion_length)  # [all R, T]
        if options.loss_type == "dapo" and dist.is_initialized():
            count = sum(mask.sum() for mask in masks).float()
            everyone = count.clone()
            dist.all_reduce(everyone)
            weights = weights * count.clamp(min=1) * dist.get_world_size() / everyone.clamp(min=1)
        meter: dict[str, list[Tensor]] = defaultdict(list)
        rollouts = max(sum(int(batch.actions.valid.sum()) for batch in pending), 1)
        terms: list[Callable[[], Tensor]] = []  # of the loss, each with a graph of its own
        for batch, weight in zip(pending, weights.split([len(mask) for mask in masks])):
            if iteration and self.trains_below:
                batch.encoded, batch.state = self.prompt(batch.inputs)
            if self.trains_masks and options.mask_weight:
                terms.append(partial(self.masks_loss, batch, rollouts, meter))
            worth = batch.mask.any(1)  # [R]
            if not options.beta and not options.entropy_coef:
                worth = worth & (batch.advantages != 0)  # the others have no gradient
            if self.trains_lvlm:
                for part, factor in self.parts(worth.nonzero()[:, 0]):
                    terms.append(partial(self.token_loss, batch, part, factor * weight, meter))
        for number, term in enumerate(terms, start=1):
            if self.is_sharded:
                self.trainer.strategy.expect_step(number == len(terms))
            self.manual_backward(term())
        totals = {name: torch.stack(values).sum() for name, values in meter.items()}
        tokens = totals.pop("tokens", None)
        for name in totals.keys() & PER_TOKEN:
            totals[name] = totals[name] / tokens.clamp(min=1)
        self.log_dict({f"train/{name}": value for name, value in totals.items()})

    def parts(self, chosen: Tensor) -> list[tuple[Tensor, float]]:
        """``chosen`` rollouts in micro-batches, each with a factor for its loss. Ranks that hold parts of the weights
        for each other need equally many, so the others repeat a rollout with factor 0."""
        parts = [(part, 1.0) for part in chosen.split(self.config.grpo.micro_batch)] if len(chosen) else []
        spare = chosen[:1] if len(chosen) else torch.zeros(1, dtype=torch.long, device=self.device)
        return parts + [(spare, 0.0)] * (self.most(len(parts)) - len(parts))

    def most(self, count: int) -> int:
        """The largest ``count`` of the ranks, where they must run the model equally often (:attr:`is_sharded`)."""
        if not self.is_sharded:
            return count
        found = torch.tensor(count, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def token_loss(self, batch: Batch, part: Tensor, weights: Tensor, meter: dict[str, list[Tensor]]) -> Tensor:
        """The policy loss over the tokens of the rollouts ``part`` [r], one micro-batch."""
        options, actions = self.config.grpo, batch.actions
        # Of all ranks: those whose answers are one token would call the layers less often than others.
        length = self.most(max(int(batch.mask[part].sum(1).max()), 1))
        columns = (actions.tokens, actions.log_probs, batch.mask, weights)
        padded = (nn.functional.pad(x[part], (0, length - x.shape[1])) for x in columns)
        tokens, old, mask, weight = padded  # [r, T] each
        index, keep = actions.index[part], actions.keep[part]  # [r], [r, S]
        log_probs, entropy = self.score(batch, index, keep, tokens, mask)  # [r, T] each
        per_token, clipped = losses.policy_loss(
            log_probs, old, batch.advantages[part, None], options.epsilon, options.epsilon_high
        )
        scored = (weight > 0).float()  # [r, T]
        meter["tokens"].append(scored.sum())
        meter["entropy"].append((scored * entropy.detach()).sum())
        meter["clip_ratio/low_mean"].append((scored * (clipped < 0)).sum())
        meter["clip_ratio/high_mean"].append((scored * (clipped > 0)).sum())
        meter["clip_ratio/region_mean"].append((scored * (clipped != 0)).sum())
        if options.beta:
            with torch.no_grad(), lora.disabled(self.lvlm):
                reference, _ = self.score(batch, index, keep, tokens, mask)
            kl = losses.k3(log_probs, reference)
            meter["kl"].append((scored * kl.detach()).sum())
            per_token = per_token + options.beta * kl
        if options.entropy_coef:
            per_token = per_token - options.entropy_coef * entropy
        loss = (weight * per_token).sum()  # []
        meter["policy_loss"].append(loss.detach())
        return loss

    def score(self, batch: Batch, index: Tensor, keep: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`glimpseprune.rollout.score` on the shared prefix, which runs again if anything below K trains."""
        encoded, state = batch.encoded, batch.state
        if self.trains_below:
            places, index = index.unique(return_inverse=True)
            if self.trains_vision:
                chosen = self.backbone.choose(batch.inputs.prompt, places)
                encoded = decoder.see(self.backbone, self.pruner, chosen)
                start = decoder.start(encoded)
            else:
                start = decoder.rows(decoder.start(encoded), places)
            state = decoder.approach(self.learner, start, self.pruner)
        # Looked at without the longest of the others, prompts may have less padding on their left.
        given = keep[:, -state.mask.shape[1] :] if self.replays_masks else None
        prompts = prefilled(self.learner, encoded, self.pruner, state, index, given)
        return score(self.learner, prompts, tokens, mask, self.config.grpo.temperature)

    def masks_loss(self, batch: Batch, rollouts: int, meter: dict[str, list[Tensor]]) -> Tensor:
        """The policy loss over the keep decisions of all rollouts."""
        options, actions = self.config.grpo, batch.actions
        visual = batch.state.visual[actions.index]  # [R, S]
        logits = at_columns(batch.state, self.pruner.logits(self.view(batch.encoded, batch.state)))
        logits = logits[actions.index] / options.mask_temperature  # [R, S]
        per_decision, clipped = losses.policy_loss(
            losses.keep_log_probs(logits, actions.keep) * visual,
            actions.keep_log_probs,
            batch.advantages[:, None],
            options.mask_epsilon,
        )
        entropy = losses.bernoulli_entropy(logits)  # [R, S]
        share = visual / visual.sum(1, keepdim=True) / rollouts  # weights that average over decisions
        meter["mask_entropy"].append((share * entropy).sum().detach())
        meter["mask_clip_ratio"].append((share * (clipped != 0)).sum())
        power = {"sum": 0.0, "sqrt": 0.5, "mean": 1.0}[options.mask_norm]
        weight = visual / visual.sum(1, keepdim=True) ** power / rollouts  # [R, S]
        loss = options.mask_weight * (weight * per_decision).sum()
        if options.mask_entropy_coef:
            loss = loss - options.mask_entropy_coef * (share * entropy).sum()
        meter["mask_loss"].append(loss.detach())
        return loss

    def average_gradients(self) -> None:
        """Mean over the processes, where each has gradients of its own."""
        if not dist.is_initialized() or self.is_sharded:
            return
        for parameter in self.trainable():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self.trainable()]
        flat = torch.cat([grad.flatten() for grad in grads])  # [all parameters], one exchange for them
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    @property
    def pad(self) -> Tensor:
        tokenizer = self.backbone.processor.tokenizer
        return torch.tensor(tokenizer.pad_token_id or tokenizer.eos_token_id or 0, device=self.device)

    # ---------------------------------------------------------------------------------------------------- reports

    def report(self, inputs: Inputs, encoded: Encoded, logits: Tensor | None, actions: Actions, std: Tensor) -> None:
        valid, lengths = actions.valid, actions.mask.sum(1).float()  # [R] each
        metrics = {
            "reward": actions.reward[valid].mean() if valid.any() else torch.zeros(()),
            "reward_std": std.mean(),
            "frac_reward_zero_std": (std < 1e-6).float().mean(),
            "invalid_rollouts": (~valid).float().mean(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": (~actions.ended).float().mean(),
            "completions/empty_ratio": actions.empty.float().mean(),
            "keep_ratio/sampled": 1 - actions.pruned.mean(),
        }
        for name, column, applies in zip(self.rewards.functions, actions.values.unbind(1), actions.applies.unbind(1)):
            known = column[~column.isnan()]
            metrics[f"rewards/{name}/none"] = (~applies).float().mean()
            metrics[f"rewards/{name}/missing"] = (applies & column.isnan()).float().mean()
            if len(known):
                metrics[f"rewards/{name}/mean"] = known.mean()
                metrics[f"rewards/{name}/std"] = known.std() if len(known) > 1 else torch.zeros(())
        if logits is not None:
            keep = self.pruner.mask(logits, encoded.counts)
            metrics["keep_ratio/greedy"] = torch.stack([x.float().mean() for x in keep.split(encoded.counts)]).mean()
            targets = self.targets(inputs, encoded.layouts)
            scores = mask_scores(keep, targets, inputs, encoded.counts)
            metrics |= {name: scores[name] for name in ("box_recall", "box_iou") if name in scores}
        shown = ("reward", "keep_ratio/sampled")
        size = len(inputs.samples)
        self.log_dict({f"train/{k}": v for k, v in metrics.items() if k not in shown}, batch_size=size)
        self.log_dict({f"train/{k}": v for k, v in metrics.items() if k in shown}, prog_bar=True, batch_size=size)

    @torch.no_grad()
    def validation_step(self, inputs: Inputs, index: int) -> None:
        """Greedy masks and greedy answers, as at inference; they end, and are cut, where those of the training are."""
        length, ends = self.config.grpo.max_completion_length, self.ends
        rollout = self.answers(inputs, self.greedy, length, **({"eos_token_id": ends} if ends else {}))
        samples = inputs.samples
        scores = self.rewards(
            self.texts(rollout),
            samples=samples,
            answers=[sample.answers for sample in samples],
            questions=[sample.question for sample in samples],
            kinds=[sample.kind for sample in samples],
            truncated=(~rollout.ended).tolist(),
        )
        real = torch.tensor([not sample.stands_in for sample in samples])
        values = {
            "score": scores.total[scores.valid & real],
            "clipped_ratio": (~rollout.ended).float().cpu()[real],
            "keep_ratio": torch.stack([keep.float().mean() for keep in rollout.keep]).cpu()[real],
        }
        targets = self.targets(inputs, rollout.layouts)
        keep = torch.cat(rollout.keep)
        values |= mask_values(keep, targets, inputs, [len(row) for row in rollout.keep])
        self.tally({name: (each.mean(), len(each)) for name, each in values.items()})
        self.remember(inputs)

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """The reward of greedy masks and answers, once the pruning's weight is ramped up."""
        if not {"score", "keep_ratio"} <= means.keys():
            return {}
        score, pruned = torch.tensor(means["score"]), torch.tensor(1 - means["keep_ratio"])
        return {"reward": float(score + self.pruning_reward(pruned, score, ramped=False))}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        for board in self.loggers:
            if self.said and hasattr(board, "log_text"):
                columns = ["question", "completion", "answer", "kept", "reward"]
                board.log_text("train/completions", columns, self.said[:32], step=self.global_step)


Stage = GRPOModule
