"""Find what a name in a config stands for: the folder (or the module) is the registry, nothing is registered.

A pruner, a backbone or a data source is a file in its package's folder; a metric or a reward is a function in its
module. Names beginning with an underscore are private. A module is imported only once it is asked for.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from glimpseprune.config import UserError


def names(package: str) -> list[str]:
    """Public modules in the folder of ``package``, sorted, none of them imported."""
    return sorted(info.name for info in iter_modules(import_module(package).__path__) if info.name[0] != "_")


def find(package: str, name: str) -> ModuleType:
    """The module ``name`` of ``package``; raises UserError with the choices where there is none."""
    choose(name, names(package), package)
    return import_module(f"{package}.{name}")


def functions(module: str, first: str) -> dict[str, Callable]:
    """Public functions defined in ``module`` whose first parameter is called ``first`` (which is what tells a metric
    from a function about metrics), by name."""
    public = inspect.getmembers(
        import_module(module),
        lambda x: inspect.isfunction(x) and x.__module__ == module and not x.__name__.startswith("_"),
    )
    return {name: found for name, found in public if next(iter(inspect.signature(found).parameters), "") == first}


def function(module: str, name: str, first: str) -> Callable:
    """The function ``name`` of :func:`functions`; raises UserError with the choices where there is none."""
    found = functions(module, first)
    return found[choose(name, found, module)]


def choose(name: str, choices: Iterable[str], where: str) -> str:
    """``name`` if it is one of ``choices``; else a UserError that names the nearest one and lists them all."""
    choices = sorted(choices)
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"no '{name}' in {where}: {hint}choices are {', '.join(choices)}")
