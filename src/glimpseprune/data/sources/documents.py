"""Documents: receipts, forms and tables, drawn; a third kind of picture beside photographs and shapes.

``python -m src.prepare source=documents out=data/documents``. Nothing is downloaded: letters are those of the font that
Pillow ships, or of ``fonts``, files of a user's own. Pages differ in size of type, margins, spacing, ink, paper, tilt
and noise. There are three kinds of page, and as many kinds of question:

=========  ==============================  =========  ==============================
kind       question                        answer     evidence
=========  ==============================  =========  ==============================
receipt    price of bread?  total?         3.40       the line that says it
form       city of the sender?             Oslo       label and value
table      rain in May?                    47         the cell, and its row's and column's names
=========  ==============================  =========  ==============================

A page is in one split alone, and has a random stream of its own. Words are the same in all splits, values are not
remembered by a model that has not read them: prices and cells are drawn anew on every page, and names in a form are put
together from parts. Left out: handwriting, stamps, several pages, curved paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.types import Box, Sample

splits = ("train", "val", "test")
KINDS = ("receipt", "form", "table")
GOODS = (
    *("apples", "bread", "butter", "cheese", "coffee", "eggs", "flour", "grapes", "honey", "juice", "lemons", "milk"),
    *("noodles", "olives", "onions", "pears", "pepper", "rice", "salt", "soap", "sugar", "tea", "tofu", "yoghurt"),
)
SHOPS = ("Corner Shop", "Green Market", "Harbour Store", "Mill & Sons", "Old Town Foods", "Station Kiosk")
PEOPLE = ("sender", "receiver", "payer", "witness")
FIELDS = ("name", "city", "phone", "number")
FIRST = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mia", "Noah")
LAST = ("Abel", "Berg", "Cruz", "Dahl", "Egli", "Frey", "Gray", "Holm", "Ito", "Jung", "Koch", "Lund", "Mori", "Nash")
CITIES = (
    "Bern",
    "Cairo",
    "Dakar",
    "Delhi",
    "Hanoi",
    "Lagos",
    "Lima",
    "Lyon",
    "Minsk",
    "Osaka",
    "Oslo",
    "Porto",
    "Quito",
)
ROWS = ("hail", "rain", "snow", "sun", "wind", "fog", "frost", "storm")
COLUMNS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug")
LINES = {"receipt": (5, 12), "form": (2, 4), "table": (4, 8)}
"""Fewest and most goods, people, rows."""


@dataclass
class Options:
    size: int = option(672, "side of a page in pixels", least=336, most=2688)
    questions: int = option(4, "questions per page", least=1, most=100)
    kinds: list[str] = option(list(KINDS), f"kinds of page, of {KINDS}, in turn")
    count: dict[str, int] = option(
        {"train": 8192, "val": 512, "test": 2048}, "questions per split", least=1, most=10**9
    )
    tilt: float = option(1.5, "most degrees that a page is turned by", least=0, most=10)
    noise: float = option(6.0, "spread of the grey levels of paper and ink", least=0, most=64)
    fonts: list[str] = option([], "font files (.ttf, .otf) to choose from; default: the one that Pillow ships")
    seed: int = option(0, "seed of the pages; every split has its own stream", least=0, most=SEEDS)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise UserError(f"options.kinds={self.kinds}: choose from {', '.join(KINDS)}")
        if unknown := set(self.count) - set(splits):
            raise UserError(f"options.count.{min(unknown)}: the splits are {', '.join(splits)}")
        for path in self.fonts:
            try:
                _font(path, 16)
            except OSError as error:
                raise UserError(f"options.fonts: '{path}' is no font file that Pillow reads") from error


@dataclass
class Page:
    """What is drawn, and what can be asked about it."""

    image: Image.Image
    asked: list[tuple[str, str, list[Box]]] = field(default_factory=list)
    """Question, answer, and where one reads it."""


@lru_cache(256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(path).expanduser(), size) if path else ImageFont.load_default(size)


class Pen:
    """Writes on a page, and knows where it wrote."""

    def __init__(self, rng: np.random.Generator, options: Options) -> None:
        self.rng, self.side, scale = rng, options.size, options.size / 672
        path = options.fonts[rng.integers(len(options.fonts))] if options.fonts else ""
        self.font, self.head = (_font(path, round(rng.uniform(*sizes) * scale)) for sizes in ((19, 25), (28, 36)))
        self.ink = tuple(int(v) for v in rng.integers(0, 70, 3))
        self.paper = tuple(int(v) for v in rng.integers(215, 256, 3))
        self.image = Image.new("RGB", (self.side, self.side), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.left = int(rng.uniform(30, 80) * scale)
        self.right = self.side - int(rng.uniform(30, 80) * scale)
        self.top = int(rng.uniform(30, 60) * scale)

    def write(self, x: float, y: float, text: str, anchor: str = "la", head: bool = False) -> Box:
        font = self.head if head else self.font
        self.draw.text((x, y), text, fill=self.ink, font=font, anchor=anchor)
        return tuple(float(v) for v in self.draw.textbbox((x, y), text, font=font, anchor=anchor))

    def rule(self, *ends: float) -> None:
        self.draw.line(ends, fill=self.ink, width=max(1, self.side // 336))

    def lines(self, count: int, top: float, bottom: float) -> list[float]:
        """Where so many lines go, more or less tightly."""
        step = (bottom - top) / max(count, 1)
        step = min(step, self.font.size * self.rng.uniform(1.6, 2.6))
        return [top + step * line for line in range(count)]


def price(rng: np.random.Generator) -> int:
    """In cents."""
    return int(rng.integers(2, 400)) * 5


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def receipt(pen: Pen, rng: np.random.Generator) -> list[tuple[str, str, list[Box]]]:
    goods = rng.permutation(GOODS)[: rng.integers(*LINES["receipt"], endpoint=True)]
    pen.write(pen.side / 2, pen.top, SHOPS[rng.integers(len(SHOPS))], "ma", head=True)
    start = pen.top + 2 * pen.head.size
    places = pen.lines(len(goods) + 1, start, pen.side - pen.top)
    asked, total = [], 0
    for name, y in zip(goods, places):
        cents = price(rng)
        total += cents
        boxes = [pen.write(pen.left, y, str(name)), pen.write(pen.right, y, money(cents), "ra")]
        asked.append((f"price of {name}?", money(cents), [_around(boxes)]))
    pen.rule(pen.left, places[-1] - 4, pen.right, places[-1] - 4)
    boxes = [pen.write(pen.left, places[-1], "total"), pen.write(pen.right, places[-1], money(total), "ra")]
    asked.append(("total?", money(total), [_around(boxes)]))
    return asked


def form(pen: Pen, rng: np.random.Generator) -> list[tuple[str, str, list[Box]]]:
    people = rng.permutation(PEOPLE)[: rng.integers(*LINES["form"], endpoint=True)]
    pen.write(pen.left, pen.top, "Delivery form", head=True)
    places = pen.lines(len(people) * (len(FIELDS) + 1), pen.top + 2 * pen.head.size, pen.side - pen.top)
    middle = pen.left + pen.font.size * rng.uniform(6, 9)
    lines, asked = iter(places), []
    for person in people:
        above = pen.write(pen.left, next(lines), str(person).capitalize())
        pen.rule(pen.left, above[3] + 3, pen.right, above[3] + 3)
        values = {
            "name": f"{FIRST[rng.integers(len(FIRST))]} {LAST[rng.integers(len(LAST))]}",
            "city": CITIES[rng.integers(len(CITIES))],
            "phone": " ".join(f"{rng.integers(100):02d}" for _ in range(3)),
            "number": str(rng.integers(1000, 10000)),
        }
        for name in FIELDS:
            y = next(lines)
            boxes = [pen.write(pen.left, y, f"{name}:"), pen.write(middle, y, values[name])]
            asked.append((f"{name} of the {person}?", values[name], [_around(boxes), above]))
    return asked


def table(pen: Pen, rng: np.random.Generator) -> list[tuple[str, str, list[Box]]]:
    low, high = LINES["table"]
    rows = rng.permutation(ROWS)[: rng.integers(low, high, endpoint=True)]
    columns = sorted(rng.permutation(len(COLUMNS))[: rng.integers(3, 7)])
    pen.write(pen.left, pen.top, "Days of weather", head=True)
    first = pen.left + pen.font.size * rng.uniform(4.5, 6)
    step = (pen.right - first) / len(columns)
    places = pen.lines(len(rows) + 1, pen.top + 2 * pen.head.size, pen.side - pen.top)
    names = [pen.write(first + step * (i + 0.5), places[0], COLUMNS[c], "ma") for i, c in enumerate(columns)]
    pen.rule(pen.left, names[0][3] + 3, pen.right, names[0][3] + 3)
    asked = []
    for name, y in zip(rows, places[1:]):
        head = pen.write(pen.left, y, str(name))
        for i, c in enumerate(columns):
            value = str(rng.integers(0, 100))
            cell = pen.write(first + step * (i + 0.5), y, value, "ma")
            asked.append((f"{name} in {COLUMNS[c]}?", value, [cell, head, names[i]]))
    return asked


PAGES = {"receipt": receipt, "form": form, "table": table}


def page(rng: np.random.Generator, options: Options, kind: str) -> Page:
    """One page of a kind, as a camera or scanner would have it."""
    pen = Pen(rng, options)
    asked = PAGES[kind](pen, rng)
    angle = float(rng.uniform(-options.tilt, options.tilt))
    turned = pen.image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=pen.paper)
    pixels = np.asarray(turned, np.float32)
    light = np.linspace(rng.uniform(0.9, 1), rng.uniform(0.9, 1), options.size, dtype=np.float32)[None, :, None]
    pixels = pixels * light + rng.normal(0, options.noise, (*pixels.shape[:2], 1)).astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    side = options.size
    return Page(image, [(text, answer, [_turned(box, angle, side) for box in boxes]) for text, answer, boxes in asked])


def _around(boxes: list[Box]) -> Box:
    left, top, right, bottom = zip(*boxes)
    return min(left), min(top), max(right), max(bottom)


def _turned(box: Box, degrees: float, side: int) -> Box:
    """The box around a box that turned with its page about the page's middle, as Pillow turns (counter-clockwise)."""
    angle, middle = np.deg2rad(degrees), side / 2
    corners = np.array([[x, y] for x in box[::2] for y in box[1::2]]) - middle
    cos, sin = np.cos(angle), np.sin(angle)
    moved = corners @ np.array([[cos, -sin], [sin, cos]]) + middle
    low, high = moved.min(0).clip(0, side), moved.max(0).clip(0, side)
    return tuple(float(v) for v in (*low, *high))


def count(options: Options, split: str) -> int:
    return options.count.get(split, 0)


def license(options: Options) -> str:
    return "made up: no rights of others" + (", but for the font files" if options.fonts else "")


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The questions ``start`` to ``stop`` of a split, always the same ones for the same options: distinct ones of a
    page, as far as there are so many."""
    total = count(options, split)
    stop = total if stop is None else min(stop, total)
    for index in range(start // options.questions, -(-stop // options.questions)):
        rng = np.random.default_rng([options.seed, splits.index(split), index])
        kind = options.kinds[index % len(options.kinds)]
        made = page(rng, options, kind)
        order = rng.permutation(len(made.asked))
        for place in range(options.questions):
            serial = index * options.questions + place
            if start <= serial < stop:
                text, answer, boxes = made.asked[order[place % len(order)]]
                yield Sample(
                    key=f"documents-{split}-{serial:07d}",
                    question=text,
                    answers=(answer,),
                    images=[made.image],
                    boxes=[boxes],
                    kind=kind,
                    dataset="documents",
                    scene=f"documents-{split}-{index:07d}",
                )
