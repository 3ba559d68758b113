"""What is seen of a vision tower, against Hugging Face's eager attention; and that seeing it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import TINY, prompt, prompts
from eager_tower import eager_tower
from glimpseprune.backbones import LVLM, _tower
from glimpseprune.types import Needs
from glimpseprune.windows import Segments
from made_up import Largest


def everything(backbone: LVLM) -> Needs:
    layers = tuple(backbone.vision_layers)
    return Needs(states=layers, keys=layers, attention=layers)


@torch.no_grad()
def test_keys_and_attention_are_those_of_eager_attention(backbone) -> None:
    inputs = prompts(backbone)
    encoded = backbone.encode(inputs, everything(backbone))
    cell = [cell for row in encoded.layouts for layout in row for part in layout.parts for cell in part.cells]
    for layer in backbone.vision_layers:
        expected = eager_tower(backbone, inputs, layer)
        torch.testing.assert_close(encoded.states[layer], expected.states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(encoded.keys[layer], expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(encoded.attention[layer], expected.attention, atol=1e-6, rtol=1e-4)
        assert encoded.attention[layer].dtype == torch.float32
        assert (encoded.attention[layer] > 0).tolist() == cell
    assert len({layer: tuple(x.tolist()) for layer, x in encoded.attention.items()}) == len(backbone.vision_layers)


@torch.no_grad()
def test_a_row_alone(backbone) -> None:
    needs = everything(backbone)
    together = backbone.encode(prompts(backbone), needs)
    for row in range(3):
        alone = backbone.encode(prompt(backbone, row), needs)
        for mine, theirs in ((alone.keys, together.keys), (alone.attention, together.attention)):
            for layer, x in mine.items():
                torch.testing.assert_close(x, theirs[layer].split(together.counts)[row])


@torch.no_grad()
def test_watching_changes_no_bit_and_collects_nothing_else(backbone) -> None:
    inputs, layer = prompts(backbone), backbone.vision_layers[-1]
    plain, seen = backbone.encode(inputs), backbone.encode(inputs, everything(backbone))
    assert torch.equal(plain.embeds, seen.embeds)
    assert all(torch.equal(plain.added[layer], seen.added[layer]) for layer in plain.added)
    assert plain.states == plain.keys == plain.attention == {}
    one = backbone.encode(inputs, Needs(keys=(layer,)))
    assert list(one.keys) == [layer] and one.states == one.attention == {}
    other = backbone.encode(inputs, Needs(attention=(layer,)))
    assert list(other.attention) == [layer] and other.states == other.keys == {}


@torch.no_grad()
def test_everything_is_as_before_after_an_error(backbone, monkeypatch) -> None:
    inputs, config = prompts(backbone), backbone.model.config.vision_config
    plain, implementation = backbone.encode(inputs).embeds, config._attn_implementation
    hooks = [len(module._forward_hooks) for module in backbone.model.modules()]

    def broken(*args):
        assert config._attn_implementation != implementation
        raise RuntimeError("in the middle of the tower")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
        patch.setattr(_tower, "received", broken)
        backbone.encode(inputs, everything(backbone))
    assert config._attn_implementation == implementation
    assert [len(module._forward_hooks) for module in backbone.model.modules()] == hooks
    assert torch.equal(backbone.encode(inputs).embeds, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_tower_on_flash_attention_is_watched_on_sdpa(name) -> None:
    """The kernel, which is not here, is not called."""
    plain = TINY[name]("sdpa")
    flash = type(plain)(copy.deepcopy(plain.model), plain.processor)
    flash.model.config.vision_config._attn_implementation = "flash_attention_2"
    inputs, needs = prompts(plain), everything(plain)
    ours, theirs = (backbone.encode(inputs, needs) for backbone in (flash, plain))
    torch.testing.assert_close(ours.embeds, theirs.embeds)
    for layer in plain.vision_layers:
        torch.testing.assert_close(ours.keys[layer], theirs.keys[layer])
        torch.testing.assert_close(ours.attention[layer], theirs.attention[layer])
    assert flash.model.config.vision_config._attn_implementation == "flash_attention_2"


def random_attention(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, tokens, 8), torch.randn(2, 3, tokens, 8)


@pytest.mark.parametrize("chunk", [1, 7 * 2 * 3 * 29, 10**9])
def test_chunks_do_not_matter(monkeypatch, chunk) -> None:
    monkeypatch.setattr(_tower, "CHUNK", chunk)
    query, key = random_attention(29)
    expected = (query @ key.transpose(-1, -2) * 0.3).softmax(-1).mean((1, 2))
    torch.testing.assert_close(_tower.received(query, key, 0.3), expected)
    torch.testing.assert_close(_tower.received(query, key, 0.3).sum(1), torch.ones(2))


def test_no_matrix_of_tokens_by_tokens_is_held(monkeypatch) -> None:
    monkeypatch.setattr(_tower, "CHUNK", 1 << 17)
    query, key = random_attention(1500)
    with Largest() as largest:
        _tower.received(query, key, 0.3)
    assert 2 * 3 * 1500 < largest.numel <= 1 << 17 < 1500**2 / 10


def test_attention_is_float32_under_autocast() -> None:
    query, key = random_attention(29)
    with torch.autocast("cpu", torch.bfloat16):
        found = _tower.received(query, key, 0.3)
    assert torch.equal(found, _tower.received(query, key, 0.3))


def test_segments_are_looked_at_apart() -> None:
    """Packed into one call with their lengths, or one call each."""
    module, (query, key) = nn.Identity(), random_attention(12)
    packed, looped = (_tower.Watch({0: module}, {0: module}) for _ in range(2))
    packed(module, query[:1], key[:1], 0.3, Segments.of([5, 3, 4], query.device))
    for q, k in zip(query[:1].split([5, 3, 4], 2), key[:1].split([5, 3, 4], 2)):
        looped(module, q, k, 0.3, None)
    packed(nn.Identity(), query, key, 0.3, None)  # of no interest
    for what in ("keys", "attention"):
        ours, theirs = (watch.collected(what, lambda x: x[0])[0] for watch in (packed, looped))
        torch.testing.assert_close(ours, theirs)
    assert ours.sum().item() == pytest.approx(3)
