"""Shards that others wrote: what in them is a sample, and where in it stand image, question and answers.

A folder without our manifest is read as WebDataset reads it: members with one name up to the first dot are a sample.
``Fields`` says under which suffix, and where in a json, things stand; img2dataset's are ``{key}.jpg``, ``{key}.txt``
(the caption) and ``{key}.json``. Left out: samples of several images, and annotations in files beside the shards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glimpseprune.config import UserError, option

_NAME = re.compile(r"(?:\./)*((?:[^\0]*/)?[^./\0]+)\.([^/\0]+)")
_KEY = 80
"""Longest key of a sample."""
_SPLITS = ("train", "val", "valid", "validation", "test", "dev", "eval")


@dataclass
class Fields:
    """Each a suffix (``jpg``), a place in a json (``json.meta.caption``), several of them with ``;`` between, of which
    the first that is there counts, or ``=`` and a text that is the same for all."""

    image: str = option("jpg;jpeg;png", "the image, PNG or JPEG")
    question: str = option("json.question", "the question")
    answers: str = option("json.answers;json.answer;txt", "the answer, or a list of accepted ones")
    boxes: str = option("", "list of evidence boxes [x0, y0, x1, y1] in pixels; empty: none")
    kind: str = option("", "the kind of question; empty: all are of one")

    def __post_init__(self) -> None:
        for name in ("image", "question", "answers"):
            if not getattr(self, name).strip("; "):
                raise UserError(f"data.fields.{name}: say where it stands, such as jpg, json.caption or =a text")
        if self.image.startswith("=") or ".." in self.image:
            raise UserError(f"data.fields.image: give the suffix of a member, such as jpg, got {self.image!r}")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member, as WebDataset takes a name apart; None where it has none."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


def places(spec: str) -> list[tuple[str, tuple[str, ...]]]:
    """Of a field: (suffix, names that lead into its json), in order of preference; no suffix for a constant."""
    if spec.startswith("="):
        return [("", (spec[1:],))]
    parts = [part.strip() for part in spec.split(";") if part.strip()]
    return [("json", tuple(part.split(".")[1:])) if part.startswith("json.") else (part, ()) for part in parts]


def lacking(members: Iterable[str], fields: Fields) -> str:
    """Which field a sample with these suffixes cannot have; empty if it may have all."""
    there = {*members, ""}
    for name in ("image", "question", "answers"):
        if not any(suffix in there for suffix, _ in places(getattr(fields, name))):
            return f"no {name} ({getattr(fields, name)})"
    return ""


def value(spec: str, members: Iterable[str], text: Callable[[str], str], meta: Callable[[], Any]) -> Any:
    """What a field holds, None where none of its places does; ``text`` of a suffix, ``meta``: the json."""
    there = set(members)
    for suffix, inside in places(spec):
        if not suffix:
            return inside[0]
        if suffix not in there:
            continue
        if not inside:
            return text(suffix).strip()
        found = meta()
        for step in inside:
            found = found.get(step) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def texts(found: Any) -> tuple[str, ...]:
    """A text or number, or a list of such, as texts. Raises ValueError for anything else."""
    several = found if isinstance(found, list) else [found]
    if not all(isinstance(each, str | int | float) for each in several):
        raise ValueError(f"a text or a list of texts is needed, not {type(found).__name__}")
    return tuple(str(each) for each in several)


def key_of(shard: str, key: str) -> str:
    """A key that our own samples might have, other in each shard."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", f"{shard.partition('.')[0]}-{key}")
    if len(plain) <= _KEY and plain == f"{shard.partition('.')[0]}-{key}":
        return plain
    from hashlib import blake2b

    mark = blake2b(f"{shard}/{key}".encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{plain[: _KEY - len(mark) - 1]}-{mark}"


def of_split(names: Iterable[str], split: str) -> list[str]:
    """Those of a folder's shards that are of ``split``: whose names begin with it; for training, where none does, all
    that begin with no split's name."""
    names = sorted(names)

    def begins(name: str, word: str) -> bool:
        return re.match(rf"{re.escape(word)}(?![A-Za-z])", name) is not None

    own = [name for name in names if begins(name, split)]
    if own or split != "train":
        return own
    return [name for name in names if not any(begins(name, word) for word in _SPLITS)]
