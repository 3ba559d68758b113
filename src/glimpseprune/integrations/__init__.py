"""Pruned models inside of other people's programs: one file each, which nothing here imports unasked.

The programs find them by entry points (setup.cfg); what a file needs beside the package is in ``requirements/``.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told of :mod:`.lmms_eval` (entry-point group ``lmms_eval.models``): where it is, unloaded."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("glimpseprune", chat_class_path=f"{__name__}.lmms_eval.GlimpsePrune")
