"""The predictor against a dense, one-image-at-a-time reading of docs/method.md §1.4, and against its published size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from devices import put
from glimpseprune.pruners.glimpse import Glimpse
from glimpseprune.vip import VIP, Segments, grid_positions, rope_2d, rotate, window_ids

GRIDS = [(3, 4), (2, 2), (3, 4)]
N = sum(rows * cols for rows, cols in GRIDS)


@pytest.fixture
def vip() -> VIP:
    torch.manual_seed(0)
    return put(VIP(6, 10, 2, width=16, cond_width=8, num_heads=2, deep_supervision=True))


def inputs(total: int = N) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    return torch.randn(total, 6), [torch.randn(total, 10) for _ in range(2)]


def dense(vip: VIP, probes, states, grids, window=None, tokens=slice(None)) -> torch.Tensor:
    """Everything at once, with an N x N mask."""
    ids = put(window_ids(grids, window))[tokens]
    same = ids[:, None] == ids
    angles = []
    for row, col in put(grid_positions(grids))[tokens].tolist():
        frequencies = [10000 ** (-2 * i / 6) for i in range(3)]  # 12 channels a head: 3 for rows, 3 for columns
        angles.append([row * f for f in frequencies] + [col * f for f in frequencies])
    angles = torch.tensor(angles)[:, None]  # [N, 1, 6]

    def turn(x):
        a, b = x[..., :6], x[..., 6:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x, outputs = vip.attn_in_proj(probes), []
    for index, block in enumerate(vip.layers):
        n = norm(x, block.norm1.weight)
        both = torch.cat([n, vip.cond_in_projs[index](states[index])], -1)
        q, k = (turn(p(both).view(-1, 2, 12)) for p in (block.attn.q_proj, block.attn.k_proj))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 12**0.5
        a = scores.masked_fill(~same, -torch.inf).softmax(-1)
        v = block.attn.v_proj(n).view(-1, 2, 8)
        x = x + block.attn.o_proj(torch.einsum("hqk,khd->qhd", a, v).flatten(1))
        n = norm(x, block.norm2.weight)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(n)) * block.mlp.up_proj(n))
        outputs.append(vip.attn_out_projs[str(index)](x).squeeze(-1))
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("grids", [GRIDS, [(3, 4)], [(2, 3), (3, 2)]], ids=["ragged", "one", "equal"])
def test_equals_the_dense_computation(vip, grids, window) -> None:
    probes, states = inputs(sum(rows * cols for rows, cols in grids))
    torch.testing.assert_close(vip(probes, states, grids, window), dense(vip, probes, states, grids, window))


def test_images_do_not_see_each_other(vip) -> None:
    probes, states = inputs()
    alone = vip(probes[12:16], [state[12:16] for state in states], GRIDS[1:2])
    torch.testing.assert_close(vip(probes, states, GRIDS)[:, 12:16], alone)


@pytest.mark.parametrize("window", [None, 2])
def test_rows_of_what_is_left_do_not_see_each_other(vip, window) -> None:
    """Some tokens have gone; one prompt goes on in two rows, with others left in each."""
    parts = [torch.tensor([0, 1, 5, 11, 13, 16, 27]), torch.tensor([2, 5, 14, 15, 20]), torch.tensor([18, 22])]
    tokens, rows = torch.cat(parts), torch.arange(3).repeat_interleave(torch.tensor([len(part) for part in parts]))
    probes, states = inputs(len(tokens))
    found = vip(probes, states, GRIDS, window, tokens, rows)
    for row, part in enumerate(parts):
        own = rows == row
        expected = dense(vip, probes[own], [state[own] for state in states], GRIDS, window, part)
        torch.testing.assert_close(found[:, own], expected)


def test_gradients_reach_every_parameter(vip) -> None:
    probes, states = inputs()
    vip(probes, states, GRIDS).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vip.parameters())


def test_outputs_and_their_bias() -> None:
    assert put(VIP(6, 10, 3, width=16, cond_width=8, num_heads=2))(*three(), GRIDS).shape == (1, N)
    vip = put(VIP(6, 10, 3, width=16, cond_width=8, num_heads=2, init_bias=-2.0, deep_supervision=True))
    assert [output.bias.item() for output in vip.attn_out_projs.values()] == [-2.0] * 3
    assert vip(*three(), GRIDS).shape == (3, N)


def three() -> tuple[torch.Tensor, list[torch.Tensor]]:
    probes, states = inputs()
    return probes, [*states, states[0]]


def test_widths_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        VIP(6, 10, 1, width=16, cond_width=8, num_heads=3)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "vision_width", "published"),
    [
        pytest.param(36, 2048, 16, 1280, 13_723_137, id="Qwen2.5-VL-3B"),
        pytest.param(28, 3584, 28, 1280, 22_406_657, id="Qwen2.5-VL-7B"),
        pytest.param(32, 4096, 32, 1024, 25_847_297, id="LLaVA-1.5-7B"),
        pytest.param(40, 5120, 40, 1024, 35_362_305, id="LLaVA-1.5-13B"),
    ],
)
def test_published_numbers_of_parameters(layers, width, heads, vision_width, published) -> None:
    with torch.device("meta"):
        modules = VIP(heads, vision_width), Glimpse(layers, width, 1e-6, 0.1)
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == published


def test_windows_are_counted_in_raster_order() -> None:
    assert window_ids([(3, 4)], 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
    assert window_ids([(1, 2), (2, 1)], None).tolist() == [0, 0, 1, 1]
    assert window_ids([(3, 3), (1, 1)], 2).tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3, 4]


def test_segments_of_any_order_attend_within_themselves() -> None:
    ids = torch.tensor([1, 0, 1, 2, 1, 3, 3, 0, 4, 1], device="cpu")  # the host knows them
    torch.manual_seed(0)
    q, k, v = torch.randn(3, len(ids), 2, 4)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 2
    others = (ids[:, None] != ids).to(q.device)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(others, -torch.inf).softmax(-1), v)
    segments = Segments(ids, q.device)
    assert segments.sizes == [(1, 2), (2, 2), (4, 1)]
    torch.testing.assert_close(segments.attend(q, k, v), expected)


def test_rope_depends_on_differences_only_and_keeps_bfloat16() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(a, b):
        turned = (rotate(x, rope_2d(torch.tensor([at]), 8)) for x, at in ((q, a), (k, b)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score((1, 5), (3, 2)), score((11, 25), (13, 22)))
    assert (score((1, 5), (3, 2)) - score((1, 5), (3, 3))).abs() > 1e-3
    assert rotate(q.bfloat16(), rope_2d(torch.tensor([(1, 2)]), 8)).dtype == torch.bfloat16


def test_logits_are_not_rounded_in_mixed_precision(vip) -> None:
    """The matrices multiply in bfloat16, the residual stream and what is read off it in the end do not."""
    probes, states = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vip(probes, states, GRIDS)
    exact = vip(probes, states, GRIDS)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, mixed.bfloat16().float())
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0.05)
