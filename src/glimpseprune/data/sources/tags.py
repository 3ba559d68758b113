"""Tags: real handwriting on real photographs, the data of the embedded default. Nothing is downloaded.

A scene is a crop of one of scikit-learn's two bundled photographs with coloured tags on it; each tag shows a two-digit
number whose digits are handwritten samples of scikit-learn's bundled optdigits. There are four kinds of question:

=========  ==============================  =======  =====================
kind       question                        answer   evidence
=========  ==============================  =======  =====================
number     number on the red tag?          27       that tag
pair       numbers on red and blue?        27 41    both tags
colour     colour of tag 27?               red      that tag
relation   is red left of blue?            yes      both tags
=========  ==============================  =======  =====================

``colour`` is not asked by default: the shipped base cannot answer it (it would have to find a tag by both its digits,
see experiments/tiny-base).

Train, validation and test share neither a digit sample nor a region of a photograph. With 8 to 12 tags a budget of 5%
of the 144 visual tokens of a 336-px image (7 tokens) cannot hold one token of each, so a mask that ignores the question
loses. ``wear`` and ``size`` make a harder task of the same kind (experiments/plus). Left out: other fonts, rotation of
whole tags, tags that overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.types import Sample

splits = ("train", "val", "test")

COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (140, 50, 180),
    "orange": (240, 135, 30),
    "cyan": (60, 205, 215),
    "pink": (245, 140, 190),
    "brown": (115, 65, 30),
    "black": (20, 20, 20),
    "grey": (135, 135, 135),
    "lime": (165, 240, 80),
}
NAMES = tuple(COLOURS)
KINDS = ("number", "pair", "colour", "relation")

TAG_WIDTH, TAG_HEIGHT, FRAME = 60, 32, 4  # pixels
GLYPH_WIDTH, GLYPH_HEIGHT = 26, 24  # pixels per digit
SNAP, JITTER = 14, 2  # tag corners lie on the patch grid, give or take this many pixels
MAX_SIZE = 1344
WORN_ANGLE, WORN_SHEAR, WORN_INK, WORN_SPECKLE = 0.35, 0.35, 0.75, 60.0  # radians, -, fraction, grey levels at wear 1
MIN_COLUMN_GAP = 20  # pixels between the centres of two tags that are compared

_DIGIT_SPLITS = {"train": slice(0, 1200), "val": slice(1200, 1400), "test": slice(1400, 1797)}
_PHOTO_SPLITS = {  # rows, columns of each 427 x 640 photograph; at least six pixels apart
    "train": (slice(0, 427), slice(0, 384)),
    "val": (slice(0, 210), slice(390, 640)),
    "test": (slice(216, 427), slice(390, 640)),
}


@dataclass
class Options:
    size: int = option(336, "image side in pixels, a multiple of 28, at most 1344", least=112, most=MAX_SIZE)
    min_tags: int = option(8, "fewest tags on an image", least=2, most=12)
    max_tags: int = option(12, "most tags on an image (there are 12 colours)", least=2, most=12)
    questions: int = option(3, "questions per image, dealt over the kinds in turn", least=1, most=1000)
    kinds: list[str] = option(["number", "pair", "relation"], f"kinds to ask, of {KINDS}")
    count: dict[str, int] = option(
        {"train": 8192, "val": 512, "test": 2048}, "questions per split", least=1, most=10**9
    )
    wear: float = option(
        0.0, "worse handwriting, 0 to 1: tilted, faded and speckled digits, on any split", least=0, most=1
    )
    seed: int = option(0, "seed of the scenes; every split has its own stream", least=0, most=SEEDS)

    def __post_init__(self) -> None:
        if self.size % 28:
            raise UserError(f"options.size={self.size}: give a multiple of 28")
        room = (self.size // (TAG_WIDTH + 16)) * (self.size // (TAG_HEIGHT + 16))
        if not self.min_tags <= self.max_tags <= room:
            raise UserError(
                f"options.min_tags={self.min_tags} options.max_tags={self.max_tags}: give no more as min_tags than as "
                f"max_tags; an image of {self.size} px has room for {room}"
            )
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise UserError(f"options.kinds={self.kinds}: choose from {', '.join(KINDS)}")
        if unknown := set(self.count) - set(splits):
            raise UserError(f"options.count.{min(unknown)}: the splits are {', '.join(splits)}")


@dataclass
class Scene:
    """One image and what is on it."""

    image: np.ndarray  # uint8 [size, size, 3]
    boxes: np.ndarray  # int [n, 4] x0, y0, x1, y1 in pixels; all zero for a tag that found no room
    colours: np.ndarray  # int [n] index into NAMES
    digits: np.ndarray  # int [n, 2] tens, units
    centres: np.ndarray  # int [n, 2, 2] x, y of each digit's centre; -1 where the tag found no room


@dataclass
class Question:
    kind: str
    text: str
    answer: str
    tags: tuple[int, ...]
    """Indices of the tags that are the evidence."""


@cache
def _digits(split: str) -> list[list[Image.Image]]:
    """Handwritten samples of each digit class as padded float images (12 x 12, ink in 0..1)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = np.random.default_rng(2024).permutation(len(bunch.images))[_DIGIT_SPLITS[split]]
    padded = np.pad(bunch.images[chosen].astype(np.float32) / 16, ((0, 0), (2, 2), (2, 2)))
    return [[Image.fromarray(glyph) for glyph in padded[bunch.target[chosen] == digit]] for digit in range(10)]


@cache
def _photographs(split: str) -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    rows, columns = _PHOTO_SPLITS[split]
    return [Image.fromarray(np.ascontiguousarray(photo[rows, columns])) for photo in load_sample_images().images]


def _handwriting(rng: np.random.Generator, digit: int, split: str, wear: float = 0.0) -> np.ndarray:
    """One handwritten sample, upscaled smoothly: ink in 0..1, [GLYPH_HEIGHT, GLYPH_WIDTH]. Train varies the hand."""
    pool = _digits(split)[digit]
    glyph = pool[rng.integers(len(pool))]
    vary = split == "train"
    angle = rng.normal(0, 0.12) if vary else 0.0
    shear = rng.normal(0, 0.12) if vary else 0.0
    zoom = rng.uniform(0.9, 1.12) if vary else rng.uniform(0.95, 1.05)
    contrast = rng.uniform(0.85, 1.4) if vary else 1.15
    shift = rng.uniform((-1.5, -1.0), (1.5, 1.0)) if vary else rng.uniform(-1.0, 1.0, 2)
    if wear:
        angle += rng.normal(0, WORN_ANGLE * wear)
        shear += rng.normal(0, WORN_SHEAR * wear)
        contrast *= 1 - rng.uniform(0, WORN_INK * wear)
    scale = 8 / (23.0 * zoom)  # output pixels to source pixels
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = np.array([[cos, -sin + shear * cos], [sin, cos + shear * sin]])
    offset = np.array([6.0, 6.0]) - matrix @ (np.array([GLYPH_WIDTH, GLYPH_HEIGHT]) / 2 + shift)
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    ink = np.asarray(
        glyph.transform((GLYPH_WIDTH, GLYPH_HEIGHT), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    )
    return np.clip(ink * contrast, 0, 1)


def _background(rng: np.random.Generator, size: int, split: str) -> np.ndarray:
    """A crop of a photograph, resized, sometimes mirrored, with varied contrast and tint: float [size, size, 3]."""
    photos = _photographs(split)
    photo = photos[rng.integers(len(photos))]
    width, height = photo.size
    side, aspect = rng.uniform(150, min(width, height)), np.exp(rng.uniform(-0.2, 0.2))
    crop_w, crop_h = min(width, side * aspect), min(height, side / aspect)
    x, y = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
    box = (x, y, x + crop_w, y + crop_h)
    pixels = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box), np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.2:
        pixels = pixels[::-1]
    mean = pixels.mean()
    pixels = (pixels - mean) * rng.uniform(0.6, 1.2) + mean * rng.uniform(0.7, 1.25)
    return np.ascontiguousarray(pixels * rng.uniform(0.85, 1.15, 3).astype(np.float32))


def _place(rng: np.random.Generator, size: int, tags: int, crowd: bool) -> np.ndarray:
    """Corners of tags that do not touch. ``crowd`` leaves out a tag that finds no room; else the layout is redrawn."""
    tries, gap = (40 if crowd else 300), 2
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(tags):
            for _ in range(tries):
                cell = rng.integers(0, ((size - TAG_WIDTH) // SNAP + 1, (size - TAG_HEIGHT) // SNAP + 1))
                x, y = (cell * SNAP + 5 + rng.integers(-JITTER, JITTER + 1, 2)).tolist()
                x, y = min(max(x, 0), size - TAG_WIDTH), min(max(y, 0), size - TAG_HEIGHT)
                if all(
                    x >= b[2] + gap or b[0] >= x + TAG_WIDTH + gap or y >= b[3] + gap or b[1] >= y + TAG_HEIGHT + gap
                    for b in boxes
                    if b[2]
                ):
                    boxes.append((x, y, x + TAG_WIDTH, y + TAG_HEIGHT))
                    break
            else:
                if not crowd:
                    break
                boxes.append((0, 0, 0, 0))
        if len(boxes) == tags:
            return np.array(boxes)


def scene(
    rng: np.random.Generator, size: int, tags: int, split: str, *, crowd: bool = False, wear: float = 0.0
) -> Scene:
    """Draw one scene of ``tags`` tags with distinct numbers and (unless ``crowd``) distinct colours.

    ``crowd`` is for dense supervision of the vision tower only: as many tags as fit, colours repeated.
    """
    boxes = _place(rng, size, tags, crowd)
    pixels = _background(rng, size, split)
    colours = rng.integers(0, len(NAMES), tags) if crowd else rng.permutation(len(NAMES))[:tags]
    numbers = rng.permutation(100)[:tags]
    digits = np.stack([numbers // 10, numbers % 10], 1)
    centres = np.full((tags, 2, 2), -1)
    for box, colour, pair, centre in zip(boxes, colours, digits, centres):
        x, y, x1, y1 = box
        if not x1:
            continue
        pixels[y:y1, x:x1] = np.array(COLOURS[NAMES[colour]]) * rng.uniform(0.9, 1.1) + rng.normal(0, 5, 3)
        pixels[y + FRAME : y1 - FRAME, x + FRAME : x1 - FRAME] = 238 + rng.normal(0, 6)
        ink = rng.uniform(10, 60)
        for place, digit in enumerate(pair):
            alpha = _handwriting(rng, int(digit), split, wear)[..., None]
            px, py = x + FRAME + GLYPH_WIDTH * place, y + FRAME
            patch = pixels[py : py + GLYPH_HEIGHT, px : px + GLYPH_WIDTH]
            patch[:] = patch * (1 - alpha) + ink * alpha
            if wear:
                patch += rng.normal(0, WORN_SPECKLE * wear, patch.shape[:2])[..., None]
            centre[place] = (px + GLYPH_WIDTH // 2, py + GLYPH_HEIGHT // 2)
    return Scene(pixels.clip(0, 255).astype(np.uint8), boxes, colours, digits, centres)


def ask(rng: np.random.Generator, view: Scene, kind: str, count: int) -> list[Question]:
    """``count`` questions of one kind, distinct as far as the scene allows."""
    name = [NAMES[c] for c in view.colours]
    number = [f"{tens}{units}" for tens, units in view.digits]
    n = len(name)
    if kind in ("number", "colour"):
        chosen = [(int(i),) for i in rng.permutation(n)[:count]]
    else:
        column = (view.boxes[:, 0] + view.boxes[:, 2]) / 2
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        if kind == "relation":
            pairs = [(i, j) for i, j in pairs if abs(column[i] - column[j]) >= MIN_COLUMN_GAP] or pairs
        order = rng.permutation(len(pairs))
        chosen = [pairs[order[k % len(pairs)]] for k in range(count)]
    out = []
    for tags in chosen:
        i, j = tags[0], tags[-1]
        if kind == "number":
            text, answer = f"number on the {name[i]} tag?", number[i]
        elif kind == "pair":
            text, answer = f"numbers on {name[i]} and {name[j]}?", f"{number[i]} {number[j]}"
        elif kind == "colour":
            text, answer = f"colour of tag {number[i]}?", name[i]
        else:
            text, answer = f"is {name[i]} left of {name[j]}?", "yes" if column[i] < column[j] else "no"
        out.append(Question(kind, text, answer, tags))
    return out


def count(options: Options, split: str) -> int:
    """How many questions a split has."""
    return options.count.get(split, 0)


def license(options: Options) -> str:
    return "of scikit-learn's bundle, photographs: CC BY 2.0, digits: CC BY 4.0 (optdigits of the UCI repository)"


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The questions ``start`` to ``stop`` of a split, always the same ones for the same options.

    Every scene has its own random stream (seed, split, scene number), so a slice costs no more than its length.
    """
    total = options.count.get(split, 0)
    stop = total if stop is None else min(stop, total)
    for index in range(start // options.questions, -(-stop // options.questions)):
        rng = np.random.default_rng([options.seed, splits.index(split), index])
        tags = int(rng.integers(options.min_tags, options.max_tags + 1))
        view = scene(rng, options.size, tags, split, wear=options.wear)
        image = Image.fromarray(view.image)
        for serial in range(index * options.questions, (index + 1) * options.questions):
            kind = options.kinds[serial % len(options.kinds)]
            question = ask(rng, view, kind, 1)[0]
            if start <= serial < stop:
                yield Sample(
                    key=f"tags-{split}-{serial:07d}",
                    question=question.text,
                    answers=(question.answer,),
                    images=[image],
                    boxes=[[tuple(float(v) for v in view.boxes[tag]) for tag in question.tags]],
                    kind=kind,
                    dataset="tags",
                    scene=f"tags-{split}-{index:07d}",
                )
