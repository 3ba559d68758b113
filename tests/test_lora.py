"""Adapters: nothing changes until they are trained; they can be switched off, and become part of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from conftest import TINY, prompts
from glimpseprune import lora
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError
from glimpseprune.decoder import prefill
from glimpseprune.options import LoraOptions
from glimpseprune.pruners import build


@pytest.fixture(params=sorted(TINY))
def backbone(request) -> LVLM:
    """A copy that adapters may be put into."""
    return copy.deepcopy(TINY[request.param]("sdpa"))


@torch.no_grad()
def logits(backbone: LVLM) -> Tensor:
    encoded = backbone.encode(prompts(backbone))
    return backbone.logits(prefill(backbone, encoded, build("none", {}, backbone)).hidden)[encoded.mask]


def adapters(backbone: LVLM) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in backbone.model.named_parameters() if lora.is_adapter(name)}


def adapt(backbone: LVLM, seed: int = 3, **options) -> LVLM:
    """Adapters that do something."""
    lora.inject(backbone, LoraOptions(**{"rank": 4, "alpha": 8.0} | options), 2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters(backbone).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


def test_fresh_adapters_change_nothing(backbone) -> None:
    before = logits(backbone)
    lora.inject(backbone, LoraOptions(rank=4), 2)
    assert torch.equal(logits(backbone), before)
    names = adapters(backbone)
    assert len(names) == 2 * 2 * 7  # layers 2 and 3, A and B, seven linear layers
    assert all(".layers.2." in name or ".layers.3." in name for name in names)
    assert not any("vision" in name or "visual" in name for name in names)  # CLIP has a q_proj, too
    assert all(p.shape[0 if "lora_A" in name else 1] == 4 for name, p in names.items())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert (logits(adapt(copy.deepcopy(TINY["qwen2_5_vl"]()))) - logits(TINY["qwen2_5_vl"]())).abs().max() > 0.1


@pytest.mark.parametrize("first", [0, 1, 3])
def test_layers_below_the_first_are_left_alone(first) -> None:
    backbone = copy.deepcopy(TINY["qwen2_5_vl"]())
    adapt(backbone, first_layer=first, modules=["q_proj", "down_proj"])
    for index, layer in enumerate(backbone.text_model.layers):
        found = [name for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer)]
        assert found == (["self_attn.q_proj", "mlp.down_proj"] if index >= first else [])


def test_half_precision_weights_get_adapters_that_can_train() -> None:
    """A step of 1e-4 is lost in bfloat16, so the adapters themselves are float32."""
    backbone = copy.deepcopy(TINY["qwen2_5_vl"]())
    backbone.model.bfloat16()
    adapt(backbone)
    assert {p.dtype for p in adapters(backbone).values()} == {torch.float32}
    assert logits(backbone).dtype == torch.bfloat16 and logits(backbone).isfinite().all()


def test_disabled_is_the_model_without_them(backbone) -> None:
    plain = logits(backbone)
    adapt(backbone)
    tuned = logits(backbone)
    some = {name for i, name in enumerate(adapters(backbone)) if i % 3 == 0}
    for name, parameter in adapters(backbone).items():
        parameter.requires_grad_(name in some)
    with lora.disabled(backbone.model):
        torch.testing.assert_close(logits(backbone), plain, atol=1e-5, rtol=0)
    assert {name for name, p in backbone.model.named_parameters() if p.requires_grad} == some
    assert torch.equal(logits(backbone), tuned) and (tuned - plain).abs().max() > 0.1


def test_disabled_ends_with_an_error_inside() -> None:
    backbone = adapt(copy.deepcopy(TINY["qwen2_5_vl"]()))
    tuned = logits(backbone)
    with pytest.raises(RuntimeError), lora.disabled(backbone.model):
        raise RuntimeError
    assert torch.equal(logits(backbone), tuned)


def test_set_trainable() -> None:
    backbone = adapt(copy.deepcopy(TINY["qwen2_5_vl"]()))
    lora.set_trainable(backbone.model, True)
    assert {name for name, p in backbone.model.named_parameters() if p.requires_grad} == set(adapters(backbone))


def test_merged_is_an_ordinary_model_with_the_same_logits(backbone) -> None:
    names = set(backbone.model.state_dict())
    tuned = logits(adapt(backbone, first_layer=0))
    lora.merge(backbone.model)
    torch.testing.assert_close(logits(backbone), tuned, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, BaseTunerLayer) for module in backbone.model.modules())
    assert set(backbone.model.state_dict()) == names


def test_adapters_at_the_scale_of_their_options() -> None:
    """What is added is alpha / rank times B A, which the merged weights show."""
    backbone = copy.deepcopy(TINY["qwen2_5_vl"]())
    before = backbone.text_model.layers[3].mlp.up_proj.weight.clone()
    adapt(backbone, rank=2, alpha=6.0)
    module = backbone.text_model.layers[3].mlp.up_proj
    expected = before + 3 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    lora.merge(backbone.model)
    torch.testing.assert_close(backbone.text_model.layers[3].mlp.up_proj.weight, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_layer": 4}, "first_layer=4.*layers 0 to 3"),
        ({"first_layer": -1}, "first_layer=-1"),
        ({"modules": ["q_proj", "query"]}, "no 'query'.*q_proj"),
    ],
)
def test_errors(options, message) -> None:
    backbone = copy.deepcopy(TINY["qwen2_5_vl"]())
    with pytest.raises(UserError, match=message):
        lora.inject(backbone, LoraOptions(**options), 2)
    assert not adapters(backbone)


def test_pruning_after_the_last_layer_leaves_no_layer_for_adapters() -> None:
    with pytest.raises(UserError, match="first_layer"):
        lora.inject(copy.deepcopy(TINY["qwen2_5_vl"]()), LoraOptions(), 4)
