"""Pictures for people who ask: ``glimpseprune.plot.kept(image, answer).save("kept.png")``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from glimpseprune import pictures
from glimpseprune.config import UserError
from glimpseprune.types import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from glimpseprune.types import Answer

Picture = Image.Image | str | Path


def kept(images: Picture | Sequence[Picture], answer: Answer | Sequence[Tensor], text: str = "") -> Image.Image:
    """The images side by side, dark where visual tokens were dropped, ``text`` below.

    Args:
        answer: what ``model.ask`` returned, or keep maps, bool [rows, cols], one per image.
    """
    opened_ = [opened(each) for each in (images if isinstance(images, (list, tuple)) else [images])]
    maps = list(getattr(answer, "maps", answer))
    if len(maps) != len(opened_):
        raise UserError(f"{len(opened_)} images, and keep maps of {len(maps)}: give the images that were asked about")
    sample = Sample("", "", ("",), opened_)
    return pictures.panel(sample, maps, [text] if text else [])


def opened(image: Picture) -> Image.Image:
    """An image, or the one in a file, read whole.

    Raises:
        UserError: there is none that Pillow can read.
    """
    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(Path(image).expanduser()) as file:
            file.load()
            return file.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture '{image}': {error}") from None
