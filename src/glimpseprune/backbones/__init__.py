"""Backbones: one file per LVLM, found by the ``model_type`` of a checkpoint's config.json.

Each file defines ``Backbone`` (a subclass of :class:`LVLM`), ``MODEL_TYPE`` and ``PUBLISHED``: sizes of published
models by the name that folders and hub ids have in lower case, as keyword arguments of their config, so that a training
can be planned before anything is downloaded. The language model, the vision tower and the processor are transformers'
own and unmodified.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from glimpseprune import hub, resources
from glimpseprune.backbones._lvlm import ALONGSIDE as ALONGSIDE
from glimpseprune.backbones._lvlm import LVLM
from glimpseprune.backbones._lvlm import dtype_of as dtype_of
from glimpseprune.backbones._lvlm import require_attention as require_attention
from glimpseprune.backbones._seen import Seen as Seen
from glimpseprune.config import UserError
from glimpseprune.cost import Shapes
from glimpseprune.lookup import find, names
from glimpseprune.types import Layout

Backbone = LVLM
"""The protocol all backbones follow (architecture: the only class that knows transformers' model classes)."""


def load(path: str | Path, **kwargs: Any) -> LVLM:
    """The backbone in a folder (or hub repository) ``path``; ``kwargs`` go to the ``load`` of its class.

    Raises:
        UserError: nothing there, no file in this folder knows its model type, or as ``load`` of its class.
    """
    kind = _module_for(_config(hub.folder(path, hub.SMALL)), path).Backbone
    return kind.load(hub.folder(path), **kwargs)


def architecture(path: str | Path) -> PreTrainedConfig:
    """The Hugging Face config of the backbone in a folder or hub repository ``path``; raises as :func:`load`."""
    folder = hub.folder(path, hub.SMALL)
    _module_for(_config(folder), path)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever a value of it leads to
        raise UserError(f"'{path}': config.json does not describe a model: {_line(error)}") from error
    if config.dtype is None and (files := sorted(folder.glob("*.safetensors"))):
        with safe_open(files[0], "pt") as weights:  # where from_pretrained looks, too
            config.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return config


def skeleton(architecture: PreTrainedConfig, dtype: str = "auto") -> LVLM:
    """A backbone without storage or processor, on the meta device: everything of it but numbers.

    Raises:
        UserError: no backbone knows this model type, or no such ``dtype``.
    """
    found = dtype_of(dtype)
    found = dtype_of(architecture.dtype or "float32") if found == "auto" else found
    kind = _module_of(architecture).Backbone
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            architecture, dtype=getattr(torch, found), attn_implementation="sdpa"
        )
        return kind(model.requires_grad_(False).eval())


def published() -> dict[str, Callable[[], PreTrainedConfig]]:
    """Names of published models, and what makes the config of each, as far as sizes go."""

    def config(module: ModuleType, sizes: Mapping[str, Any]) -> PreTrainedConfig:
        made = AutoConfig.for_model(module.MODEL_TYPE, **copy.deepcopy(sizes))
        made.dtype = "bfloat16"
        return made

    modules = [find(__name__, name) for name in names(__name__)]
    return {name: partial(config, module, sizes) for module in modules for name, sizes in module.PUBLISHED.items()}


def describe(architecture: PreTrainedConfig) -> Shapes:
    """The matrices of a model with this config."""
    return _module_for({"model_type": architecture.model_type}, architecture.name_or_path).Backbone.describe(
        architecture
    )


def layout_of(architecture: PreTrainedConfig, size: tuple[int, int], *bounds: int | None) -> Layout:
    """Of an image of ``size`` = (width, height) pixels, whose least and most pixels have ``bounds``."""
    return _module_of(architecture).Backbone.layout_of(architecture, size, *bounds)


def _module_of(architecture: PreTrainedConfig) -> ModuleType:
    return _module_for({"model_type": architecture.model_type}, architecture.name_or_path)


def _module_for(config: Mapping[str, Any], path: str | Path) -> ModuleType:
    kind = config.get("model_type")
    for name in (known := names(__name__)):
        if kind == (module := find(__name__, name)).MODEL_TYPE:
            return module
    raise UserError(f"'{path}' is a '{kind}' model, which no backbone knows (there are {', '.join(known)})")


def _config(folder: Path) -> dict[str, Any]:
    said = "expected a folder with config.json, or the id of a hub repository"
    try:
        config = PreTrainedConfig.get_config_dict(str(folder))[0] if (folder / "config.json").is_file() else {}
    except Exception as error:  # what is no JSON, or not of the kind that it should be
        config, said = {}, f"config.json: {_line(error)}"
    if not config and (folder / resources.CONFIG).is_file():
        raise UserError(f"'{folder}' is a run folder, not a backbone: give it as ckpt")
    if not config:
        raise UserError(f"no checkpoint at '{folder}': {said}")
    if config.get("quantization_config"):
        raise UserError(f"'{folder}' is quantised, which is not supported: take the model in bfloat16 or float16")
    return config


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
