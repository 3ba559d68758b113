"""The knobs of pretraining the tiny base, as dataclasses; read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from glimpseprune.config import SEEDS, START, UserError, option
from glimpseprune.options import Accelerator, Precision


@dataclass
class Lesson:
    size: int = option(336, "image side in pixels", least=112, most=1344)
    min_tags: int = option(8, "fewest tags per image", least=1, most=12)
    max_tags: int = option(12, "most tags per image", least=1, most=12)
    batch: int = option(16, "images per step", least=1, most=4096)
    steps: int = option(500, "optimiser steps", least=1, most=10**8)
    dense: bool = option(False, "vision tower only: crowded scenes, no questions")

    def __post_init__(self) -> None:
        if self.size % 28 or self.min_tags > self.max_tags:
            raise UserError(
                f"lessons: size={self.size} min_tags={self.min_tags} max_tags={self.max_tags}: give a multiple of 28, "
                "and no more as min_tags than as max_tags"
            )


@dataclass
class TinyConfig:
    """Shape of the tiny Qwen2.5-VL."""

    layers: int = option(6, "decoder layers", least=1, most=128)
    hidden: int = option(128, "decoder width", least=1, most=8192)
    intermediate: int = option(384, "decoder SwiGLU width", least=1, most=32768)
    heads: int = option(4, "decoder attention heads", least=1, most=128)
    kv_heads: int = option(2, "decoder key/value heads", least=1, most=128)
    rope_theta: float = option(
        100.0, "M-RoPE base; large bases make neighbouring columns indistinguishable", above=1, most=1e12
    )
    vision_layers: int = option(4, "vision-tower blocks", least=1, most=128)
    vision_hidden: int = option(96, "vision-tower width", least=1, most=8192)
    vision_intermediate: int = option(256, "vision-tower SwiGLU width", least=1, most=32768)
    vision_heads: int = option(4, "vision-tower heads", least=1, most=128)
    vision_full: list[int] = option([3], "vision blocks with full attention; the others use windows", least=0, most=127)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.hidden % (2 * self.heads):
            raise UserError(
                f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}, and twice that "
                f"model.hidden={self.hidden}"
            )
        if self.vision_hidden % (4 * self.vision_heads):
            wanted = f"a multiple of 4 x model.vision_heads={self.vision_heads}"
            raise UserError(f"model.vision_hidden={self.vision_hidden}: give {wanted}")
        if max(self.vision_full, default=0) >= self.vision_layers:
            raise UserError(f"model.vision_full={self.vision_full}: the blocks are 0 to {self.vision_layers - 1}")


@dataclass
class PretrainConfig:
    seed: int = option(0, "seed of weights and scenes", least=0, most=SEEDS)
    out: str = option("runs/pretrain", "run folder; the model is saved in <out>/model", role=START)
    model: TinyConfig = field(default_factory=TinyConfig)
    lessons: list[Lesson] = field(
        default_factory=lambda: [
            Lesson(size=224, min_tags=10, max_tags=10, steps=130, dense=True),
            Lesson(size=224, min_tags=4, max_tags=5, steps=300),
            Lesson(size=336, min_tags=8, max_tags=12, batch=12, steps=500),
        ],
        metadata={"help": "curriculum, one entry per lesson", "was": "stages"},
    )
    lr: float = option(2e-3, "AdamW learning rate", least=0, most=10)
    muon_lr: float = option(0.02, "Muon learning rate", least=0, most=10)
    weight_decay: float = option(0.02, "of both optimisers", least=0, most=100)
    warmup: int = option(50, "steps of linear warm-up", least=0, most=10**8)
    decay: float = option(
        0.25, "last fraction of the steps, over which the rates fall linearly to zero", least=0, most=1
    )
    aux: float = option(1.0, "weight of the vision-tower heads", least=0, most=1e6)
    bind: float = option(0.3, "weight of the decoder heads", least=0, most=1e6)
    aux_layer: int = option(2, "decoder layer whose input the binding heads read", least=0, most=127)
    prune_layer: int = option(
        2, "key dropout hides visual keys from question rows in layers above this one", least=0, most=127
    )
    key_dropout: float = option(0.4, "probability per image", least=0, most=1)
    key_dropout_from: float = option(0.8, "fraction of the steps after which key dropout starts", least=0, most=1)
    ring: int = option(1, "most rings of visual tokens kept around an evidence box in key dropout", least=0, most=1000)
    val_every: int = option(100, "steps between validations", least=1, most=10**8)
    val_images: int = option(64, "validation images", least=1, most=10**6)
    workers: int = option(1, "processes that draw scenes", least=0, most=256)
    precision: Precision = option("32-true", "Lightning's; bf16-mixed where the CPU or GPU computes in bf16")
    accelerator: Accelerator = option("auto", "what trains; auto: a GPU where there is one")
    resume: str | None = option(None, "checkpoint to continue from, e.g. <out>/checkpoints/last.ckpt", role=START)
    overwrite: bool = option(False, "replace the pretraining in `out`", role=START)

    def __post_init__(self) -> None:
        if not self.lessons:
            raise UserError("lessons: give one at least")
        if self.aux_layer >= self.model.layers:
            raise UserError(f"aux_layer={self.aux_layer}: the model has layers 0 to {self.model.layers - 1}")
