"""Dynamic visual token pruning for large vision-language models: train it, use it, compare it.

>>> import glimpseprune
>>> model = glimpseprune.load("runs/demo")
>>> answer = model.ask(image, "number on the red tag?")
>>> answer.text, answer.kept, answer.total
>>> glimpseprune.plot.kept(image, answer).save("kept.png")
>>> inputs = model.prepare("number on the red tag?", image)  # the same, by hand
>>> rollout = model.generate(**inputs, max_new_tokens=8)
>>> rollout.texts, rollout.keep_maps()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glimpseprune import plot
    from glimpseprune.checkpoint import GlimpsePrune, load
    from glimpseprune.config import UserError

    __version__: str

__all__ = ["GlimpsePrune", "UserError", "__version__", "load", "plot"]

if __name__ != "glimpseprune":  # a second set of classes and registries, equal to the first in name only
    raise ImportError(f"import glimpseprune, not {__name__}: they would be two packages")


def __getattr__(name: str) -> Any:
    # Lazily, so that a command line with a typo is answered before torch has loaded.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("glimpseprune")
        except PackageNotFoundError:  # a checkout that was not installed
            return "0"
    if name == "UserError":
        from glimpseprune.config import UserError

        return UserError
    if name == "plot":
        return import_module("glimpseprune.plot")
    if name in __all__:
        from glimpseprune import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'glimpseprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
