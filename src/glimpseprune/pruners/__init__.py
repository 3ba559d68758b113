"""Pruning methods: one file each, which defines ``Options`` (a dataclass) and ``Pruner`` (an ``nn.Module``).

``Pruner(backbone, options)`` has ``stops``, ``needs`` and ``decide(view)``, see :class:`glimpseprune.decoder.Pruner`;
every default of ``Options`` works on every backbone on which the method has a meaning, and elsewhere it is refused by a
UserError. A method whose strength can be set to a budget also has ``to_budget(keep_ratio, backbone) -> dict``: the
options with which a fraction ``keep_ratio`` of the visual tokens is left for decoding. A new file is found by its name,
one elsewhere by its path (``pruner.name=./mine.py``); nothing is registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import merge_options
from glimpseprune.lookup import find

DEFINES = ("Options", "Pruner")
"""Names that every file has."""


def build(name: str, options: Mapping[str, Any] | Any, backbone: LVLM) -> nn.Module:
    """The pruner ``name`` for ``backbone``; ``options`` are merged strictly into its ``Options``.

    Raises:
        UserError: unknown name or option, or options that do not fit the backbone.
    """
    return find(__name__, name).Pruner(backbone, options_of(name, options))


def options_of(name: str, options: Mapping[str, Any] | Any) -> Any:
    """The checked ``Options`` of the pruner ``name``, without a backbone; raises as :func:`build`."""
    return merge_options(find(__name__, name).Options, options, "pruner.options")
