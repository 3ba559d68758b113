"""Rows of your own, without code: a file of JSON lines, JSON, CSV or Parquet beside its pictures::

    {"image": "photos/1.jpg", "question": "what is the total?", "answer": "12.50", "boxes": [[40, 310, 96, 330]]}

    python -m src.prepare source=jsonl options.path=rows.jsonl out=data/mine
    python -m src.prepare source=jsonl options.path=rows.csv options.image=file options.answer=label out=data/mine

Only image, question and answer must be there; what they and the others are called is an option. Without a field for the
split, pictures are drawn into train, val and test by a hash of their path, so that no picture is in two of them and new
pictures move no old ones. A row that is no good is left out, and counted by its cause. Left out: two files that hold
the same picture are two pictures; addresses are not fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glimpseprune.config import option
from glimpseprune.data.sources._fields import SPLITS, Fields
from glimpseprune.data.sources._pictures import Folder
from glimpseprune.data.sources._rows import table
from glimpseprune.data.sources._splits import Rows, Unfit, remembered
from glimpseprune.types import Sample

splits = SPLITS


@dataclass
class Options(Fields):
    path: str = option(help="file of rows: .jsonl, .json, .csv, .tsv or .parquet")


def present(options: Options) -> tuple[str, ...]:
    """The splits that have rows; raises UserError as :func:`samples`."""
    return _rows(options).present


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample | Unfit]:
    """Samples ``start`` to ``stop`` of a split in the order of the file, and what is wrong in place of unfit rows.

    Raises:
        UserError: there is no such file or folder, or it is no table.
    """
    return _rows(options).samples(split, start, stop)


def count(options: Options, split: str) -> int:
    """How many samples a split has, unfit ones included; raises UserError as :func:`samples`."""
    return _rows(options).count(split)


def inputs(options: Options) -> list[str]:
    return [options.path]


def _rows(options: Options) -> Rows:
    return remembered(_read, options, {"path": options.path})


def _read(options: Options) -> Rows:
    path = Path(options.path)
    folder = Folder(path.parent if options.images is None else options.images)
    return Rows(table(path), options, folder, options.dataset or path.stem)
