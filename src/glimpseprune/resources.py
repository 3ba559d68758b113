"""Where a name in a config leads: to a folder here, beside the run that names it, or into the package.

``shipped/`` holds what the package brings along: configs, DeepSpeed's JSONs, the embedded LVLM, by their names in a
checkout. In the repository it is links to ``conf/`` and into ``data/``, so that nothing is there twice; in a wheel,
files. To ship more, link it there.

A run's config.yaml names folders so that the run may be moved, and evaluated from anywhere: what is shipped by that
name, others relative to the run folder, with a dot in front, and ids of the hub as they are. Names without a dot in
front are those of the working directory, as older runs have them. For a run that is moved without its folders, the
section ``seen`` remembers where they were, which is looked at last.
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
SEEN = "seen"
"""Section of config.yaml with the absolute paths of the folders that it names."""
PLACES = ("backbone.path", "data.path", "data.val_path", "init_from")
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
    values, seen = copy.deepcopy(dict(values)), {}
    for place, section, key in _places(values):
        path = section[key]
        if there(found := find(path)):
            section[key], real = _stored(Path(found).resolve(), Path(folder).resolve())
            seen |= {} if real is None else {place: real}
    return values | ({SEEN: seen} if seen else {})


def opened(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The other way round: ``values`` that were read in the run ``folder``, for use in the working directory. What is
    not there stays as it is."""
    values, folder = copy.deepcopy(dict(values)), Path(folder).resolve()
    seen = values.pop(SEEN, {})
    for place, section, key in _places(values):
        text = section[key]
        if not text.startswith("."):
            continue
        found = os.path.normpath(folder / text)
        if not there(found) and not there(text):
            found = str(seen.get(place, found) if isinstance(seen, dict) else found)
        if there(found):
            section[key] = _shown(Path(found))
    return values


def _places(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each of PLACES that is a text, with the mapping and the key where it stands."""
    for place in PLACES:
        section, _, key = place.rpartition(".")
        inside = values.get(section) if section else values
        if isinstance(inside, dict) and isinstance(inside.get(key), str):
            yield place, inside, key


def _stored(real: Path, folder: Path) -> tuple[str, str | None]:
    """The name of a folder in the config of the run ``folder``, and where it is to be remembered, unless it travels
    with the run or the package."""
    names = (entry for entry in SHIPPED.glob("*/*") if entry.is_dir() and entry.resolve() == real)
    if (entry := next(names, None)) is not None:
        return str(entry.relative_to(SHIPPED)), None
    relative = os.path.relpath(real, folder)
    if real.is_relative_to(folder):
        return relative if relative == "." else f"./{relative}", None
    return relative, str(real)


def _shown(path: Path) -> str:
    """Relative where it lies in the working directory, as one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
