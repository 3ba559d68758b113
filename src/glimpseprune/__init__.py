"""Dynamic visual token pruning for large vision-language models: train it, use it, compare it.

>>> import glimpseprune
>>> model = glimpseprune.load("runs/demo")
>>> inputs = model.backbone.prepare(["number on the red tag?"], [[image]])
>>> rollout = model.generate(**inputs, max_new_tokens=8)
>>> rollout.tokens, rollout.keep_maps()
"""

from __future__ import annotations

from typing import Any

__all__ = ["GlimpsePrune", "load"]

if __name__ != "glimpseprune":  # a second set of classes and registries, equal to the first in name only
    raise ImportError(f"import glimpseprune, not {__name__}: they would be two packages")


def __getattr__(name: str) -> Any:
    # Lazily, so that a command line with a typo is answered before torch has loaded.
    if name in __all__:
        from glimpseprune import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'glimpseprune' has no attribute '{name}'")
