"""A row as a Sample: which field is what, and what boxes are measured in.

What a sample must be is said in :func:`..shards.check` alone; here is only what comes before there is one: a field that
is not there, an answer that is no text, a box that has to be turned into pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from PIL import Image

from glimpseprune import images
from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.data.shards import IMAGES, check_box, check_sizes
from glimpseprune.data.sources._pictures import Folder
from glimpseprune.data.sources._rows import Row, shown_value
from glimpseprune.types import Box, Sample

SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}
SPLITS = tuple(SHARES)
ROUNDING = 1
"""Pixels by which a box may reach over the edge, where it is put: annotations are rounded."""

_FAR = 1e9  # pixels: farther away is no box
_TOKENS = re.compile(r"\A(\s*<image>\s*)+|(\s*<image>\s*)+\Z")


@dataclass
class Fields:
    """Names of fields may lead inside: ``answers.text``, ``conversations.0.value``; through a list, into each."""

    image: str = option("image", "field of the picture, or of a list of them: paths below `images`; or image + s")
    question: str = option("question", "field of the question")
    answer: str = option("answer", "field of the answer, or of all accepted ones; or answer + s")
    boxes: str | None = option(None, "field of the evidence boxes; null: `boxes`, in rows that have it")
    kind: str | None = option(None, "field of the kind of question; null: `kind`, in rows that have it")
    key: str | None = option(None, "field of a name of the row; null: `key`, in rows that have it, else its number")
    scene: str | None = option(None, "field that rows on the same pictures share; null: `scene`, else the pictures")
    frame: Literal["pixels", "fraction", "thousand"] = option(
        "pixels", "what boxes are measured in: pixels of the picture as it is shown, 0 to 1 of it, 0 to 1000"
    )
    order: Literal["xyxy", "xywh", "cxcywh", "yxyx"] = option("xyxy", "of the four numbers of a box")
    bad_boxes: Literal["refuse", "drop"] = option(
        "refuse", "a box outside of its picture: the row is left out, or only the box; either is told"
    )
    suffix: str = option("", "put behind every question, such as a wish for a short answer")
    images: str | None = option(None, "folder in which all pictures lie; null: that of the rows")
    dataset: str | None = option(None, "its name in the shards; null: that of the file")
    split_field: str | None = option(None, "field that names the split: train, val (validation, dev) or test")
    shares: dict[str, float] = option(
        {},
        "without one: share of the pictures of each split, all rows on a picture together; none: .9, .05 and .05",
        least=0,
        most=1,
    )
    seed: int = option(0, "of the choice of those", least=0, most=SEEDS)

    def __post_init__(self) -> None:
        self.shares = self.shares or dict(SHARES)
        if unknown := set(self.shares) - set(SPLITS):
            raise UserError(f"options.shares.{min(unknown)}: the splits are {', '.join(SPLITS)}")
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise UserError(f"options.shares: {self.shares} must add up to 1, or rows would be lost")


# --------------------------------------------------------------------------------------------------------- row by row


def sample(row: Row, fields: Fields, folder: Folder, key: str, dataset: str) -> Sample:
    """What a row says, as a Sample with pictures that are not decoded yet; ``key`` is that of a row without one.

    Raises:
        ValueError: a field is missing or of a wrong kind, or a picture cannot be opened.
    """
    given = pictures_of(row, fields)
    pictures = [folder.open(each) for each in given[: IMAGES + 1]]  # with more it will be refused
    check_sizes(picture.size for picture in pictures)  # before one is decoded
    question = field(row, fields.question)
    if not isinstance(question, str):
        raise ValueError(f"field '{fields.question}' must be a text, not {shown_value(question)}")
    boxes, lost = _boxes(row, pictures, fields)
    own, kind, scene = (maybe(row, getattr(fields, name), name) for name in ("key", "kind", "scene"))
    return Sample(
        key=key if own is None else name_of(as_text(own, "a key")),
        question=_TOKENS.sub("", question).strip() + fields.suffix,
        answers=tuple(as_text(each, "an answer") for each in _list(field(row, fields.answer, "answer"))),
        images=pictures,
        boxes=boxes,
        kind="all" if kind is None else as_text(kind, "a kind"),
        dataset=dataset,
        scene=" ".join(map(folder.identity, given)) if scene is None else as_text(scene, "a scene"),
        left_out=lost,
    )


def name_of(text: str) -> str:
    """A key as shards allow it; different texts have different ones."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if plain == text and len(text) <= 80:
        return text
    return f"{plain[:60]}-{blake2b(text.encode(errors='surrogatepass'), digest_size=6).hexdigest()}"


def pictures_of(row: Row, fields: Fields) -> list[Any]:
    return _list(field(row, fields.image, "image"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def field(row: Row, name: str, plural: str = "") -> Any:
    """What stands under a name; that of ``plural``, where it is the default, may have an s."""
    names = [name, f"{name}s"] if name == plural else [name]
    for each in names:
        try:
            return row[each] if each in row else _inside(row, each.split("."))
        except (KeyError, IndexError, TypeError):
            continue
    there = ", ".join(f"'{each}'" for each in list(row)[:8])
    raise ValueError(f"there is no field '{name}', only {there or 'none at all'}")


def _inside(value: Any, path: Sequence[str]) -> Any:
    for place, part in enumerate(path):
        if isinstance(value, list) and not part.isdigit():
            return [_inside(each, path[place:]) for each in value]
        value = value[int(part) if isinstance(value, list) else part]
    return value


def maybe(row: Row, name: str | None, default: str) -> Any:
    """A field that must be there only if the options name it."""
    return row.get(default) if name is None else field(row, name)


def as_text(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what} must be a text or a number, not {shown_value(value)}")
    return str(value).strip()


# --------------------------------------------------------------------------------------------------------------- boxes


def _boxes(row: Row, pictures: Sequence[Image.Image], fields: Fields) -> tuple[list[list[Box]] | None, str]:
    """Boxes of each picture in pixels, None where there are none; and what was left out."""
    given = maybe(row, fields.boxes, "boxes")
    if given is None or _is_empty(given):
        return None, ""
    depth = _depth(given)
    nested = [[given]] if depth == 1 else [given] if depth == 2 else given
    if not 1 <= depth <= 3 or len(nested) != len(pictures):
        raise ValueError("boxes must be four numbers, a list of boxes, or with several images a list for each")
    lost: list[str] = []
    made = [
        list(_fitting(boxes, images.shown_size(picture), row, fields, lost)) for boxes, picture in zip(nested, pictures)
    ]
    return made if any(made) else None, "; ".join(dict.fromkeys(lost))


def _fitting(boxes: Sequence[Any], size: tuple[int, int], row: Row, fields: Fields, lost: list[str]) -> Iterator[Box]:
    for box in boxes:
        found = in_pixels(box, size, fields.frame, fields.order)
        try:
            check_box(found, *size)
            if fields.frame == "pixels":
                _check_size(size, (row.get("width"), row.get("height")))
        except (ValueError, OverflowError) as error:
            if fields.bad_boxes == "refuse":
                raise
            lost.append(str(error))
        else:
            yield found


def _check_size(size: tuple[int, int], said: tuple[Any, Any]) -> None:
    """Pixels of a picture that was made smaller since, or turned, are others."""
    if all(type(each) is int for each in said) and said != size:
        raise ValueError(f"boxes in pixels of an image of {said[0]} x {said[1]}, but it has {size[0]} x {size[1]}")


def _is_box(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 4 and not any(isinstance(each, list) for each in given)


def _is_empty(given: Any) -> bool:
    return isinstance(given, list) and all(map(_is_empty, given))


def _depth(value: Any, most: int = 4) -> int:
    if not isinstance(value, list) or not most:
        return 0
    return 1 + max((_depth(each, most - 1) for each in value), default=0)


def in_pixels(box: Any, size: tuple[int, int], frame: str = "pixels", order: str = "xyxy") -> Any:
    """A box as x0, y0, x1, y1 in pixels of its picture; as it is where it is not four numbers of any use."""
    if not _is_box(box) or not all(type(v) in (int, float) and abs(v) < _FAR for v in box):
        return tuple(box) if isinstance(box, list) else (box,)
    a, b, c, d = box
    corners = {
        "xyxy": (a, b, c, d),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "yxyx": (b, a, d, c),
    }[order]
    ends = (*size, *size)
    if frame != "pixels":
        corners = tuple(v * end / {"fraction": 1, "thousand": 1000}[frame] for v, end in zip(corners, ends))
    return tuple(_inward(v, end) for v, end in zip(corners, ends))


def _inward(v: float, end: int) -> float:
    return min(max(v, 0), end) if -ROUNDING <= v <= end + ROUNDING else v
