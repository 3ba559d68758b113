"""Decoding on buffers of a fixed size against tokens that are appended to a cache; and what nobody waits for."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import devices
from conftest import TINY, prompts
from glimpseprune import host, replay, steps
from glimpseprune.attention import single
from glimpseprune.decoder import View, advance, append, branch, prefill, run_layers, start
from glimpseprune.generate import generate
from glimpseprune.pruners import build
from glimpseprune.steps import Steps, decoding, draw
from glimpseprune.types import Decision, Needs, Stop

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
GLIMPSE = {"prune_layer": 1, "vision_layers": (1,), "width": 16, "cond_width": 8, "num_heads": 2, "max_keep": 0.3}


class Half(nn.Module):
    """Every second visual token goes; with a stop that leaves caches alone or renumbers, layers differ in columns."""

    needs = Needs()

    def __init__(self, *stops: Stop) -> None:
        super().__init__()
        self.stops = stops

    def decide(self, view: View) -> Decision:
        visual = view.state.visual
        return Decision(visual & (visual.cumsum(1) % 2 == 0))


PRUNERS = {
    "none": (),
    "in all layers": (Stop(2),),
    "cache left": (Stop(1, prune_cache=False), Stop(3, prune_cache=False)),
    "renumbered": (Stop(1, renumber=True), Stop(2, renumber=True, prune_cache=False)),
}


def appended(backbone, state, tokens):
    """Logits behind each of the tokens [B, T], by appending them one by one."""
    found, current = [], branch(state)
    for token in tokens.T:
        current = run_layers(backbone, append(current, backbone.embed(token[:, None])), backbone.num_layers)
        found.append(backbone.logits(current.hidden[:, -1]).float())
    return found


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True], ids=["views", "fixed"])
@pytest.mark.parametrize("name", PRUNERS)
def test_steps_are_tokens_appended(backbone, name, fixed, monkeypatch) -> None:
    """Ragged rows, spans of layers with columns of their own, and more tokens than there was room for at first."""
    monkeypatch.setattr(steps, "ROOM", 8)
    encoded = backbone.encode(prompts(backbone))
    state = prefill(backbone, encoded, Half(*PRUNERS[name]))
    tokens = torch.randint(0, 30, (len(state.mask), 7), generator=torch.Generator().manual_seed(0)).to(backbone.device)
    step = Steps(backbone, state, room=3, fixed=fixed)
    step.fill(state)
    for expected, token in zip(appended(backbone, state, tokens), tokens.T, strict=True):
        torch.testing.assert_close(step(token), expected, **CLOSE)
    assert step.room == 12 and step.done == 7


@torch.no_grad()
def test_what_was_held_before_is_not_seen() -> None:
    """Buffers that serve a second, shorter prompt, and numbers that are none in what it does not see."""
    backbone = TINY["qwen2_5_vl"]()
    long, short = (
        prefill(backbone, backbone.encode(backbone.choose(prompts(backbone), torch.tensor([row]))), pruner)
        for row, pruner in ((1, Half()), (1, Half(Stop(1))))
    )
    assert long.mask.shape[1] > short.mask.shape[1]
    step = Steps(backbone, long, fixed=True)
    for buffer in (*step.keys, *step.values):
        buffer.fill_(torch.nan)
    tokens = torch.tensor([[3, 5, 8]], device=backbone.device)
    for state in (long, short, long):
        step.fill(state)
        for expected, token in zip(appended(backbone, state, tokens), tokens.T, strict=True):
            torch.testing.assert_close(step(token), expected, **CLOSE)


@torch.no_grad()
def test_lent_caches_hold_what_they_held(backbone) -> None:
    state = prefill(backbone, backbone.encode(prompts(backbone)), Half(Stop(1, prune_cache=False)))
    held = [(layer.keys.clone(), layer.values.clone()) for layer in state.cache.layers]
    step = decoding(backbone, state, graphs=False)
    step(torch.full((len(state.mask),), 4, device=backbone.device))
    for layer, (keys, values), own in zip(state.cache.layers, held, step.keys, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.keys.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


@torch.no_grad()
def test_a_block_is_its_layers(backbone) -> None:
    """Layers above the pruned tokens, on columns that are padded; two prompts of other lengths, one after the other."""
    block = None
    for pruner in (Half(Stop(3)), Half(Stop(1), Stop(3)), Half(Stop(3))):
        encoded = backbone.encode(prompts(backbone))
        state = advance(backbone, encoded, start(encoded), pruner, until=len(pruner.stops))
        expected = run_layers(backbone, branch(state), backbone.num_layers)
        block = block or replay.Block(backbone, state, -(-state.mask.shape[1] // 64) * 64)
        ours = block(branch(state))
        assert ours.depth == expected.depth and ours.trace == expected.trace
        torch.testing.assert_close(ours.hidden[state.mask], expected.hidden[state.mask], **CLOSE)
        for mine, theirs in zip(ours.cache.layers, expected.cache.layers, strict=True):
            for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                torch.testing.assert_close(a.transpose(1, 2)[state.mask], b.transpose(1, 2)[state.mask], **CLOSE)


def test_what_is_held_is_bounded(gpu, monkeypatch) -> None:
    """In number and size; the latest stays, and what is asked for again is what was made."""
    backbone, made = TINY["qwen2_5_vl"](), []

    class Thing:
        bytes = 10

    monkeypatch.setattr(backbone, "captured", {})
    monkeypatch.setattr(replay, "KEPT", 3)

    def thing(*sizes):
        found = replay.take(backbone, sizes, lambda: made.append(Thing()) or made[-1])
        replay.back(backbone, found)
        return found

    first = thing(1)
    assert thing(2) is not first and thing(1) is first and len(made) == 2
    thing(3), thing(4)
    assert len(backbone.captured) == 3 and thing(1) is first and thing(2) is not made[1]
    monkeypatch.setattr(replay, "BYTES", 15)
    assert thing(5) is made[-1] and len(backbone.captured) == 1
    made[-1].bytes = 20
    assert thing(5) is made[-1] and not backbone.captured


def test_draws_are_those_of_multinomial() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 7), (5, 1000)):
        chances = (
            torch.rand(shape, generator=generator).softmax(-1).to(devices.device if devices.device == "cuda" else "cpu")
        )
        torch.manual_seed(3)
        expected = torch.multinomial(chances, 1)[:, 0]
        torch.manual_seed(3)
        assert torch.equal(draw(chances), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_single_query_repeats_no_key(groups) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * groups, 1, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    visible = torch.tensor([[True] * 5, [False, False, True, True, True]])[:, None, None]
    repeated = (x.repeat_interleave(groups, 1) for x in (key, value))
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, visible, scale=0.4).transpose(1, 2)
    torch.testing.assert_close(single(query, key, value, visible, 0.4), expected)


# ------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu():
    """One, if only a pretended one, which notes whoever waits for it."""
    if devices.device == "cpu":
        with devices.Pretend() as pretended:
            yield pretended
    elif devices.device == "pretend":
        yield devices.PRETENDING
    else:
        yield None


def moved(backbone):
    """Another one like it, on the GPU, of which nothing has been captured."""
    backbone = copy.copy(backbone)
    backbone.captured, backbone.pools = {}, {}
    backbone = copy.deepcopy(backbone)
    backbone.model.to("cuda")
    return backbone


@torch.no_grad()
@pytest.mark.parametrize("method", ["none", "glimpse", "question"])
def test_a_prefill_waits_for_the_kept_counts_alone(backbone, gpu, method) -> None:
    options = {"none": {}, "glimpse": GLIMPSE, "question": GLIMPSE | {"sight": "question"}}[method]
    backbone = moved(backbone)
    pruner = build("none" if method == "none" else "glimpse", options, backbone).to("cuda").eval()
    encoded = backbone.encode(prompts(backbone), pruner.needs)
    if gpu is None:
        torch.cuda.set_sync_debug_mode("error" if method == "none" else "default")
    else:
        gpu.waited.clear()
    try:
        prefill(backbone, encoded, pruner)
    finally:
        if gpu is None:
            torch.cuda.set_sync_debug_mode("default")
    if gpu is not None:
        assert [place.partition(":")[0] for place in gpu.waited] == ["decoder.py"] * (method != "none"), gpu.waited


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 1.3, "top_k": 9}], ids=["greedy", "sampled"]
)
def test_replayed_decoding_is_decoding_and_waits_for_nothing(backbone, gpu, settings) -> None:
    """The same tokens with and without a graph, again from what was captured, whoever else was served in between."""
    backbone = moved(backbone)
    pruner, inputs = build("glimpse", GLIMPSE, backbone).to("cuda").eval(), prompts(backbone)
    settings = settings | {"max_new_tokens": 9, "eos_token_id": 2, "pad_token_id": 0}

    def run(replays: bool, **more):
        backbone.replays = replays
        torch.manual_seed(5)
        return generate(backbone, pruner, inputs, **settings, **more).tokens

    expected = run(False)
    assert not backbone.captured
    assert torch.equal(run(True), expected)
    (first,) = (each for each in backbone.captured.values() if isinstance(each, Steps))
    run(True, stopping_criteria=[lambda ids, scores: torch.ones(len(ids), dtype=torch.bool, device=ids.device)])
    assert torch.equal(run(True), expected)
    assert [each for each in backbone.captured.values() if isinstance(each, Steps)] == [first]
    if gpu is not None:
        waits = []
        for settings["max_new_tokens"] in (3, 9):
            gpu.waited.clear()
            run(True)
            waits.append(sorted(gpu.waited))
        assert waits[0] == waits[1]  # whatever waits, it is no step


@torch.no_grad()
def test_other_weights_are_recorded_anew_and_nobody_shares(gpu) -> None:
    """A graph reads the addresses that it was recorded with, and has one set of buffers."""
    backbone = moved(TINY["qwen2_5_vl"]())
    state = prefill(backbone, backbone.encode(prompts(backbone)), Half())
    first = decoding(backbone, state)
    assert decoding(backbone, state) is not first  # which has not ended
    first.close()
    assert decoding(backbone, state) is first
    first.close()
    layer = backbone.text_model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    assert decoding(backbone, state) is not first


def test_what_was_recorded_in_inference_mode_serves_out_of_it(gpu) -> None:
    backbone = moved(TINY["qwen2_5_vl"]())
    pruner, inputs = Half(Stop(1)), prompts(backbone)
    found = []
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(generate(backbone, pruner, inputs, max_new_tokens=4).tokens)
    assert all(torch.equal(tokens, found[0]) for tokens in found)


def test_what_cannot_be_captured_is_decoded_step_by_step(gpu, monkeypatch) -> None:
    backbone = moved(TINY["qwen2_5_vl"]())

    def refuse(backbone, run, trial=None):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "record", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with torch.no_grad(), pytest.warns(UserWarning, match="decoding runs launch by launch.*capturing"):
        done = decoding(backbone, prefill(backbone, backbone.encode(prompts(backbone)), Half()))
    assert done.replay is None and not done.fixed and not backbone.replays


@pytest.mark.parametrize(
    "said", ["called a synchronizing CUDA operation", "a prototype that may miss synchronizations"]
)
def test_what_waits_is_refused_before_it_is_recorded(said, monkeypatch) -> None:
    """torch warns of a wait, and of the mode itself; the mode is put back."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    refused = pytest.raises(RuntimeError, match=r"test_steps.py:\d+ waits for the device")
    with refused if "called" in said else nullcontext(), replay.unwaited():
        warnings.warn(said, stacklevel=1)
    assert modes == ["warn", 0]


def test_a_copy_of_a_backbone_has_no_graphs() -> None:
    backbone = copy.copy(TINY["qwen2_5_vl"]())
    backbone.captured, backbone.pools = {"a": (x for x in ())}, {"b": (x for x in ())}  # which nothing can copy
    made = copy.deepcopy(backbone)
    assert made.captured == made.pools == {} and backbone.captured and backbone.pools
    assert torch.equal(made.lm_head.weight, backbone.lm_head.weight)


def test_columns_on_the_host() -> None:
    known = host.Columns.counted([2, 4])
    assert known.mask.tolist() == [[False, False, True, True], [True] * 4] and known.counts == [2, 4]
    assert not known.full and host.Columns.counted([3, 3]).full
    more = known.followed(1, torch.tensor([[True], [False]], device="cpu"))
    assert more.counts == [3, 4] and known.followed(2).counts == [4, 6]
