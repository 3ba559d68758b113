"""The controls: what random and oracle keep, whatever the backbone."""

from __future__ import annotations

import pytest
import torch

from conftest import PICTURES, TINY, prompts
from glimpseprune.config import UserError
from glimpseprune.decoder import prefill
from glimpseprune.generate import generate, kept
from glimpseprune.pruners import build
from glimpseprune.types import Stop


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return TINY[request.param]()


def test_oracle_keeps_the_targets_and_grows_them(tiny) -> None:
    inputs = prompts(tiny)
    encoded = tiny.encode(inputs)
    wanted = [torch.zeros(count, dtype=torch.bool) for count in encoded.counts]
    part, first = encoded.layouts[1][1].parts[0], encoded.layouts[1][0].count
    rows, cols = part.grid
    wanted[1][first] = True  # upper left corner of the second image of row 1
    encoded.targets = wanted
    for dilate in (0, 1):
        state = prefill(tiny, encoded, build("oracle", {"dilate": dilate}, tiny))
        keep = kept(encoded, state)
        assert not keep[0].any() and not keep[2].any() and not keep[1][:first].any()
        expected = torch.zeros(rows, cols, dtype=torch.bool)
        expected[: 1 + dilate, : 1 + dilate] = True
        assert torch.equal(keep[1][first : first + rows * cols].view(rows, cols), expected)
        assert not keep[1][first + rows * cols :].any()


def test_oracle_needs_boxes(tiny) -> None:
    with pytest.raises(UserError, match="ground-truth boxes"):
        generate(tiny, build("oracle", {}, tiny), prompts(tiny), max_new_tokens=1)


def test_random_keeps_what_it_is_told(tiny) -> None:
    encoded = tiny.encode(prompts(tiny))

    def counts(pruner) -> list[int]:
        return [int(keep.sum()) for keep in kept(encoded, prefill(tiny, encoded, pruner))]

    assert counts(build("random", {"keep_ratio": 0.25}, tiny)) == [count // 4 for count in encoded.counts]
    assert counts(build("random", {"keep_ratio": 0.0}, tiny)) == [1, 1, 1]
    assert counts(build("random", {"keep_ratio": 0.0, "min_keep": 0}, tiny)) == [0, 0, 0]
    assert counts(build("random", {"keep_ratio": 1.0}, tiny)) == encoded.counts
    told = build("random", {"keep_ratio": 0.25}, tiny)
    told.counts = [[3, 0, 7]]
    assert counts(told) == [3, 0, 7]


def test_random_at_several_stops_keeps_its_fraction_of_the_prompt(tiny) -> None:
    """Not at each of them anew of what is left."""
    encoded = tiny.encode(prompts(tiny))
    pruner = build("random", {"keep_ratio": 0.25}, tiny)
    pruner.mimic((Stop(1), Stop(3)))
    for cut in prefill(tiny, encoded, pruner).trace[1:]:
        assert cut.kept.tolist() == [count // 4 for count in encoded.counts]


def test_random_depends_on_its_seed(tiny) -> None:
    encoded = tiny.encode(prompts(tiny))
    masks = [
        kept(encoded, prefill(tiny, encoded, build("random", {"keep_ratio": 0.5, "seed": s}, tiny))) for s in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1]))
    assert not all(torch.equal(a, b) for a, b in zip(masks[0], masks[2]))


def test_random_differs_between_prompts_and_not_between_batches(tiny) -> None:
    """The same images and equally many tokens, but another question."""
    questions, images = ["why?", "who?", "why?"], [PICTURES[1]] * 3
    pruner = build("random", {"keep_ratio": 0.5}, tiny)
    encoded = tiny.encode(tiny.prepare(questions, images))
    first, other, again = kept(encoded, prefill(tiny, encoded, pruner))
    assert not torch.equal(first, other) and torch.equal(first, again)
    encoded = tiny.encode(tiny.prepare(["a longer question, so that there is padding", questions[1]], images[:2]))
    assert torch.equal(kept(encoded, prefill(tiny, encoded, pruner))[1], other)


def test_bad_random_options(tiny) -> None:
    with pytest.raises(UserError, match="give 0 to 1"):
        build("random", {"keep_ratio": 5.0}, tiny)
    with pytest.raises(UserError, match="prune_layer: give -1 to 1000, got -2"):
        build("random", {"prune_layer": -2}, tiny)
    with pytest.raises(UserError, match="min_keep is 1000 but a prompt has only"):
        generate(tiny, build("random", {"min_keep": 1000}, tiny), prompts(tiny), max_new_tokens=1)


def test_prune_layer_beyond_the_last_is_after_the_last(tiny) -> None:
    assert build("random", {"prune_layer": 1000}, tiny).stops == (Stop(tiny.num_layers),)
    assert build("random", {"prune_layer": -1}, tiny).stops == (Stop(0),)
