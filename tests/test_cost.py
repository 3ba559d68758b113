"""Cost: the predictor's analytic count against torch's own counter, all others against the published anchor; those of
a backbone's own matrices against torch's counter are in contracts/test_backbones.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, flops_of, prompt
from contracts._masked import Replay, Witness
from contracts._methods import METHODS
from devices import put
from glimpseprune import backbones, cost
from glimpseprune.cost import Step, Vip
from glimpseprune.decoder import peek, prefill, run_layers, see, start
from glimpseprune.pruners import build
from glimpseprune.types import Layout
from glimpseprune.vip import VIP

SHAPES = {name: backbones.describe(make()) for name, make in backbones.published().items()}


@pytest.mark.parametrize("on", sorted(TINY))
@torch.no_grad()
def test_looks_into_the_decoder_against_torch(on):
    backbone = TINY[on]("eager")
    encoded = see(backbone, build("none", {}, backbone), prompt(backbone, 1))
    decoder, columns = backbone.shapes.decoder, encoded.mask.shape[1]
    waiting = run_layers(backbone, start(encoded), 1)
    assert cost.peek_flops(decoder, columns) == flops_of(lambda: peek(backbone, waiting))
    plain, *looks = (
        flops_of(partial(run_layers, backbone, start(encoded), 2, probes=probes)) for probes in ((), (1,), (0, 1))
    )
    assert [flops - plain for flops in looks] == [cost.row_flops(decoder, columns, rows) for rows in (1, 2)]


@pytest.mark.parametrize("on", sorted(TINY))
@pytest.mark.parametrize("name", ["staged", "mixed", "merging"])
@torch.no_grad()
def test_a_staged_prefill_against_torch(name, on):
    """What several decisions left to each layer, from the trace; two images."""
    backbone = TINY[on]("eager")
    pruner, inputs = METHODS[name].Pruner(backbone, METHODS[name].Options()), prompt(backbone, 1)
    witness, encoded = Witness(pruner), see(backbone, pruner, inputs)
    state = prefill(backbone, encoded, witness)

    steps = cost.steps_of(state.trace, 0)
    assert len(steps) == 1 + len(pruner.stops) and len({step.kept for step in steps}) == len(steps)
    decisions, spans = sum(step.flops for step in steps), cost.spans(backbone.num_layers, steps)
    text = int(encoded.mask.sum()) - encoded.counts[0]
    flops = cost.prefill_flops(backbone.shapes, text, encoded.layouts[0], spans, decisions)
    assert flops.decoder == flops_of(lambda: prefill(backbone, encoded, Replay(witness)))
    assert flops.tower + flops.projector == flops_of(lambda: backbone.encode(inputs))
    assert flops.lm_head == flops_of(lambda: backbone.logits(state.hidden[:, -1]))
    assert flops.total == cost.account(backbone.shapes, text, encoded.layouts[0], steps).flops


def test_vip_linears_against_torch():
    shapes, vip = TINY["qwen2_5_vl"]().shapes, Vip(width=8, cond_width=16, blocks=2, probes=3)
    model = put(VIP(3 * 4, 24, 2, width=8, cond_width=16, num_heads=2))
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
    [
        ("qwen2.5-vl-7b", 6.53),
        ("qwen2.5-vl-3b", 2.77),
        ("qwen3-vl-8b", 6.95),
        ("llava-1.5-7b", 6.48),
        ("llava-1.5-13b", 12.69),
        ("llava-v1.6-mistral-7b", 6.98),
    ],
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
def test_measure_on_a_gpu():
    with cost.measure("cuda") as measured:
        torch.ones(1 << 20, device="cuda")
    assert measured.peak_bytes >= 4 << 20
