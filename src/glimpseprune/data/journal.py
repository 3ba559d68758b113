"""What is whole of a folder of shards that is being written, so that whoever comes after a kill can go on.

A folder in the unfinished one: ``asked.json`` says how its shards are made, and a file beside it for every shard that
is whole what :func:`.shards.write_shard` said of it. It is written after the shard, and compared with it by sha256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glimpseprune import files
from glimpseprune.data.shards import sha256_of

JOURNAL = ".glimpseprune-journal"
"""Name of the folder: one that nobody else gives, for it is removed where it is left over."""
_ASKED = "asked.json"


class Journal:
    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / JOURNAL

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Shards that are said to be whole."""
        if not (self.place / _ASKED).is_file():
            return []
        return sorted(f"{file.stem}.tar" for file in self.place.glob("*.json") if file.name != _ASKED)

    def asked(self) -> dict[str, Any]:
        """What :meth:`begin` was given; empty where that cannot be read."""
        return _read(self.place / _ASKED) or {}

    def begin(self, asked: Mapping[str, Any], but: Sequence[Path] = ()) -> None:
        """Begin anew: all that is in the folder goes, ``but`` these."""
        files.remove(self.place / _ASKED)  # first, for without it nothing counts
        files.empty(self.folder, *but)
        files.write_json(self.place / _ASKED, asked, indent=1)

    def go_on(self, but: Sequence[Path] = ()) -> None:
        """All goes that is not whole, ``but`` these."""
        files.empty(self.folder, self.place, *but, *(self.folder / name for name in self.names()))

    def end(self) -> None:
        """There is nothing to go on with any more."""
        files.remove(self.place / _ASKED)
        files.remove(self.place)

    def add(self, entry: Mapping[str, Any]) -> None:
        """A shard is whole, and on the disk."""
        files.write_json(self._file(entry["name"]), entry)

    def whole(self, name: str) -> dict[str, Any] | None:
        """What was said of a shard; None where it is not there, or another one by now."""
        entry, path = _read(self._file(name)), self.folder / name
        if entry is None or not path.is_file() or path.stat().st_size != entry.get("bytes"):
            return None
        return entry if sha256_of(path) == entry.get("sha256") else None

    def _file(self, name: str) -> Path:
        return self.place / f"{Path(name).stem}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
