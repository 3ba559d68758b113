"""DivPrune against loops over all pairs of tokens, its published counts and FLOPs, and what its decision costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, prompt, prompts
from glimpseprune import backbones
from glimpseprune.config import UserError
from glimpseprune.decoder import View, decide, prefill, rows, start
from glimpseprune.generate import kept
from glimpseprune.pruners import build
from glimpseprune.pruners.divprune import spread, spread_flops, to_budget
from glimpseprune.types import Layout, Part
from made_up import Largest, made_up, view_of


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return TINY[request.param]()


def naive(features: Tensor, number: int) -> list[bool]:
    """Every distance by itself, in float64; of equals the first."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt())

    features = features.double()
    places = range(len(features))
    distance = [[1 - cosine(features[i], features[j]) for j in places] for i in places]
    chosen: list[int] = []
    while len(chosen) < number:
        free = [i for i in places if i not in chosen]
        nearest = [min((distance[i][j] for j in chosen or places if j != i), default=0.0) for i in free]
        chosen.append(free[nearest.index(max(nearest))])
    return [i in chosen for i in places]


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.1, 0.4, 1.0])
def test_decisions_are_those_of_loops(backbone, keep) -> None:
    """Row by row, each over all its images. Which of several exactly equal tokens (newlines) comes first is open."""
    encoded = backbone.encode(prompts(backbone))
    state = decide(backbone, encoded, start(encoded), build("divprune", {"keep_ratio": keep}, backbone))
    for row, chosen in enumerate(kept(encoded, state)):
        features = encoded.embeds[row][encoded.visual[row]]
        kind = features.unique(dim=0, return_inverse=True)[1]
        expected = torch.tensor(naive(features, max(1, round(keep * len(features)))))
        assert kind[chosen].sort()[0].tolist() == kind[expected].sort()[0].tolist()
        alone = backbone.encode(prompt(backbone, row))
        single = decide(backbone, alone, start(alone), build("divprune", {"keep_ratio": keep}, backbone))
        assert torch.equal(kept(alone, single)[0], chosen)
    assert torch.equal(state.hidden[state.visual], encoded.embeds[encoded.visual][torch.cat(kept(encoded, state))])


def test_by_hand() -> None:
    """At 180 degrees the nearest neighbour is farthest (85), from there 0 is, and then 95; lengths do not matter."""
    angles = torch.tensor([0.0, 10.0, 180.0, 60.0, 95.0]).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [2.0], [3.0], [0.5]])
    found = [spread(points, number).nonzero()[:, 0].tolist() for number in range(6)]
    assert found == [[], [2], [0, 2], [0, 2, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert spread(points[:1], 1).tolist() == [True]


def test_equal_tokens_are_chosen_once_and_last() -> None:
    torch.manual_seed(0)
    features = torch.randn(9, 8).repeat_interleave(2, 0)
    chosen = spread(features, 9).view(9, 2)
    assert chosen.sum(1).tolist() == [1] * 9
    assert spread(features, 12).sum() == 12 and spread(features, 18).all()
    assert spread(torch.ones(4, 3), 3).sum() == 3
    assert spread(torch.zeros(4, 3), 3).sum() == 3


def test_chunks_do_not_matter(monkeypatch) -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 6)
    expected = spread(features, 20)
    for held in (1, 70, 50 * 7):
        monkeypatch.setattr("glimpseprune.pruners._cosine.HELD", held)
        assert torch.equal(spread(features, 20), expected)


def test_autocast_does_not_matter() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        chosen = spread(features, 60)
    assert torch.equal(chosen, spread(features, 60))


def test_newlines_are_candidates(tiny) -> None:
    """All alike, so that one of them may be worth a place and the rest goes before any other token."""
    encoded = made_up(tiny, [[Layout((Part(3, 4, newline=True),), ((3, 4),))]])
    newline = torch.tensor(encoded.layouts[0][0].parts[0].cells).logical_not()
    tokens = encoded.embeds[encoded.visual]
    tokens[newline] = tokens[newline][0].clone()
    encoded.embeds[encoded.visual] = tokens
    pruner = build("divprune", {"count": 13}, tiny)
    keep = pruner.decide(view_of(tiny, encoded, pruner)).keep[encoded.visual]
    assert keep[~newline].all() and keep[newline].sum() == 1


def test_rows_that_repeat(tiny) -> None:
    encoded = tiny.encode(prompts(tiny))
    pruner = build("divprune", {"keep_ratio": 0.3}, tiny)
    whole = pruner.decide(View(start(encoded), encoded, tiny, pruner.stops[0]))
    index = torch.tensor([2, 0, 0, 1])
    some = pruner.decide(View(rows(start(encoded), index), encoded, tiny, pruner.stops[0]))
    assert torch.equal(some.keep, whole.keep[index])
    assert some.flops == [whole.flops[row] for row in index]


@torch.no_grad()
@pytest.mark.parametrize("renumber", [True, False])
def test_positions(tiny, renumber) -> None:
    encoded = tiny.encode(prompts(tiny))
    state = prefill(tiny, encoded, build("divprune", {"keep_ratio": 0.3, "renumber": renumber}, tiny))
    for row, mask in enumerate(state.mask):
        own, source = state.positions[..., row, :][..., mask], state.source[row][mask]
        expected = torch.arange(len(source)) if renumber else encoded.positions[..., row, source]
        assert torch.equal(own, expected.expand_as(own))
    assert build("divprune", {}, tiny).options.renumber  # as published


def test_published_numbers(tiny) -> None:
    assert build("divprune", {}, tiny).numbers([576, 5, 1]) == [56, 1, 1]
    assert build("divprune", {"keep_ratio": 0.111}, tiny).numbers([576]) == [64]
    assert build("divprune", {"keep_ratio": 0.1}, tiny).numbers([1152]) == [115]
    assert build("divprune", {"count": 64}, tiny).numbers([576, 30]) == [64, 30]
    assert build("divprune", {"keep_ratio": 0.0, "min_keep": 0}, tiny).numbers([576]) == [0]


TEXT = [15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57]
"""Tokens of the questions of the paper's eleven data sets, and of the images where they differ."""
TILED = [2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116]
VIDEO = [28, 63, 21, 38, 196]


@pytest.mark.parametrize(
    ("model", "text", "visual", "keep", "full", "pruned", "percent"),
    [
        ("llava-1.5-7b", TEXT, [576] * 11, 0.098, 3.228, 0.512, 15.63),
        ("llava-1.5-13b", TEXT, [576] * 11, 0.098, 6.281, 1.002, 15.71),
        ("llava-1.5-7b", TEXT, TILED, 0.098, 11.849, 1.266, 10.79),
        ("llava-1.5-7b", VIDEO, [1152] * 5, 0.1, 6.539, 0.937, 14.10),
    ],
    ids=["7b", "13b", "tiles", "video"],
)
def test_published_flops(model, text, visual, keep, full, pruned, percent) -> None:
    """The paper's own formula, which leaves out system prompt, the gated third of the MLP and the decision itself."""
    decoder = backbones.describe(backbones.published()[model]()).decoder

    def published(columns: int) -> int:
        width = decoder.width
        return decoder.layers * (4 * columns * width**2 + 2 * columns**2 * width + 2 * columns * width * decoder.mlp)

    left = build("divprune", {"keep_ratio": keep}, next(iter(TINY.values()))()).numbers(visual)
    before, after = ([published(a + b) for a, b in zip(text, tokens)] for tokens in (visual, left))
    assert sum(before) / len(text) / 1e12 == pytest.approx(full, abs=6e-4)
    assert sum(after) / len(text) / 1e12 == pytest.approx(pruned, abs=6e-4)
    ratios = [100 * a / b for a, b in zip(after, before)]
    assert sum(ratios) / len(ratios) == pytest.approx(percent, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"keep_ratio": 0.3}, {"count": 1}, {"keep_ratio": 0.0, "min_keep": 0}])
def test_declared_flops_are_counted_ones(tiny, options) -> None:
    pruner = build("divprune", options, tiny)
    for inputs in (prompts(tiny), prompt(tiny)):
        encoded = tiny.encode(inputs)
        view = View(start(encoded), encoded, tiny, pruner.stops[0])
        with FlopCounterMode(display=False) as counter:
            flops = pruner.decide(view).flops
        assert len(flops) == len(encoded.mask) and sum(flops) == counter.get_total_flops()


def test_flops_at_a_published_size() -> None:
    """Deciding on 576 tokens costs .1% of the prefill that it saves."""
    assert spread_flops(576, 56, 4096) == 2 * 4096 * (576**2 + 55 * 576)
    assert spread_flops(576, 56, 4096) < 1e-3 * 3.228e12


def test_no_matrix_of_tokens_by_tokens_is_made(tiny) -> None:
    encoded = made_up(tiny, [[Layout.of((60, 60))]])
    pruner = build("divprune", {"count": 5}, tiny)
    with Largest() as largest:
        pruner.decide(view_of(tiny, encoded, pruner))
    assert 3600 * tiny.hidden_size <= largest.numel <= 3600**2 / 10


@pytest.mark.parametrize("keep", [0.05, 0.111, 0.5, 1.0])
def test_budget(tiny, keep) -> None:
    number = build("divprune", to_budget(keep, tiny), tiny).numbers([1000])[0]
    assert number == pytest.approx(1000 * keep) and math.isclose(to_budget(keep, tiny)["keep_ratio"], keep)


def test_more_than_there_is(tiny) -> None:
    encoded = tiny.encode(prompts(tiny))
    with pytest.raises(UserError, match="min_keep is 999 but a prompt has only"):
        prefill(tiny, encoded, build("divprune", {"min_keep": 999}, tiny))
    assert all(row.all() for row in kept(encoded, prefill(tiny, encoded, build("divprune", {"count": 999}, tiny))))
