"""easy-VQA: a coloured shape on a pale ground, 48,248 questions, 13 answers. Its package (MIT) ships the pictures.

``pip install easy-vqa``, then ``python -m src.prepare source=easy_vqa out=data/easy_vqa``. Kinds of question:
``shape``, ``colour`` and ``yesno`` (three in four, half of them yes). The pictures have 64 x 64 pixels and are
enlarged, for at their own size they are a handful of visual tokens. The evidence is the shape: the box of all that is
not of the colour of the corners. ``train`` and ``val`` are parts of the package's train, without a picture in common;
``test`` is its test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.data.sources._splits import drawn
from glimpseprune.types import Box, Sample

splits = ("train", "val", "test")

Question = tuple[int, str, str, int]
"""Its number in the package, text, answer, number of its picture."""


@dataclass
class Options:
    size: int = option(336, "image side in pixels, enlarged from 64", least=64, most=1344)
    val: float = option(0.05, "share of the training pictures that is held out as val", least=0, most=1)
    seed: int = option(0, "of the choice of those", least=0, most=SEEDS)


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The questions ``start`` to ``stop`` of a split in the package's order, which is that of the pictures.

    Raises:
        UserError: the package is not installed.
    """
    part = "test" if split == "test" else "train"
    for number, text, answer, picture in _questions(split, options.val, options.seed)[start:stop]:
        image, box = _picture(_folder() / part / "images" / f"{picture}.png", options.size)
        yield Sample(
            key=f"easy_vqa-{part}-{number:06d}",
            question=text,
            answers=(answer,),
            images=[image],
            boxes=[[box]],
            kind="yesno" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour",
            dataset="easy_vqa",
            scene=f"easy_vqa-{part}-{picture}",
        )


def count(options: Options, split: str) -> int:
    """How many questions a split has; raises UserError as :func:`samples`."""
    return len(_questions(split, options.val, options.seed))


def license(options: Options) -> str:
    return "MIT"


SHAPES = ("rectangle", "circle", "triangle")


def _folder() -> Path:
    try:
        return Path(import_module("easy_vqa").__file__).parent / "data"
    except ModuleNotFoundError as error:
        raise UserError("source=easy_vqa needs the package easy-vqa: pip install easy-vqa") from error


@lru_cache(3)
def _questions(split: str, val: float, seed: int) -> list[Question]:
    file = _folder() / ("test" if split == "test" else "train") / "questions.json"
    rows = [(number, *row) for number, row in enumerate(json.loads(file.read_text()))]
    if split == "test":
        return rows
    shares = {"train": 1 - val, "val": val}
    return [row for row in rows if drawn(str(row[3]), shares, seed) == split]


@lru_cache(1)
def _picture(file: Path, size: int) -> tuple[Image.Image, Box]:
    """The picture enlarged, and the box of its shape in pixels of that."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(image)
    rows, columns = np.nonzero((pixels != pixels[0, 0]).any(-1))
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    scale = size / image.width
    return image.resize((size, size), Image.Resampling.BICUBIC), tuple(float(v * scale) for v in box)
