"""Batches in waves: what a batch says does not depend on how many of its prompts are prefilled at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import PICTURES, QUESTIONS, TINY, launched, prompts
from glimpseprune import waves
from glimpseprune.backbones import LVLM
from glimpseprune.decoder import prefill, see
from glimpseprune.generate import continue_from, generate, kept
from glimpseprune.pruners import build

GLIMPSE = {"prune_layer": 1, "threshold": 0.5, "init_bias": 0.0, "vision_layers": [2, 1], "width": 16,
           "cond_width": 16, "num_heads": 2}  # fmt: skip
METHODS = {
    "none": {},
    "glimpse": GLIMPSE,
    "fastv": {"keep_ratio": 0.3},
    "pyramiddrop": {},
    "visionzip": {"dominant": 0.3, "contextual": 0.2},
    "oracle": {},
}
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "output_logits": True}


def built(name: str, backbone: LVLM) -> object:
    torch.manual_seed(0)
    pruner = build(name, METHODS[name], backbone)
    return pruner.eval() if hasattr(pruner, "eval") else pruner


def some(backbone: LVLM) -> list[Tensor]:
    """Box targets of each row, ragged ones."""
    layouts = backbone.layouts(prompts(backbone))
    sizes = [sum(layout.count for layout in row) for row in layouts]
    return [torch.arange(size) % (row + 2) == 0 for row, size in enumerate(sizes)]


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize(
    ("on", "columns"), [*((on, 1) for on in sorted(TINY)), ("qwen2_5_vl", 400)], ids=lambda value: str(value)
)
def test_waves_say_what_a_batch_says(name, on, columns, monkeypatch) -> None:
    backbone, seen = TINY[on](), []
    pruner, inputs, targets = built(name, backbone), prompts(backbone), some(backbone)
    size = inputs["input_ids"].shape[1]
    with launched():
        encoded = see(backbone, pruner, inputs, targets)
        state = prefill(backbone, encoded, pruner)
        expected = continue_from(backbone, encoded, state, **SETTINGS)
        monkeypatch.setattr(waves, "COLUMNS", 1 if columns == 1 else 2 * size)
        monkeypatch.setattr(waves, "see", lambda *args: seen.append(see(*args)) or seen[-1])
        found = generate(backbone, pruner, inputs, targets=targets, **SETTINGS)
    assert [len(each.mask) for each in seen] == ([1, 1, 1] if columns == 1 else [2, 1])
    assert all(each.mask.any(0).all() for each in seen)  # no column is padding alone
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.extra["logits"], expected.extra["logits"], atol=2e-5, rtol=1e-4)
    assert all(map(torch.equal, found.keep, expected.keep)) and found.layouts == expected.layouts
    ours, theirs = found.prefill, state
    for mine, other in zip(ours.trace, theirs.trace, strict=True):
        assert mine.stop == other.stop and torch.equal(mine.kept, other.kept) and torch.equal(mine.flops, other.flops)
    assert torch.equal(ours.next_position, theirs.next_position) and torch.equal(ours.row, theirs.row)
    for row in range(len(QUESTIONS)):
        mine, other = ours.mask[row], theirs.mask[row]
        assert torch.equal(ours.positions[..., row, :][..., mine], theirs.positions[..., row, :][..., other])
        for layer, alike in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            lengths = min(layer.keys.shape[2], alike.keys.shape[2], int(mine.sum()))
            torch.testing.assert_close(
                layer.keys[row, :, -lengths:], alike.keys[row, :, -lengths:], atol=2e-5, rtol=1e-4
            )


@torch.no_grad()
def test_questions_on_one_picture_and_what_was_seen(monkeypatch) -> None:
    backbone = TINY["qwen2_5_vl"]()
    pruner, picture = built("glimpse", backbone), PICTURES[0]
    inputs = backbone.prepare(QUESTIONS, [picture] * 3)
    expected = generate(backbone, pruner, inputs, **SETTINGS)
    monkeypatch.setattr(waves, "COLUMNS", 1)
    assert torch.equal(generate(backbone, pruner, inputs, **SETTINGS).tokens, expected.tokens)
    seen = {"seen": backbone.see(inputs, pruner.needs)}
    texts = {name: x for name, x in inputs.items() if name not in backbone.image_keys}
    assert torch.equal(generate(backbone, pruner, texts | seen, **SETTINGS).tokens, expected.tokens)


@torch.no_grad()
def test_several_answers_of_each_prompt_and_kept_maps(monkeypatch) -> None:
    backbone = TINY["qwen3_vl"]()
    pruner, inputs = built("glimpse", backbone), prompts(backbone)
    monkeypatch.setattr(waves, "COLUMNS", 1)
    many = generate(
        backbone, pruner, inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2, eos_token_id=None
    )
    assert many.tokens.shape == (6, 3) and len(many.keep) == 6
    encoded, state = waves.prefilled(backbone, pruner, inputs)
    assert all(torch.equal(a, b) for a, b in zip(many.keep[::2], kept(encoded, state)))
    assert encoded.embeds.shape[-1] == 0 and not encoded.states and state.hidden.shape[1] == 1
