"""Rows of a table by split: as a field of theirs says, or drawn, so that no picture is in two splits.

A row that makes no sample is given as :class:`Unfit`, so that ``prepare`` counts it by its cause and goes on.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from hashlib import blake2b
from typing import Any, TypeVar

from glimpseprune.data.shards import Damage
from glimpseprune.data.sources._fields import (
    SPLITS,
    Fields,
    as_text,
    field,
    maybe,
    name_of,
    pictures_of,
    sample,
)
from glimpseprune.data.sources._pictures import Folder
from glimpseprune.data.sources._rows import Row, Table, shown_value
from glimpseprune.types import Sample

_OTHER_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}

T = TypeVar("T")


class Unfit(Damage):
    """A row that makes no sample. The message says why, ``key`` where it stands."""

    def __init__(self, key: str, cause: object) -> None:
        super().__init__(str(cause))
        self.key = key


class Rows:
    """The rows of a table by split, in their order. Every row is in one of them: unfit ones in the first there is."""

    def __init__(self, table: Table, fields: Fields, folder: Folder, dataset: str = "") -> None:
        self.table, self.fields, self.folder, self.dataset = table, fields, folder, dataset
        self.twice: set[int] = set()
        chosen = self._by_field() if fields.split_field else self._by_share()
        self.splits = {split: array("q") for split in SPLITS}
        first = next((split for split in SPLITS if split in chosen), SPLITS[0])
        for number, split in enumerate(chosen):
            self.splits[split or first].append(number)

    @property
    def present(self) -> tuple[str, ...]:
        """Those of :data:`SPLITS` that have rows."""
        return tuple(split for split, numbers in self.splits.items() if numbers)

    def count(self, split: str) -> int:
        return len(self.splits[split])

    def samples(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample | Unfit]:
        for number in self.splits[split][start:stop]:
            place = self.table.place(number)
            try:
                if number in self.twice:
                    raise ValueError("another row before it has this key")
                row = self.table.read(number)
                if self.fields.split_field:
                    _split(row, self.fields.split_field)
                key = name_of(f"{self.dataset}-{place:0>7}")
                yield sample(row, self.fields, self.folder, key, self.dataset or str(row.get("dataset", "")))
            except Exception as error:  # whatever a reader of pictures raises on hostile bytes
                yield Unfit(f"{self.dataset}:{place}".lstrip(":"), str(error) or type(error).__name__)

    def _read(self) -> Iterator[Row | None]:
        keys = set()
        for number in range(len(self.table)):
            try:
                row = self.table.read(number)
                own = maybe(row, self.fields.key, "key")
                key = None if own is None else as_text(own, "a key")
            except ValueError:
                yield None
                continue
            if key is not None and key in keys:
                self.twice.add(number)
            keys.add(key)
            yield row

    def _by_field(self) -> list[str | None]:
        return [_or_none(lambda row=row: _split(row, self.fields.split_field)) for row in self._read()]

    def _by_share(self) -> list[str | None]:
        """Rows that share a picture, or a scene, are in one group, and so are all that share one with those."""
        groups = _Groups()
        firsts: list[str | None] = []
        for row in self._read():
            names = _or_none(lambda row=row: self._names(row))
            firsts.append(names and groups.join(names))
        names = groups.names()
        return [first and drawn(names[first], self.fields.shares, self.fields.seed) for first in firsts]

    def _names(self, row: Row | None) -> list[str]:
        if row is None:
            raise ValueError
        scene = maybe(row, self.fields.scene, "scene")
        pictures = [self.folder.identity(each) for each in pictures_of(row, self.fields)]
        return pictures if scene is None else [f"scene {as_text(scene, 'a scene')}", *pictures]


def _or_none(find: Callable[[], T]) -> T | None:
    try:
        return find()
    except ValueError:
        return None


def _split(row: Row | None, name: str) -> str:
    said = field(row or {}, name)
    split = split_called(said)
    if split is None:
        raise ValueError(f"field '{name}' must name a split, {', '.join(SPLITS)}, not {shown_value(said)}")
    return split


def split_called(name: Any) -> str | None:
    """The one of :data:`SPLITS` that is meant; None where none is."""
    split = _OTHER_NAMES.get(str(name).lower(), str(name).lower())
    return split if split in SPLITS else None


def drawn(name: str, shares: dict[str, float], seed: int) -> str:
    """A split for a name, each as often as its share says, whatever other names there are."""
    digest = blake2b(f"{seed} {name}".encode(errors="surrogatepass"), digest_size=8).digest()
    place, end = int.from_bytes(digest, "big") / 2**64, 0.0
    held = {split: shares[split] for split in SPLITS if shares.get(split)}
    for split, share in held.items():
        end += share
        if place < end:
            return split
    return split


class _Groups:
    """Names that belong together, directly or through others."""

    def __init__(self) -> None:
        self.above: dict[str, str] = {}

    def join(self, names: Iterable[str]) -> str:
        tops = [self._top(name) for name in names]
        top = min(tops)  # so that a group's name does not depend on the order of the rows
        for other in tops:
            self.above[other] = top
        return top

    def _top(self, name: str) -> str:
        above = self.above.setdefault(name, name)
        while above != self.above[above]:
            self.above[name] = above = self.above[above]
        return above

    def names(self) -> dict[str, str]:
        """Every name -> that of its group."""
        return {name: self._top(name) for name in self.above}


# ------------------------------------------------------------------------------------------------------------ once only


def remembered(make: Callable[[Any], Rows], options: Any, files: Mapping[str, str | os.PathLike[str]]) -> Rows:
    """``make(options)``, or what it gave before if these files have not changed since; kept for processes that are
    forked from this one, so that many of them index a file once."""
    known = json.dumps(
        [type(options).__module__, asdict(options), [(str(file), *_stamp(file)) for file in files.values()]]
    )
    if known not in _kept:
        while len(_kept) > 1:
            del _kept[next(iter(_kept))]
        _kept[known] = make(options)
    return _kept[known]


_kept: dict[str, Rows] = {}


def _stamp(file: str | os.PathLike[str]) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
