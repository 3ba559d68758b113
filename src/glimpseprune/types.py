"""The nouns that travel through the library, and the legend of tensor shapes.

B batch, S sequence (columns of the prompt), V visual tokens of one row (over all its images), N visual tokens of
the whole batch, N' those of them that are left, Q query columns of one call, T new tokens, H heads, d head width,
D model width, L decoder layers, K layers that see every token, C width of the vision tower, G rollouts of one prompt.

Visual tokens are always listed row by row, image by image, in the order in which the decoder gets them (raster order
within a grid): flattening ``embeds[visual]`` gives the same N rows as every ``[N, ...]`` tensor below. Only dataclasses
live here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glimpseprune.host import Columns

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import DynamicCache

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the original image as it is shown (EXIF orientation applied), x to the right, y down."""

Grid = tuple[int, int]
"""Rows and columns of visual tokens (after the backbone's merger)."""


# ------------------------------------------------------------------------------------------- where visual tokens lie


@dataclass(frozen=True)
class Part:
    """One grid of visual tokens of an image: the whole of it, a thumbnail, its tiles put together, a frame."""

    rows: int
    cols: int
    box: Box = (0.0, 0.0, 1.0, 1.0)
    """What it shows, as fractions of the image's width and height."""
    newline: bool = False
    """Every row ends in one more token that is no cell of the picture, such as a learned newline."""
    newline_stays: bool = False
    """These tokens may not go: they are columns like text, and nowhere counted as visual."""

    @property
    def grid(self) -> Grid:
        """Rows and columns of the tokens that may go; newlines, if they may, are one more column."""
        return self.rows, self.cols + (self.newline and not self.newline_stays)

    @property
    def cells(self) -> list[bool]:
        """For each token that may go, whether it is a cell of the picture."""
        row = [True] * self.cols + [False] * (self.grid[1] - self.cols)
        return row * self.rows

    @property
    def free(self) -> list[bool]:
        """For each token that the prompt has a place for, whether it may go."""
        return ([True] * self.cols + [not self.newline_stays] * self.newline) * self.rows


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of one image lie."""

    parts: tuple[Part, ...]
    """In the decoder's order."""
    encoded: tuple[Grid, ...]
    """Grids of the pictures that the vision tower was given; not those of ``parts`` where padding is cut away."""

    @classmethod
    def of(cls, *grids: Grid) -> Layout:
        """Of an image whose ``grids`` all show the whole of it, as the tower encoded them."""
        return cls(tuple(Part(rows, cols) for rows, cols in grids), grids)

    @property
    def count(self) -> int:
        """Visual tokens."""
        return sum(rows * cols for rows, cols in (part.grid for part in self.parts))

    @property
    def places(self) -> int:
        """Columns of the prompt, tokens that may not go included."""
        return sum(len(part.free) for part in self.parts)

    def map(self, keep: Tensor) -> Tensor:
        """``keep`` bool [V] of one image as bool [rows, cols] over the whole of it, as fine as its finest part: a cell
        is kept if any part keeps one that shows it."""
        rows, cols = (
            max(round(size / (part.box[axis + 2] - part.box[axis])) for part, size in sizes)
            for axis, sizes in ((1, [(p, p.rows) for p in self.parts]), (0, [(p, p.cols) for p in self.parts]))
        )
        y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols
        seen = torch.zeros(rows, cols, dtype=torch.bool)
        for part, own in zip(self.parts, keep.cpu().split([rows * cols for rows, cols in self.grids])):
            left, top, right, bottom = part.box
            row = ((y - top) / (bottom - top) * part.rows).floor().long()
            col = ((x - left) / (right - left) * part.cols).floor().long()
            inside = ((row >= 0) & (row < part.rows))[:, None] & ((col >= 0) & (col < part.cols))
            shown = own.view(part.grid)[row.clamp(0, part.rows - 1)[:, None], col.clamp(0, part.cols - 1)]
            seen |= shown & inside
        return seen

    @property
    def grids(self) -> list[Grid]:
        """Of each part."""
        return [part.grid for part in self.parts]


# ------------------------------------------------------------------------------------------------- samples and batches


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
    """Set by the reader of shards, or the collator, when this sample is not one of its own: which damaged one it
    replaces, and why, or that it only pads a batch. Train on it; never score it."""
    left_out: str = ""
    """Set by a source: what it left out of this sample, and why; told by ``prepare``, in no shard."""


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


# ------------------------------------------------------------------------------------------------ what pruners ask for


@dataclass(frozen=True)
class Stop:
    """Where a pruning method decides."""

    depth: int
    """Decoder layers that have run; 0 = before the first, L = after the last."""
    renumber: bool = False
    """Survivors get positions 0, 1, 2 ... in the layers above (those below keep theirs)."""
    prune_cache: bool = True
    """Drop the K/V of the layers that have run, too."""


@dataclass(frozen=True)
class Needs:
    """What ``encode`` and the driver collect for a pruner, and nothing else. Layers are numbered as the backbone's
    ``vision_layers``; negative ones count from the end."""

    states: tuple[int, ...] = ()
    """Tower layers: hidden states [N, C], pooled to visual tokens."""
    keys: tuple[int, ...] = ()
    """Tower layers: keys [N, H, d], after RoPE, pooled to visual tokens."""
    attention: tuple[int, ...] = ()
    """Tower layers: attention that each visual token receives, mean over heads [N]: from the class token where there
    is one, else from all queries of its segment, on average."""
    probes: tuple[int, ...] = ()
    """Decoder layers: log of the attention from the prompt's last column to the visual ones [N', H]."""

    def __or__(self, other: Needs) -> Needs:
        """What serves both."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("states", "keys", "attention", "probes"))
        return Needs(*(tuple(dict.fromkeys((*mine, *theirs))) for mine, theirs in pairs))


@dataclass
class Decision:
    """What a pruner decides at a stop."""

    keep: Tensor  # [B, S] bool over the columns that are left; text and padding may hold anything
    merge: Tensor | None = None
    """[N', D]: the survivors' hidden states from here on, where dropped tokens are merged into them."""
    flops: Sequence[float] | Tensor = ()
    """Of deciding, one number per row; empty: none worth counting."""


@dataclass(frozen=True)
class Ride:
    """Columns that a pruner sends with a prompt on its way to the first stop, behind it, so that no token sees them: a
    look that takes the layers' calls that are made anyway. Nothing of them stays but what ``see`` noted."""

    vectors: Tensor  # [L, B, n, D]; the first is their input, each other is added to that of its layer
    mask: Tensor  # [B, n] bool, False on (left) padding
    see: Any
    """A probe of :mod:`glimpseprune.attention`; their queries are the last n, their keys the last n columns."""
    layers: tuple[int, ...]
    """Where it looks."""
    found: Any
    """() -> what it saw."""


@dataclass(frozen=True)
class Cut:
    """A decision that was taken at ``stop``. The first of a trace is the prompt as it entered the decoder."""

    stop: Stop
    kept: Tensor  # [B] visual tokens that are left
    flops: Tensor  # [B] int64, of deciding


# ------------------------------------------------------------------------------------------------ through the decoder


@dataclass
class Encoded:
    """A prompt turned into decoder inputs by a backbone."""

    input_ids: Tensor  # [B, S]
    embeds: Tensor  # [B, S, D]
    positions: Tensor  # [B, S], or [3, B, S] for M-RoPE
    mask: Tensor  # [B, S] bool, False on padding
    visual: Tensor  # [B, S] bool, columns that a pruner may drop
    layouts: list[list[Layout]]
    """Per row, per image."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Of the tower, as :class:`Needs` asked for them; so are ``keys`` and ``attention``."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> [B, S, D], which is added to its output (deepstack)."""
    targets: list[Tensor] | None = None
    flops: Sequence[float] = ()
    """Per row, of a look before the tower."""
    known: Columns | None = None
    """Its columns on the host; asked of the device where nobody says."""

    def __post_init__(self) -> None:
        if self.known is None:
            self.known = Columns(self.mask.cpu(), self.visual.cpu(), self.input_ids.cpu())

    @property
    def grids(self) -> list[list[Grid]]:
        """Per row, of each part of its images."""
        return [[grid for layout in row for grid in layout.grids] for row in self.layouts]

    @property
    def counts(self) -> list[int]:
        """V of each row."""
        return [sum(layout.count for layout in row) for row in self.layouts]


@dataclass
class Frame:
    """Columns held by the cached layers below ``stop``, where they differ from those of the :class:`Prefill`.

    A pruner that leaves the earlier layers' K/V alone, or renumbers the survivors, gives each span of layers columns
    or positions of its own. Layers belong to the first frame whose ``stop`` is above them.
    """

    stop: int
    positions: Tensor  # [B, S'] or [3, B, S']
    mask: Tensor  # [B, S'] bool
    source: Tensor  # [B, S']
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
    row: Tensor  # [B] row of the encoded prompt that each row continues
    next_position: Tensor  # [B] position of the token that comes next, equal on every axis
    cache: DynamicCache
    depth: int = 0
    """How many decoder layers have run on ``hidden``."""
    added: dict[int, Tensor] = field(default_factory=dict)  # as Encoded's, for the columns left and the layers ahead
    probes: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> [B, S, H], log of the last column's attention; of the layers that a pruner needs."""
    trace: tuple[Cut, ...] = ()
    """The prompt, and every decision since: what costs are read from."""
    frames: tuple[Frame, ...] = ()
    """Only for pruners that renumber or do not prune the cache; ordered by ``stop``."""
    known: Columns | None = None
    """``mask`` and, before a pruner has chosen, ``visual`` on the host; None where only the device has them."""
    whole: bool = False
    """Rows are those that were encoded, in their order, with all their visual tokens."""
    ridden: tuple[Any, Any] | None = None
    """A pruner, and what its columns that rode along found out of these very rows, see :class:`Ride`."""


@dataclass
class Rollout:
    """What ``generate`` returns."""

    tokens: Tensor  # [B, T] new tokens, right-padded with the pad token after the end of turn
    keep: list[Tensor]
    """Per row bool [V] over all its images: the visual tokens that decoding saw."""
    layouts: list[list[Layout]]
    prefill: Prefill
    extra: dict[str, Any] = field(default_factory=dict)
    ended: Tensor | None = None  # [B] bool, False where an answer was cut at the greatest length or time
    texts: list[str] = field(default_factory=list)
    """The answers, where a model with a processor gave them."""

    def keep_maps(self) -> list[list[Tensor]]:
        """Per row, per image: bool [rows, cols], ready to be laid over the image."""
        return [
            [layout.map(part) for layout, part in zip(row, keep.split([layout.count for layout in row]))]
            for keep, row in zip(self.keep, self.layouts)
        ]


@dataclass
class Answer:
    """What ``ask`` returns: an answer, what was kept for it, and how long it took."""

    text: str
    maps: list[Tensor]
    """Per image bool [rows, cols]: the visual tokens that were kept."""
    kept: int
    total: int
    """Visual tokens."""
    first_token: float
    """Seconds until the first token was there, preparing included."""
    seconds: float
    """In all."""
    rollout: Rollout

    def said(self) -> str:
        """All but the text, in a line."""
        return (
            f"kept {self.kept} of {self.total} visual tokens ({self.kept / max(self.total, 1):.1%}), first token after "
            f"{self.first_token * 1e3:.0f} ms, {self.seconds * 1e3:.0f} ms in all"
        )
