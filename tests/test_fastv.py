"""FastV against the attention that Hugging Face's own forward returns, and against the paper's table of FLOPs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from conftest import flops_of, prompt, prompts, unmodified, watched_layers
from glimpseprune import cost
from glimpseprune.config import UserError
from glimpseprune.cost import Step
from glimpseprune.decoder import View, approach, prefill, run_layers, start
from glimpseprune.generate import generate, kept
from glimpseprune.pruners import build, fastv

WIDTHS = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}
"""Width, width of the MLP, layers."""


def naive_keep(row: Tensor, count: int) -> list[int]:
    """Tokens that stay, by their columns [H, V] of the last row of attention: one token and one head at a time."""
    heads, tokens = row.shape
    scores = []
    for token in range(tokens):
        total = 0.0
        for head in range(heads):
            total += float(row[head, token])
        scores.append(total / heads)
    return sorted(sorted(range(tokens), key=lambda token: (-scores[token], token))[:count])


def published_flops(columns: float, width: int, mlp: int, matrices: int = 2) -> float:
    """Of one layer, by the paper's formula, which counts two matrices of an MLP that has three."""
    return 4 * columns * width**2 + 2 * columns**2 * width + matrices * columns * width * mlp


def spans(pruner: fastv.Pruner, layers: int, tokens: int = 576) -> list[cost.Span]:
    return cost.spans(layers, [Step(0, tokens), Step(pruner.stops[0].depth, *pruner.numbers([tokens]))])


def test_the_oracle_on_paper() -> None:
    rows = torch.tensor([[0.5, 0.1, 0.2, 0.0], [0.0, 0.5, 0.0, 0.1]])  # means .25 .30 .10 .05: no head decides alone
    assert [naive_keep(rows, count) for count in (2, 1, 0)] == [[0, 1], [1], []]


@torch.no_grad()
@pytest.mark.parametrize(("layer", "keep"), [(2, 0.5), (1, 0.25), (-1, 0.1)])
def test_decides_by_the_attention_of_hugging_face(backbone, layer, keep) -> None:
    """A ragged batch, two images in one of its rows, against each row's own forward without padding."""
    layer = layer % backbone.num_layers
    encoded, model = backbone.encode(prompts(backbone)), unmodified(backbone)
    state = prefill(backbone, encoded, build("fastv", {"layer": layer, "keep_ratio": keep}, backbone))
    for row, ours in enumerate(kept(encoded, state)):
        inputs = prompt(backbone, row)
        attention = model(**inputs, output_attentions=True).attentions[layer - 1][0, :, -1]  # [H, S]
        visual = attention[:, backbone.encode(inputs).visual[0]]  # [H, V]
        assert ours.nonzero().flatten().tolist() == naive_keep(visual, max(int(keep * visual.shape[1]), 1))


@torch.no_grad()
def test_positions_and_the_cache_below_stay(backbone) -> None:
    encoded = backbone.encode(prompt(backbone, 1))
    state = prefill(backbone, encoded, build("fastv", {}, backbone))
    whole, left = encoded.mask.shape[1], state.mask.shape[1]
    assert whole - left == encoded.counts[0] - encoded.counts[0] // 2
    lengths = [layer.keys.shape[2] for layer in state.cache.layers]
    assert lengths == [whole] * 2 + [left] * (backbone.num_layers - 2)
    assert torch.equal(state.positions, encoded.positions[..., state.source[0]])


def test_counts() -> None:
    decoder = SimpleNamespace(num_layers=32)

    def numbers(counts: list[int], **options) -> list[int]:
        return build("fastv", options, decoder).numbers(counts)

    assert [numbers([576], keep=keep) for keep in (0.5, 0.25, 0.125, 0.75)] == [[288], [144], [72], [432]]  # scripts
    assert numbers([576, 7], keep=0.5) == [288, 3]
    assert numbers([576, 100], count=144) == [144, 100]
    assert numbers([576], keep=0.0) == [1]
    assert numbers([576], keep=0.0, min_keep=0) == numbers([576], count=0, min_keep=0) == [0]
    assert numbers([576, 9], count=2, min_keep=5) == [5, 5]


@torch.no_grad()
def test_a_budget_is_what_is_left_for_decoding(backbone) -> None:
    encoded = backbone.encode(prompts(backbone))
    pruner = build("fastv", {"count": 3} | fastv.to_budget(0.4, backbone), backbone)
    left = [int(row.sum()) for row in kept(encoded, prefill(backbone, encoded, pruner))]
    assert left == [int(0.4 * count) for count in encoded.counts]


# GFLOPs of a layer, mean over layers, as printed: with 36 tokens of text, R = .9, .75, .5 dropped behind K layers.
TABLE = {
    ("7b", 2): (19.9, 32.8, 54.6),
    ("7b", 3): (22.8, 34.8, 56.6),
    ("7b", 5): (27.8, 39.7, 59.6),
    ("13b", 2): (29.7, 50.2, 84.6),
    ("13b", 3): (33.0, 52.9, 86.4),
    ("13b", 5): (39.6, 58.4, 90.1),
}


@pytest.mark.parametrize(("size", "layer"), TABLE)
def test_published_flops(size, layer) -> None:
    """Those of 13B to the last digit; those of 7B are printed up to .4 beside their own formula. The formula has 57.6
    of 576 tokens, a prompt 57."""
    width, mlp, layers = WIDTHS[size]
    for printed, dropped in zip(TABLE[size, layer], (0.9, 0.75, 0.5), strict=True):
        pruner = build("fastv", {"layer": layer, "keep_ratio": 1 - dropped}, SimpleNamespace(num_layers=layers))
        (below, _), (above, left) = spans(pruner, layers)
        exact = 576 * (1 - dropped)
        assert 0 <= exact - left < 1
        full, cheap = (published_flops(36 + seen, width, mlp) / 1e9 for seen in (576, exact))
        assert (below * full + above * cheap) / layers == pytest.approx(printed, abs={"7b": 0.45, "13b": 0.05}[size])


@pytest.mark.parametrize(("tokens", "printed"), [(576, 2.01), (2880, 10.6), (2048, 7.4)])
def test_flops_that_pyramiddrop_publishes_for_it(tokens, printed) -> None:
    """TFLOPs of the image tokens of a 7B model, three matrices in the MLP; 50% behind two layers."""
    width, mlp, layers = WIDTHS["7b"]
    seen = spans(build("fastv", {}, SimpleNamespace(num_layers=layers)), layers, tokens)
    flops = sum(many * published_flops(count, width, mlp, 3) for many, count in seen) / 1e12
    assert flops == pytest.approx(printed, abs=0.005 if printed < 3 else 0.05)


def test_mean_tokens_that_later_papers_go_by() -> None:
    """K = 2 of 32: an average of 64, 128 or 192 tokens over layers leaves 29.9, 98.1, 166.4 behind the second."""
    for average, left in ((64, 30), (128, 98), (192, 166)):
        pruner = build("fastv", {"count": left}, SimpleNamespace(num_layers=32))
        assert cost.mean_visual_tokens(spans(pruner, 32)) == pytest.approx(average, abs=0.5)


@torch.no_grad()
def test_declared_flops_are_those_of_the_probed_row(backbone) -> None:
    for row in range(3):
        encoded, pruner = backbone.encode(prompt(backbone, row)), build("fastv", {}, backbone)

        def run(probes, encoded=encoded) -> int:
            return flops_of(lambda: run_layers(backbone, start(encoded), 2, probes=probes))

        state = approach(backbone, start(encoded), pruner)
        view = View(state, encoded, backbone, pruner.stops[0])
        assert flops_of(lambda: pruner.decide(view)) == 0  # noqa: B023
        assert pruner.decide(view).flops == [run(pruner.needs.probes) - run(())]


@torch.no_grad()
def test_trace_is_what_the_layers_saw(backbone) -> None:
    pruner, layers = build("fastv", {"keep_ratio": 0.3}, backbone), backbone.num_layers
    together = prefill(backbone, backbone.encode(prompts(backbone)), pruner)
    for row in range(3):
        encoded = backbone.encode(prompt(backbone, row))
        with watched_layers(backbone) as columns:
            alone = prefill(backbone, encoded, pruner)
        text = int((~encoded.visual).sum())
        steps = cost.steps_of(together.trace, row)
        assert steps == cost.steps_of(alone.trace, 0)
        assert len(columns) == layers
        assert cost.mean_visual_tokens(cost.spans(layers, steps)) == sum(columns) / layers - text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": 4}, "layer=4: give 1 to 3"),
    ],
)
def test_options_that_do_not_fit(wrong, message) -> None:
    with pytest.raises(UserError, match=message):
        build("fastv", wrong, SimpleNamespace(num_layers=4))


def test_a_decoder_that_is_too_shallow_for_the_default() -> None:
    with pytest.raises(UserError, match="layer=2: give 1 to 1"):
        build("fastv", {}, SimpleNamespace(num_layers=2))


def test_min_keep_above_the_number_of_tokens(backbone) -> None:
    with pytest.raises(UserError, match="min_keep is 999 but a prompt has only"):
        generate(backbone, build("fastv", {"min_keep": 999}, backbone), prompts(backbone), max_new_tokens=1)
