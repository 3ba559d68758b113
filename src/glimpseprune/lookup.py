"""Find what a name in a config stands for: the folder (or the module) is the registry, nothing is registered.

A pruner, a backbone or a data source is a file in its package's folder; a metric or a reward is a function in its
module. Names beginning with an underscore are private. A module is imported only once it is asked for. A name that ends
in ``.py`` is the path of a file of the user's own, which must define what the package says in ``DEFINES``.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pkgutil import iter_modules
from types import ModuleType

from glimpseprune.config import UserError


def names(package: str) -> list[str]:
    """Public modules in the folder of ``package``, sorted, none of them imported."""
    return sorted(info.name for info in iter_modules(import_module(package).__path__) if info.name[0] != "_")


def find(package: str, name: str) -> ModuleType:
    """The module ``name`` of ``package``, or the file ``name``; raises UserError with the choices where there is none,
    or with what the file does not define."""
    if not is_file(name):
        choose(name, names(package), package)
        return import_module(f"{package}.{name}")
    module = _load(name)
    if lacking := [each for each in getattr(import_module(package), "DEFINES", ()) if not hasattr(module, each)]:
        raise UserError(f"{name} defines no {' and no '.join(lacking)}: see {package}, whose files it is like")
    return module


def is_file(name: str) -> bool:
    """Whether a name is the path of a file of the user's own, which is run when it is looked up."""
    return name.endswith(".py")


def _load(path: str) -> ModuleType:
    """The file as a module, run once."""
    real = os.path.realpath(path)
    if not os.path.isfile(real):
        raise UserError(f"there is no file '{path}' (seen from {os.getcwd()})")
    name = f"own_{blake2b(os.fsencode(real), digest_size=8).hexdigest()}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, real)
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


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
