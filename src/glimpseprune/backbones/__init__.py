"""Backbones: one file per LVLM, found by the ``model_type`` of a checkpoint's config.json.

Each file defines ``Backbone`` (a subclass of :class:`LVLM`) and ``matches(config) -> bool``. The language model, the
vision tower and the processor are transformers' own and unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from glimpseprune.backbones._lvlm import LVLM
from glimpseprune.backbones._lvlm import require_attention as require_attention
from glimpseprune.config import UserError
from glimpseprune.lookup import find, names

Backbone = LVLM
"""The protocol all backbones follow (architecture: the only class that knows transformers' model classes)."""


def load(path: str | Path, **kwargs: Any) -> LVLM:
    """The backbone in a folder (or hub repository) ``path``; ``kwargs`` go to the ``load`` of its class.

    Raises:
        UserError: nothing there, or no file in this folder knows its model type.
    """
    return _class_for(_config(path), path).load(path, **kwargs)


def architecture(path: str | Path) -> PreTrainedConfig:
    """The Hugging Face config of the backbone in a folder or hub repository ``path``; raises as :func:`load`."""
    _class_for(_config(path), path)
    config = AutoConfig.from_pretrained(path)
    if config.dtype is None and (files := sorted(Path(path).glob("*.safetensors"))):
        with safe_open(files[0], "pt") as weights:  # where from_pretrained looks, too
            config.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return config


def skeleton(architecture: PreTrainedConfig, dtype: str = "auto") -> LVLM:
    """A backbone without storage or processor, on the meta device: everything of it but numbers.

    Raises:
        UserError: no backbone knows this model type, or no such ``dtype``.
    """
    found = (architecture.dtype or torch.float32) if dtype == "auto" else dtype
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"backbone.dtype={dtype}: give auto, float32, bfloat16 or float16")
    kind = _class_for({"model_type": architecture.model_type}, architecture.name_or_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=found, attn_implementation="sdpa")
        return kind(model.requires_grad_(False).eval())


def _class_for(config: Mapping[str, Any], path: str | Path) -> type[LVLM]:
    for name in (known := names(__name__)):
        module = find(__name__, name)
        if module.matches(config):
            return module.Backbone
    kind = config.get("model_type")
    raise UserError(f"'{path}' is a '{kind}' model, which no backbone knows (there are {', '.join(known)})")


def _config(path: str | Path) -> dict[str, Any]:
    said = "expected a folder with config.json, or the id of a hub repository"
    try:
        config = PreTrainedConfig.get_config_dict(str(path))[0] if _is_there(str(path)) else {}
    except (OSError, ValueError) as error:
        config, said = {}, str(error).strip().splitlines()[0]
    if not config:
        raise UserError(f"no checkpoint at '{path}': {said}")
    return config


def _is_there(path: str) -> bool:
    # A hub id has exactly one slash, and nothing of that name lies here.
    is_hub_id = path.count("/") == 1 and path[0] not in "/.~" and not Path(path).exists()
    return is_hub_id or (Path(path) / "config.json").is_file()
