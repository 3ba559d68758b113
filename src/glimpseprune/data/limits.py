"""How large a sample is before it is read, and what happens to those above a limit.

Sizes of images stand in their headers; they are read once per shard and kept in the cache. What a limit leaves out is
counted by its cause; ``shrink`` makes the images smaller instead, boxes with them, all of a sample by one factor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from glimpseprune import files
from glimpseprune.data.mixture import Mixture
from glimpseprune.data.shards import Damage, Shards
from glimpseprune.types import Sample

Size = tuple[int, int]
"""Width and height in pixels."""
Tokens = Callable[[Size], int]
"""Visual tokens of an image of a size."""

_STEPS = 150  # of 3% each: to a hundredth of a side


@dataclass(frozen=True)
class Limits:
    """Of one sample, over all its images; None: none."""

    max_pixels: int | None = None
    max_tokens: int | None = None
    above: Literal["drop", "shrink"] = "drop"

    def __bool__(self) -> bool:
        return self.max_pixels is not None or self.max_tokens is not None

    def broken(self, sizes: Sequence[Size], tokens: Tokens) -> str:
        """Which limit images of these sizes are above; empty if none."""
        if self.max_pixels is not None and sum(width * height for width, height in sizes) > self.max_pixels:
            return f"above data.max_pixels={self.max_pixels}"
        if self.max_tokens is not None and sum(map(tokens, sizes)) > self.max_tokens:
            return f"above data.max_tokens={self.max_tokens}"
        return ""

    def fitted(self, sizes: Sequence[Size], tokens: Tokens) -> list[Size] | None:
        """The sizes to which to shrink, all by one factor; None where no factor helps, as of backbones whose images
        have one number of tokens."""
        made, factor = list(sizes), 1.0
        for _ in range(_STEPS):
            if not self.broken(made, tokens):
                return made
            ratios = [0.97]
            if self.max_pixels is not None:
                ratios.append((self.max_pixels / sum(width * height for width, height in made)) ** 0.5)
            factor *= max(min(ratios), 0.5)
            made = [(max(1, int(width * factor)), max(1, int(height * factor))) for width, height in sizes]
        return None

    def shrunk(self, sample: Sample, tokens: Tokens) -> Sample:
        """``sample`` within the limits, itself where it is so already, or cannot be."""
        sizes = [image.size for image in sample.images]
        if not self.broken(sizes, tokens) or (made := self.fitted(sizes, tokens)) is None:
            return sample
        images = [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(sample.images, made)]
        if sample.boxes is None:
            return replace(sample, images=images)
        boxes = [
            [(x0 * w / width, y0 * h / height, x1 * w / width, y1 * h / height) for x0, y0, x1, y1 in boxes]
            for boxes, (width, height), (w, h) in zip(sample.boxes, sizes, made)
        ]
        return replace(sample, images=images, boxes=boxes)


@dataclass(frozen=True)
class Measured:
    """All samples of a split, measured."""

    lengths: np.ndarray  # int [samples], visual tokens, once shrunk; 0 where that is not known
    keep: np.ndarray  # bool [samples]
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> samples."""


def tokens_of(backbone: Any) -> Tokens:
    """How many visual tokens an image makes for a backbone, with the pixel bounds of its processor."""
    size = getattr(getattr(backbone.processor, "image_processor", None), "size", None) or {}
    bounds = size.get("shortest_edge"), size.get("longest_edge")
    return lambda image: backbone.visual_tokens(image, *bounds)


def measure(shards: Shards | Mixture, tokens: Tokens, limits: Limits) -> Measured:
    """Lengths and what stays of the limits; what cannot be read is left to whoever reads it. Raises as ``Shards``."""

    def known(size: Size) -> int:
        try:
            return tokens(size)
        except ValueError:  # the processor refuses it: the collator says so
            return 0

    counted = lru_cache(None)(known)
    found = [sizes for of_shard in image_sizes(shards) for sizes in of_shard]
    lengths, keep = np.zeros(len(found), dtype=np.int64), np.ones(len(found), dtype=bool)
    left_out: Counter[str] = Counter()
    for place, sizes in enumerate(found):
        reason, made = limits.broken(sizes, counted), sizes
        if reason and limits.above == "shrink":
            made = limits.fitted(sizes, counted)
            reason = f"{reason}, and no smaller one is below" if made is None else ""
        if reason:
            keep[place] = False
            left_out[reason] += 1
        lengths[place] = sum(map(counted, made or sizes))
    return Measured(lengths, keep, left_out)


def image_sizes(shards: Shards | Mixture) -> list[list[list[Size]]]:
    """Per shard, per sample: sizes of its images; none where it is damaged."""
    if isinstance(shards, Mixture):
        return [of_shard for folder in shards.folders for of_shard in image_sizes(folder)]
    found, start = [], 0
    for (name, whole, size, sha256), count in zip(shards.shards, shards.counts):
        if count < whole:  # a limit cuts through it
            found.append(_sizes(shards, start, count))
        else:
            fields = None if shards.fields is None else vars(shards.fields)
            what = json.dumps(["sizes", shards.place.identity(name, size, sha256), fields, whole])
            read = json.loads(shards.place.cache.text(what, partial(_write_sizes, shards, start, count)))
            found.append([[(width, height) for width, height in sample] for sample in read])
        start += count
    return found


def _write_sizes(shards: Shards, start: int, count: int, file: Path) -> None:
    files.write_json(file, _sizes(shards, start, count))


def _sizes(shards: Shards, start: int, count: int) -> list[list[Size]]:
    found = []
    for index in range(start, start + count):
        try:
            found.append(shards.sizes(index))
        except Damage:
            found.append([])
    return found


def dropped(measured: Measured, limits: Sequence[int]) -> list[tuple[int, int, float]]:
    """Of each limit of visual tokens: the limit, how many samples are above it, and the share of all visual tokens that
    these have."""
    lengths = measured.lengths
    total = max(1, int(lengths.sum()))
    return [(limit, int((lengths > limit).sum()), float(lengths[lengths > limit].sum() / total)) for limit in limits]
