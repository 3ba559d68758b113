"""Prompts that begin alike, run once as far as they do, are what they are when each runs alone."""

from __future__ import annotations

import pytest
import torch

from conftest import TINY, flops_of, picture, watched_layers
from glimpseprune import prefix
from glimpseprune.backbones import LVLM
from glimpseprune.decoder import branch, run_layers, start
from glimpseprune.types import Prefill

ONE, TWO, THREE = [picture(112, 168, 0)], [picture(140, 84, 1), picture(84, 84, 2)], [picture(196, 112, 3)]
IMAGES = [ONE, TWO, ONE, TWO, THREE]
SCENES = ["one", "two", "one", "two", ""]
QUESTIONS = ["what is on the red tag?", "why?", "how many of them are there, and where?", "b?", "who is it then"]
DEPTH = 2


def begun(backbone: LVLM) -> Prefill:
    return start(backbone.encode(backbone.prepare(QUESTIONS, IMAGES)))


def same(one: Prefill, other: Prefill, layers: range) -> None:
    """Equal at all columns that are no padding."""
    mask = one.mask
    pairs = [(one.hidden, other.hidden)]
    for layer in layers:
        held = one.cache.layers[layer], other.cache.layers[layer]
        pairs += [tuple(getattr(x, name).transpose(1, 2) for x in held) for name in ("keys", "values")]
    pairs += [(one.probes[layer], other.probes[layer]) for layer in one.probes]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-4)
    for name in ("positions", "mask", "visual", "source", "row", "next_position"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.depth, sorted(one.added), one.known, one.whole) == (
        other.depth, sorted(other.added), other.known, other.whole,
    )  # fmt: skip
    assert all(torch.equal(one.added[layer], other.added[layer]) for layer in one.added)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, DEPTH])
def test_is_what_whole_prompts_come_to(backbone, depth):
    """All backbones, positions and deepstack with them; below K, and from there on as the teacher goes."""
    state = begun(backbone)
    shared = prefix.alike(state.known, SCENES)
    assert shared.group.tolist() == [0, 1, 0, 1, 2]
    expected = run_layers(backbone, branch(state), depth, probes=(0,))
    ours = prefix.run(backbone, state, depth, shared, probes=(0,))
    same(ours, expected, range(depth))
    assert not state.cache.layers, "the prompt's own cache was touched"
    last = backbone.num_layers
    same(prefix.run(backbone, ours, last, shared), run_layers(backbone, expected, last), range(last))


@torch.no_grad()
def test_beginnings_run_once():
    backbone = TINY["qwen2_5_vl"]("sdpa")
    state = begun(backbone)
    shared = prefix.alike(state.known, SCENES)
    with watched_layers(backbone) as columns:
        prefix.run(backbone, state, 1, shared)
    padding = (~state.known.mask).sum(1)
    assert columns == [int((shared.end - padding).max()), state.mask.shape[1] - int(shared.end.min())]
    once = flops_of(lambda: prefix.run(backbone, state, DEPTH, shared))
    assert once < 0.9 * flops_of(lambda: run_layers(backbone, branch(state), DEPTH))


def test_rows_that_do_not_begin_alike_are_not_shared():
    backbone = TINY["qwen2_5_vl"]("sdpa")
    state = begun(backbone)
    assert prefix.alike(state.known, list(range(5))) is None
    assert prefix.alike(state.known, ["same"] * 5).group.tolist() == [0, 1, 0, 1, 2], "ids differ: not the same images"
    with torch.no_grad():
        alone = prefix.run(backbone, state, DEPTH, None)
    same(alone, run_layers(backbone, branch(state), DEPTH), range(DEPTH))


def test_prepared_prompts_tell_which_pictures_they_show(backbone):
    prompt = backbone.prepare(QUESTIONS, [[picture.copy() for picture in row] for row in IMAGES])
    images = prefix.pictures(prompt, backbone.layouts(prompt))
    assert images == [(0,), (1, 2), (0,), (1, 2), (3,)]
    assert prefix.alike(start(backbone.encode(prompt)).known, images).group.tolist() == [0, 1, 0, 1, 2]
    alone = backbone.prepare(QUESTIONS[:2], IMAGES[:2])
    assert prefix.alike(start(backbone.encode(alone)).known, prefix.pictures(alone, backbone.layouts(alone))) is None
