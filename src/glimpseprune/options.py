"""The knobs of a training run, as dataclasses: what ``python -m src.train`` reads, checks and saves.

Only plain data lives here, so that a typo in a config is answered before torch is imported. The options of a pruning
method are declared in that method's own file and merged under ``pruner.options``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from glimpseprune.config import FREE, MISSING, PLACE, SEEDS, START, UserError, option, without_secrets

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "32", "bf16", "16"]
"""Lightning's, without float64 and those that need a package more."""
LOGGERS = ("tensorboard", "csv", "wandb")
PARTS = ("glimpse", "private", "vip", "lora", "decoder", "vision")
PIXELS = 1 << 26
"""Of the largest image that is read."""
DEVICES = (
    r"auto|-1|[1-9]\d{0,3}|\[\s*\d{1,4}(\s*,\s*\d{1,4})*\s*\]|\d{1,4}(\s*,\s*\d{1,4})+|\d{1,4},",
    "auto, a number of devices, or a list such as [2,3]",
)

STRATEGIES = (
    r"auto|ddp|zero[123]|zero3_offload|.+\.json",
    "auto, ddp, zero1, zero2, zero3, zero3_offload, or a JSON file for DeepSpeed",
)


@dataclass
class BackboneOptions:
    path: str = option(MISSING, "Hugging Face folder or hub id of the LVLM", role=PLACE)
    dtype: Dtype = option("auto", "weights; auto: as stored")
    attention: Attention = option(
        "sdpa", "attention backend; auto: flash-attn where it is installed and can run, else sdpa"
    )
    min_pixels: int | None = option(
        None, "least pixels per image after resizing (default: the processor's)", least=1, most=PIXELS
    )
    max_pixels: int | None = option(
        None, "most pixels per image after resizing (default: the processor's)", least=1, most=PIXELS
    )

    def __post_init__(self) -> None:
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise UserError(f"backbone.min_pixels={self.min_pixels} is above backbone.max_pixels={self.max_pixels}")


@dataclass
class PrunerOptions:
    name: str = option("glimpse", "pruning method, a file of pruners/")
    options: dict[str, Any] = option({}, "options of the method, see its Options dataclass")


def _names(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield str(name)
        if isinstance(value, dict):
            yield from _names(value)


def _is_secret(name: str) -> bool:
    return "?" not in without_secrets(f"https://x?{name}=1")


@dataclass
class DataOptions:
    path: str = option(
        MISSING,
        "folder of shards, as `python -m src.prepare` writes it, or its address (http, https, s3, gs)",
        role=PLACE,
    )
    val_path: str | None = option(None, "folder of the validation samples (default: `path`)", role=PLACE)
    mix: dict[str, float] = option(
        {},
        "further folders to train on, each with its weight: the share of samples that come from there; `path` has 1, "
        "unless it is named here",
        above=0,
        most=1e6,
    )
    fields: dict[str, str] | None = option(
        None,
        "how to read shards that others wrote, without our manifest: where in a sample image, question, answers, boxes "
        "and kind stand, such as {image: jpg, question: json.question, answers: txt}; {} for these defaults",
    )
    prepare: dict[str, Any] | None = option(
        None, "what `python -m src.prepare` is given if `path` is not there", role=FREE
    )
    batch_size: int = option(16, "samples per device and step", least=1, most=65536)
    together: int = option(
        1,
        "consecutive training samples that stay together when they are shuffled: how many questions the shards have on "
        "an image, which then share what of a step does not depend on the question",
        least=1,
        most=65536,
    )
    bucket: int = option(
        0,
        "samples among which those of like numbers of visual tokens are put into one step, so that less is padded; "
        "0: they come as they are shuffled",
        least=0,
        most=10**7,
    )
    max_pixels: int | None = option(None, "most pixels of a sample, over its images", least=1, most=10**9)
    max_tokens: int | None = option(None, "most visual tokens of a sample, over its images", least=1, most=10**7)
    above: Literal["drop", "shrink"] = option(
        "drop", "what happens to samples above a limit: left out and counted, or their images made smaller"
    )
    val_samples: int = option(128, "samples per validation", least=1, most=10**9)
    workers: int = option(1, "loader processes per device", least=0, most=256, role=FREE)
    verify: bool = option(False, "check the shards' hashes before the start", role=FREE)
    cache: str | None = option(
        None, "folder for shards that come from an address, or unpacked (default: in the user's cache)", role=FREE
    )
    cache_gb: float = option(50.0, "GB of it at most; those used longest ago leave", above=0, most=1e6, role=FREE)
    storage: dict[str, Any] = option({}, "options of fsspec's filesystem, such as {anon: true}", role=FREE)

    def __post_init__(self) -> None:
        if found := next((name for name in _names(self.storage) if _is_secret(name)), None):
            raise UserError(
                f"data.storage.{found}: a config is saved with the run; give what is secret in the environment "
                "(AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc), or as a signature in the address"
            )


@dataclass
class LossOptions:
    """The KL stage is ``kl=1 pressure=1``; the published box recipe is ``kl=0 pressure=0 mask=1 answer=1``."""

    kl: float = option(1.0, "weight of KL(teacher || student) on the answer", least=0, most=1e6)
    pressure: float = option(1.0, "weight of the pruning pressure, once ramped up", least=0, most=1e6)
    mask: float = option(0.0, "weight of the mask loss (needs boxes)", least=0, most=1e6)
    answer: float = option(
        0.0, "weight of the cross-entropy of the answer through the glimpse, or private layers", least=0, most=1e6
    )
    answer_kl: float = option(
        0.0, "weight of KL(teacher || the answer through private layers): `early`", least=0, most=1e6
    )
    attention: float = option(
        0.0, "weight of KL(the teacher's attention to visual tokens || that of the look): `early`", least=0, most=1e6
    )
    attention_layer: int | None = option(
        None, "decoder layer whose attention that is, from K on; null: at two thirds of the depth", least=0, most=1000
    )
    pressure_kind: Literal["hinge", "budget", "mean"] = option(
        "hinge", "hinge: relu(mean gate - target) per sample; budget: the same per batch; mean: mean gate"
    )
    target: float = option(0.05, "keep ratio at which the hinge lets go", least=0, most=1)
    pressure_from: float = option(0.0, "fraction of the steps before the pressure starts", least=0, most=1)
    pressure_ramp: float = option(0.4, "fraction of the steps over which it grows to its weight", least=0, most=1)
    value_until: float = option(
        0.3, "fraction of the steps with the `value` estimator; `stc` afterwards", least=0, most=1
    )
    dropped: int | None = option(
        None,
        "under `stc` the student runs so many dropped tokens per sample, those nearest to coming back, and takes the "
        "others from the teacher; null: runs all",
        least=0,
        most=10**6,
    )
    exact: float = option(
        0.0, "fraction of the steps that run all of them and set the gradient right on average", least=0, most=1
    )
    dice: float = option(1.0, "weight of dice within the mask loss", least=0, most=1e6)
    bce: float = option(0.1, "weight of binary cross-entropy within the mask loss", least=0, most=1e6)

    def __post_init__(self) -> None:
        names = ("kl", "pressure", "mask", "answer", "answer_kl", "attention")
        if not any(getattr(self, name) for name in names):
            raise UserError(f"loss: {', '.join(names[:-1])} and {names[-1]} are all 0: there is nothing to train for")
        if self.exact and self.dropped is None:
            raise UserError("loss.exact: without loss.dropped every step is exact; leave it out")


@dataclass
class LoraOptions:
    rank: int = option(32, "rank of the adapters", least=1, most=4096)
    alpha: float = option(64.0, "their output is scaled by alpha / rank", above=0, most=1e6)
    dropout: float = option(
        0.0, "on their input; above 0 the policy that is updated is not quite the one sampled from", least=0, below=1
    )
    first_layer: int | None = option(
        None, "first decoder layer with adapters; null: the first one above the pruning", least=0, most=1000
    )
    modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linear layers that get one"
    )


@dataclass
class GRPOOptions:
    """Names and meanings are TRL's where TRL has them."""

    num_generations: int = option(8, "rollouts per prompt, G", least=2, most=4096)
    num_masks: int | None = option(
        None, "keep masks per prompt, each with G / num_masks answers (default: G)", least=1, most=4096
    )
    max_completion_length: int = option(64, "tokens per answer at most", least=1, most=32768)
    temperature: float = option(1.0, "of the sampled tokens", above=0, most=100)
    num_iterations: int = option(1, "updates per batch of rollouts", least=1, most=1000)
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon", least=0, most=1)
    epsilon_high: float | None = option(None, "and above 1 + epsilon_high (default: epsilon)", least=0, most=100)
    beta: float = option(0.0, "weight of the KL (k3) to the policy without adapters", least=0, most=1e6)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = option("dapo", "how per-token losses are averaged")
    scale_rewards: Literal["group", "batch", "none"] = option("group", "whose std divides the advantages")
    std_floor: float = option(0.1, "added to that std; a tiny one makes pruning run away", above=0, most=1e6)
    mask_truncated_completions: bool = option(False, "leave answers without an end out of the loss")
    entropy_coef: float = option(0.0, "bonus for the entropy of the tokens", least=-1e3, most=1e3)
    masks: Literal["sampled", "greedy", "boxes"] = option(
        "sampled", "drawn from the gate, as at inference, or the ground-truth boxes (the published recipe)", was="keep"
    )
    mask_temperature: float = option(1.0, "of the sampled masks", was="keep_temperature", above=0, most=100)
    mask_weight: float = option(1.0, "weight of the masks' policy loss", was="keep_weight", least=0, most=1e6)
    mask_norm: Literal["sum", "sqrt", "mean"] = option(
        "sqrt", "its decisions on V tokens are divided by 1, sqrt(V), V", was="keep_norm"
    )
    mask_epsilon: float = option(0.2, "clips the ratio of each decision", was="keep_epsilon", least=0, most=1)
    mask_entropy_coef: float = option(
        0.0, "bonus for the entropy of the decisions", was="keep_entropy_coef", least=-1e3, most=1e3
    )
    zero_variance: Literal["skip", "resample"] = option("skip", "what happens to groups whose rewards are all equal")
    resample_tries: int = option(2, "how often such a group is rolled out again", least=0, most=100)
    micro_batch: int = option(32, "rollouts per backward pass", least=1, most=65536, role=FREE)

    def __post_init__(self) -> None:
        if self.num_masks and self.num_generations % self.num_masks:
            raise UserError(f"grpo.num_masks={self.num_masks} must divide grpo.num_generations={self.num_generations}")


@dataclass
class JudgeOptions:
    base_url: str = option(
        MISSING,
        "an OpenAI-compatible server, such as http://localhost:8000/v1; a password or key in it is not saved",
        form=(r"https?://\S+", "an address that begins with http:// or https://"),
        role=FREE,
    )
    model: str = option(MISSING, "model name, as the server knows it")
    api_key_env: str = option(
        "OPENAI_API_KEY", "environment variable that holds the key, if the server wants one", role=FREE
    )
    concurrency: int = option(16, "requests under way at the same time", least=1, most=1024, role=FREE)
    timeout: float = option(
        60.0, "seconds per request, from its start to the last byte of the reply", above=0, most=3600, role=FREE
    )
    retries: int = option(
        3, "further attempts after 429, 5xx, a timeout or a lost connection", least=0, most=100, role=FREE
    )
    backoff: float = option(
        0.5, "seconds before the first further attempt, doubled each time", least=0, most=600, role=FREE
    )
    max_tokens: int = option(256, "tokens per reply; a reply cut off there is no verdict", least=1, most=65536)
    cache: str | None = option(
        None, "folder in which verdicts are remembered (an evaluation: verdicts/ in its own)", role=FREE
    )

    def __post_init__(self) -> None:
        if not self.api_key_env.isidentifier():  # most likely the key itself, which must not be told
            raise UserError("the judge's api_key_env must be the name of an environment variable, such as JUDGE_KEY")


@dataclass
class RewardOptions:
    """reward = sum of weight x function + pruning x (fraction of the visual tokens that was pruned)."""

    functions: dict[str, float] = option(
        {"exact_match": 1.0}, "functions of rewards.py or metrics.py -> weight", least=-1e6, most=1e6
    )
    pruning: float = option(0.5, "weight of the pruning ratio, once ramped up", least=0, most=1e6)
    pruning_ramp: float = option(0.0, "fraction of the steps over which it grows to that", least=0, most=1)
    pruning_when: Literal["correct", "always"] = option("correct", "correct: times the task's score")
    pruning_target: float | None = option(
        None, "pruning ratio above which there is no more reward for it", least=0, most=1
    )
    judge: JudgeOptions | None = option(None, "server for the reward `judge`")
    task: str | None = option(
        None, "the task that the reward `task` is about, a file of tasks/ (default: by the data set of each sample)"
    )


@dataclass
class GuardOptions:
    """When training stops by itself; the weights of the last validation in good order stay."""

    keep_floor: float = option(
        0.002, "keep ratio below which pruning has run away, if the reward falls too", least=0, most=1
    )
    empty: float = option(0.5, "fraction of empty answers that is a collapse, if the reward falls too", least=0, most=1)
    drop: float = option(
        0.3, "how far the smoothed reward must have fallen, as a fraction of its best", least=0, most=1
    )
    smoothing: float = option(0.9, "of the moving averages", least=0, below=1)


@dataclass
class WatchOptions:
    """What is measured while training goes on, and what ends it; a loss that is not finite always does."""

    peak_tflops: float | None = option(
        None, "of an accelerator, dense bf16, for perf/mfu (default: by its name)", above=0, most=1e6
    )
    explode: float | None = option(
        20.0,
        "stop when the loss (grpo: the gradient norm) is so many times what it usually is; null = never",
        above=1,
        most=1e9,
    )
    stall_minutes: float = option(
        30.0, "end a run in which nothing moves for so long, and name the rank; 0 = never", least=0, most=1e5
    )
    overlap: float | None = option(
        0.1,
        "stage 1: say so when val/mask_overlap stays above this under the whole pressure; null = never",
        least=0,
        most=1,
        role=FREE,
    )
    restarts: int = option(
        0,
        "stage 1: and begin anew with other weights, at most so many times, all steps again",
        least=0,
        most=100,
        role=FREE,
    )


@dataclass
class OptimOptions:
    glimpse_lr: float = option(1e-3, "learning rate of the glimpse token", least=0, most=10)
    private_lr: float = option(3e-4, "learning rate of a method's private layers", least=0, most=10)
    vip_lr: float = option(1e-3, "learning rate of the visual importance predictor", least=0, most=10)
    lora_lr: float = option(1e-4, "learning rate of the adapters", least=0, most=10)
    decoder_lr: float = option(1e-6, "learning rate of the decoder's own weights", least=0, most=10)
    vision_lr: float = option(1e-6, "learning rate of the vision tower's own weights", least=0, most=10)
    weight_decay: float = option(0.01, "AdamW weight decay (matrices only)", least=0, most=100)
    betas: tuple[float, float] = option((0.9, 0.98), "AdamW betas", least=0, below=1)
    warmup: int = option(20, "steps of linear warm-up", least=0, most=10**8)
    final_lr: float = option(0.05, "fraction of the rate that the cosine ends at", least=0, most=1)
    clip: float = option(1.0, "gradient norm is clipped to this; 0 = never", least=0, most=1e6)


@dataclass
class TrainerOptions:
    """Passed to Lightning's Trainer."""

    max_steps: int = option(1000, "optimiser steps", least=1, most=10**8, role=FREE)
    accelerator: Accelerator = option("auto", "what trains; auto: a GPU where there is one", role=FREE)
    devices: str = option("auto", "devices per node (under srun: one per task)", form=DEVICES, role=FREE)
    nodes: int = option(1, "nodes (under srun: those of the job)", least=1, most=4096, role=FREE)
    strategy: str = option(
        "auto", "how processes share the work; a JSON file is for DeepSpeed", form=STRATEGIES, role=FREE
    )
    precision: Precision = option("32-true", "Lightning's precision")
    accumulate: int = option(1, "batches per optimiser step", least=1, most=10**6)
    checkpointing: bool = option(
        False, "compute the decoder's activations again in the backward pass, and do not hold them: slower", role=FREE
    )
    compile: Literal["inductor", "aot_eager", "eager"] | None = option(
        None, "torch.compile of the layers from K on and of the predictor, by this backend; null: none", role=FREE
    )
    val_every: int = option(200, "optimiser steps between validations and checkpoints", least=1, most=10**8, role=FREE)
    log_every: int = option(10, "optimiser steps between log lines", least=1, most=10**8, role=FREE)
    logger: list[str] = option(["tensorboard"], f"what curves go to, beside metrics.jsonl, of {LOGGERS}", role=FREE)
    last_checkpoints: int = option(
        2,
        "how many of the last checkpoints stay, beside the best",
        was="keep_checkpoints",
        least=1,
        most=10**6,
        role=FREE,
    )


@dataclass
class TrainConfig:
    stage: str = option("glimpse", "what to train: a file of training/ that defines `Stage`")
    out: str = option(MISSING, "run folder", role=START)
    init_from: str | None = option(
        None, "run folder or published folder whose glimpse and VIP to start from", role=PLACE
    )
    resume: bool = option(
        False, "continue the run in `out` from its last checkpoint (a requeued job does so unasked)", role=START
    )
    overwrite: bool = option(False, "replace the run in `out`", role=START)
    seed: int = option(0, "seed of initialisation, data order and dropout", least=0, most=SEEDS)
    backbone: BackboneOptions = option(BackboneOptions)
    pruner: PrunerOptions = option(PrunerOptions)
    train: list[str] = option(
        ["glimpse", "vip"],
        "what trains, of glimpse, private (a method's own decoder layers), vip, lora, decoder (its layers), vision "
        "(tower and merger)",
    )
    lora: LoraOptions | None = option(None, "adapters on the decoder; {} for the defaults")
    data: DataOptions = option(DataOptions)
    loss: LossOptions = option(LossOptions)
    grpo: GRPOOptions = option(GRPOOptions)
    rewards: RewardOptions = option(RewardOptions)
    guard: GuardOptions = option(GuardOptions, role=FREE)
    watch: WatchOptions = option(WatchOptions, role=FREE)
    optim: OptimOptions = option(OptimOptions)
    trainer: TrainerOptions = option(TrainerOptions)

    def __post_init__(self) -> None:
        if wrong := [name for name in self.trainer.logger if name not in LOGGERS]:
            raise UserError(f"trainer.logger: no '{wrong[0]}', choose from {', '.join(LOGGERS)}")
        if wrong := [part for part in self.train if part not in PARTS]:
            raise UserError(f"train: no part '{wrong[0]}', choose from {', '.join(PARTS)}")
        if not self.train or len(set(self.train)) < len(self.train):
            raise UserError(f"train={self.train}: give one part or more of {', '.join(PARTS)}, each once")
