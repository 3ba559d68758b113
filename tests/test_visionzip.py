"""VisionZip against loops over tokens, fed by Hugging Face's eager attention; its published numbers; what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, prompt, prompts
from eager_tower import Tower, eager_tower
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError
from glimpseprune.cost import attention_flops
from glimpseprune.decoder import View, decide, prefill, rows, start
from glimpseprune.generate import kept
from glimpseprune.pruners import build
from glimpseprune.pruners.visionzip import SHARES, Merging, assign, merge, to_budget
from glimpseprune.types import Encoded, Layout, Part
from made_up import Largest, made_up, view_of

SOME = {"dominant": 0.3, "contextual": 0.2}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return TINY[request.param]()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.pow(2).sum() * b.pow(2).sum()).sqrt())


def naive(
    cell: list[bool], received: Tensor, keys: Tensor, states: Tensor, dominant: int, contextual: int
) -> tuple[list[int], dict[int, Tensor]]:
    """Of one image: the dominant tokens, and the contextual ones with their merged states; of equals the first."""
    pictured = [i for i, is_cell in enumerate(cell) if is_cell]
    best = sorted(pictured, key=lambda i: (-float(received[i]), i))[:dominant]
    rest = [i for i in pictured if i not in best]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    mean = [sum(head for head in keys[i].double()) / keys.shape[1] for i in range(len(cell))]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in members:
            similar = [cosine(mean[i], mean[target]) for target in targets]
            members[targets[similar.index(max(similar))]].append(i)
    merged = {}
    for target, others in members.items():
        merged[target] = states[target].clone()
        if others:
            merged[target] += sum(states[i] for i in others) / len(others)
    return best, merged


def naive_row(
    backbone: LVLM, encoded: Encoded, tower: Tower, row: int, numbers: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Which tokens of a row stay, bool [V], and the decoder's inputs at them [V', D]."""
    embeds, first = encoded.embeds[row][encoded.visual[row]].clone(), 0
    before = sum(encoded.counts[:row])
    keep = torch.zeros(len(embeds), dtype=torch.bool)
    for layout, (dominant, contextual) in zip(encoded.layouts[row], numbers, strict=True):
        cell = [cell for part in layout.parts for cell in part.cells]
        own = slice(first, first + len(cell))
        seen = slice(before + first, before + first + len(cell))
        states = embeds[own] if backbone.projector is None else tower.states[seen]
        best, merged = naive(cell, tower.attention[seen], tower.keys[seen], states, dominant, contextual)
        keep[[first + i for i in (*best, *merged)]] = True
        for target, state in merged.items():
            embeds[first + target] = state if backbone.projector is None else backbone.projector(state)
        first += len(cell)
    return keep, embeds[keep]


@torch.no_grad()
@pytest.mark.parametrize("options", [SOME, {"dominant_count": 6, "contextual_count": 3}, {"layer": -2, **SOME}, {}])
def test_decisions_and_merged_states_are_those_of_loops(backbone, options) -> None:
    inputs, pruner = prompts(backbone), build("visionzip", options, backbone)
    encoded = backbone.encode(inputs, pruner.needs)
    state = decide(backbone, encoded, start(encoded), pruner)
    layer = backbone.vision_layers[-2] if "layer" in options else backbone.feature_layer
    tower = eager_tower(backbone, inputs, layer)
    if backbone.projector is not None:
        tower.states = eager_tower(backbone, inputs, backbone.feature_layer).states
    for row, keep in enumerate(kept(encoded, state)):
        numbers = [pruner.numbers(layout.count, layout.count) for layout in encoded.layouts[row]]
        expected, states = naive_row(backbone, encoded, tower, row, numbers)
        assert torch.equal(keep, expected)
        torch.testing.assert_close(state.hidden[row][state.visual[row]], states, **CLOSE)


@torch.no_grad()
def test_rows_alone(tiny) -> None:
    """Decisions, merged states and FLOPs do not depend on the batch."""
    pruner = build("visionzip", SOME, tiny)
    encoded = tiny.encode(prompts(tiny), pruner.needs)
    together = decide(tiny, encoded, start(encoded), pruner)
    for row, keep in enumerate(kept(encoded, together)):
        alone = tiny.encode(prompt(tiny, row), pruner.needs)
        state = decide(tiny, alone, start(alone), pruner)
        assert torch.equal(kept(alone, state)[0], keep)
        hidden = together.hidden[row][together.visual[row]]
        torch.testing.assert_close(state.hidden[state.visual], hidden, **CLOSE)
        assert state.trace[1].flops[0] == together.trace[1].flops[row]


@torch.no_grad()
def test_only_targets_change(tiny) -> None:
    """Text and dominant tokens keep every bit, every target that others joined is new."""
    pruner = build("visionzip", SOME, tiny)
    encoded = tiny.encode(prompts(tiny), pruner.needs)
    before = encoded.embeds.clone()
    keep, merging, _ = pruner.choose(View(start(encoded), encoded, tiny, pruner.stops[0]))
    state = decide(tiny, encoded, start(encoded), pruner)
    assert torch.equal(encoded.embeds, before)
    same = (state.hidden == before.gather(1, state.source[..., None].expand_as(state.hidden))).all(-1)
    assert same[state.mask & ~state.visual].all()
    dominant = keep.index_fill(0, merging.targets, False)
    assert same[state.visual][dominant[keep]].all() and dominant.any()
    joined = torch.zeros_like(keep).index_fill(0, merging.targets[merging.joined], True)
    assert not same[state.visual][joined[keep]].any() and joined.any()
    assert torch.isfinite(prefill(tiny, encoded, pruner).hidden[state.mask]).all()


def test_merging_by_hand() -> None:
    """Tokens 0, 1, 3, 4, 6 are left for two targets: every second, 0 and 3. 1 is like 3; 4 and 6 are like 0."""
    keys = torch.tensor([[1.0, 0], [0, 1], [5, 5], [0, 1], [1, 0], [5, 5], [0.8, 0.6]])
    states = torch.tensor([[1.0], [2], [4], [8], [16], [32], [64]])
    rest = torch.tensor([0, 1, 3, 4, 6])
    merging = assign(keys, [rest, torch.tensor([5])], [2, 0])
    assert [x.tolist() for x in merging] == [[0, 3], [1, 4, 6], [1, 0, 0]]
    assert merge(states, merging).tolist() == [[1 + (16 + 64) / 2], [8 + 2]]
    alone = assign(keys, [rest], [5])
    assert [x.tolist() for x in alone] == [[0, 1, 3, 4, 6], [], []]
    assert torch.equal(merge(states, alone), states[rest])
    assert merge(states, assign(keys, [rest], [0])).shape == (0, 1)


def test_second_image_has_targets_of_its_own() -> None:
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    merging = assign(keys, [torch.tensor([0, 1]), torch.tensor([2, 3])], [1, 1])
    assert merging == Merging(*merging) and [x.tolist() for x in merging] == [[0, 2], [1, 3], [0, 1]]


def test_chunks_do_not_matter(tiny, monkeypatch) -> None:
    encoded = made_up(tiny, [[Layout.of((9, 9))]], layers_of(tiny))
    pruner = build("visionzip", SOME, tiny)
    expected = pruner.decide(view_of(tiny, encoded, pruner))
    for held in (1, 37):
        monkeypatch.setattr("glimpseprune.pruners._cosine.HELD", held)
        found = pruner.decide(view_of(tiny, encoded, pruner))
        assert torch.equal(found.keep, expected.keep) and torch.equal(found.merge, expected.merge)


def layers_of(backbone: LVLM) -> tuple[int, ...]:
    return (backbone.feature_layer,)


NEWLINES = Layout((Part(2, 2), Part(3, 4, newline=True)), ((2, 2), (4, 4)))
STAY = Layout((Part(3, 4, newline=True, newline_stays=True),), ((3, 4),))


def test_what_is_no_cell_always_goes(tiny) -> None:
    """It counts where a fraction is taken, and nothing is merged into it or out of it."""
    encoded = made_up(tiny, [[NEWLINES, NEWLINES], [STAY]], layers_of(tiny))
    cell = torch.tensor([c for row in encoded.layouts for own in row for part in own.parts for c in part.cells])
    everything = build("visionzip", {"dominant": 1.0}, tiny)
    keep = everything.decide(view_of(tiny, encoded, everything)).keep[encoded.visual]
    assert torch.equal(keep, cell) and not cell.all()

    pruner = build("visionzip", SOME, tiny)
    assert pruner.numbers(19, 16) == (int(0.3 * 19), int(0.2 * 19))
    decision = pruner.decide(view_of(tiny, encoded, pruner))
    keep = decision.keep[encoded.visual]
    assert not (keep & ~cell).any()
    embeds = encoded.embeds[encoded.visual]
    embeds[~cell] += 1000.0
    encoded.embeds[encoded.visual] = embeds
    again = pruner.decide(view_of(tiny, encoded, pruner))
    assert torch.equal(again.merge, decision.merge)
    encoded.attention[tiny.feature_layer][:] = 0  # cells may get none either
    keep = everything.decide(view_of(tiny, encoded, everything)).keep[encoded.visual]
    assert torch.equal(keep, cell)


def test_rows_that_repeat(tiny) -> None:
    encoded = made_up(tiny, [[NEWLINES], [STAY, Layout.of((3, 3))]], layers_of(tiny))
    pruner = build("visionzip", SOME, tiny)
    whole = pruner.decide(view_of(tiny, encoded, pruner))
    sizes = [int((whole.keep[row] & encoded.visual[row]).sum()) for row in range(2)]
    index = torch.tensor([1, 0, 0])
    some = pruner.decide(View(rows(start(encoded), index), encoded, tiny, pruner.stops[0]))
    assert torch.equal(some.keep, whole.keep[index])
    torch.testing.assert_close(some.merge, torch.cat([whole.merge.split(sizes)[row] for row in index]))
    assert some.flops == [whole.flops[row] for row in index]


@torch.no_grad()
@pytest.mark.parametrize("renumber", [True, False])
def test_positions(tiny, renumber) -> None:
    pruner = build("visionzip", SOME | {"renumber": renumber}, tiny)
    encoded = tiny.encode(prompts(tiny), pruner.needs)
    state = prefill(tiny, encoded, pruner)
    for row, mask in enumerate(state.mask):
        own, source = state.positions[..., row, :][..., mask], state.source[row][mask]
        expected = torch.arange(len(source)) if renumber else encoded.positions[..., row, source]
        assert torch.equal(own, expected.expand_as(own))


@pytest.mark.parametrize(("count", "expected"), [(576, (35, 28)), (1296, (79, 64)), (5014, (305, 250)), (5, (1, 1))])
def test_published_fractions(tiny, count, expected) -> None:
    assert build("visionzip", {}, tiny).numbers(count, count) == expected
    assert build("visionzip", to_budget(sum(SHARES), tiny), tiny).numbers(count, count) == expected


@pytest.mark.parametrize(("total", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30)])
def test_published_counts(tiny, total, dominant, contextual) -> None:
    """Of 576 patches. With one dominant token less, for the class token that was counted, as many are left to be merged
    as there were: 523 for 54 + 10, of which every 52nd is a target."""
    options = {"dominant_count": dominant, "contextual_count": contextual}
    assert build("visionzip", options, tiny).numbers(576, 576) == (dominant, contextual)
    assert dominant + contextual == total
    encoded = made_up(tiny, [[Layout.of((24, 24))]], layers_of(tiny))
    exact = build("visionzip", options | {"dominant_count": dominant - 1}, tiny)
    keep, merging, _ = exact.choose(view_of(tiny, encoded, exact))
    assert int(keep.sum()) == total - 1 and len(merging.others) == 577 - total
    received = encoded.attention[tiny.feature_layer]
    rest = received.argsort(descending=True)[dominant - 1 :].sort()[0]
    step = (577 - dominant) // contextual
    assert merging.targets.tolist() == [int(rest[step * i]) for i in range(contextual)]
    assert step == 52 or total != 64


def test_numbers_at_the_ends(tiny) -> None:
    def numbers(options: dict, count: int, pictured: int) -> tuple[int, int]:
        return build("visionzip", options, tiny).numbers(count, pictured)

    assert numbers({"dominant": 0.65}, 1000, 1000) == (650, 50)  # the official repository's
    assert numbers({"dominant_count": 54, "contextual_count": 10}, 60, 60) == (54, 6)
    assert numbers({"dominant_count": 54, "contextual_count": 10}, 40, 38) == (38, 0)
    assert numbers({"dominant": 0.0, "contextual": 0.1}, 50, 50) == (0, 5)
    assert numbers({"contextual": 0.0}, 50, 50) == (3, 0)
    assert numbers({"contextual_count": 0}, 50, 50) == (3, 0)
    assert numbers({}, 1, 1) == (1, 0)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"dominant": 0.0}, {"contextual": 0.0}, {"dominant": 0.0, "contextual": 0.0}])
def test_one_kind_or_none(tiny, options) -> None:
    pruner = build("visionzip", options, tiny)
    encoded = tiny.encode(prompts(tiny), pruner.needs)
    state = prefill(tiny, encoded, pruner)
    images = [layout.count for row in encoded.layouts for layout in row]
    assert int(state.visual.sum()) == sum(sum(pruner.numbers(count, count)) for count in images)
    assert torch.isfinite(state.hidden[state.mask]).all()


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 1.0])
def test_budget(tiny, keep) -> None:
    """Both numbers are cut to whole ones."""
    pruner = build("visionzip", to_budget(keep, tiny), tiny)
    for count in (576, 1000, 5014):
        dominant, contextual = pruner.numbers(count, count)
        assert keep * count - 2 < dominant + contextual <= keep * count
        assert dominant / contextual == pytest.approx(SHARES[0] / SHARES[1], rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("options", [SOME, {}, {"layer": -2, **SOME}, {"contextual": 0.0}])
def test_declared_flops_are_counted_ones(backbone, options) -> None:
    """What attention and keys, choice and merging cost beside an encoding without them."""
    pruner = build("visionzip", options, backbone)
    for inputs in (prompts(backbone), prompt(backbone)):
        with FlopCounterMode(display=False) as plain:
            backbone.encode(inputs)
        with FlopCounterMode(display=False) as counter:
            encoded = backbone.encode(inputs, pruner.needs)
            flops = pruner.decide(View(start(encoded), encoded, backbone, pruner.stops[0])).flops
        assert len(flops) == len(encoded.mask)
        assert sum(flops) == counter.get_total_flops() - plain.get_total_flops()


def test_flops_of_made_up_rows(tiny) -> None:
    """The tower looks at what it encoded, padding included; similarities are those of cells that may be merged."""
    encoded = made_up(tiny, [[NEWLINES, NEWLINES], [STAY]], layers_of(tiny))
    pruner, shapes = build("visionzip", {"dominant_count": 4, "contextual_count": 3}, tiny), tiny.shapes
    flops = pruner.decide(view_of(tiny, encoded, pruner)).flops
    projected = 0 if tiny.projector is None else 3 * sum(2 * a * b for a, b in shapes.projector)
    width = shapes.tower.width // 2  # of a key as made up
    looked = [
        attention_flops(shapes.tower, [grid for own in row for grid in own.encoded], tiny.feature_layer)
        for row in encoded.layouts
    ]
    assert flops[0] == looked[0] + 2 * (2 * width * 3 * (16 - 7) + projected)
    assert flops[1] == looked[1] + 2 * width * 3 * (12 - 7) + projected


def test_no_matrix_of_tokens_by_tokens_is_made(tiny) -> None:
    encoded = made_up(tiny, [[Layout.of((60, 60))]], layers_of(tiny))
    pruner = build("visionzip", {"dominant": 0.1, "contextual": 0.4}, tiny)
    with Largest() as largest:
        pruner.decide(view_of(tiny, encoded, pruner))
    assert 3600 * tiny.hidden_size <= largest.numel <= 3600**2 / 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": 99}, r"pruner\.options\.layer: vision layer 99 does not exist"),
        ({"layer": -99}, r"pruner\.options\.layer: vision layer -99 does not exist"),
    ],
)
def test_options_that_make_no_sense(tiny, wrong, message) -> None:
    with pytest.raises(UserError, match=message):
        build("visionzip", wrong, tiny)


def test_the_layer(tiny) -> None:
    def layer(**options) -> int:
        pruner = build("visionzip", options, tiny)
        assert pruner.needs.keys == pruner.needs.attention == (pruner.layer,)
        return pruner.layer

    assert layer() == tiny.feature_layer
    assert layer(layer=-1) == tiny.vision_layers[-1] and layer(layer=tiny.vision_layers[0]) == tiny.vision_layers[0]
