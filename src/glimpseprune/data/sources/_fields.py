"""Rows as Samples: which field is what, where pictures lie, which row is in which split. For sources that read tables.

A row that makes no sample is given as :class:`Unfit`, so that ``prepare`` counts it by its cause. What a sample must be
is said in :func:`..shards.check` alone; here is only what comes before there is one: a field that is not there, a
picture that cannot be opened, an answer that is no text.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, TypeVar

from PIL import Image

from glimpseprune import images
from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.data.shards import IMAGE_BYTES, Damage, check_box, check_sizes, open_file
from glimpseprune.data.sources._rows import Row, Table
from glimpseprune.types import Box, Sample

SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}
SPLITS = tuple(SHARES)
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pictures that are read: none whose reader starts another program."""
ROUNDING = 1
"""Pixels by which a box may reach over the edge, where it is put: annotations are rounded."""

_OTHER_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
_TOKENS = re.compile(r"\A(\s*<image>\s*)+|(\s*<image>\s*)+\Z")

T = TypeVar("T")


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


class Unfit(Damage):
    """A row that makes no sample. The message says why, ``key`` where it stands."""

    def __init__(self, key: str, cause: object) -> None:
        super().__init__(str(cause))
        self.key = key


# ------------------------------------------------------------------------------------------------------------ pictures


class Folder:
    """Pictures below one folder; nothing outside of it is ever opened, whatever a row says or a link points to."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(path)
        if not os.path.isdir(self.root):
            raise UserError(f"options.images={path}: there is no such folder")
        self._inside = os.path.join(self.root, "")
        self._place = lru_cache(1 << 12)(os.path.realpath)  # of the few folders that many pictures are in
        self._last: tuple[Any, Image.Image | None] = (None, None)

    def find(self, name: str) -> str:
        """Where a picture lies; raises ValueError where there is none, or it is outside of the folder."""
        if "://" in name:
            raise ValueError(f'image "{name}" is an address: fetch it, and give the path of the file')
        head, tail = os.path.split(os.path.join(self.root, name))
        real = os.path.join(self._place(head), tail)
        if tail in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(real)
        if not real.startswith(self._inside):
            raise ValueError(f'image "{name}" lies outside of the folder of the images')
        if not os.path.exists(real):
            raise ValueError(f'there is no image "{name}"')
        return real

    def first(self, *names: str) -> str:
        """The first of these paths where there is a picture; where there is none, the first."""
        for name in names:
            try:
                self.find(name)
            except ValueError:
                continue
            return name
        return names[0]

    def identity(self, given: Any) -> str:
        """The same for the same picture: its place in the folder, or a hash where the row itself holds it."""
        name, data = _named(given)
        if data is not None:
            return blake2b(data, digest_size=12).hexdigest()
        return self.find(name).removeprefix(self._inside)

    def open(self, given: Any) -> Image.Image:
        """A picture, not decoded yet; rows that follow each other and name the same one get the same object.

        Raises:
            ValueError: there is none, or it is larger than what may be stored.
        """
        if given != self._last[0] or self._last[1] is None:
            name, data = _named(given)
            self._last = given, _picture(f'image "{name}"', self._read(name) if data is None else data)
        return self._last[1]

    def _read(self, name: str) -> bytes:
        try:
            with open(self.find(name), "rb", opener=open_file) as stream:
                if (size := os.fstat(stream.fileno()).st_size) > IMAGE_BYTES:
                    raise ValueError(f'image "{name}" has {size} bytes, more than the {IMAGE_BYTES} allowed')
                return stream.read(IMAGE_BYTES)
        except OSError as error:
            raise ValueError(f'image "{name}" cannot be read: {error.strerror}') from None


def _named(given: Any) -> tuple[str, bytes | None]:
    """Name and content of what a row gives for a picture; without content, the name is a path."""
    if isinstance(given, dict) and given.keys() <= {"bytes", "path"}:  # as tables of `datasets` hold one
        name, data = given.get("path"), given.get("bytes")
    else:
        name, data = (None, given) if isinstance(given, bytes) else (given, None)
    if data is None and not (isinstance(name, str) and name.strip()):
        raise ValueError(f"an image must be the path of a file, not {_short(given)}")
    return name or "in the row", data


def _picture(what: str, data: bytes) -> Image.Image:
    if len(data) > IMAGE_BYTES:
        raise ValueError(f"{what} has {len(data)} bytes, more than the {IMAGE_BYTES} allowed")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # whatever a reader raises on hostile bytes
        raise ValueError(f"{what} is no picture that can be read ({', '.join(FORMATS)})") from None


# --------------------------------------------------------------------------------------------------------- row by row


def sample(row: Row, fields: Fields, folder: Folder, key: str, dataset: str) -> Sample:
    """What a row says, as a Sample with pictures that are not decoded yet; ``key`` is that of a row without one.

    Raises:
        ValueError: a field is missing or of a wrong kind, or a picture cannot be opened.
    """
    given = _pictures(row, fields)
    pictures = [folder.open(each) for each in given]
    check_sizes(picture.size for picture in pictures)  # before one is decoded
    question = _field(row, fields.question)
    if not isinstance(question, str):
        raise ValueError(f"field '{fields.question}' must be a text, not {_short(question)}")
    boxes, lost = _boxes(row, pictures, fields)
    own, kind, scene = (_maybe(row, getattr(fields, name), name) for name in ("key", "kind", "scene"))
    return Sample(
        key=key if own is None else name_of(_text(own, "a key")),
        question=_TOKENS.sub("", question).strip() + fields.suffix,
        answers=tuple(_text(each, "an answer") for each in _list(_field(row, fields.answer, "answer"))),
        images=pictures,
        boxes=boxes,
        kind="all" if kind is None else _text(kind, "a kind"),
        dataset=dataset,
        scene=" ".join(map(folder.identity, given)) if scene is None else _text(scene, "a scene"),
        left_out=lost,
    )


def name_of(text: str) -> str:
    """A key as shards allow it; different texts have different ones."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if plain == text and len(text) <= 80:
        return text
    return f"{plain[:60]}-{blake2b(text.encode(errors='surrogatepass'), digest_size=6).hexdigest()}"


def _pictures(row: Row, fields: Fields) -> list[Any]:
    return _list(_field(row, fields.image, "image"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _field(row: Row, name: str, plural: str = "") -> Any:
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


def _maybe(row: Row, name: str | None, default: str) -> Any:
    """A field that must be there only if the options name it."""
    return row.get(default) if name is None else _field(row, name)


def _text(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what} must be a text or a number, not {_short(value)}")
    return str(value).strip()


def _short(value: Any) -> str:
    kind = "null" if value is None else type(value).__name__
    return f'{kind} "{value}"' if isinstance(value, str | int | float) else kind


# --------------------------------------------------------------------------------------------------------------- boxes


def _boxes(row: Row, pictures: Sequence[Image.Image], fields: Fields) -> tuple[list[list[Box]] | None, str]:
    """Boxes of each picture in pixels, None where there are none; and what was left out."""
    given = _maybe(row, fields.boxes, "boxes")
    depth = _depth(given)
    if given is None or (depth < 3 and not _is_box(given) and not any(_list(given))):
        return None, ""
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
        except ValueError as error:
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


def _depth(value: Any, most: int = 4) -> int:
    if not isinstance(value, list) or not most:
        return 0
    return 1 + max((_depth(each, most - 1) for each in value), default=0)


def in_pixels(box: Any, size: tuple[int, int], frame: str = "pixels", order: str = "xyxy") -> Any:
    """A box as x0, y0, x1, y1 in pixels of its picture; as it is where it is not four numbers."""
    if not _is_box(box) or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
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


# --------------------------------------------------------------------------------------------------------------- splits


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
            except ValueError as error:
                yield Unfit(f"{self.dataset}:{place}".lstrip(":"), error)

    def _read(self) -> Iterator[Row | None]:
        keys = set()
        for number in range(len(self.table)):
            try:
                row = self.table.read(number)
                own = _maybe(row, self.fields.key, "key")
                key = None if own is None else _text(own, "a key")
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
        scene = _maybe(row, self.fields.scene, "scene")
        pictures = [self.folder.identity(each) for each in _pictures(row, self.fields)]
        return pictures if scene is None else [f"scene {_text(scene, 'a scene')}", *pictures]


def _or_none(find: Callable[[], T]) -> T | None:
    try:
        return find()
    except ValueError:
        return None


def _split(row: Row | None, name: str) -> str:
    said = _field(row or {}, name)
    split = split_called(said)
    if split is None:
        raise ValueError(f"field '{name}' must name a split, {', '.join(SPLITS)}, not {_short(said)}")
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
