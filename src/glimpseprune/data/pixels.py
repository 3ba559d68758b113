"""A limit on the pixels of each stored image: what has more is refused, or made smaller, its boxes with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from glimpseprune import images
from glimpseprune.data.shards import check
from glimpseprune.types import Sample


@dataclass(frozen=True)
class PixelLimit:
    most: int | None = None
    """Width x height; None: only what shards allow at all."""
    large: Literal["refuse", "shrink"] = "refuse"

    def __call__(self, sample: Sample) -> tuple[Sample, str]:
        """The sample within the limit, and what was changed in it.

        Raises:
            ValueError: an image has more pixels and is to be refused, or the sample is invalid.
        """
        sizes = [image.size for image in sample.images]  # of their headers: what is small enough is not decoded here
        if self.most is None or all(width * height <= self.most for width, height in sizes):
            return sample, ""
        width, height = next(size for size in sizes if size[0] * size[1] > self.most)
        if self.large == "refuse":
            raise ValueError(f"image of {width} x {height} pixels, more than the max_pixels={self.most}")
        check(sample)  # or a box could be inside only once it is smaller
        return self._shrunk(sample)

    def _shrunk(self, sample: Sample) -> tuple[Sample, str]:
        made, boxes, changes = [], [], []
        for place, image in enumerate(sample.images):
            picture = image
            if image.width * image.height > self.most:
                picture = images.shrunk(image, self.most)
                picture.format = image.format  # what was a JPEG is stored as one
            was, is_ = images.shown_size(image), images.shown_size(picture)
            made.append(picture)
            if sample.boxes is not None:
                scale = (is_[0] / was[0], is_[1] / was[1]) * 2
                ends = (*is_, *is_)
                boxes.append(
                    sample.boxes[place]
                    if was == is_
                    else [tuple(min(v * s, end) for v, s, end in zip(box, scale, ends)) for box in sample.boxes[place]]
                )
            if was != is_:
                changes.append(f"image of {was[0]} x {was[1]} pixels stored with {is_[0]} x {is_[1]}")
        return replace(sample, images=made, boxes=boxes if sample.boxes is not None else None), "; ".join(changes)
