"""Where a name in a config leads: to a folder here, beside the run that names it, or into the package.

``shipped/`` holds what the package brings along: configs, DeepSpeed's JSONs, the embedded LVLM, by their names in a
checkout. In the repository it is links to ``conf/`` and into ``data/``, so that nothing is there twice; in a wheel,
files. To ship more, link it there.

A run's config.yaml names folders so that the run may be moved, and evaluated from anywhere: what is shipped by that
name, others relative to the run folder, with a dot in front, and ids of the hub as they are. Names without a dot in
front are those of the working directory, as older runs have them. Where a run was moved without its folders, the places
that its weights remember are looked at last.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("shipped")
CONFIG, TRAINABLE = "config.yaml", "trainable.safetensors"
"""Of a run folder."""
PLACES = ("backbone.path", "data.path", "init_from")
"""Keys of a run's config whose values are folders."""


def find(path: str | Path) -> str:
    """``path`` if that is there, seen from the working directory (``~`` is the home folder); else where the package
    brings what is called so, such as ``conf/stage1.yaml`` or ``data/tiny-qwen2_5_vl``; else ``path`` again, whose
    absence is not told here."""
    try:
        path = Path(path).expanduser() if str(path).startswith("~") else path
    except RuntimeError:  # no such user
        return str(path)
    shipped = SHIPPED / path
    inside = shipped.is_relative_to(SHIPPED) and ".." not in shipped.parts
    return str(shipped if inside and there(shipped) and not there(path) else path)


def there(path: str | Path) -> bool:
    """Whether something of that name is there; what no name can be is not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def stored(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The ``values`` of a config as config.yaml of the run ``folder`` says them."""
    values = copy.deepcopy(dict(values))
    for section, key in _places(values):
        section[key] = _stored(section[key], Path(folder).resolve())
    return values


def opened(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The other way round: ``values`` that were read in the run ``folder``, for use in the working directory. What is
    not there stays as it is."""
    values, folder = copy.deepcopy(dict(values)), Path(folder).resolve()
    for place, (section, key) in zip(PLACES, _places(values, every=True)):
        text = section.get(key)
        if not isinstance(text, str) or not text.startswith("."):
            continue
        found = Path(os.path.normpath(folder / text))
        if not there(found) and not there(text):
            found = Path(remembered(folder).get(place, found))
        if there(found):
            section[key] = _shown(found)
    return values


def places(values: Mapping[str, Any]) -> dict[str, str]:
    """The absolute places of the folders that a config names, of those that are there and not of the package."""
    found = {}
    for place, (section, key) in zip(PLACES, _places(values, every=True)):
        text = section.get(key)
        if isinstance(text, str) and there(path := find(text)) and _shipped(Path(path).resolve()) is None:
            found[place] = str(Path(path).resolve())
    return found


def remembered(folder: Path) -> dict[str, str]:
    """The :func:`places` that the weights of a run folder remember."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / TRAINABLE, "np") as weights:
            return weights.metadata() or {}
    except (OSError, SafetensorError):  # which whoever needs the weights will say
        return {}


def _places(values: dict[str, Any], every: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the texts of PLACES stand; ``every``: also where there is none."""
    for place in PLACES:
        section, _, key = place.rpartition(".")
        inside = values.get(section) if section else values
        inside = inside if isinstance(inside, dict) else {}
        if every or isinstance(inside.get(key), str):
            yield inside, key


def _stored(text: str, folder: Path) -> str:
    if not there(path := find(text)):
        return text
    real = Path(path).resolve()
    if (name := _shipped(real)) is not None:
        return name
    relative = os.path.relpath(real, folder)
    return relative if relative.startswith(".") else f"./{relative}"


def _shipped(real: Path) -> str | None:
    """What the package calls this folder, if it brings it."""
    names = (entry for entry in SHIPPED.glob("*/*") if entry.is_dir() and entry.resolve() == real)
    return next((str(entry.relative_to(SHIPPED)) for entry in names), None)


def _shown(path: Path) -> str:
    """Relative where it lies in the working directory, as one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
