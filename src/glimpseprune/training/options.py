"""The knobs of a training run, as dataclasses: what ``python -m src.train`` reads, checks and saves.

Only plain data lives here, so that a typo in a config is answered before torch is imported. The options of a pruning
method are declared in that method's own file and merged under ``pruner.options``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from glimpseprune.config import MISSING, option


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
    pressure_kind: Literal["hinge", "mean"] = option("hinge", "hinge: relu(mean gate - target); mean: mean gate")
    target: float = option(0.05, "keep ratio at which the hinge lets go")
    pressure_from: float = option(0.0, "fraction of the steps before the pressure starts")
    pressure_ramp: float = option(0.4, "fraction of the steps over which it grows to its weight")
    value_until: float = option(0.3, "fraction of the steps with the `value` estimator; `stc` afterwards")
    dice: float = option(1.0, "weight of dice within the mask loss")
    bce: float = option(0.1, "weight of binary cross-entropy within the mask loss")


@dataclass
class OptimOptions:
    glimpse_lr: float = option(1e-3, "learning rate of the glimpse token")
    vip_lr: float = option(1e-3, "learning rate of the visual importance predictor")
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
    devices: str = option("auto", "devices per node")
    nodes: int = option(1, "nodes")
    strategy: str = option("auto", "auto, ddp, deepspeed_stage_2, ...")
    precision: str = option("32-true", "32-true, bf16-mixed, ...")
    accumulate: int = option(1, "batches per optimiser step")
    val_every: int = option(200, "optimiser steps between validations and checkpoints")
    log_every: int = option(10, "optimiser steps between log lines")


@dataclass
class TrainConfig:
    stage: str = option("glimpse", "what to train: a file of training/ that defines `Stage`")
    out: str = option(MISSING, "run folder")
    init_from: str | None = option(None, "run folder or published folder whose glimpse and VIP to start from")
    resume: bool = option(False, "continue the run in `out` from its last checkpoint")
    overwrite: bool = option(False, "replace the run in `out`")
    seed: int = option(0, "seed of initialisation, data order and dropout")
    backbone: BackboneOptions = option(BackboneOptions)
    pruner: PrunerOptions = option(PrunerOptions)
    data: DataOptions = option(DataOptions)
    loss: LossOptions = option(LossOptions)
    optim: OptimOptions = option(OptimOptions)
    trainer: TrainerOptions = option(TrainerOptions)
