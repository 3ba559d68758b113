"""Export: ``python -m src.export ckpt=runs/stage2 out=exported``.

Writes one folder that is two things at once. An ordinary Hugging Face folder: ``from_pretrained`` of the plain class
loads the language model as the run left it, with adapters merged into its weights, beside its tokenizer and image
processor. And a run folder of ours: ``config.yaml``, whose ``backbone.path`` is the folder itself wherever that is
moved, and ``trainable.safetensors`` with nothing but the pruner, so that ``glimpseprune.load(out)`` and
``python -m src.evaluate ckpt=out`` work. What the language model was before is no longer in it: evaluated, its ``none``
is the trained model. Left out: quantised weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glimpseprune import config, files
from glimpseprune.config import MISSING, UserError, option
from glimpseprune.evaluate import BackboneChoice, checkpoint_config


@dataclass
class ExportConfig:
    ckpt: str = option(MISSING, "run folder, published folder or hub id")
    out: str = option(MISSING, "folder to write; must be new or empty")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "of what is written (default: as loaded)")
    backbone: BackboneChoice = option(BackboneChoice)


@config.entry(ExportConfig)
def main(cfg: ExportConfig) -> None:
    run(cfg)


def run(cfg: ExportConfig) -> None:
    """Merge, and write the folder.

    Raises:
        UserError: ``out`` is not empty, or as ``checkpoint.load``.
    """
    out = files.resolved(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} is there and not an empty folder: give another one")

    import torch

    from glimpseprune import checkpoint

    saved = checkpoint_config(cfg)
    model = checkpoint.load(cfg.ckpt, backbone=saved.backbone)
    lvlm = model.backbone.model
    if saved.lora is not None:
        from glimpseprune import lora

        lora.merge(lvlm)
    if cfg.dtype is not None:
        lvlm.to(dtype := getattr(torch, cfg.dtype))
        for section in (lvlm.config.text_config, lvlm.config.vision_config):  # save_pretrained forgets these
            section.dtype = dtype
    with files.folder(out) as partial:
        lvlm.save_pretrained(partial)
        save_processor(model.processor, partial)
        # It starts from nothing, and stores its weights in the very dtype that it wants.
        where = replace(saved.backbone, path=str(partial), dtype="auto")
        alone = replace(saved, init_from=None, lora=None, backbone=where)
        checkpoint.save(partial, alone, checkpoint.trained(model.pruner))
    print(config.as_typed(f"exported to {out}   evaluate it: python -m src.evaluate ckpt={out}"))


def save_processor(processor: Any, out: Path) -> None:
    """The processor, or its parts one by one where it lacks one (Qwen's has no video part here)."""
    parts = [getattr(processor, name) for name in processor.get_attributes()]
    whole = all(part is not None for part in parts)
    for part in [processor] if whole else [part for part in parts if part is not None]:
        part.save_pretrained(out)
