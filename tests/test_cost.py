"""Cost: the analytic counts against torch's own counter on tiny random models, and against the published anchor."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from conftest import TINY, prompt
from contracts._masked import Replay, Witness
from contracts._methods import METHODS
from glimpseprune import backbones, cost
from glimpseprune.cost import Step, Vip
from glimpseprune.decoder import prefill, see
from glimpseprune.types import Layout
from glimpseprune.vip import VIP

IMAGE = 90
SHAPES = {name: backbones.describe(make()) for name, make in backbones.published().items()}


def qwen(depth: int = 3) -> Qwen2_5_VLForConditionalGeneration:
    """Windows of 2 x 2 tokens, full attention in the second of three vision layers, two query heads per key head."""
    text = dict(
        vocab_size=100, bos_token_id=1, eos_token_id=2, hidden_size=32, intermediate_size=48, num_hidden_layers=depth,
        num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, window_size=56, out_hidden_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(config).eval()


def count(model: torch.nn.Module, **inputs) -> dict[str, int]:
    """FLOPs by module name, as torch counts them while the model runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    return {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def test_qwen_against_torch():
    torch.manual_seed(0)
    model, grids, text = qwen(), [(3, 5), (4, 2)], 6
    patches = torch.tensor([[1, 2 * rows, 2 * cols] for rows, cols in grids])
    visual = sum(rows * cols for rows, cols in grids)
    ids = torch.tensor([[1] * (text - 1) + [IMAGE] * 15 + [1] + [IMAGE] * 8])
    counts = count(
        model,
        input_ids=ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.randn(4 * visual, 3 * 2 * 14 * 14),
        image_grid_thw=patches,
    )
    flops = cost.prefill_flops(backbones.describe(model.config), text, [Layout.of(g) for g in grids], [(3, visual)])
    assert flops.decoder == sum(counts[f"model.language_model.layers.{i}"] for i in range(3))
    assert flops.tower == counts["model.visual.patch_embed"] + sum(counts[f"model.visual.blocks.{i}"] for i in range(3))
    assert flops.projector == counts["model.visual.merger"]
    assert flops.lm_head == counts["lm_head"]


def test_llava_against_torch():
    torch.manual_seed(0)
    model, grids, text = llava(), [(4, 4), (4, 4)], 6
    ids = torch.tensor([[1] * text + [IMAGE] * 32])
    counts = count(model, input_ids=ids, pixel_values=torch.randn(2, 3, 56, 56))
    flops = cost.prefill_flops(backbones.describe(model.config), text, [Layout.of(g) for g in grids], [(3, 32)])
    assert flops.decoder == sum(counts[f"model.language_model.layers.{i}"] for i in range(3))
    assert flops.tower == counts["model.vision_tower"]
    assert flops.projector == counts["model.multi_modal_projector"]
    assert flops.lm_head == counts["lm_head"]


@pytest.mark.parametrize("on", sorted(TINY))
@pytest.mark.parametrize("name", ["staged", "mixed", "merging"])
@torch.no_grad()
def test_a_staged_prefill_against_torch(name, on):
    """What several decisions left to each layer, from the trace; two images."""
    backbone = TINY[on]("eager")
    pruner, inputs = METHODS[name].Pruner(backbone, METHODS[name].Options()), prompt(backbone, 1)
    witness, encoded = Witness(pruner), see(backbone, pruner, inputs)
    state = prefill(backbone, encoded, witness)

    def total(work) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    steps = cost.steps_of(state.trace, 0)
    assert len(steps) == 1 + len(pruner.stops) and len({step.kept for step in steps}) == len(steps)
    decisions, spans = sum(step.flops for step in steps), cost.spans(backbone.num_layers, steps)
    text = int(encoded.mask.sum()) - encoded.counts[0]
    flops = cost.prefill_flops(backbone.shapes, text, encoded.layouts[0], spans, decisions)
    assert flops.decoder == total(lambda: prefill(backbone, encoded, Replay(witness)))
    assert flops.tower + flops.projector == total(lambda: backbone.encode(inputs))
    assert flops.lm_head == total(lambda: backbone.logits(state.hidden[:, -1]))
    assert flops.total == cost.account(backbone.shapes, text, encoded.layouts[0], steps).flops


def test_decoding_against_torch():
    model = qwen()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 9, dtype=torch.long)).past_key_values
    counts = count(model, input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    shapes = backbones.describe(model.config)
    layers = sum(counts[f"model.language_model.layers.{i}"] for i in range(3))
    assert cost.decode_flops(shapes, 9) == layers + counts["lm_head"]
    assert cost.decode_flops(shapes, [(1, 9), (2, 9)]) == cost.decode_flops(shapes, 9)
    assert cost.layer_flops(shapes.decoder, 1, 9) * 3 == layers


def test_vip_linears_against_torch():
    shapes, vip = backbones.describe(qwen().config), Vip(width=8, cond_width=16, blocks=2, probes=3)
    model = VIP(3 * 4, 24, 2, width=8, cond_width=16, num_heads=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(15, 12), [torch.randn(15, 24)] * 2, [(3, 5)])
    counts = counter.get_flop_counts()["Global"]
    linear = counts[torch.ops.aten.addmm] + counts[torch.ops.aten.mm]
    attention = vip.blocks * 2 * 15**2 * (8 + 24)  # scores as wide as queries, a weighted sum as wide as values
    assert cost.vip_flops(vip, shapes, [15]) == linear + attention


def test_vip_attends_within_segments():
    shapes = SHAPES["qwen2.5-vl-7b"]
    one, two = (cost.vip_flops(Vip(), shapes, sizes) for sizes in ([80], [40, 40]))
    assert one - two == 4 * 2 * (256 + 768) * (80**2 - 2 * 40**2)


def test_published_anchor():
    """7B, 5,074-token prompt, 203 tokens left in the cache, pruning after layer 18: 76.6 -> 53.1 TFLOPs, .691."""
    shapes, text, layouts = SHAPES["qwen2.5-vl-7b"], 74, [Layout.of((50, 100))]
    full = cost.prefill_flops(shapes, text, layouts, [(28, 5000)])
    assert full.decoder / 1e12 == pytest.approx(76.6, abs=0.1)
    deciding = 19 * cost.layer_flops(shapes.decoder, 1, 5074) + cost.vip_flops(Vip(), shapes, [5000])
    for kept in (203 - text, 203):  # whether the published count of tokens includes the text is not said
        pruned = cost.prefill_flops(shapes, text, layouts, [(19, 5000), (9, kept)], deciding)
        assert pruned.prunable / 1e12 == pytest.approx(53.1, abs=0.4)
        assert pruned.prunable / full.prunable == pytest.approx(0.69, abs=0.01)
        assert pruned.tower == full.tower and pruned.lm_head == full.lm_head
        assert pruned.total / full.total > pruned.prunable / full.prunable


def test_causal_half():
    decoder = SHAPES["qwen2.5-vl-7b"].decoder
    whole, half = cost.layer_flops(decoder, 100), cost.layer_flops(decoder, 100, causal=True)
    assert whole - half == 4 * 3584 * (100**2 - 100 * 101 // 2)
    tail = cost.layer_flops(decoder, 40, 60, causal=True)  # prefill in two pieces is the same prefill
    assert cost.layer_flops(decoder, 60, causal=True) + tail == half


def test_spans():
    assert cost.spans(32, [Step(0, 576)]) == [(32, 576)]
    assert cost.spans(32, [Step(0, 576), Step(0, 64)]) == [(0, 576), (32, 64)]
    pyramid = cost.spans(32, [Step(0, 576), Step(8, 288), Step(16, 144), Step(24, 72)])
    assert pyramid == [(8, 576), (8, 288), (8, 144), (8, 72)]
    assert cost.mean_visual_tokens(pyramid) == pytest.approx(0.46875 * 576)  # the mean retention PyramidDrop states
    shapes = SHAPES["llava-1.5-7b"]
    flops = cost.prefill_flops(shapes, 50, [Layout.of((24, 24))], pyramid)
    assert flops.decoder == 8 * sum(cost.layer_flops(shapes.decoder, 50 + n) for n in (576, 288, 144, 72))
    with pytest.raises(ValueError, match="do not add up to 32 layers"):
        cost.prefill_flops(shapes, 50, [Layout.of((24, 24))], [(8, 576)])


def test_cached():
    """A decision prunes the cache of all layers below it, or of none."""
    steps = [Step(0, 100), Step(2, 50, prune_cache=False), Step(5, 20)]
    assert cost.cached(8, steps) == [(2, 20), (3, 20), (3, 20)]
    assert cost.cached(8, [Step(0, 100), Step(2, 50), Step(5, 20, prune_cache=False)]) == [(2, 50), (3, 50), (3, 20)]


def test_account():
    shapes, layouts = SHAPES["qwen2.5-vl-7b"], [Layout.of((10, 20)), Layout.of((5, 4))]
    none = cost.account(shapes, 30, layouts, [Step(0, 220)])
    assert (none.kept, none.mean_tokens, none.ratio, none.decoder_ratio, none.kv_ratio) == (220, 220, 1, 1, 1)
    assert none.kv_bytes == 28 * 250 * 2 * 4 * 128 * 2
    pruned = cost.account(shapes, 30, layouts, [Step(0, 220), Step(7, 20, 10**9)])
    assert (pruned.kept, pruned.mean_tokens, pruned.kv_bytes) == (20, 70, none.kv_bytes // 5)
    assert pruned.ratio == pruned.flops / none.flops and pruned.decoder_ratio < pruned.ratio < 1
    assert pruned.flops == cost.prefill_flops(shapes, 30, layouts, [(7, 220), (21, 20)]).total + 1e9
    fastv = cost.account(shapes, 30, layouts, [Step(0, 220), Step(7, 20, prune_cache=False)])
    assert fastv.kv_bytes == (7 * 250 + 21 * 50) * 2 * 4 * 128 * 2
    assert fastv.kv_ratio == pytest.approx((7 * 220 + 21 * 20) / 28 / 220)
    assert fastv.flops == pruned.flops - 1e9


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen2.5-vl-7b", 6.53), ("qwen2.5-vl-3b", 2.77), ("llava-1.5-7b", 6.48), ("llava-1.5-13b", 12.69)],
)
def test_named_shapes_have_the_published_sizes(name, billions):
    """Parameters of the decoder layers: two FLOPs each for one token, but for the one pair that it attends to."""
    decoder = SHAPES[name].decoder
    flops = cost.layer_flops(decoder, 1) - 4 * decoder.heads * decoder.head_width
    assert decoder.layers * flops / 2e9 == pytest.approx(billions, abs=0.005)


def test_measure():
    with cost.measure() as measured:
        torch.ones(200, 200) @ torch.ones(200, 200)
    assert 0 < measured.seconds < 60 and measured.peak_bytes is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measure_on_a_gpu():
    with cost.measure("cuda") as measured:
        torch.ones(1 << 20, device="cuda")
    assert measured.peak_bytes >= 4 << 20
