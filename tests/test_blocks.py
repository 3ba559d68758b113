"""A tower's blocks are run without reading from the device, and a chunk at a time without another result."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from conftest import TINY, prompt, prompts
from glimpseprune import backbones, memory, windows
from glimpseprune.backbones import LVLM, _blocks, _tower
from glimpseprune.types import Encoded, Needs
from made_up import Live


@pytest.fixture(params=sorted(TINY))
def tiny(request) -> LVLM:
    return TINY[request.param]()


def everything(backbone: LVLM) -> Needs:
    layers = tuple(backbone.vision_layers)
    return Needs(states=layers, keys=layers, attention=layers)


def test_nothing_is_read_from_the_device(tiny, monkeypatch) -> None:
    """On the meta device there is nothing to be read: numbers, sizes that depend on numbers, and copies all raise."""
    backbone = type(tiny)(copy.deepcopy(tiny.model).to("meta"), tiny.processor)
    monkeypatch.setattr(_tower.torch, "autocast", lambda *_, **__: nullcontext())  # which does not know this device
    for inputs in (prompt(tiny), prompts(tiny)):
        encoded = backbone.encode(inputs, everything(backbone))
        assert encoded.embeds.is_meta and encoded.positions.is_meta and encoded.visual.is_meta
        assert encoded.counts == tiny.encode(inputs).counts
    with pytest.raises(RuntimeError, match="meta"):
        encoded.visual.nonzero()


def tensors(encoded: Encoded) -> dict[str, torch.Tensor]:
    kinds = ("states", "keys", "attention", "added")
    return {"embeds": encoded.embeds} | {
        f"{kind} {layer}": x for kind in kinds for layer, x in getattr(encoded, kind).items()
    }


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("chunk", [1, 10, 40, 64])
def test_chunks_do_not_matter(name, attn, chunk, monkeypatch) -> None:
    """Chunks of several segments, of one, and of a part of one."""
    backbone, needs = TINY[name](attn), everything(TINY[name](attn))
    inputs = prompts(backbone)
    whole = tensors(backbone.encode(inputs, needs))
    rows: list[int] = []
    (mlp,) = {type(block.mlp) for block in blocks(backbone)}
    forward = mlp.forward
    monkeypatch.setattr(windows, "CHUNK", chunk)
    monkeypatch.setattr(mlp, "forward", lambda self, x: rows.append(x.shape[:-1].numel()) or forward(self, x))
    parts = tensors(backbone.encode(inputs, needs))
    for key, x in whole.items():
        torch.testing.assert_close(parts[key], x, atol=1e-5, rtol=1e-5)
    longest = 26 * 5 if backbone.shapes.tower.extra else chunk  # a picture with its tiles stays whole
    assert max(rows) <= longest or attn == "eager"
    assert len(rows) > len(blocks(backbone)) and "embeds" in whole


def blocks(backbone: LVLM) -> nn.ModuleList:
    return backbone.tower.blocks if hasattr(backbone.tower, "blocks") else backbone.tower.encoder.layers


def test_a_tower_that_trains_runs_at_once(tiny, monkeypatch) -> None:
    backbone = type(tiny)(copy.deepcopy(tiny.model), tiny.processor)
    backbone.tower.requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        backbone.model.zero_grad()
        backbone.encode(prompts(tiny)).embeds.square().sum().backward()
        return [weight.grad for weight in backbone.tower.parameters() if weight.grad is not None]

    expected = gradients()
    monkeypatch.setattr(windows, "CHUNK", 10)
    for own, other in zip(gradients(), expected, strict=True):
        assert torch.equal(own, other)
    pixels = {name: x.clone() for name, x in prompt(tiny).items()}
    pixels["pixel_values"].requires_grad_(True)
    backbone.tower.requires_grad_(False)
    backbone.encode(pixels).embeds.sum().backward()
    assert pixels["pixel_values"].grad.abs().sum() > 0
    assert _blocks.chunk_of(backbone.tower) == 10
    next(backbone.tower.parameters()).ds_id = 0  # as ZeRO-3 marks what it splits
    assert _blocks.chunk_of(backbone.tower) > 10


def test_pieces_are_whole_segments() -> None:
    module = nn.Linear(1, 1)
    module.config = TINY["qwen2_5_vl"]().tower.config
    found = _blocks.pieces([4, 4, 0, 2, 9, 1, 1], 8, module)
    assert [piece.segments.lengths for piece in found] == [(4, 4), (2,), (9,), (1, 1)]
    assert [len(piece.segments.lengths) for piece in _blocks.pieces([4] * 9, 20, module)] == [5, 4]
    assert [(piece.rows.start, piece.rows.stop) for piece in found] == [(0, 8), (8, 10), (10, 19), (19, 21)]
    (mixed,) = _blocks.pieces([4, 2, 4, 1, 1], 100, module)
    plan = {size: rows if isinstance(rows, slice) else rows.tolist() for size, rows in mixed.segments.sizes}
    assert plan == {1: slice(10, 12), 2: slice(4, 6), 4: [0, 1, 2, 3, 6, 7, 8, 9]}
    assert mixed.segments.edges.tolist() == pad(torch.tensor([4, 2, 4, 1, 1]).cumsum(0), (1, 0)).tolist()


def test_rows_of_any_number() -> None:
    x = torch.arange(7)
    for chunk in (1, 3, 7, 100):
        assert torch.equal(_blocks.by_rows(lambda rows: x[rows] * 2, 7, chunk), x * 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_memory_of_a_published_tower(name, monkeypatch) -> None:
    """In shapes alone, attention being a fused kernel: as planned, what goes deep into the decoder counted, and bounded
    by what states take beside a chunk."""
    backbone = backbones.skeleton(backbones.published()[name](), "bfloat16")
    monkeypatch.setattr(windows, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    monkeypatch.setattr(windows, "CHUNK", 8192)
    tower = backbone.shapes.tower

    def peak(rows: int, cols: int) -> int:
        sizes = torch.tensor([[1, rows * tower.merge, cols * tower.merge]])
        pixels = torch.zeros(1, tower.patch).expand(int(sizes.prod()), -1)
        with Live(backbone.model) as live:
            backbone.see({"pixel_values": pixels, "image_grid_thw": sizes})
        return live.peak

    large, small = peak(66, 76), peak(44, 76)  # in chunks of the same size
    deep = 2 * len(backbone.deep) * backbone.hidden_size
    assert large == pytest.approx(memory.tower_bytes(tower, 2, 66 * 76) + 66 * 76 * deep, rel=0.2)
    assert large - small < 22 * 76 * (tower.merge**2 * 7 * tower.width * 2 + deep)
    monkeypatch.setattr(windows, "CHUNK", 10**9)
    assert large < 0.6 * peak(66, 76)
