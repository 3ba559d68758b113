"""Visual-CoT: the boxes that the published recipe trains on, and the free-form benchmark of twelve sets.

``python -m src.prepare source=viscot options.root=viscot options.images=data out=data/viscot``

``root`` holds ``<set>_cot_train.jsonl`` (or ``train/``, ``metadata/``) and ``benchmark/<set>.json``, ``images`` the
pictures as they are published, in ``cot/<dataset>/``. ``train`` and ``val`` are the training rows, ``test`` is the
benchmark; the set is the kind of a question. As the data are (docs/evaluation.md §1.2):

- boxes are pixels, those of the benchmark behind ``###`` in the second path; the numbers of turn 1 are not used;
- the question is turn 0 without ``<image>`` and without the sentence that asks for a box, the answer turn 3;
- pictures of textcap lie in textvqa's folder, those of visual7w in v7w's; some in a folder ``val`` of theirs, which no
  path names;
- a box outside of its page is dropped and told, and so are the boxes of a picture that has another size than its row
  says; the question stays.

The file emotic, which no published score counts, is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.data.sources._fields import SPLITS, Fields
from glimpseprune.data.sources._pictures import Folder
from glimpseprune.data.sources._rows import Joined, Row, table
from glimpseprune.data.sources._splits import Rows, Unfit, remembered
from glimpseprune.types import Sample

splits = SPLITS
SETS = (
    "cub",
    "docvqa",
    "dude",
    "flickr30k",
    "gqa",
    "infographicsvqa",
    "openimages",
    "sroie",
    "textcap",
    "textvqa",
    "visual7w",
    "vsr",
)
TRAIN = ("{}_cot_train.jsonl", "train/{}_cot_train.jsonl", "metadata/{}_cot_train.jsonl")
BENCHMARK = ("benchmark/{}.json", "{}.json")
SENTENCE = "Please provide the bounding box coordinate of the region that can help you answer the question better."
_FOLDERS = {"textcap": "textvqa", "visual7w": "v7w"}
"""Set -> folder of its pictures below cot/, where that has another name."""


@dataclass
class Options:
    root: str = option(help="folder of the annotations: <set>_cot_train.jsonl and benchmark/<set>.json")
    images: str | None = option(None, "folder that holds cot/ with the pictures; null: root")
    sets: list[str] | None = option(None, f"of {', '.join(SETS)}; null: those that are there")
    val: float = option(0.01, "share of the training pictures that is held out as val", least=0, most=1)
    seed: int = option(0, "of the choice of those", least=0, most=SEEDS)

    def __post_init__(self) -> None:
        if unknown := set(self.sets or ()) - set(SETS):
            raise UserError(f"options.sets: no '{min(unknown)}'; choices are {', '.join(SETS)}")


def present(options: Options) -> tuple[str, ...]:
    """The splits of which there are files; raises UserError as :func:`samples`."""
    found = [*_train(options).present, *_benchmark(options).present]
    if not found:
        names = " or ".join(pattern.format("<set>") for pattern in (TRAIN[0], BENCHMARK[0]))
        raise UserError(f"options.root={options.root}: there is no {names}")
    return tuple(found)


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample | Unfit]:
    """Samples ``start`` to ``stop`` of a split, set by set, and what is wrong in place of unfit rows.

    Raises:
        UserError: there is no such folder, or no file of a set that was asked for.
    """
    return (_benchmark if split == "test" else _train)(options).samples(split, start, stop)


def count(options: Options, split: str) -> int:
    """How many samples a split has, unfit ones included; raises UserError as :func:`samples`."""
    return (_benchmark if split == "test" else _train)(options).count(split)


def inputs(options: Options) -> list[Path]:
    return [file for patterns in (TRAIN, BENCHMARK) for file in _files(options, patterns).values()]


def license(options: Options) -> str:
    return "annotations: Apache 2.0 (the card of deepcs233/Visual-CoT); pictures: that of the set that each is from"


def notes(options: Options) -> list[str]:
    """Files that look like those of a set, and are of none."""
    known = {pattern.format(name) for pattern in (*TRAIN, *BENCHMARK) for name in SETS}
    there = [file for pattern in (*TRAIN, BENCHMARK[0]) for file in Path(options.root).glob(pattern.format("*"))]
    names = sorted({str(file.relative_to(options.root)) for file in there} - known)
    return [f"{name} is of no set that is read" for name in names]


def _train(options: Options) -> Rows:
    files = _files(options, TRAIN)
    return remembered(partial(_rows, _trained, files, {"train": 1 - options.val, "val": options.val}), options, files)


def _benchmark(options: Options) -> Rows:
    files = _files(options, BENCHMARK)
    return remembered(partial(_rows, _benchmarked, files, {"test": 1.0}), options, files)


def _files(options: Options, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Set -> its file; all or none of those that are asked for."""
    if not os.path.isdir(options.root):
        raise UserError(f"options.root={options.root}: there is no such folder")
    found, absent = {}, []
    for name in dict.fromkeys(options.sets or SETS):
        places = [Path(options.root, pattern.format(name)) for pattern in patterns]
        if file := next(filter(Path.exists, places), None):
            found[name] = file
        elif options.sets:
            absent.append(places[0].relative_to(options.root))
    if found and absent:
        raise UserError(f"options.sets: there is no {', '.join(map(str, absent))} in {options.root}")
    return found


Shape = Callable[[Row, str, str, Folder], Row]


def _rows(shape: Shape, files: Mapping[str, Path], shares: dict[str, float], options: Options) -> Rows:
    folder = Folder(options.root if options.images is None else options.images)
    tables = [(name, table(file), partial(_shaped, shape, name, folder)) for name, file in files.items()]
    return Rows(Joined(tables), Fields(bad_boxes="drop", shares=shares, seed=options.seed), folder)


def _shaped(shape: Shape, name: str, folder: Folder, row: Row, place: str) -> Row:
    try:
        return {**shape(row, name, place, folder), "kind": name, "dataset": name}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("the row is not one of Visual-CoT") from None


def _trained(row: Row, name: str, place: str, folder: Folder) -> Row:
    return {
        "key": f"viscot-{name}-train-{place}",
        "image": _placed(folder, f"cot/{_FOLDERS.get(name, name)}/{row['image']}"),
        "question": row["question"],
        "answer": row["answer"],
        "boxes": row["bboxs"],
        "width": row["width"],
        "height": row["height"],
    }


def _benchmarked(row: Row, name: str, place: str, folder: Folder) -> Row:
    picture, marked = row["image"]
    turns = [turn["value"] for turn in row["conversations"]]
    return {
        "key": f"viscot-{name}-test-{place}",
        "image": _placed(folder, picture),
        "question": turns[0].replace(SENTENCE, ""),
        "answer": turns[3],
        "boxes": [json.loads(marked.partition("###")[2])],
    }


def _placed(folder: Folder, path: str) -> str:
    """``cot/cub/x/y.jpg``, or ``cot/cub/val/x/y.jpg`` where the picture lies there."""
    cot, dataset, *rest = path.split("/")
    return folder.first(path, "/".join((cot, dataset, "val", *rest)))
