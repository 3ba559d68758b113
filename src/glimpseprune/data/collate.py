"""From Samples to Inputs: a left-padded prompt, the answer to learn, and the visual tokens under the evidence boxes.

The box rule is that of the published recipe (docs/evaluation.md §2; HVision-NKU/GlimpsePrune@091a3d5): boxes normalised
by the size of the original image, every cell they touch is a target, in each part of the image. Left out: LLaVA-1.5's
centre crop of images that are not square. A prompt does not tell their sizes, so its layout says that the grid shows
the whole image, which it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from glimpseprune.config import UserError
from glimpseprune.images import shown_size
from glimpseprune.legible import surrogate
from glimpseprune.types import Box, Inputs, Layout, Part, Sample

if TYPE_CHECKING:
    Backbone = Any  # a module's class of that name under backbones/; only prepare, layouts and processor are used here


class Collator:
    """list[Sample] -> Inputs, for one backbone. Runs no model, so it may live in a data worker.

    Args:
        backbone: gives ``prepare``, ``layouts`` and ``processor.tokenizer``.
        max_answer: at most this many answer tokens, end of turn included; a longer answer is cut and does not end.
        system: system prompt; None is the backbone's default.
        dilate: grow each box by this many visual tokens on every side.

    A sample that cannot be asked (no image, one that the processor refuses, more text than the tokenizer allows) is
    replaced by another of its batch, whose ``stands_in`` names it and says why.

    Raises:
        UserError: all samples of a batch are of that kind; the first one is named by its key.
    """

    def __init__(
        self, backbone: Backbone, *, max_answer: int | None = None, system: str | None = None, dilate: int = 0
    ) -> None:
        self.backbone, self.max_answer, self.system, self.dilate = backbone, max_answer, system, dilate
        tokenizer = backbone.processor.tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError("the backbone's tokenizer has no eos token, so an answer cannot end its turn")
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.longest = getattr(tokenizer, "model_max_length", 10**9)
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(self, samples: Sequence[Sample]) -> Inputs:
        samples = list(samples)
        try:
            prompt, layouts, answers = self._made(samples)
        except UserError:
            samples = self._fitting(samples)
            prompt, layouts, answers = self._made(samples)
        lengths = torch.tensor([len(answer) for answer in answers])
        answer_ids = pad_sequence(answers, batch_first=True, padding_value=self.pad)  # [B, T]
        return Inputs(
            prompt=prompt,
            samples=samples,
            answer_ids=answer_ids,
            answer_mask=torch.arange(answer_ids.shape[1]) < lengths[:, None],  # [B, T]
            targets=[sample_targets(sample, of_row, self.dilate) for sample, of_row in zip(samples, layouts)],
        )

    def _made(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[list[Layout]], list[Tensor]]:
        """Prompt, layouts and answers; raises UserError where something of it cannot be made."""
        for sample in samples:
            if not sample.images:
                raise UserError("a prompt without an image; every question needs at least one")
        try:
            questions, images = [sample.question for sample in samples], [sample.images for sample in samples]
            prompt = dict(self.backbone.prepare(questions, images, self.system))
            layouts = self.backbone.layouts(prompt)
        except (ValueError, IndexError, StopIteration) as error:  # what processors raise; UserError is a ValueError
            raise UserError(str(error) or type(error).__name__) from error
        for length, row in zip(prompt["attention_mask"].sum(1).tolist(), layouts):
            words = length - sum(layout.places for layout in row)
            if words > self.longest:
                raise UserError(f"its prompt has {words} tokens of text, more than the {self.longest} of the tokenizer")
        return prompt, layouts, [self.answer_ids(sample.answers[0]) for sample in samples]

    def _fitting(self, samples: Sequence[Sample]) -> list[Sample]:
        """The batch with a sound sample in the place of each that cannot be asked, as the reader has it with damage."""
        wrong = {}
        for place, sample in enumerate(samples):
            try:
                self._made([sample])
            except UserError as error:
                wrong[place] = f"sample {sample.key!r}: {error}"
        sound = [sample for place, sample in enumerate(samples) if place not in wrong]
        if not sound:
            raise UserError(wrong[0])
        return [
            replace(sound[0], stands_in=sample.stands_in or wrong[place]) if place in wrong else sample
            for place, sample in enumerate(samples)
        ]

    def answer_ids(self, answer: str) -> Tensor:
        """[T] tokens of an answer, in which special tokens are text, and the end of turn."""
        if half := surrogate(answer):
            raise UserError(f"an answer holds {half}, half of a surrogate pair")
        ids = [*self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids, self.end]
        return torch.tensor(ids[: self.max_answer], dtype=torch.long)


def sample_targets(sample: Sample, layouts: Sequence[Layout], dilate: int = 0) -> Tensor:
    """bool [V] over all images of a sample: under a box. All True where the source has no boxes."""
    if sample.boxes is None:
        return torch.ones(sum(layout.count for layout in layouts), dtype=torch.bool)
    images = zip(sample.boxes, map(shown_size, sample.images), layouts, strict=True)
    return torch.cat(
        [box_targets(boxes, size, part, dilate) for boxes, size, layout in images for part in layout.parts]
    )


def box_targets(boxes: Iterable[Box], size: tuple[int, int], part: Part, dilate: int = 0) -> Tensor:
    """bool [tokens] of a ``part`` of an image, in raster order: cells int(x0 cols) .. min(int(x1 cols), cols - 1), both
    included, and the same for y, with the box divided by ``size`` = (width, height) of the original image
    (docs/evaluation.md §2), or of what the part shows of it. Tokens that are no cell are not targets."""
    left, top, right, bottom = (edge * size[axis % 2] for axis, edge in enumerate(part.box))
    target = torch.zeros(part.grid, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        if x1 < left or x0 > right or y1 < top or y0 > bottom:
            continue
        first, last = _cells(y0 - top, y1 - top, bottom - top, part.rows, dilate)
        begin, end = _cells(x0 - left, x1 - left, right - left, part.cols, dilate)
        target[first : last + 1, begin : end + 1] = True
    return target.flatten()


def _cells(low: float, high: float, length: float, cells: int, dilate: int) -> tuple[int, int]:
    """First and last cell of an interval. One that lies on the far edge belongs to the last cell."""
    first, last = (min(max(int(edge / length * cells), 0), cells - 1) for edge in (low, high))
    return max(first - dilate, 0), min(last + dilate, cells - 1)
