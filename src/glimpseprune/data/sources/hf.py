"""A table of the library ``datasets``: a folder that it saved, one of Parquet files, or a name on the hub::

    python -m src.prepare source=hf options.path=lmms-lab/textvqa options.answer=answers out=data/textvqa
    python -m src.prepare source=hf options.path=saved options.boxes=bbox options.order=xywh out=data/mine

Fields are named as those of ``source=jsonl``. A table that comes in parts called train, validation or test keeps them,
unless ``split_field`` names a field; of one part, pictures are drawn into splits by ``shares``, by a hash of what is in
them. Rows with pictures are read twice for that, once for the hash. Code that a set brings along is not run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from glimpseprune.config import UserError, option
from glimpseprune.data.sources._fields import SPLITS, Fields
from glimpseprune.data.sources._pictures import Folder
from glimpseprune.data.sources._rows import Joined, Row
from glimpseprune.data.sources._splits import Rows, Unfit, remembered, split_called
from glimpseprune.types import Sample

splits = SPLITS


@dataclass
class Options(Fields):
    path: str = option(help="folder, or name on the hub")
    config: str | None = option(None, "which configuration of the set, where it has several")


def present(options: Options) -> tuple[str, ...]:
    """The splits that have rows; raises UserError as :func:`samples`."""
    return _rows(options).present


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample | Unfit]:
    """Samples ``start`` to ``stop`` of a split in the order of the table, and what is wrong in place of unfit rows.

    Raises:
        UserError: there is no such table, or the library is not installed.
    """
    return _rows(options).samples(split, start, stop)


def count(options: Options, split: str) -> int:
    """How many samples a split has, unfit ones included; raises UserError as :func:`samples`."""
    return _rows(options).count(split)


def inputs(options: Options) -> list[Path]:
    """Of a set on the hub none: there a change has another address."""
    return [file for file in Path(options.path).rglob("*") if file.is_file()] if os.path.isdir(options.path) else []


def license(options: Options) -> str | None:
    """What the table itself says of it."""
    said = [part.part.info.license for _, part, _ in _rows(options).table.tables]
    return ", ".join(dict.fromkeys(filter(None, said))) or None


def _rows(options: Options) -> Rows:
    return remembered(_read, options, {"path": options.path})


def _read(options: Options) -> Rows:
    parts = _load(options.path, options.config)
    own = {name: split_called(name) for name in parts}
    fields: Fields = options
    if options.split_field is None and len(parts) > 1:
        if unknown := [name for name, split in own.items() if split is None]:
            raise UserError(
                f"options.path={options.path}: part '{unknown[0]}' is none of {', '.join(SPLITS)}: "
                "save those you want under these names, or give options.split_field"
            )
        fields = replace(options, split_field=_PART)
    tables = [(name, _Part(part), partial(_named, name)) for name, part in parts.items()]
    there = options.path if options.images is None and os.path.isdir(options.path) else options.images or "."
    return Rows(Joined(tables), fields, Folder(there), options.dataset or Path(options.path).name)


_PART = "part of the table"
"""The field that says so; no column has this name."""


def _named(name: str, row: Row, place: str) -> Row:
    return {**row, _PART: name}


def _load(path: str, config: str | None) -> dict[str, Any]:
    """Name of a part -> its table."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"options.path={path}: source=hf needs the package datasets: pip install datasets") from None
    try:
        if not os.path.isdir(path):
            found = datasets.load_dataset(path, config)
        elif any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset("parquet", data_dir=path)
    except Exception as error:  # of the library, of the network, of files: all are about this path
        raise UserError(f"options.path={path}: cannot be read as a table: {error}") from None
    return dict(found) if isinstance(found, dict) else {"all": found}


class _Part:
    """One part of a table, with its pictures as the files that they were."""

    def __init__(self, part: Any) -> None:
        from datasets import Image

        for name, feature in part.features.items():
            if isinstance(feature, Image):
                part = part.cast_column(name, Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), Image):
                part = part.cast_column(name, type(feature)(Image(decode=False)))
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def read(self, number: int) -> Row:
        return self.part[number]

    def place(self, number: int) -> str:
        return str(number + 1)
