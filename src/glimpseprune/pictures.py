"""Pictures of what was kept: the image darkened where its tokens were dropped, evidence boxes, question and answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from glimpseprune.images import shown, shown_size
from glimpseprune.legible import legible
from glimpseprune.types import Sample

SIDE = 336  # pixels of a drawn image's longer side
LINE = 15  # pixels per line of text
LETTERS = 300  # most of a line
DIM = 0.22  # brightness of what was dropped
BOX = (255, 255, 255)


def overlay(image: Image.Image, keep: Tensor) -> Image.Image:
    """``image`` with the cells of ``keep`` (bool [rows, cols]) bright and the others dark."""
    image = shown(image).convert("RGB")
    scale = SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    mask = Image.fromarray(keep.cpu().numpy().astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    dark = Image.blend(Image.new("RGB", image.size), image, DIM)
    return Image.composite(image, dark, mask)


def panel(sample: Sample, keeps: Sequence[Tensor], lines: Sequence[str]) -> Image.Image:
    """One sample: its images side by side under their keep masks, evidence boxes outlined, ``lines`` of text below."""
    tiles = [overlay(image, keep) for image, keep in zip(sample.images, keeps)]
    for tile, image, boxes in zip(tiles, sample.images, sample.boxes or [[] for _ in tiles]):
        (width, height), draw = shown_size(image), ImageDraw.Draw(tile)
        for x0, y0, x1, y1 in boxes:
            left, right = _span(x0 * tile.width / width, x1 * tile.width / width, tile.width)
            top, bottom = _span(y0 * tile.height / height, y1 * tile.height / height, tile.height)
            draw.rectangle((left, top, right, bottom), outline=BOX)
    height = max(tile.height for tile in tiles)
    page = Image.new("RGB", (sum(tile.width for tile in tiles), height + LINE * len(lines) + 6), "white")
    left = 0
    for tile in tiles:
        page.paste(tile, (left, 0))
        left += tile.width
    write, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for row, line in enumerate(lines):
        write.text((4, height + 2 + row * LINE), legible(line, LETTERS), fill="black", font=font)
    return page


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """First and last of ``length`` pixels that an edge covers, which may be thinner than one of them."""
    first = min(int(low), length - 1)
    return first, max(first, ceil(high) - 1)


def grid(panels: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Panels in rows of ``columns``, each cell as large as the largest panel."""
    width, height = (max(p.size[axis] for p in panels) + 6 for axis in (0, 1))
    columns = min(columns, len(panels))
    page = Image.new("RGB", (width * columns, height * -(-len(panels) // columns)), "white")
    for index, picture in enumerate(panels):
        page.paste(picture, (index % columns * width + 3, index // columns * height + 3))
    return page


def packed(image: Image.Image) -> str:
    """A PNG file in base64."""
    file = io.BytesIO()
    image.save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def unpacked(text: str) -> Image.Image:
    """The image that :func:`packed` had."""
    return Image.open(io.BytesIO(base64.b64decode(text)))
