"""Gated attention against its definition, and probed attention against the backend it wraps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from conftest import TINY, prompts
from glimpseprune import attention
from glimpseprune.attention import Away, Gate
from glimpseprune.backbones import _lvlm
from glimpseprune.decoder import run_layers, start

B, H, H_KV, S, D = 2, 4, 2, 9, 8
SCALE = D**-0.5


@pytest.fixture(params=[S, 3, 1], ids=lambda q: f"{q} queries")
def tensors(request) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (B, H, request.param, D), (B, H_KV, S, D), (B, H_KV, S, D)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.fixture(params=[False, True], ids=["full", "padded"])
def columns(request) -> Tensor:
    columns = torch.ones(B, S, dtype=torch.bool)
    if request.param:
        columns[1, :3] = False
    return columns


WEIGHT = torch.tensor([[1, 0.9, 0.2, 0.51, 0.0, 0.5, 1, 1, 1], [1, 0.1, 0.7, 0.9, 0.3, 0.6, 0.2, 1, 1]]).double()


def everything_visible(columns: Tensor, queries: int) -> Tensor:
    """bool [B, 1, Q, S]: causal, not padding, and oneself."""
    causal = torch.ones(S, S, dtype=torch.bool).tril()[S - queries :]
    return (causal & columns[:, None] | torch.eye(S, dtype=torch.bool)[S - queries :])[:, None]


def probabilities(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    scores = query @ key.repeat_interleave(H // H_KV, 1).transpose(-1, -2) * SCALE
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)  # [B, H, Q, S]


def run(tensors, columns: Tensor, gate: Gate) -> Tensor:
    mask = attention.mask("sdpa", columns, tensors[0].shape[2], torch.float64)
    return attention.gated(*tensors, mask, gate, SCALE)


def test_stc_forward_is_hard_pruning(tensors, columns) -> None:
    queries = tensors[0].shape[2]
    kept = (WEIGHT > 0.5)[:, None, None] | torch.eye(S, dtype=torch.bool)[S - queries :]
    visible = everything_visible(columns, queries) & kept
    expected = probabilities(*tensors[:2], visible) @ tensors[2].repeat_interleave(H // H_KV, 1)
    torch.testing.assert_close(run(tensors, columns, Gate(WEIGHT)), expected)
    torch.testing.assert_close(run(tensors, columns, Gate(WEIGHT.clone().requires_grad_())), expected)


def upstream_of(out: Tensor) -> Tensor:
    """A gradient of what attention says, as it is in a decoder, where nothing reads what dropped columns say."""
    live = (WEIGHT > 0.5)[:, S - out.shape[2] :]
    return torch.randn_like(out) * live[:, None, :, None]


@pytest.mark.parametrize("most", [None, 1])
def test_stc_gradient_is_the_stated_surrogate(tensors, columns, most, monkeypatch) -> None:
    if most:  # one row of attention at a time
        monkeypatch.setattr(attention, "_MOST", most)
    query, key, value = tensors
    weight = WEIGHT.clone().requires_grad_()
    out = run(tensors, columns, Gate(weight))
    upstream = upstream_of(out)
    ours = torch.autograd.grad(out, [weight, *tensors], upstream, retain_graph=True)

    # d out / d weight_j = a_full_j (v_j - out), summed over heads and queries
    full = probabilities(query, key, everything_visible(columns, query.shape[2]))
    values = value.repeat_interleave(H // H_KV, 1)
    difference = values[:, :, None] - out[:, :, :, None]  # [B, H, Q, S, d]
    expected = torch.einsum("bhqs,bhqsd,bhqd->bs", full, difference, upstream)
    torch.testing.assert_close(ours[0], expected)

    # q, k and v get the gradient of hard pruning and nothing else
    hard = run(tensors, columns, Gate(WEIGHT))
    for mine, theirs in zip(ours[1:], torch.autograd.grad(hard, tensors, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_columns_that_are_away_have_a_gradient(tensors, columns) -> None:
    """Where the unpruned model has the same keys and values, it is the gradient of a prompt that is all there."""
    query, key, value = tensors
    queries = query.shape[2]
    if queries == S:  # as in a decoder: what does not run does not ask either
        query = query[:, :, [0, 1, 3, 5, 6, 7, 8]]
    there = torch.tensor([[0, 1, 3, 5, 6, 7, 8], [0, 2, 3, 5, 6, 7, 8]])
    away = torch.ones(B, S, dtype=torch.bool).scatter(1, there, False)
    assert not (away & (WEIGHT > 0.5)).any()
    cache = DynamicCache()
    cache.update(key, value, 0)
    place = there[:, None, :, None].expand(-1, H_KV, -1, D)
    few = [x.gather(2, place) for x in (key, value)]
    asking = there[:, -query.shape[2] :]
    visible = everything_visible(columns, S).expand(B, 1, S, S)[torch.arange(B)[:, None], 0, asking]  # [B, Q, S]
    mine = visible.gather(2, there[:, None].expand(-1, query.shape[2], -1))[:, None]
    weight = WEIGHT.clone().requires_grad_()
    away = Away(away & columns, cache)
    out = attention.gated(query, *few, mine, Gate(weight, columns=there, away=away), SCALE)
    upstream = torch.randn_like(out) * (WEIGHT > 0.5).gather(1, asking)[:, None, :, None]
    (ours,) = torch.autograd.grad(out, weight, upstream)
    full = probabilities(query, key, visible[:, None])
    difference = value.repeat_interleave(H // H_KV, 1)[:, :, None] - out[:, :, :, None]  # [B, H, Q, S, d]
    torch.testing.assert_close(ours, torch.einsum("bhqs,bhqsd,bhqd->bs", full, difference, upstream))


def test_value_gate_scales_probabilities_without_renormalising(tensors, columns) -> None:
    weight = WEIGHT.clone().requires_grad_()
    out = run(tensors, columns, Gate(weight, "value"))
    full = probabilities(*tensors[:2], everything_visible(columns, tensors[0].shape[2]))
    expected = (full * weight[:, None, None]) @ tensors[2].repeat_interleave(H // H_KV, 1)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, [weight, *tensors], upstream) for x in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_gate_that_keeps_everything_changes_nothing(tensors, columns) -> None:
    plain = probabilities(*tensors[:2], everything_visible(columns, tensors[0].shape[2]))
    expected = plain @ tensors[2].repeat_interleave(H // H_KV, 1)
    for estimator in ("stc", "value"):
        short = torch.ones(B, 4, dtype=torch.float64)  # columns beyond the gate weigh 1
        torch.testing.assert_close(run(tensors, columns, Gate(short, estimator)), expected)


def test_unknown_estimator(tensors, columns) -> None:
    with pytest.raises(ValueError, match="choices are stc, value"):
        run(tensors, columns, Gate(WEIGHT, "hard"))


def test_logits_repeat_key_heads(tensors) -> None:
    query, key, _ = (x.float() for x in tensors)
    expected = query @ key.repeat_interleave(H // H_KV, 1).transpose(-1, -2) * SCALE
    torch.testing.assert_close(attention.logits(query, key, SCALE), expected)


def test_masks() -> None:
    full, padded = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[False, True, True, True]])
    for implementation in ("sdpa", "flash_attention_2"):
        assert attention.mask(implementation, full, 4, torch.float32) is None
        assert attention.mask(implementation, full, 1, torch.float32) is None
    assert attention.mask("flash_attention_2", padded, 4, torch.float32) is padded
    assert attention.mask("sdpa", full, 2, torch.float32).tolist() == [[[[True, True, True, False], [True] * 4]]]
    expected = [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        padded[0].tolist(),
    ]
    assert attention.mask("sdpa", padded, 4, torch.float32).tolist() == [[expected]]
    additive = attention.mask("eager", padded, 4, torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, torch.tensor([[expected]]))


def test_instrumented_model_is_the_model(backbone) -> None:
    """Hugging Face's own forward, padding included, is what it was before the backend was wrapped."""
    plain = copy.deepcopy(backbone.model)
    plain.model.language_model.config._attn_implementation = backbone.attention
    inputs = prompts(backbone)
    mask = inputs["attention_mask"].bool()
    assert backbone.text_model.config._attn_implementation == f"probed_{backbone.attention}"
    assert torch.equal(backbone.model(**inputs).logits[mask], plain(**inputs).logits[mask])


def test_probe_sees_every_layer(backbone) -> None:
    seen = {}
    encoded = backbone.encode(prompts(backbone))
    run_layers(backbone, start(encoded), 3, probe=lambda i, q, k, scale: seen.update({i: (q, k, scale)}))
    assert sorted(seen) == [0, 1, 2]
    query, key, scale = seen[2]
    batch, columns = encoded.mask.shape
    shape = backbone.shapes.decoder
    assert query.shape == (batch, shape.heads, columns, shape.head_width)
    assert key.shape == (batch, shape.kv_heads, columns, shape.head_width)
    assert scale == pytest.approx(shape.head_width**-0.5)


def test_instrument_rejects_other_backends() -> None:
    text = copy.deepcopy(TINY["llava1_5"]().text_model)
    text.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="eager, sdpa, flash_attention_2"):
        attention.instrument(text)


@pytest.mark.parametrize(
    ("installed", "able", "dtype", "expected"),
    [
        ((), (9, 0), "bfloat16", "sdpa"),
        (("flash_attn",), (9, 0), "bfloat16", "flash_attention_2"),
        (("flash_attn", "flash_attn_interface"), (9, 0), "float16", "flash_attention_3"),
        (("flash_attn", "flash_attn_interface"), (8, 6), "bfloat16", "flash_attention_2"),
        (("flash_attn",), (7, 5), "bfloat16", "sdpa"),
        (("flash_attn",), (9, 0), "float32", "sdpa"),
        (("flash_attn",), (9, 0), "auto", "flash_attention_2"),
    ],
)
def test_auto_is_what_is_there_and_can_run(installed, able, dtype, expected, monkeypatch, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "dtype": "bfloat16"}')
    monkeypatch.setattr(_lvlm, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    assert _lvlm.attention_of("auto", "cuda:0", dtype, tmp_path) == expected
    assert _lvlm.attention_of("auto", "cpu", dtype, tmp_path) == "sdpa"


@pytest.mark.parametrize("name", sorted(TINY))
def test_flash_attention_is_called_as_it_wants_to_be(name: str, monkeypatch) -> None:
    """With a stand-in for the kernel: [B, S, H, d] tensors, a 2-D mask, causal from the lower right."""

    def kernel(query, key, value, mask, query_length, is_causal, dropout, softmax_scale, attn_implementation):
        assert is_causal and attn_implementation == "flash_attention_2" and query_length == query.shape[1]
        columns = torch.ones(key.shape[:2], dtype=torch.bool) if mask is None else mask
        visible = attention.mask("eager", columns, query_length, torch.float32) == 0
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*heads, visible, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    monkeypatch.setattr(attention, "_flash_attention_forward", kernel)
    plain = TINY[name]("sdpa")
    flash = copy.copy(plain)
    flash.text_model = copy.deepcopy(plain.text_model)
    flash.text_model.config._attn_implementation = "flash_attention_2"
    flash.attention = attention.instrument(flash.text_model)
    encoded = plain.encode(prompts(plain))
    ours, theirs = (run_layers(b, start(encoded), b.num_layers).hidden[encoded.mask] for b in (flash, plain))
    torch.testing.assert_close(ours, theirs)
