"""MLPs of a width that kernels are slow at run wider, and are otherwise what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from conftest import TINY, prompts
from glimpseprune.backbones import LVLM, _aligned, qwen2_5_vl
from glimpseprune.types import Needs

ODD = 35


@pytest.fixture
def odd() -> LVLM:
    """A tiny Qwen2.5-VL whose tower's MLPs are 35 wide."""
    tiny = TINY["qwen2_5_vl"]()
    config = copy.deepcopy(tiny.model.config)
    config.vision_config.intermediate_size, config._attn_implementation = ODD, "sdpa"
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return qwen2_5_vl.Backbone(model, tiny.processor)


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    monkeypatch.setattr(
        qwen2_5_vl.Backbone,
        "aligns",
        lambda self, pictures: self.aligned.is_needed and qwen2_5_vl.is_free(self.tower),
    )


def shapes(backbone: LVLM) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in backbone.model.named_parameters()}


def widths(backbone: LVLM) -> set[int]:
    """Of what goes into ``down_proj`` while a batch is encoded."""
    seen: list[int] = []
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
        for block in backbone.tower.blocks
    ]
    backbone.encode(prompts(backbone))
    for hook in hooks:
        hook.remove()
    return set(seen)


@torch.inference_mode()
def test_the_numbers_are_the_same(odd, monkeypatch) -> None:
    needs = Needs(states=tuple(odd.vision_layers))
    assert not odd.aligns(odd.pictures(torch.zeros(56, 56))) and widths(odd) == {ODD}
    plain = odd.encode(prompts(odd), needs)
    monkeypatch.setattr(qwen2_5_vl.Backbone, "aligns", lambda *_: True)
    assert widths(odd) == {64}
    wide = odd.encode(prompts(odd), needs)
    torch.testing.assert_close(wide.embeds, plain.embeds, atol=1e-6, rtol=1e-5)
    for layer, state in plain.states.items():
        torch.testing.assert_close(wide.states[layer], state, atol=1e-5, rtol=1e-5)


def test_parameters_stay_what_they_were(odd, on_gpu, tmp_path) -> None:
    before, sizes = copy.deepcopy(odd.model.state_dict()), shapes(odd)
    with torch.inference_mode():
        odd.encode(prompts(odd))
    assert shapes(odd) == sizes
    assert all(torch.equal(x, before[name]) for name, x in odd.model.state_dict().items())
    assert not any(x.is_inference() for x in odd.model.parameters())
    odd.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    written = {x.shape for name, x in saved.items() if "blocks" in name and "_proj" in name}
    assert written == {(ODD, 24), (ODD,), (24, ODD), (24,)}
    assert type(odd)(copy.deepcopy(odd.model), odd.processor).aligned.is_needed
    torch.testing.assert_close(copy.deepcopy(odd).encode(prompts(odd)).embeds, odd.encode(prompts(odd)).embeds)


def test_weights_that_change_or_are_replaced(odd, on_gpu, monkeypatch) -> None:
    """In place, as a checkpoint is restored; or by others, as a model is moved or cast."""
    first = odd.encode(prompts(odd)).embeds
    down = odd.tower.blocks[0].mlp.down_proj.weight
    wide = odd.aligned.whole[down]
    with torch.no_grad():
        down.mul_(2)
    second = odd.encode(prompts(odd)).embeds
    assert odd.aligned.whole[down] is wide and not torch.allclose(first, second)
    odd.model.double()
    third = odd.encode(prompts(odd)).embeds
    assert odd.aligned.whole[down].dtype == torch.float64 and third.dtype == torch.float64
    torch.testing.assert_close(third.float(), second, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()  # back on the CPU
    assert widths(odd) == {ODD} and not odd.aligned.whole


def test_nothing_is_widened_that_trains_or_fits(odd, on_gpu) -> None:
    odd.tower.requires_grad_(True)
    assert widths(odd) == {ODD} and not odd.aligned.whole
    with torch.no_grad():
        assert widths(odd) == {64}
    odd.encode(prompts(odd)).embeds.sum().backward()
    assert odd.tower.blocks[0].mlp.down_proj.weight.grad.shape == (24, ODD)
    for name in ("qwen2_5_vl", "qwen3_vl"):
        assert not TINY[name]().aligned.is_needed


def test_an_error_leaves_them_as_they_were(odd, on_gpu, monkeypatch) -> None:
    sizes = shapes(odd)
    monkeypatch.setattr(odd, "run_blocks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        odd.encode(prompts(odd))
    assert shapes(odd) == sizes and all(64 in x.shape for x in odd.aligned.whole.values())


def test_only_what_is_short_is_filled_up() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 70), requires_grad=False)
    aligned = _aligned.Aligned({weight: 1})
    own = weight.clone()
    assert aligned.is_needed
    for _ in range(2):
        with aligned.widened():
            assert weight.shape == (3, 128) and torch.equal(weight[:, :70], own) and not weight[:, 70:].any()
        assert torch.equal(weight, own)
    assert aligned.whole[weight].data_ptr() == weight.data_ptr()
    assert not _aligned.Aligned({torch.nn.Parameter(torch.zeros(8, 3)): 0}).is_needed
