"""The knobs of a training run, as dataclasses: what ``python -m src.train`` reads, checks and saves.

Only plain data lives here, so that a typo in a config is answered before torch is imported. The options of a pruning
method are declared in that method's own file and merged under ``pruner.options``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from glimpseprune.config import MISSING, UserError, option


@dataclass
class BackboneOptions:
    path: str = option(MISSING, "Hugging Face folder or hub id of the LVLM")
    dtype: str = option("auto", "weights: auto (as stored), float32, bfloat16, float16")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "attention backend")
    min_pixels: int | None = option(None, "least pixels per image after resizing (default: the processor's)")
    max_pixels: int | None = option(None, "most pixels per image after resizing (default: the processor's)")


@dataclass
class PrunerOptions:
    name: str = option("glimpse", "pruning method, a file of pruners/")
    options: dict[str, Any] = option({}, "options of the method, see its Options dataclass")


@dataclass
class DataOptions:
    path: str = option(MISSING, "folder of shards, as `python -m src.prepare` writes it")
    prepare: dict[str, Any] | None = option(None, "what `python -m src.prepare` is given if `path` is not there")
    batch_size: int = option(16, "samples per device and step")
    val_samples: int = option(128, "samples per validation")
    workers: int = option(1, "loader processes per device")
    verify: bool = option(False, "check the shards' hashes before the start")


@dataclass
class LossOptions:
    """The KL stage is ``kl=1 pressure=1``; the published box recipe is ``kl=0 pressure=0 mask=1 answer=1``."""

    kl: float = option(1.0, "weight of KL(teacher || student) on the answer")
    pressure: float = option(1.0, "weight of the pruning pressure, once ramped up")
    mask: float = option(0.0, "weight of the mask loss (needs boxes)")
    answer: float = option(0.0, "weight of the cross-entropy of the answer through the glimpse")
    pressure_kind: Literal["hinge", "budget", "mean"] = option(
        "hinge", "hinge: relu(mean gate - target) per sample; budget: the same per batch; mean: mean gate"
    )
    target: float = option(0.05, "keep ratio at which the hinge lets go")
    pressure_from: float = option(0.0, "fraction of the steps before the pressure starts")
    pressure_ramp: float = option(0.4, "fraction of the steps over which it grows to its weight")
    value_until: float = option(0.3, "fraction of the steps with the `value` estimator; `stc` afterwards")
    dice: float = option(1.0, "weight of dice within the mask loss")
    bce: float = option(0.1, "weight of binary cross-entropy within the mask loss")


@dataclass
class LoraOptions:
    rank: int = option(32, "rank of the adapters")
    alpha: float = option(64.0, "their output is scaled by alpha / rank")
    dropout: float = option(0.0, "on their input; above 0 the policy that is updated is not quite the one sampled from")
    first_layer: int | None = option(None, "first decoder layer with adapters; null: the first one above the pruning")
    modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linear layers that get one"
    )


@dataclass
class GRPOOptions:
    """Names and meanings are TRL's where TRL has them."""

    num_generations: int = option(8, "rollouts per prompt, G")
    num_masks: int | None = option(None, "keep masks per prompt, each with G / num_masks answers (default: G)")
    max_completion_length: int = option(64, "tokens per answer at most")
    temperature: float = option(1.0, "of the sampled tokens")
    num_iterations: int = option(1, "updates per batch of rollouts")
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = option(None, "and above 1 + epsilon_high (default: epsilon)")
    beta: float = option(0.0, "weight of the KL (k3) to the policy without adapters")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = option("dapo", "how per-token losses are averaged")
    scale_rewards: Literal["group", "batch", "none"] = option("group", "whose std divides the advantages")
    std_floor: float = option(0.1, "added to that std; a tiny one makes pruning run away")
    mask_truncated_completions: bool = option(False, "leave answers without an end out of the loss")
    entropy_coef: float = option(0.0, "bonus for the entropy of the tokens")
    masks: Literal["sampled", "greedy", "boxes"] = option(
        "sampled", "drawn from the gate, as at inference, or the ground-truth boxes (the published recipe)", was="keep"
    )
    mask_temperature: float = option(1.0, "of the sampled masks", was="keep_temperature")
    mask_weight: float = option(1.0, "weight of the masks' policy loss", was="keep_weight")
    mask_norm: Literal["sum", "sqrt", "mean"] = option(
        "sqrt", "its decisions on V tokens are divided by 1, sqrt(V), V", was="keep_norm"
    )
    mask_epsilon: float = option(0.2, "clips the ratio of each decision", was="keep_epsilon")
    mask_entropy_coef: float = option(0.0, "bonus for the entropy of the decisions", was="keep_entropy_coef")
    zero_variance: Literal["skip", "resample"] = option("skip", "what happens to groups whose rewards are all equal")
    resample_tries: int = option(2, "how often such a group is rolled out again")
    micro_batch: int = option(32, "rollouts per backward pass")


@dataclass
class JudgeOptions:
    base_url: str = option(MISSING, "an OpenAI-compatible server, such as http://localhost:8000/v1")
    model: str = option(MISSING, "model name, as the server knows it")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the key, if the server wants one")
    concurrency: int = option(16, "requests under way at the same time")
    timeout: float = option(60.0, "seconds per request, from its start to the last byte of the reply")
    retries: int = option(3, "further attempts after 429, 5xx, a timeout or a lost connection")
    backoff: float = option(0.5, "seconds before the first further attempt, doubled each time")
    max_tokens: int = option(256, "tokens per reply; a reply cut off there is no verdict")

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://", MISSING)):
            raise UserError(f"the judge's base_url must begin with http:// or https://, got {self.base_url!r}")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"the judge's {name} must be at least {least}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise UserError(f"the judge's timeout must be positive, got {self.timeout}")


@dataclass
class RewardOptions:
    """reward = sum of weight x function + pruning x (fraction of the visual tokens that was pruned)."""

    functions: dict[str, float] = option({"exact_match": 1.0}, "functions of rewards.py or metrics.py -> weight")
    pruning: float = option(0.5, "weight of the pruning ratio, once ramped up")
    pruning_ramp: float = option(0.0, "fraction of the steps over which it grows to that")
    pruning_when: Literal["correct", "always"] = option("correct", "correct: times the task's score")
    pruning_target: float | None = option(None, "pruning ratio above which there is no more reward for it")
    judge: JudgeOptions | None = option(None, "server for the reward `judge`")


@dataclass
class GuardOptions:
    """When training stops by itself; the weights of the last validation in good order stay."""

    keep_floor: float = option(0.002, "keep ratio below which pruning has run away, if the reward falls too")
    empty: float = option(0.5, "fraction of empty answers that is a collapse, if the reward falls too")
    drop: float = option(0.3, "how far the smoothed reward must have fallen, as a fraction of its best")
    smoothing: float = option(0.9, "of the moving averages")


@dataclass
class WatchOptions:
    """What is measured while training goes on, and what ends it; a loss that is not finite always does."""

    peak_tflops: float | None = option(None, "of an accelerator, dense bf16, for perf/mfu (default: by its name)")
    explode: float | None = option(
        20.0, "stop when the loss (grpo: the gradient norm) is so many times what it usually is; null = never"
    )
    overlap: float | None = option(
        0.1, "stage 1: say so when val/mask_overlap stays above this under the whole pressure; null = never"
    )
    restarts: int = option(0, "stage 1: and begin anew with other weights, at most so many times, all steps again")
    stall_minutes: float = option(30.0, "end a run in which nothing moves for so long, and name the rank; 0 = never")


@dataclass
class OptimOptions:
    glimpse_lr: float = option(1e-3, "learning rate of the glimpse token")
    vip_lr: float = option(1e-3, "learning rate of the visual importance predictor")
    lora_lr: float = option(1e-4, "learning rate of the adapters")
    decoder_lr: float = option(1e-6, "learning rate of the decoder's own weights")
    vision_lr: float = option(1e-6, "learning rate of the vision tower's own weights")
    weight_decay: float = option(0.01, "AdamW weight decay (matrices only)")
    betas: list[float] = option([0.9, 0.98], "AdamW betas")
    warmup: int = option(20, "steps of linear warm-up")
    final_lr: float = option(0.05, "fraction of the rate that the cosine ends at")
    clip: float = option(1.0, "gradient norm is clipped to this; 0 = never")


@dataclass
class TrainerOptions:
    """Passed to Lightning's Trainer."""

    max_steps: int = option(1000, "optimiser steps")
    accelerator: str = option("auto", "auto, cpu, gpu")
    devices: str = option("auto", "devices per node (under srun: one per task)")
    nodes: int = option(1, "nodes (under srun: those of the job)")
    strategy: str = option("auto", "auto, ddp, zero1, zero2, zero3, zero3_offload, or a JSON file for DeepSpeed")
    precision: str = option("32-true", "32-true, bf16-mixed, ...")
    accumulate: int = option(1, "batches per optimiser step")
    val_every: int = option(200, "optimiser steps between validations and checkpoints")
    log_every: int = option(10, "optimiser steps between log lines")
    last_checkpoints: int = option(2, "how many of the last checkpoints stay, beside the best", was="keep_checkpoints")


@dataclass
class TrainConfig:
    stage: str = option("glimpse", "what to train: a file of training/ that defines `Stage`")
    out: str = option(MISSING, "run folder")
    init_from: str | None = option(None, "run folder or published folder whose glimpse and VIP to start from")
    resume: bool = option(False, "continue the run in `out` from its last checkpoint (a requeued job does so unasked)")
    overwrite: bool = option(False, "replace the run in `out`")
    seed: int = option(0, "seed of initialisation, data order and dropout")
    backbone: BackboneOptions = option(BackboneOptions)
    pruner: PrunerOptions = option(PrunerOptions)
    train: list[str] = option(
        ["glimpse", "vip"], "what trains, of glimpse, vip, lora, decoder (its layers), vision (tower and merger)"
    )
    lora: LoraOptions | None = option(None, "adapters on the decoder; {} for the defaults")
    data: DataOptions = option(DataOptions)
    loss: LossOptions = option(LossOptions)
    grpo: GRPOOptions = option(GRPOOptions)
    rewards: RewardOptions = option(RewardOptions)
    guard: GuardOptions = option(GuardOptions)
    watch: WatchOptions = option(WatchOptions)
    optim: OptimOptions = option(OptimOptions)
    trainer: TrainerOptions = option(TrainerOptions)
