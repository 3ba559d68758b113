"""The knobs of pretraining the tiny base, as dataclasses; read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from glimpseprune.config import option


@dataclass
class Lesson:
    size: int = option(336, "image side in pixels")
    min_tags: int = option(8, "fewest tags per image")
    max_tags: int = option(12, "most tags per image")
    batch: int = option(16, "images per step")
    steps: int = option(500, "optimiser steps")
    dense: bool = option(False, "vision tower only: crowded scenes, no questions")


@dataclass
class TinyConfig:
    """Shape of the tiny Qwen2.5-VL."""

    layers: int = option(6, "decoder layers")
    hidden: int = option(128, "decoder width")
    intermediate: int = option(384, "decoder SwiGLU width")
    heads: int = option(4, "decoder attention heads")
    kv_heads: int = option(2, "decoder key/value heads")
    rope_theta: float = option(100.0, "M-RoPE base; large bases make neighbouring columns indistinguishable")
    vision_layers: int = option(4, "vision-tower blocks")
    vision_hidden: int = option(96, "vision-tower width")
    vision_intermediate: int = option(256, "vision-tower SwiGLU width")
    vision_heads: int = option(4, "vision-tower heads")
    vision_full: list[int] = field(
        default_factory=lambda: [3], metadata={"help": "vision blocks with full attention; the others use windows"}
    )


@dataclass
class PretrainConfig:
    seed: int = option(0, "seed of weights and scenes")
    out: str = option("runs/pretrain", "run folder; the model is saved in <out>/model")
    model: TinyConfig = field(default_factory=TinyConfig)
    lessons: list[Lesson] = field(
        default_factory=lambda: [
            Lesson(size=224, min_tags=10, max_tags=10, steps=130, dense=True),
            Lesson(size=224, min_tags=4, max_tags=5, steps=300),
            Lesson(size=336, min_tags=8, max_tags=12, batch=12, steps=500),
        ],
        metadata={"help": "curriculum, one entry per lesson", "was": "stages"},
    )
    lr: float = option(2e-3, "AdamW learning rate")
    muon_lr: float = option(0.02, "Muon learning rate")
    weight_decay: float = option(0.02, "of both optimisers")
    warmup: int = option(50, "steps of linear warm-up")
    decay: float = option(0.25, "last fraction of the steps, over which the rates fall linearly to zero")
    aux: float = option(1.0, "weight of the vision-tower heads")
    bind: float = option(0.3, "weight of the decoder heads")
    aux_layer: int = option(2, "decoder layer whose input the binding heads read")
    prune_layer: int = option(2, "key dropout hides visual keys from question rows in layers above this one")
    key_dropout: float = option(0.4, "probability per image")
    key_dropout_from: float = option(0.8, "fraction of the steps after which key dropout starts")
    ring: int = option(1, "most rings of visual tokens kept around an evidence box in key dropout")
    val_every: int = option(100, "steps between validations")
    val_images: int = option(64, "validation images")
    workers: int = option(1, "processes that draw scenes")
    precision: str = option("32-true", "Lightning precision; bf16-mixed where the CPU or GPU computes in bf16")
    accelerator: str = option("auto", "Lightning accelerator")
    resume: str | None = option(None, "checkpoint to continue from, e.g. <out>/checkpoints/last.ckpt")
