"""The nouns that travel through the library, and the legend of tensor shapes.

B batch, S sequence (columns of the prompt), V visual tokens of one row (over all its images), N visual tokens of
the whole batch, Q query columns of one call, T new tokens, H heads, d head width, D model width, L decoder layers,
K layers that see every token, C width of the vision tower, G rollouts of one prompt.

Visual tokens are always listed row by row, image by image, in raster order: flattening ``hidden[visual]`` gives the
same N rows as every ``[N, ...]`` tensor below. Only dataclasses live here; this module imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import DynamicCache

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the original image, x to the right, y down."""

Grid = tuple[int, int]
"""Rows and columns of the visual tokens of one image (after the backbone's merger)."""


@dataclass
class Sample:
    """One question on one or more images, as a source yields it and a shard stores it."""

    key: str
    question: str
    answers: tuple[str, ...]
    """Accepted answers; the first one is the training target."""
    images: list[Image]
    boxes: list[list[Box]] | None = None
    """Evidence boxes, one list per image; None where the source has none."""
    kind: str = "all"
    """Kind of question; accuracies are reported per kind."""
    dataset: str = ""
    scene: str = ""
    """Samples with the same one ask about the same images; empty where that is not known."""
    stands_in: str = ""
    """Set by the reader of shards when this sample is not one of its own: which damaged one it replaces, and why, or
    that it only pads a batch. Train on it; never score it."""


@dataclass
class Inputs:
    """A collated batch: left-padded prompts ready for a backbone, and what training and scoring need beside them."""

    prompt: dict[str, Tensor]
    """What the processor returns: input_ids [B, S], attention_mask [B, S], pixel_values, ..."""
    samples: list[Sample]
    answer_ids: Tensor | None = None  # [B, T] right-padded, end of turn included
    answer_mask: Tensor | None = None  # [B, T] bool
    targets: list[Tensor] | None = None
    """Per row bool [V]: visual tokens under an evidence box. Rows without boxes are all True."""


@dataclass
class Encoded:
    """A prompt turned into decoder inputs by a backbone."""

    input_ids: Tensor  # [B, S]
    embeds: Tensor  # [B, S, D]
    positions: Tensor  # [B, S], or [3, B, S] for M-RoPE
    mask: Tensor  # [B, S] bool, False on padding
    visual: Tensor  # [B, S] bool
    grids: list[list[Grid]]
    """Per row, per image."""
    vision_states: dict[int, Tensor] = field(default_factory=dict)
    """Vision-tower layer -> [N, C], pooled to visual tokens."""
    targets: list[Tensor] | None = None

    @property
    def counts(self) -> list[int]:
        """V of each row."""
        return [sum(rows * cols for rows, cols in grids) for grids in self.grids]


@dataclass
class Frame:
    """Columns held by the cached layers below ``stop``, where they differ from those of the :class:`Prefill`.

    A pruner that leaves the earlier layers' K/V alone, or renumbers the survivors, gives each span of layers columns
    or positions of its own. Layers belong to the first frame whose ``stop`` is above them.
    """

    stop: int
    positions: Tensor  # [B, S'] or [3, B, S']
    mask: Tensor  # [B, S'] bool
    next_position: Tensor  # [B]


@dataclass
class Prefill:
    """A batch on its way through the decoder: the columns that survive, and the cache of the layers that have run.

    ``mask``, ``positions``, ``visual`` and ``source`` describe all S cached columns; ``hidden`` describes the last Q
    of them (Q = S while the prompt runs, Q = T when tokens are appended to it).
    """

    hidden: Tensor  # [B, Q, D] output of the last layer that ran
    positions: Tensor  # [B, S] or [3, B, S]
    mask: Tensor  # [B, S] bool
    visual: Tensor  # [B, S] bool
    source: Tensor  # [B, S] column of the unpruned prompt; only meaningful where mask is True
    next_position: Tensor  # [B] position of the token that comes next, equal on every axis
    cache: DynamicCache
    depth: int = 0
    """How many decoder layers have run on ``hidden``."""
    frames: tuple[Frame, ...] = ()
    """Only for pruners that renumber or do not prune the cache; ordered by ``stop``."""


@dataclass
class Rollout:
    """What ``generate`` returns."""

    tokens: Tensor  # [B, T] new tokens, right-padded with the pad token after the end of turn
    keep: list[Tensor]
    """Per row bool [V] over all its images: the visual tokens that decoding saw."""
    grids: list[list[Grid]]
    prefill: Prefill
    extra: dict[str, Any] = field(default_factory=dict)

    def keep_maps(self) -> list[list[Tensor]]:
        """Per row, per image: bool [rows, cols], ready to be laid over the image."""
        return [
            [part.view(shape) for part, shape in zip(torch.split(keep, [r * c for r, c in grids]), grids)]
            for keep, grids in zip(self.keep, self.grids)
        ]
