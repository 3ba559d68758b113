"""Images as people see them: upright, on white, in 8 bits. What is opened anywhere in the package goes through here.

``convert("RGB")`` alone looks at nothing: it clips 16-bit and float values to white or black, puts what is transparent
on whatever colour lies below, and keeps a photo as the sensor had it. The rules:

- the EXIF (or XMP) orientation is applied, and boxes are in pixels of the picture as it is shown then;
- what is transparent is put on white;
- grey levels of 16 bits are divided by 257; integers of 32 bits and floats are taken to go up to the first of 1 (only
  floats), 255 and 65535 that none of them exceeds, and refused where there is none, one is negative or no number;
- an animation is the frame it stands at, the first one when it was just opened;
- CMYK, palettes, YCbCr and single bits are converted by Pillow; what it cannot convert is refused by name.

Left out: colour profiles, which the image processors of transformers ignore, too.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image

from glimpseprune.config import UserError

__all__ = ["distinct", "file_of", "fingerprint", "is_shown_as_stored", "of_file", "shown", "shown_size", "shrunk"]

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes it upright."""
_TOPS = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Mode -> what white may be; others of more than 8 bits have 16."""


def shown(image: Image.Image) -> Image.Image:
    """The picture as it is shown: of mode L where it was grey and opaque, else RGB; ``image`` itself if it is that.

    Raises:
        UserError: it is cut off or broken, or its pixels cannot be turned into 8-bit ones.
    """
    _load(image)
    turn = _TURNS.get(_orientation(image))
    if image.mode[0] in "IF":
        made = _eight_bits(image)
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        made = _on_white(image)
    elif image.mode in ("L", "RGB"):
        made = image
    else:
        made = _converted(image, "L" if image.mode == "1" else "RGB")
    if turn is not None:
        made = made.transpose(turn)
    if made is not image:
        made.info = {}  # a tag of orientation would turn it again
    return made


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what :func:`shown` gives; raises as it does where the image cannot be read."""
    _load(image)
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def of_file(data: bytes, formats: Sequence[str]) -> Image.Image:
    """A picture, not decoded yet, that goes on knowing its file; nobody may draw on it. Raises as ``Image.open``."""
    image = Image.open(io.BytesIO(data), formats=formats)
    image.file = data
    return image


def file_of(image: Image.Image, most: int) -> bytes | None:
    """The file that an image is, byte for byte: one :func:`of_file`, or opened and not decoded yet; else None, and
    where it has more than ``most`` bytes."""
    if (known := getattr(image, "file", None)) is not None:
        return known
    stream = getattr(image, "fp", None)
    if stream is None or not getattr(image, "tile", None):  # pixels that are there may have been changed
        return None
    try:
        place = stream.tell()
        stream.seek(0)
        data = stream.read(most + 1)
        stream.seek(place)
    except (OSError, ValueError):
        return None
    return data if len(data) <= most else None


def is_shown_as_stored(image: Image.Image) -> bool:
    """Whether any reader sees in the file of ``image`` what :func:`shown` does: one picture, upright and opaque. Of how
    many bits it is, Pillow does not always tell."""
    plain = image.mode in ("1", "L", "P", "RGB") and "transparency" not in image.info
    return plain and not getattr(image, "is_animated", False) and _orientation(image) == 1


def shrunk(image: Image.Image, most: int) -> Image.Image:
    """What is shown, with ``most`` pixels at most and its sides in proportion; as it is where it has no more."""
    picture = shown(image)
    scale = math.sqrt(most / (picture.width * picture.height))
    if scale >= 1:
        return picture
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def distinct(images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """The pictures that differ in what is shown, as RGB and in their order; and which of them each image is."""
    given = {id(image): image for image in images}
    made = {key: shown(image).convert("RGB") for key, image in given.items()}
    sizes = Counter(picture.size for picture in made.values())
    known: dict[object, int] = {}
    pictures, numbers = [], {}
    for key, picture in made.items():
        what = (picture.size, picture.tobytes()) if sizes[picture.size] > 1 else key
        if what not in known:
            known[what] = len(pictures)
            pictures.append(picture)
        numbers[key] = known[what]
    return pictures, [numbers[id(image)] for image in images]


def fingerprint(image: Image.Image) -> bytes:
    """The same for pictures of which the same is shown."""
    picture = shown(image).convert("RGB")
    return blake2b(picture.tobytes(), salt=b"%dx%d" % picture.size, digest_size=16).digest()


def _load(image: Image.Image) -> None:
    broken = getattr(image, "broken", None)  # at the second time of asking Pillow may give what it has got
    if broken is None:
        try:
            image.load()
            return
        except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # what Pillow's decoders raise
            image.broken = broken = error
    raise UserError(f"an image cannot be read: {broken}") from broken


def _orientation(image: Image.Image) -> int:
    """1 where nothing, or nothing sensible, is said of it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever a broken block of EXIF leads to: the pixels are sound
        return 1


def _converted(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except ValueError:
        raise UserError(f"an image of mode {image.mode}, which cannot be converted: give it as {mode}") from None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "PA", "RGBa"):
        image = image.convert({"La": "LA"}.get(image.mode, "RGBA"))
    image = _converted(image, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    tops = _TOPS.get(image.mode, (65535,))
    top = next((top for top in tops if low >= 0 and high <= top), None)  # none where there is a NaN
    if top is None:
        ways = " or ".join(f"0 to {top}" for top in tops)
        raise UserError(f"an image of mode {image.mode} with values from {low:g} to {high:g}: give {ways}, or 8 bits")
    grey = (values.astype(np.float32) * np.float32(255 / top) + np.float32(0.5)).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)
