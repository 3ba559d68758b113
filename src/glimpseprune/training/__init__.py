"""The stages of training: one file each, which defines ``Stage``, a :class:`._stage.StageModule`.

A new file is found by its name; nothing is registered. Lightning is imported with the stage that is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from glimpseprune import lookup, options

if TYPE_CHECKING:
    from glimpseprune.training._stage import StageModule


def stage_of(name: str) -> type[StageModule]:
    """The LightningModule of the stage ``name``; raises as :func:`require`."""
    return lookup.find(__name__, name).Stage


def require(name: str) -> None:
    """Raises UserError with the choices unless ``name`` is a stage; imports none."""
    lookup.choose(name, lookup.names(__name__), __name__)


# Addresses of before, which scripts of users have.
sys.modules[f"{__name__}.options"] = options


def __getattr__(name: str) -> Any:
    if name in ("slurm", "checkpoints", "strategies", "callbacks"):
        return import_module(f"glimpseprune.running.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
