"""Questions and images in the forms in which people have them -> one text and one list of PIL images per prompt.

An image is a PIL image, a path, an array or a tensor: uint8, or floats from 0 to 1, of shape [H, W], [H, W, C], or, as
torch has them, [C, H, W], with 1, 3 or 4 channels. What an image looks like (orientation, transparency, more than 8
bits) is not decided here. Pictures that a tower has seen (:class:`._seen.Seen`) take the place of images, of all or of
none. Left out: addresses on the web, which nothing of ours opens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from glimpseprune.backbones._seen import Seen
from glimpseprune.config import UserError

KINDS = "a PIL image, a path, an array or a tensor (uint8, or floats from 0 to 1: [H, W], [H, W, C] or [C, H, W])"
CHANNELS = (1, 3, 4)


def rows(questions: Any, images: Any) -> tuple[list[str], list[list[Image.Image]] | list[list[Seen]]]:
    """One text and its images per prompt. A question alone is one prompt, with one image or a list of them; in a list,
    every question has one image or a list of them. What was seen may be given once for all questions.

    Raises:
        UserError: numbers that do not match, a prompt without an image, or something that is no text or no image.
    """
    if isinstance(questions, str):
        questions = [questions]
        images = images if _nested(images) else [images]
    if not isinstance(questions, Sequence) or isinstance(questions, bytes):
        raise UserError(f"questions: give a text or a list of texts, not {_kind(questions)}")
    for row, question in enumerate(questions):
        if not isinstance(question, str):
            raise UserError(f"question {row}: give a text, not {_kind(question)}")
    if not questions:
        raise UserError("there is no question: give a text and its image, or a list of texts and one of images")
    if isinstance(images, Seen):
        images = [images] * len(questions)
    if _is_image(images) or not isinstance(images, Iterable):
        got = "one image" if _is_image(images) else _kind(images)
        raise UserError(f"images: give a list with one image, or a list of images, per question, not {got}")
    images = list(images)
    if len(images) != len(questions):
        of = "one question" if len(questions) == 1 else f"{len(questions)} questions"
        raise UserError(
            f"{of} and images for {len(images)} of them: images is a list with one entry per question, an image or a "
            "list of images"
        )
    made = [_row(row, of_row) for row, of_row in enumerate(images)]
    if len({isinstance(image, Seen) for row in made for image in row}) == 2:
        raise UserError("images: some were seen, others were not: see all of them, or none")
    return list(questions), made


def picture(image: Any, where: str) -> Image.Image | Seen:
    """``image`` as a PIL image, read from its file if it is a path; ``where`` begins what errors say."""
    if isinstance(image, (Image.Image, Seen)):
        return image
    if isinstance(image, (str, PathLike)):
        if str(image).startswith(("http://", "https://")):
            raise UserError(f"{where}: '{image}' is an address on the web: download it, and give the file")
        return _opened(Path(image).expanduser() if str(image)[:2] == "~/" else Path(image), where)
    if isinstance(image, Tensor):
        array = image.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        return _drawn(array, where, channels_first=True)
    if isinstance(image, np.ndarray):
        return _drawn(image, where)
    raise UserError(f"{where}: give {KINDS}, not {_kind(image)}")


def _row(row: int, images: Any) -> list[Image.Image]:
    where = f"prompt {row}"
    if _is_image(images):
        return [picture(images, where)]
    if images is None or (isinstance(images, Sequence) and not images):
        raise UserError(f"{where} has no image: every prompt needs at least one")
    if not isinstance(images, (list, tuple)):
        raise UserError(f"{where}: give {KINDS}, or a list of them, not {_kind(images)}")
    return [picture(image, f"{where}, image {number}") for number, image in enumerate(images)]


def _nested(images: Any) -> bool:
    """Whether they are a list with a list for its only prompt."""
    return isinstance(images, (list, tuple)) and len(images) == 1 and isinstance(images[0], (list, tuple))


def _is_image(value: Any) -> bool:
    return isinstance(value, (Image.Image, Seen, str, PathLike, np.ndarray, Tensor))


def _opened(path: Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"{where}: there is no file '{path}' (seen from {Path.cwd()})") from None
    except Exception as error:  # of the disk, or whatever a damaged file leads Pillow to
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: {str(path)!r} cannot be read as an image: {said}") from None


def _drawn(array: np.ndarray, where: str, channels_first: bool = False) -> Image.Image:
    first, last = (array.ndim == 3 and array.shape[axis] in CHANNELS for axis in (0, 2))
    if first and (channels_first or not last):
        array = array.transpose(1, 2, 0)
    elif array.ndim != 2 and not last:
        raise UserError(f"{where}: give {KINDS}, not one of shape {list(array.shape)}")
    if not array.size:
        raise UserError(f"{where}: an array of shape {list(array.shape)} has no pixels")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # nor is NaN
            raise UserError(f"{where}: floats from {array.min():g} to {array.max():g}: give them from 0 to 1, or uint8")
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 and not (array.dtype == np.uint16 and array.ndim == 2):
        raise UserError(f"{where}: an array of {array.dtype}: give uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array))


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"
