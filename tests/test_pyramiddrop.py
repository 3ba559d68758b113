"""PyramidDrop against Hugging Face's layers run one by one on shortened prompts, and against the paper's figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from conftest import flops_of, prompt, prompts, unmodified, watched_layers
from glimpseprune import cost
from glimpseprune.config import UserError
from glimpseprune.cost import Step
from glimpseprune.decoder import View, approach, decide, prefill, start
from glimpseprune.generate import generate, kept
from glimpseprune.pruners import build, pyramiddrop
from glimpseprune.types import Encoded, Stop

SCHEDULES = {
    "default": {},
    "two": {"layers": (1, 3), "keep_ratio": (0.7, 0.2)},
    "one": {"layers": (2,), "keep_ratio": (0.3,)},
}


def naive_counts(tokens: int, ratios: list[float]) -> list[int]:
    """Left behind each drop, of the tokens at first."""
    return [int(tokens * ratio) for ratio in ratios]


@torch.no_grad()
def naive(model: nn.Module, encoded: Encoded, drops: dict[int, float]) -> tuple[list[list[int]], Tensor]:
    """One prompt without padding through the layers of Hugging Face's model: before the layers in ``drops`` so large a
    fraction of its visual tokens is left. The tokens left each time, and what the last layer makes of all columns."""
    text = model.model.language_model
    hidden, positions = encoded.embeds, encoded.positions
    places = encoded.visual[0].nonzero().flatten().tolist()
    columns, total, left = list(range(hidden.shape[1])), len(places), []
    for index, layer in enumerate(text.layers):
        size = len(columns)
        mask = torch.full((1, 1, size, size), -torch.inf).triu(1)
        rope = text.rotary_emb(hidden, positions)
        if index in drops:
            attention = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rope, attention_mask=mask)[1]
            scores = {}
            for place, column in enumerate(columns):
                if column in places:
                    scores[column] = sum(float(head[-1, place]) for head in attention[0]) / len(attention[0])
            best = sorted(scores, key=lambda column: (-scores[column], column))[: int(total * drops[index])]
            stay = [place for place, column in enumerate(columns) if column in best or column not in places]
            columns = [columns[place] for place in stay]
            left.append([places.index(column) for column in columns if column in places])
            hidden = hidden[:, stay]
            positions = torch.arange(len(stay)).expand(*positions.shape[:-1], -1)
            mask = mask[..., : len(stay), : len(stay)]
            rope = text.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope)
        if index in encoded.added:
            hidden = hidden + encoded.added[index][:, columns]
    return left, hidden


def published_flops(tokens: int, width: int = 4096, mlp: int = 11008) -> float:
    """Of one layer of a 7B model on image tokens alone, by the paper's formula."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * mlp


def spans(options: dict, layers: int = 32, tokens: int = 576) -> list[cost.Span]:
    pruner = build("pyramiddrop", options, SimpleNamespace(num_layers=layers))
    steps = [Step(stop.depth, *pruner.numbers(stage, [tokens])) for stage, stop in enumerate(pruner.stops)]
    return cost.spans(layers, [Step(0, tokens), *steps])


@torch.no_grad()
def test_the_oracle_without_drops_is_the_forward_of_hugging_face(backbone) -> None:
    model, inputs = unmodified(backbone), prompt(backbone, 1)
    left, hidden = naive(model, backbone.encode(inputs), {})
    assert left == []
    torch.testing.assert_close(backbone.logits(hidden), model(**inputs).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_drop_is_that_of_the_layers_by_hand(backbone, schedule) -> None:
    """A ragged batch, two images in one of its rows, stage by stage against each row alone without padding."""
    pruner, model = build("pyramiddrop", SCHEDULES[schedule], backbone), unmodified(backbone)
    encoded = backbone.encode(prompts(backbone))
    drops = dict(zip((stop.depth for stop in pruner.stops), pruner.options.keep_ratio, strict=True))
    state, ours = start(encoded), []
    for _ in pruner.stops:
        state = decide(backbone, encoded, state, pruner)
        ours.append([row.nonzero().flatten().tolist() for row in kept(encoded, state)])
    state = prefill(backbone, encoded, pruner)
    for row in range(3):
        left, hidden = naive(model, backbone.encode(prompt(backbone, row)), drops)
        assert [stage[row] for stage in ours] == left
        assert list(map(len, left)) == naive_counts(encoded.counts[row], list(drops.values()))
        torch.testing.assert_close(state.hidden[row][state.mask[row]], hidden[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_first_drop_goes_by_the_attention_of_hugging_face(backbone) -> None:
    """Nothing is shorter yet where it decides, so the whole forward has this very row."""
    pruner, model = build("pyramiddrop", {}, backbone), unmodified(backbone)
    encoded = backbone.encode(prompts(backbone))
    state = decide(backbone, encoded, start(encoded), pruner)
    for row, ours in enumerate(kept(encoded, state)):
        inputs = prompt(backbone, row)
        attention = model(**inputs, output_attentions=True).attentions[pruner.stops[0].depth][0, :, -1].mean(0)  # [S]
        scores = attention[backbone.encode(inputs).visual[0]].tolist()
        best = sorted(range(len(scores)), key=lambda token: -scores[token])[: len(scores) // 2]
        assert ours.nonzero().flatten().tolist() == sorted(best)


@torch.no_grad()
def test_positions_may_stay(backbone) -> None:
    encoded = backbone.encode(prompts(backbone))
    state = prefill(backbone, encoded, build("pyramiddrop", {"renumber": False}, backbone))
    own = encoded.positions.gather(-1, state.source.expand(encoded.positions.shape[:-1] + state.source.shape[-1:]))
    assert torch.equal(state.positions[..., state.mask], own[..., state.mask])


@torch.no_grad()
def test_positions_are_new_and_the_cache_below_stays(backbone) -> None:
    encoded, layers = backbone.encode(prompt(backbone, 1)), (1, 3)
    state = prefill(backbone, encoded, build("pyramiddrop", {"layers": layers, "keep_ratio": (0.5, 0.2)}, backbone))
    text, tokens = int((~encoded.visual).sum()), encoded.counts[0]
    whole, *left = text + tokens, text + int(0.5 * tokens), text + int(0.2 * tokens)
    ends = [*layers, backbone.num_layers]
    lengths = [size for size, low, high in zip((whole, *left), (0, *layers), ends) for _ in range(high - low)]
    assert [layer.keys.shape[2] for layer in state.cache.layers] == lengths
    for held, size in zip((*state.frames[1:], state), left, strict=True):
        assert torch.equal(held.positions, torch.arange(size).expand_as(held.positions))
        assert held.next_position.tolist() == [size]  # a new token's position: so many are cached at this depth
    assert torch.equal(state.frames[0].positions, encoded.positions)


def test_published_counts_and_layers() -> None:
    for tokens, left in ((576, [288, 144, 72]), (2880, [1440, 720, 360])):
        assert spans({}, tokens=tokens) == [(8, tokens), *((8, number) for number in left)]
        assert naive_counts(tokens, [0.5, 0.25, 0.125]) == left
    assert naive_counts(7, [0.5, 0.25, 0.125]) == [3, 1, 0]
    assert spans({}, tokens=7) == [(8, 7), (8, 3), (8, 1), (8, 1)]  # one token at least
    assert spans({"min_keep": 0}, tokens=7)[-1] == (8, 0)
    stops = {layers: build("pyramiddrop", {}, SimpleNamespace(num_layers=layers)).stops for layers in (32, 28, 40, 4)}
    assert stops[32] == tuple(Stop(depth, renumber=True, prune_cache=False) for depth in (8, 16, 24))
    depths = {layers: [stop.depth for stop in found] for layers, found in stops.items()}
    assert depths == {32: [8, 16, 24], 28: [7, 14, 21], 40: [10, 20, 30], 4: [1, 2, 3]}


def test_published_retention() -> None:
    """46.9% of 576: 270 tokens on average; the scripts' layers of a decoder of 40 keep less."""
    assert cost.mean_visual_tokens(spans({})) == 270 == 0.46875 * 576
    assert cost.mean_visual_tokens(spans({}, 40)) == 270
    assert cost.mean_visual_tokens(spans({"layers": [8, 16, 24]}, 40)) == pytest.approx(0.4 * 576)
    steep = {"layers": [2, 8, 16], "keep_ratio": [0.19, 0.19**2, 0.19**3]}  # the author's, for a budget of 64
    assert cost.mean_visual_tokens(spans(steep)) == pytest.approx(62.9, abs=0.05)


TERAFLOPS = {576: ("3.82", "1.78"), 2880: ("20.8", "9.46"), 2048: ("14.4", "6.6"), 5184: ("40.6", "18.1")}
"""As printed: unpruned and pruned, by image tokens."""


@pytest.mark.parametrize("tokens", TERAFLOPS)
def test_published_flops(tokens) -> None:
    for printed, seen in zip(TERAFLOPS[tokens], ([(32, tokens)], spans({}, tokens=tokens)), strict=True):
        flops = sum(layers * published_flops(count) for layers, count in seen) / 1e12
        assert f"{flops:.{len(printed.partition('.')[2])}f}" == printed


@torch.no_grad()
def test_declared_flops_are_those_of_the_look_ahead(backbone) -> None:
    pruner = build("pyramiddrop", {}, backbone)
    for row in range(3):
        encoded = backbone.encode(prompt(backbone, row))
        state = start(encoded)
        for stop in pruner.stops:
            state = approach(backbone, state, pruner)
            view = View(state, encoded, backbone, stop)
            rope = flops_of(lambda: backbone.text_model.rotary_emb(state.hidden, state.positions))  # noqa: B023
            assert pruner.decide(view).flops == [flops_of(lambda: pruner.decide(view)) - rope]  # noqa: B023
            state = decide(backbone, encoded, state, pruner)


@torch.no_grad()
def test_trace_is_what_the_layers_saw(backbone) -> None:
    pruner, layers = build("pyramiddrop", {"keep_ratio": (0.8, 0.5, 0.1)}, backbone), backbone.num_layers
    together = prefill(backbone, backbone.encode(prompts(backbone)), pruner)
    for row in range(3):
        encoded = backbone.encode(prompt(backbone, row))
        with watched_layers(backbone) as columns:
            alone = prefill(backbone, encoded, pruner)
        text = int((~encoded.visual).sum())
        steps = cost.steps_of(together.trace, row)
        assert steps == cost.steps_of(alone.trace, 0)
        seen = [tokens for count, tokens in cost.spans(layers, steps) for _ in range(count)]
        assert seen == [count - text for count in columns]
        assert cost.mean_visual_tokens(cost.spans(layers, steps)) == sum(columns) / layers - text


@torch.no_grad()
def test_a_budget_is_what_is_left_for_decoding(backbone) -> None:
    encoded = backbone.encode(prompts(backbone))
    options = pyramiddrop.to_budget(0.125, backbone)
    assert options["keep_ratio"] == pytest.approx(pyramiddrop.Options().keep_ratio)
    for keep in (0.0, 0.2, 1.0):
        pruner = build("pyramiddrop", pyramiddrop.to_budget(keep, backbone), backbone)
        left = [int(row.sum()) for row in kept(encoded, prefill(backbone, encoded, pruner))]
        assert left == [max(int(keep * count), 1) for count in encoded.counts]


@pytest.mark.parametrize(
    ("wrong", "layers", "message"),
    [
        ({}, 3, r"layers=\[0, 1, 2\]: give 3 rising numbers, one for each of keep_ratio, from 1 to 2"),
        ({}, 2, r"layers=\[0, 1, 1\]"),
        ({"layers": [8, 16]}, 32, "give 3 rising numbers"),
        ({"layers": [8, 8, 16]}, 32, "give 3 rising numbers"),
        ({"layers": [16, 8, 24]}, 32, "give 3 rising numbers"),
        ({"layers": [8, 16, 32]}, 32, "from 1 to 31"),
        ({"keep_ratio": [0.25, 0.5, 0.1]}, 32, "never rise"),
    ],
)
def test_options_that_do_not_fit(wrong, layers, message) -> None:
    with pytest.raises(UserError, match=message):
        build("pyramiddrop", wrong, SimpleNamespace(num_layers=layers))


def test_a_shallow_decoder_with_fewer_drops() -> None:
    pruner = build("pyramiddrop", {"keep_ratio": [0.5]}, SimpleNamespace(num_layers=2))
    assert [stop.depth for stop in pruner.stops] == [1]


def test_min_keep_above_the_number_of_tokens(backbone) -> None:
    with pytest.raises(UserError, match="min_keep is 999 but a prompt has only"):
        generate(backbone, build("pyramiddrop", {"min_keep": 999}, backbone), prompts(backbone), max_new_tokens=1)
