"""Backbones: one file per LVLM, found by the ``model_type`` of a checkpoint's config.json.

Each file defines ``Backbone`` (a subclass of :class:`LVLM`) and ``matches(config) -> bool``. The language model, the
vision tower and the processor are transformers' own and unmodified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..config import UserError
from ..lookup import find, names
from ._lvlm import LVLM

Backbone = LVLM
"""The protocol all backbones follow (architecture: the only class that knows transformers' model classes)."""


def load(path: str | Path, **kwargs: Any) -> LVLM:
    """The backbone in a folder (or hub repository) ``path``; ``kwargs`` go to the ``load`` of its class.

    Raises:
        UserError: nothing there, or no file in this folder knows its model type.
    """
    config = PreTrainedConfig.get_config_dict(str(path))[0] if _is_there(str(path)) else {}
    if not config:
        raise UserError(f"no checkpoint at '{path}': expected a folder with config.json, or the id of a hub repository")
    for name in (known := names(__name__)):
        module = find(__name__, name)
        if module.matches(config):
            return module.Backbone.load(path, **kwargs)
    kind = config.get("model_type")
    raise UserError(f"'{path}' is a '{kind}' model, which no backbone knows (there are {', '.join(known)})")


def _is_there(path: str) -> bool:
    # A hub id has exactly one slash, and nothing of that name lies here.
    is_hub_id = path.count("/") == 1 and path[0] not in "/.~" and not Path(path).exists()
    return is_hub_id or (Path(path) / "config.json").is_file()
