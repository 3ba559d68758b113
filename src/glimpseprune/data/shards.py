"""Shards: Samples written as WebDataset tar files, and read back by index.

A folder holds ``{split}-000000.tar`` ... and one ``manifest.json`` with the count, bytes and sha256 of every shard.
In a shard a sample is ``{key}.json`` and ``{key}.0.png`` (or ``.jpg``), ``{key}.1.png`` ...; any WebDataset reader
understands it. webdataset itself only writes here: its readers are streams, which lose samples at a damaged header
without a word and can resume only by reading everything again. Ours walks the headers of a shard once and then reads
any sample by its index, so a position is a number, and a damaged sample is a :class:`Damage` that names its place.

Shards are not trusted. Nothing is unpacked to disk and no name in a tar is ever a path; there are no pickles; sizes of
members and of decoded images, alone and together, are bounded before they are read or decoded; the json must have the
right types. What is refused when reading is refused when writing (:func:`check`, and the bounds below). The json of a
sample ends in checksums of its members and of itself, which are compared whenever the sample is read (1 to 3% of the
time that it takes); shards from before there were any are read without. An image is stored as the file that it is
where that is plain, else as :mod:`..images` shows it: upright, on white, in 8 bits.

A folder may also be an address, its shards ``.tar.gz``, and both come through a cache (:mod:`.places`); and shards that
others wrote are read by a map of fields (:mod:`.foreign`), counted once.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
import warnings
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from glimpseprune import config, files, images
from glimpseprune.config import UserError
from glimpseprune.data import foreign, remote
from glimpseprune.data.cache import used
from glimpseprune.data.foreign import Fields
from glimpseprune.data.places import ENDS, RATIO, Place, Store, open_file
from glimpseprune.legible import legible, surrogate
from glimpseprune.types import Sample

__all__ = [
    "Damage",
    "ImageEncoder",
    "Shards",
    "Store",
    "check",
    "check_box",
    "check_sizes",
    "decode",
    "encode",
    "open_file",
    "write",
    "write_manifest",
    "write_shard",
]

MANIFEST = "manifest.json"
FORMAT = "glimpseprune-shards-1"
IMAGE_FORMATS = ("auto", "png", "jpg")

MANIFEST_BYTES = 1 << 28  # largest manifest that is read: that of a million shards
SHARD_COUNT = 1 << 24  # most samples of one shard
JSON_BYTES = 1 << 20  # largest json member
IMAGE_BYTES = 1 << 26  # largest image member
TEXT = 1 << 13  # longest text, in characters
PIXELS = 1 << 26  # largest image: 8192 x 8192
SAMPLE_PIXELS = 1 << 27  # of all images of a sample
ASPECT = 200  # longer side over shorter side; image processors refuse more
IMAGES = 64  # most images of one sample
SCANS = 500  # of one JPEG; each takes as long as decoding the whole picture, and costs a few bytes

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # no dot or slash: WebDataset splits names at them; 100 bytes with suffix
_BLOCK = 512
_COUNTING = 8  # shards that are counted at a time
_SEAL = b', "own_crc32": '  # comes last in the json: a checksum of all bytes before it
_PNG_DEPTH = 24  # byte of a PNG that says how many bits a channel has
_FIRST = 10  # samples left out that the manifest names
_EXAMPLES = 3  # and of each cause
_CAUSES = 30  # that it counts one by one
OTHER_CAUSES = "other causes"
TOLD = ("invalid", "lacking", "changed")
_HEAD = 1 << 16  # bytes of an image in which its size stands, almost always
_ORIENTATION = 0x0112  # of EXIF
_OPEN = 32  # shards whose file and index are kept at hand

T = TypeVar("T")
Entry = tuple[str, int, "int | None", "str | None"]
"""Of a shard: name, samples, bytes and sha256, as far as known."""
Group = tuple[str, dict[str, tuple[int, int]] | None]
"""Key of a sample, and where its members lie in the tar: name without key -> offset, size in bytes. None in place of
them where another sample has had the key already."""


class _Stop(Exception):
    """What is no fault of a sample, and ends the reading."""

    def __init__(self, error: UserError) -> None:
        self.error = error


class Damage(Exception):
    """A sample that cannot be read. The message says where (shard, index, key if known) and why."""


def check(sample: Sample) -> None:
    """Raise ValueError where a sample breaks what every reader may rely on; the one rule for writing and reading."""
    if not isinstance(sample.key, str) or not _KEY.fullmatch(sample.key):
        raise ValueError(f"key {sample.key!r} must be 1 to 80 letters, digits, '_' or '-'")
    _check_text("question", sample.question)
    _check_text("kind", sample.kind)
    if not isinstance(sample.answers, (tuple, list)):
        raise ValueError(f"answers must be a list of texts, not {type(sample.answers).__name__}")
    if not sample.answers:
        raise ValueError("answers must be one or more texts")
    for answer in sample.answers:
        _check_text("an answer", answer)
    _check_text("dataset", sample.dataset, empty=True)
    _check_text("scene", sample.scene, empty=True)
    if not 1 <= len(sample.images) <= IMAGES:
        raise ValueError(f"{len(sample.images)} images: there must be 1 to {IMAGES}")
    check_sizes(image.size for image in sample.images)
    if sample.boxes is None:
        return
    if not isinstance(sample.boxes, list) or len(sample.boxes) != len(sample.images):
        raise ValueError("boxes must be null or one list per image")
    for boxes, image in zip(sample.boxes, sample.images):
        width, height = images.shown_size(image)
        for box in boxes:
            check_box(box, width, height)


def check_box(box: Sequence[Any], width: int, height: int) -> None:
    """Raise ValueError where a box is none of an image of this size."""
    if len(box) != 4 or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        raise ValueError(f"box {box}: it must be four finite numbers")
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError(f"box {box} is not inside its image of {width} x {height}")


def _check_text(name: str, value: Any, empty: bool = False) -> None:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{name} must be a text" + ("" if empty else " that is not empty"))
    if len(value) > TEXT:
        raise ValueError(f"{name} has {len(value)} characters, more than the {TEXT} allowed")
    if half := surrogate(value):
        raise ValueError(f"{name} holds {half}, half of a surrogate pair")


def _plain(sample: Sample) -> Sample:
    """With numbers of Python in lists, whatever arrays the boxes came in."""
    if sample.boxes is None:
        return sample
    boxes = [[tuple(v.item() if hasattr(v, "item") else v for v in box) for box in image] for image in sample.boxes]
    return replace(sample, boxes=boxes)


def file_of(image: Image.Image) -> bytes | None:
    """The file of an image that may be stored as it is; to be asked for before it is decoded."""
    return images.file_of(image, IMAGE_BYTES) if image.format in ("PNG", "JPEG") else None


class ImageEncoder:
    """An image as (suffix, bytes). ``auto`` stores the file itself, where it is a PNG or a JPEG that any reader shows
    as :mod:`..images` does; else what was opened from a JPEG file as JPEG, with the file's own tables where it was not
    turned, and all else as PNG, without loss. ``png`` and ``jpg`` (quality 95, chroma at full resolution) are for all
    images; files of that kind are stored as they are.

    It remembers the last image, for sources ask several questions of one image in a row and encoding is what is slow.
    """

    def __init__(self, image_format: str = "auto") -> None:
        if image_format not in IMAGE_FORMATS:
            raise UserError(f"image_format is {image_format!r}: choose from {', '.join(IMAGE_FORMATS)}")
        self.image_format = image_format
        self.kept = {"auto": ("PNG", "JPEG"), "png": ("PNG",), "jpg": ("JPEG",)}[image_format]
        self.last: tuple[bytes, tuple[str, bytes]] = (b"", ("", b""))

    def __call__(self, image: Image.Image, file: bytes | None = None) -> tuple[str, bytes]:
        """``file``: as :func:`..images.file_of` gives it before the image is decoded."""
        from_jpeg, given = image.format in ("JPEG", "MPO"), image
        image = images.shown(given)
        keep = from_jpeg and image is given
        if file is not None and self._is_storable(given, file):
            stored = {"PNG": "png", "JPEG": "jpg"}[given.format], file
            if file_of(given) is None:  # opened by the source: next time it is known by its pixels alone
                self.last = self._digest(image, from_jpeg, keep), stored
            return stored
        digest = self._digest(image, from_jpeg, keep)
        if digest != self.last[0]:
            buffer = io.BytesIO()
            if self.image_format == "png" or (self.image_format == "auto" and not from_jpeg):
                image.save(buffer, "PNG", compress_level=1)  # twice as fast as 6 and 9% larger, on photographs
                suffix = "png"
            else:
                own = given.format == "JPEG" and hasattr(given, "quantization")
                exactly = keep and own and self.image_format == "auto"
                tables = {"quality": "keep"} if exactly else {"quality": 95, "subsampling": 0}
                image.save(buffer, "JPEG", **tables)
                suffix = "jpg"
            self.last = digest, (suffix, buffer.getvalue())
        return self.last[1]

    def _is_storable(self, image: Image.Image, file: bytes) -> bool:
        return (
            image.format in self.kept
            and images.is_shown_as_stored(image)
            and (_scans(file) <= SCANS if image.format == "JPEG" else file[_PNG_DEPTH] <= 8)
        )

    def _digest(self, image: Image.Image, from_jpeg: bool, keep: bool) -> bytes:
        salt = f"{image.width}{image.mode}{from_jpeg:d}{keep:d}".encode()
        return hashlib.blake2b(image.tobytes(), salt=salt).digest()


def encode(sample: Sample, encoder: Callable[[Image.Image, bytes | None], tuple[str, bytes]]) -> dict[str, Any]:
    """A WebDataset record: ``__key__``, ``json`` and ``0.png``, ``1.jpg`` ... as bytes.

    Raises:
        ValueError: the sample is not what :func:`check` wants, or too large to be read again.
    """
    sample, stored = _plain(sample), [file_of(image) for image in sample.images]
    check(sample)
    members = {f"{i}.{suffix}": data for i, (suffix, data) in enumerate(map(encoder, sample.images, stored))}
    meta = {
        "question": sample.question,
        "answers": list(sample.answers),
        "images": list(members),
        "boxes": sample.boxes,
        "kind": sample.kind,
        "dataset": sample.dataset,
        "scene": sample.scene,
        "crc32": {name: zlib.crc32(data) for name, data in members.items()},
    }
    body = json.dumps(meta, ensure_ascii=False).encode()[:-1]
    record = {"json": body + _SEAL + b"%d}" % zlib.crc32(body), **members}
    for name, data in record.items():
        _check_bytes(name, len(data))
    return {"__key__": sample.key, **record}


def decode(key: str, member: Callable[[str], bytes]) -> Sample:
    """The inverse of :func:`encode`; ``member`` gives the bytes under a name. Raises on anything that is not right."""
    data = member("json")
    meta = json.loads(data, object_pairs_hook=_each_once)
    if not isinstance(meta, dict):
        raise ValueError("the json is not an object")
    sums = _checksums(data, meta)
    names, answers, boxes = meta.get("images"), meta.get("answers"), meta.get("boxes")
    if not isinstance(names, list) or not all(map(_is_text, names)) or len(names) > IMAGES:
        raise ValueError(f"'images' in the json must be at most {IMAGES} names of members")
    if not isinstance(answers, list):
        raise ValueError("'answers' in the json must be a list")
    if boxes is not None:
        boxes = [[tuple(box) for box in image] for image in boxes]
    decoded: dict[str, Image.Image] = {}
    for place, name in enumerate(names):
        if name not in decoded:
            data = member(name)
            if sums is not None and zlib.crc32(data) != sums.get(name):
                raise ValueError(f"the checksum of member '{legible(name, 20)}' is another")
            decoded[name] = _decode_image(data, [decoded[other].size for other in names[:place]])
        else:
            check_sizes(decoded[other].size for other in names[: place + 1])
    sample = Sample(
        key=key,
        question=meta.get("question"),
        answers=tuple(answers),
        images=[decoded[name] for name in names],
        boxes=boxes,
        kind=meta.get("kind"),
        dataset=meta.get("dataset", ""),
        scene=meta.get("scene", ""),
    )
    check(sample)
    return sample


def decode_foreign(key: str, members: Iterable[str], member: Callable[[str], bytes], fields: Fields) -> Sample:
    """A sample as others write it; ``members``: its suffixes. Raises on anything that is not right."""

    def text(suffix: str) -> str:
        data = member(suffix)
        if len(data) > 4 * TEXT:
            raise ValueError(f"member '{suffix}' has {len(data)} bytes, more than a text may have")
        return data.decode()

    @lru_cache(1)
    def meta() -> Any:
        return json.loads(member("json"))

    found = {name: foreign.value(spec, members, text, meta) for name, spec in vars(fields).items() if name != "image"}
    if lacking := [name for name in ("question", "answers") if found[name] is None]:
        raise ValueError(f"no {lacking[0]} ({getattr(fields, lacking[0])})")
    image = _decode_image(member(next(name for name, _ in foreign.places(fields.image) if name in members)), [])
    boxes = found["boxes"]
    sample = Sample(
        key=key,
        question=" ".join(foreign.texts(found["question"])),
        answers=foreign.texts(found["answers"]),
        images=[image],
        boxes=None if boxes is None else [[tuple(box) for box in boxes]],
        kind="all" if found["kind"] is None else str(found["kind"]),
    )
    check(sample)
    return sample


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in the json")
    return found


def _checksums(data: bytes, meta: Mapping[str, Any]) -> Mapping[str, int] | None:
    """Name of a member -> crc32, as a sound json says; None in one from before there were any."""
    if "crc32" not in meta and "own_crc32" not in meta:
        return None
    body, _, end = data.rpartition(_SEAL)
    if end != b"%d}" % zlib.crc32(body) or not isinstance(meta.get("crc32"), dict):
        raise ValueError("the checksum of the json is another")
    return meta["crc32"]


def write_shard(
    samples: Iterable[Sample | Exception],
    path: Path,
    *,
    image_format: str = "auto",
    fit: Callable[[Sample], tuple[Sample, str]] = lambda sample: (sample, ""),
    tick: Callable[[], None] = lambda: None,
    leave_out: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Write one tar; None, and no file, where there are no samples. ``fit`` gives what is written of a sample, and what
    it has changed, if anything, or raises ValueError; ``tick`` is called after every one.

    ``leave_out(key and reason)`` is called for a sample that is invalid, or the exception that a source gives in place
    of one that it could not read, which is then left out; without it, it ends the writing. Returns the shard's entry
    in the manifest: name, count, bytes, sha256, and, for the caller to use up, ``keys``, ``kinds`` (a count of each),
    ``invalid`` (key and reason of those left out), ``lacking`` (of those of which the source left something out) and
    ``changed`` (of those that ``fit`` changed). A shard of which nothing is left has a count of 0. The bytes depend on
    the samples alone.

    Raises:
        UserError: an invalid sample, named by its key.
    """
    from webdataset import TarWriter  # here, so that reading needs no webdataset

    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return None
    keys: list[str] = []
    kinds: Counter[str] = Counter()
    invalid: list[tuple[str, str]] = []
    lacking: list[tuple[str, str]] = []
    changed: list[tuple[str, str]] = []
    encoder = ImageEncoder(image_format)
    with files.stream(path) as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in chain([first], samples):
            try:
                if isinstance(sample, Exception):
                    raise sample
                sample, change = fit(sample)
                record = encode(sample, encoder)
            except Exception as error:  # whatever a decoder raises on what a source has found somewhere
                key, reason = legible(getattr(sample, "key", type(sample).__name__), 100), _reason(error)
                if leave_out is None:
                    raise UserError(f"the source gave an invalid sample '{key}': {reason}") from error
                invalid.append((key, reason))
                leave_out(f"'{key}': {reason}")
            else:
                tar.write(record)
                keys.append(sample.key)
                kinds[sample.kind] += 1
                if sample.left_out:
                    lacking.append((sample.key, legible(sample.left_out, 300)))
                if change:
                    changed.append((sample.key, legible(change, 300)))
            tick()
    size, sha256 = path.stat().st_size, sha256_of(path)
    entry = {"name": path.name, "count": len(keys), "bytes": size, "sha256": sha256}
    return entry | {"keys": keys, "kinds": dict(kinds), "invalid": invalid, "lacking": lacking, "changed": changed}


def _reason(error: Exception) -> str:
    """One line, the same in every process."""
    return legible(re.sub(r" at 0x[0-9a-f]+", "", str(error)) or type(error).__name__, 300)


def _cause(reason: str) -> str:
    """A reason without the numbers in it, and what stands in double quotes: by this it is counted."""
    return re.sub(r'(?<![A-Za-z])-?\d[\d.]*(e[+-]?\d+)?|"[^"]*"', "…", reason)


def close_up(folder: Path, split: str, shards: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a split's shards, in order, once empty ones are removed and the others renamed to follow each
    other; what was left out of those goes with the next one, or the last."""
    kept: list[dict[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    for entry in shards:
        left_out += entry["invalid"]
        path = folder / entry["name"]
        if not entry["count"]:
            path.unlink()
            continue
        name = shard_name(split, len(kept))
        if name != path.name:
            path.rename(folder / name)
        kept.append({**entry, "name": name, "invalid": left_out})
        left_out = []
    if left_out and not kept:
        key, reason = left_out[0]
        raise UserError(f"all {len(left_out)} samples of split '{split}' are invalid, the first one '{key}': {reason}")
    if left_out:
        kept[-1]["invalid"] = kept[-1]["invalid"] + left_out
    return kept


def begin_manifest(folder: Path, meta: Mapping[str, Any]) -> None:
    """A manifest without splits yet; ``meta``, such as how they are made, is entered as it is."""
    files.write_json(folder / MANIFEST, {"format": FORMAT, **meta, "splits": {}}, indent=1)


def write_manifest(
    folder: Path, split: str, shards: Sequence[Mapping[str, Any]], meta: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Enter a split, given what :func:`write_shard` said of its shards, in the folder's manifest; returns its entry.

    In it ``rows`` is how many the source gave, ``count`` how many of them are there, and ``invalid`` is about those
    that are not, if any: their ``count``, how many by ``reasons``, ``examples`` of each, and the ``first`` few. So are
    ``lacking`` and ``changed``, about samples that are there, but for a part that their source left out, or otherwise
    than they were. Reasons that differ only in their numbers and names are counted as one.

    Raises:
        UserError: no shards, or a key that stands twice.
    """
    if not shards:
        raise UserError(f"the source has no samples for split '{split}'")
    twice = [key for key, times in Counter(key for shard in shards for key in shard["keys"]).items() if times > 1]
    if twice:
        raise UserError(f"split '{split}': {len(twice)} keys stand more than once, such as {twice[0]!r}")
    entry = {
        "split": split,
        **(meta or {}),
        "rows": sum(shard["count"] + len(shard["invalid"]) for shard in shards),
        "count": sum(shard["count"] for shard in shards),
        "kinds": dict(sorted(sum((Counter(shard["kinds"]) for shard in shards), Counter()).items())),
        "shards": [{key: shard[key] for key in ("name", "count", "bytes", "sha256")} for shard in shards],
    }
    for name in TOLD:
        if told := [each for shard in shards for each in shard.get(name, ())]:
            entry[name] = _by_cause(told)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {"format": FORMAT, "splits": {}}
    manifest["splits"][split] = entry
    files.write_json(path, manifest, indent=1, default=str)
    return entry


def _by_cause(told: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What a manifest says of samples, given the key of each and the reason."""
    causes = [_cause(reason) for _, reason in told]
    common = dict(Counter(causes).most_common(_CAUSES))
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {cause: [] for cause in common}
    for cause, (key, reason) in zip(causes, told):
        cause = cause if cause in common else OTHER_CAUSES
        reasons[cause] += 1
        if len(named := examples.setdefault(cause, [])) < _EXAMPLES:
            named.append(f"{key}: {reason}")
    return {
        "count": len(told),
        "reasons": {cause: reasons[cause] for cause in examples},
        "examples": examples,
        "first": [f"{key}: {reason}" for key, reason in told[:_FIRST]],
    }


def write(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    split: str,
    shard_size: int = 512,
    meta: Mapping[str, Any] | None = None,
    image_format: str = "auto",
) -> dict[str, Any]:
    """Write a split into folder ``out`` and its manifest, in one process; returns the split's entry in the manifest.

    ``meta`` (source, options) is entered as it is. Raises as :func:`write_shard` and :func:`write_manifest`.
    """
    folder, stream = Path(out), iter(samples)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    while shard := write_shard(
        islice(stream, shard_size), folder / shard_name(split, len(shards)), image_format=image_format
    ):
        shards.append(shard)
    return write_manifest(folder, split, shards, meta)


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:06d}.tar"


class Shards:
    """The samples of one split of a folder, by index; any process may read any of them.

    ``folder`` may be an address; ``limit`` leaves only the first so many samples; ``verify`` compares the sha256 of
    every shard here with the manifest, which reads the whole folder once (what comes from an address is compared as it
    comes); ``store`` says how what is not just files with our manifest is read.

    Attributes:
        left_out: reason -> samples in the shards of others that lack what ``store.fields`` asks for.
        mix: empty, for there is one folder; see :class:`.mixture.Mixture`.

    Raises:
        UserError: the folder or its manifest is missing or broken, the split is not in it, or its shards are not those
            of the manifest. (A shard that is only shorter than it should be is read as far as it goes: see
            :meth:`read`.)
    """

    mix: Sequence[tuple[int, float]] = ()

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        limit: int | None = None,
        verify: bool = False,
        store: Store = Store(),  # noqa: B008 (frozen)
    ) -> None:
        self.place, self.split = Place(folder, store), split
        self.folder = self.place.folder
        self.fields: Fields | None = None
        self.left_out: Counter[str] = Counter()
        if (shards := _read_manifest(self.place, split)) is None:
            self.fields = config.merge_options(Fields, store.fields, "data.fields")
            shards, self.left_out = _counted(self.place, split, self.fields)
        self.shards = shards
        if verify and not self.place.remote and self.fields is None:
            wrong = [name for name, _, _, sha256 in self.shards if sha256_of(self.folder / name) != sha256]
            if wrong:
                raise UserError(_remedy(self.folder, f"sha256 differs from {MANIFEST} for {some(wrong)}"))
        if limit is not None and limit < 1:
            raise UserError(f"limit is {limit}: at least 1 sample of {self.folder} ({split})")
        ends = list(accumulate(count for _, count, _, _ in self.shards))
        self.ends = ends if limit is None else [min(end, limit) for end in ends]
        self._open: OrderedDict[int, tuple[IO[bytes], list[Group]]] = OrderedDict()
        self._lost: dict[int, str] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [end - start for start, end in zip([0, *self.ends], self.ends)]

    def require_cache(self, window: int) -> None:
        """Raise UserError where ``window`` shards, which a training reads in turns, are more than the cache holds."""
        require_room(self.in_use(window), self.place, window)

    def in_use(self, window: int) -> int:
        """Bytes of the cache that the largest ``window`` shards take up, as far as they are known."""
        sizes = [size or 0 for name, _, size, _ in self.shards if self.place.cached(name)]
        return sum(sorted(sizes, reverse=True)[:window])

    def read(self, index: int) -> Sample:
        """Sample ``index``, 0 <= index < len.

        A shard's samples are counted in the order in which they are found in it; where fewer are found than the
        manifest says, those missing are the last ones, whichever they were.

        Raises:
            Damage: the sample is lost or broken.
            UserError: its shard did not come for now, or there is no room for it.
        """
        return self._member(index, self._decode)

    def sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of each image of a sample, as it would be shown, without decoding them; raises as
        :meth:`read`."""
        return self._member(index, self._sizes)

    def _member(self, index: int, make: Callable[[str, str, Iterable[str], Callable[[str], bytes]], T]) -> T:
        shard = bisect_right(self.ends, index)
        local = index - (self.ends[shard - 1] if shard else 0)
        name, count, _, _ = self.shards[shard]
        place = f"{name}[{local}]"
        try:
            stream, groups = self._index(shard)
            if local >= len(groups):
                raise ValueError(f"only {len(groups)} of {count} samples are left in this shard")
            key, members = groups[local]
            place = f"{place} ({key})"
            if members is None:
                raise ValueError("another sample before it has this key")
            return make(name, key, members, partial(_read_member, stream, members))
        except _Stop as stop:
            raise stop.error from None
        except Exception as error:  # whatever a decoder raises on hostile bytes
            raise Damage(legible(f"{place}: {error or type(error).__name__}", 300)) from error

    def _decode(self, shard: str, key: str, members: Iterable[str], member: Callable[[str], bytes]) -> Sample:
        if self.fields is None:
            return decode(key, member)
        return decode_foreign(foreign.key_of(shard, key), members, member, self.fields)

    def _sizes(
        self, shard: str, key: str, members: Iterable[str], member: Callable[[str], bytes]
    ) -> list[tuple[int, int]]:
        if self.fields is None:
            names = json.loads(member("json")).get("images")
        else:
            names = [next(name for name, _ in foreign.places(self.fields.image) if name in members)]
        if not isinstance(names, list) or len(names) > IMAGES:
            raise ValueError(f"'images' in the json must be at most {IMAGES} names of members")
        return [_image_size(partial(member, name)) for name in names]

    def _index(self, shard: int) -> tuple[IO[bytes], list[Group]]:
        if shard not in self._open:
            name, count, *_ = self.shards[shard]
            stream = self._stream(shard)
            found = _once(_walk(stream)) if self.fields is None else _complete(stream, self.fields)
            groups = list(islice(found, count + 1))
            if len(groups) > count:
                warnings.warn(f"{name}: it holds more than the {count} samples that {MANIFEST} counts", stacklevel=5)
            self._let_go()
            self._open[shard] = stream, groups
        elif self.place.cached(self.shards[shard][0]):
            used(self._open[shard][0])
        self._open.move_to_end(shard)
        return self._open[shard]

    def _stream(self, shard: int) -> IO[bytes]:
        if shard in self._lost:
            raise remote.Lost(self._lost[shard])
        name, _, size, sha256 = self.shards[shard]
        try:
            return self.place.open(name, size, sha256)
        except remote.Lost as lost:  # 512 samples need not ask 512 times
            self._lost[shard] = str(lost)
            raise
        except UserError as error:
            raise _Stop(error) from error

    def _let_go(self) -> None:
        """Close what was used longest ago, and what has left the cache, whose place on the disk waits for that."""
        gone = {other for other, (stream, _) in self._open.items() if not os.fstat(stream.fileno()).st_nlink}
        stay = [other for other in self._open if other not in gone]
        for other in [*gone, *stay[: max(0, len(stay) + 1 - _OPEN)]]:
            self._open.pop(other)[0].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def require_room(needed: int, place: Place, window: int) -> None:
    """Raise UserError where the ``needed`` bytes of shards that a training reads in turns do not fit into the cache."""
    if needed > place.cache.limit:
        raise UserError(
            f"data.cache_gb={place.cache.limit / 1e9:g}: a training reads {window} shards of a folder in turns, which "
            f"have {needed / 1e9:.3g} GB: give more"
        )


def _own_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member of our shards; None for one that is foreign."""
    key, _, member = name.partition(".")
    return (key, member) if _KEY.fullmatch(key) else None


def _walk(stream: IO[bytes], split_name: Callable[[str], tuple[str, str] | None] = _own_name) -> Iterator[Group]:
    """Samples of a tar in order. What is not a sound header is passed over, block by block, up to the next one."""
    size = os.fstat(stream.fileno()).st_size
    group: Group | None = None
    offset = 0
    while offset + _BLOCK <= size:
        start = offset + _BLOCK
        try:
            header = tarfile.TarInfo.frombuf(os.pread(stream.fileno(), _BLOCK, offset), "utf-8", "strict")
            if not 0 <= header.size <= size - start:
                raise ValueError("the member is longer than the file")
        except (tarfile.HeaderError, ValueError):  # includes the zeros that end a tar
            offset = start
            continue
        offset = start + -(-header.size // _BLOCK) * _BLOCK
        if not header.isreg() or (name := split_name(header.name)) is None:
            continue
        key, member = name
        if group is None or key != group[0] or member in group[1]:
            if group:
                yield group
            group = key, {}
        if len(group[1]) < 4 * IMAGES:  # foreign members are left alone; a million of them are not kept
            group[1][member] = start, header.size
    if group:
        yield group


def _once(groups: Iterable[Group]) -> Iterator[Group]:
    seen = set()
    for key, members in groups:
        yield key, None if key in seen else members
        seen.add(key)


def _complete(stream: IO[bytes], fields: Fields, left_out: Counter[str] | None = None) -> Iterator[Group]:
    """Samples of a tar that others wrote, but those that lack a field, which are counted by reason."""
    for key, members in _once(_walk(stream, foreign.split_name)):
        reason = "another sample before it has this key" if members is None else foreign.lacking(members, fields)
        if not reason:
            yield key, members
        elif left_out is not None:
            left_out[reason] += 1


def _read_member(
    stream: IO[bytes], members: Mapping[str, tuple[int, int]], name: str, most: int | None = None
) -> bytes:
    if name not in members:
        raise ValueError(f"member '{legible(name, 20)}' is missing")
    offset, size = members[name]
    _check_bytes(name, size)
    size = size if most is None else min(size, most)
    data = os.pread(stream.fileno(), size, offset)
    if len(data) < size:
        raise ValueError(f"member '{name}' is cut off after {len(data)} of {size} bytes")
    return data


def _decode_image(data: bytes, others: Iterable[tuple[int, int]]) -> Image.Image:
    """``others``: sizes of the images of the sample that are there already."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:  # whose message holds an address, other each time
        raise ValueError("an image is neither PNG nor JPEG") from None
    with image:
        check_sizes([*others, image.size])  # known from the header, before any pixel is decoded
        if image.format == "JPEG" and _scans(data) > SCANS:
            raise ValueError(f"a JPEG of more than {SCANS} scans")
        picture = images.shown(image).convert("RGB")
        picture.format, picture.file = image.format, data  # as it was stored, should it be stored again
        return picture


def _image_size(read: Callable[..., bytes]) -> tuple[int, int]:
    """Width and height of an image as it is shown, from its header; ``read(most)`` gives its first bytes, or all."""
    try:
        image = Image.open(io.BytesIO(read(_HEAD)), formats=("PNG", "JPEG"))
    except Exception:  # a header may be longer: a thumbnail, a colour profile
        image = Image.open(io.BytesIO(read()), formats=("PNG", "JPEG"))
    with image:
        check_sizes([image.size])
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def _scans(jpeg: bytes) -> int:
    """At least as many as there are: their marker may also stand in a thumbnail. 30 times as fast as bytes.count."""
    pairs = (np.frombuffer(jpeg, "<u2", (len(jpeg) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(each == 0xDAFF)) for each in pairs)


def _check_bytes(name: str, size: int) -> None:
    limit = JSON_BYTES if name == "json" else IMAGE_BYTES
    if size > limit:
        raise ValueError(f"member '{name}' has {size} bytes, more than the {limit} allowed")


def check_sizes(sizes: Iterable[tuple[int, int]]) -> None:
    """Raise ValueError where images of one sample, known by their sizes, are too large, alone or together."""
    total = 0
    for width, height in sizes:
        total += width * height
        if not 0 < width * height <= PIXELS:
            raise ValueError(f"image of {width} x {height} pixels: there must be 1 to {PIXELS}")
        if max(width, height) > ASPECT * min(width, height):
            raise ValueError(f"image of {width} x {height} pixels: the sides differ by more than {ASPECT} times")
    if total > SAMPLE_PIXELS:
        raise ValueError(f"the images have {total} pixels together, more than the {SAMPLE_PIXELS} allowed")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(place: Place, split: str) -> list[Entry] | None:
    """The shards of a split, checked against what lies in the folder; None where there is no manifest and the shards of
    others are welcome."""
    folder = place.folder
    there = {} if place.remote else _names(folder)
    try:
        if place.remote:
            manifest = json.loads(place.small(MANIFEST, MANIFEST_BYTES))
        else:
            with open(folder / MANIFEST, "rb", opener=open_file) as stream:
                if os.fstat(stream.fileno()).st_size > MANIFEST_BYTES:
                    raise ValueError(f"it has more than {MANIFEST_BYTES} bytes")
                manifest = json.load(stream)
    except (FileNotFoundError, remote.Lost) as error:
        if place.store.fields is not None:
            return None
        found = str(error) if place.remote else f"there are only {some(sorted(there))}" if there else "it is empty"
        others = "; shards that others wrote are read with data.fields={}" if place.remote or _tars(there) else ""
        raise UserError(_remedy(place, f"no {MANIFEST}: {found}") + others) from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_remedy(place, f"cannot read {MANIFEST}: {error}")) from None
    try:
        if manifest["format"] != FORMAT:
            raise ValueError
        splits = manifest["splits"]
        if split not in splits:
            raise UserError(_remedy(place, f"there is no split '{split}', only {some(sorted(splits))}"))
        shards = [(s["name"], s["count"], s["bytes"], s["sha256"]) for s in splits[split]["shards"]]
        if not shards or not all(
            name in (shard_name(split, i), shard_name(split, i) + ".gz")
            and type(count) is type(size) is int
            and 0 < count <= min(size * (1 if name.endswith(".tar") else RATIO) // (2 * _BLOCK), SHARD_COUNT)
            for i, (name, count, size, _) in enumerate(shards)
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_remedy(place, f"{MANIFEST} is not one of ours")) from None
    if place.remote:
        return shards
    listed = {name for name, *_ in shards}
    if lost := sorted(listed - set(there)):
        raise UserError(_remedy(folder, f"{some(lost)} of {len(listed)} shards in {MANIFEST} are missing"))
    of_split = re.compile(re.escape(split) + r"-\d{6}\.tar(\.gz)?")
    if extra := [name for name in there if of_split.fullmatch(name) and name not in listed]:
        raise UserError(_remedy(folder, f"{some(extra)} are there but not in {MANIFEST}"))
    found = {name: (folder / name).stat() for name in sorted(listed)}
    if strange := [name for name, status in found.items() if not stat.S_ISREG(status.st_mode)]:
        raise UserError(_remedy(folder, f"{some(strange)} in {MANIFEST} are no files"))
    if longer := [name for name, _, size, _ in shards if found[name].st_size > size]:
        raise UserError(_remedy(folder, f"{some(longer)} are longer than {MANIFEST} says"))
    return shards


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(_remedy(folder, "it is a file, not a folder" if folder.exists() else "there is no such folder"))
    return sorted(path.name for path in folder.iterdir())


def _tars(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(ENDS) and not name.startswith(".")]


def _counted(place: Place, split: str, fields: Fields) -> tuple[list[Entry], Counter[str]]:
    """The shards of a split that others wrote, without those of which nothing is left, and what was left out by reason.
    Each is walked once; what was found is kept in the cache until it is another file."""
    try:
        there = place.names()
    except remote.Lost as lost:
        raise UserError(f"no shards in {place}: {lost}") from None
    names = foreign.of_split(_tars(there), split)
    if not names:
        raise UserError(f"no shards of split '{split}' in {place}: {some(sorted(there)) or 'it is empty'}")

    def counted(name: str) -> dict[str, Any]:
        what = json.dumps([place.identity(name, there[name]), vars(fields)])
        return json.loads(place.cache.text(what, partial(_count, place, name, there[name], fields)))

    with ThreadPoolExecutor(_COUNTING) as pool:
        found = dict(zip(names, pool.map(counted, names)))
    if lost := {name: entry["lost"] for name, entry in found.items() if entry["lost"]}:
        warnings.warn(f"{place}: {len(lost)} shards are left out, such as {next(iter(lost.values()))}", stacklevel=3)
    left_out = sum((Counter(entry["left_out"]) for entry in found.values()), Counter())
    shards = [(name, entry["count"], there[name], None) for name, entry in found.items() if entry["count"]]
    if not shards:
        raise UserError(f"no sample of split '{split}' in {place} has what data.fields asks for: {dict(left_out)}")
    return shards, left_out


def _count(place: Place, name: str, size: int | None, fields: Fields, file: Path) -> None:
    """Write what is found in a shard to ``file``."""
    left_out: Counter[str] = Counter()
    try:
        with place.open(name, size) as stream:
            count, lost = sum(1 for _ in _complete(stream, fields, left_out)), ""
    except (remote.Lost, ValueError) as error:
        if isinstance(error, UserError):
            raise
        count, lost = 0, legible(f"{name}: {error}", 300)
    files.write_json(file, {"count": count, "left_out": left_out, "lost": lost})


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(legible(name, 100) for name in names[:3]) + more


def _remedy(folder: Path | Place, trouble: str) -> str:
    far = isinstance(folder, Place) and folder.remote
    out = "<folder>`, and bring that there" if far else f"{folder}`"
    return f"no usable shards in {folder}: {trouble}; make them with `python -m src.prepare source=<name> out={out}"
