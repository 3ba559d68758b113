"""Packed batches: every question about an image behind one shared image prefix, each seeing what it would see alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from glimpseprune.data.sources import tags
from glimpseprune.tiny.config import Lesson
from glimpseprune.tiny.model import CELL
from glimpseprune.tiny.tokenizer import token_ids, tokenizer

POINTING = {
    "number": ((3, 0), (5, 0), (6, 0)),
    "pair": ((2, 0), (4, 1), (5, 0), (6, 0), (7, 1), (8, 1)),
    "colour": ((4, 0), (5, 0)),
    "relation": ((1, 0), (4, 1)),
}
"""Tokens of a question and its answer that must know where a tag is, and which of its tags: the words that name it, and
the tokens from which the answer about it is read."""


def layout(count: int) -> list[tuple[str, int]]:
    """How many questions of each kind are asked about an image with ``count`` tags."""
    return [("number", count), ("colour", count), ("relation", count // 2), ("pair", count // 2)]


def draw(rng: np.random.Generator, lesson: Lesson, split: str) -> dict[str, Tensor]:
    """One batch of scenes that share their number of tags, with packed questions and all auxiliary labels."""
    count = int(rng.integers(lesson.min_tags, lesson.max_tags + 1))
    scenes = [tags.scene(rng, lesson.size, count, split, crowd=lesson.dense) for _ in range(lesson.batch)]
    grid = lesson.size // CELL
    edge = np.arange(grid) * CELL
    digit_at = np.full((lesson.batch, 2, grid * grid), 10)
    cover = np.zeros((lesson.batch, count, grid * grid), np.float32)
    for i, view in enumerate(scenes):
        box = view.boxes
        wide = np.clip(np.minimum(box[:, 2:3], edge + CELL) - np.maximum(box[:, 0:1], edge), 0, None)
        high = np.clip(np.minimum(box[:, 3:4], edge + CELL) - np.maximum(box[:, 1:2], edge), 0, None)
        cover[i] = (high[:, :, None] * wide[:, None, :] / CELL**2).reshape(count, -1)
        for place in range(2):
            there = view.centres[:, place, 0] >= 0
            cell = view.centres[there, place] // CELL
            digit_at[i, place, cell[:, 1] * grid + cell[:, 0]] = view.digits[there, place]
    batch = {
        "images": torch.from_numpy(np.stack([view.image for view in scenes])),
        "cover": torch.from_numpy(cover),  # [B, n, V] fraction of each visual token that a tag covers
        "colours": torch.from_numpy(np.stack([view.colours for view in scenes])).long(),  # [B, n]
        "digits": torch.from_numpy(np.stack([view.digits for view in scenes])).long(),  # [B, n, 2]
        "digit_at": torch.from_numpy(digit_at),  # [B, 2, V] digit whose centre lies in the token, 10 = none
    }
    if lesson.dense:
        return batch
    ids, labels, evidence, places = [], [], [], []
    for i, view in enumerate(scenes):
        asked = [q for kind, number in layout(count) for q in tags.ask(rng, view, kind, number)]
        text, answer = [token_ids(q.text) for q in asked], [token_ids(q.answer) for q in asked]
        ids.append([t for q, a in zip(text, answer) for t in (*q, *a)])
        end = tokenizer().eos_token_id
        labels.append([t for q, a in zip(text, answer) for t in (*[-100] * (len(q) - 1), *a, end)])
        evidence.append(np.stack([cover[i][list(q.tags)].max(0) > 0 for q in asked]))
        centre = (view.boxes[:, :2] + view.boxes[:, 2:]) // 2 // CELL
        places.append([centre[q.tags[which]] for q in asked for _, which in POINTING[q.kind]])
    start = np.cumsum([0, *(len(q) + len(a) for q, a in zip(text, answer))])
    words = [int(start[i]) + word for i, q in enumerate(asked) for word, _ in POINTING[q.kind]]
    return batch | {
        "ids": torch.tensor(ids),  # [B, P'] packed questions and answers
        "labels": torch.tensor(labels),  # [B, P'] next token, -100 where nothing is predicted
        "evidence": torch.from_numpy(np.stack(evidence)),  # [B, questions, V] bool
        "words": torch.tensor(words),  # [M] packed rows that must know where a tag is
        "places": torch.from_numpy(np.array(places)).long(),  # [B, M, 2] column and row of that tag
        "lengths": torch.tensor([[len(q), len(a)] for q, a in zip(text, answer)]),  # [questions, 2]
        "kinds": torch.tensor([tags.KINDS.index(q.kind) for q in asked]),  # [questions]
    }


class Curriculum(IterableDataset):
    """The batches of all lessons in order; the batch of a step depends on (seed, step) alone, not on the workers."""

    def __init__(self, lessons: list[Lesson], seed: int, split: str, first: int = 0):
        self.plan = [lesson for lesson in lessons for _ in range(lesson.steps)]
        self.seed, self.split, self.first = seed, split, first

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + offset, len(self.plan), stride):
            rng = np.random.default_rng([self.seed, tags.splits.index(self.split), step])
            yield draw(rng, self.plan[step], self.split)


def dilate(mask: Tensor, rings: int) -> Tensor:
    """Grow a bool mask over a square token grid, [..., V], by a number of rings."""
    if not rings:
        return mask
    side = int(mask.shape[-1] ** 0.5)
    grown = F.max_pool2d(mask.float().reshape(-1, 1, side, side), 2 * rings + 1, 1, rings)
    return grown.reshape(mask.shape) > 0


def packed_masks(batch: dict[str, Tensor], rings: list[int | None], drop_all: bool = False) -> tuple[Tensor, Tensor]:
    """Attention masks of the packed sequence, bool [B, 1, S, S]: up to the pruning layer, and above it.

    ``rings[i]`` None leaves image i alone; a number hides the visual keys outside the evidence, dilated by so many
    rings, from question rows above the pruning layer and from answer rows in all layers; visual rows above it see
    their own tag. (The prefix is shared by all questions, so this is the closest approximation of real pruning.)
    """
    visual = batch["evidence"].shape[-1]
    prefix = visual + 2
    device, lengths = batch["lengths"].device, batch["lengths"].sum(1)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # question of each packed row
    size = prefix + len(owner)
    place = torch.arange(len(owner), device=device) - (lengths.cumsum(0) - lengths)[owner]  # within its question
    is_answer = place >= batch["lengths"][owner, 0]
    group = torch.cat([torch.full((prefix,), -1, device=device), owner])
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    causal &= (group[None] < 0) | (group[None] == group[:, None])
    if all(ring is None for ring in rings):
        return causal[None, None], causal[None, None]
    low = causal.repeat(len(rings), 1, 1)
    high = low.clone()
    eye = torch.eye(visual, dtype=torch.bool, device=device)
    answer_rows = prefix + is_answer.nonzero()[:, 0]
    for i, ring in enumerate(rings):
        if ring is None:
            continue
        seen = torch.zeros_like(batch["evidence"][i]) if drop_all else dilate(batch["evidence"][i], ring)
        high[i, prefix:, 1 : 1 + visual] &= seen[owner]
        low[i, answer_rows, 1 : 1 + visual] &= seen[owner[is_answer]]
        tag = dilate(batch["cover"][i] > 0, ring).float()
        high[i, 1 : 1 + visual, 1 : 1 + visual] &= (tag.T @ tag > 0) | eye
        high[i, 1 + visual, 1 : 1 + visual] = False
    return low[:, None], high[:, None]
