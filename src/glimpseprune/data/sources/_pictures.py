"""Pictures that rows name, by a path below one folder, or hold themselves."""

from __future__ import annotations

import os
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from PIL import Image

from glimpseprune import images
from glimpseprune.config import UserError
from glimpseprune.data.shards import IMAGE_BYTES, open_file
from glimpseprune.data.sources._rows import shown_value

Image.init()
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
"""Pictures that are read, those of several frames in a JPEG (MPO) among them: none whose reader starts another program,
and as this Pillow was built."""


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
        raise ValueError(f"an image must be the path of a file, not {shown_value(given)}")
    return name or "in the row", data


def _picture(what: str, data: bytes) -> Image.Image:
    if len(data) > IMAGE_BYTES:
        raise ValueError(f"{what} has {len(data)} bytes, more than the {IMAGE_BYTES} allowed")
    try:
        return images.of_file(data, FORMATS)
    except Exception:  # whatever a reader raises on hostile bytes
        raise ValueError(f"{what} is no picture that can be read ({', '.join(FORMATS)})") from None
