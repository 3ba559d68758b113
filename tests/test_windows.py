"""Batched windows give the numbers of the loop over windows."""

import copy

import pytest
import torch

from conftest import TINY, picture, prompts
from glimpseprune import windows
from glimpseprune.windows import NAME, batch_windows


def test_equals_the_loop_over_ragged_windows():
    tower = copy.deepcopy(TINY["qwen2_5_vl"]().model.model.visual)
    prompt = prompts(TINY["qwen2_5_vl"]())
    tower.config._attn_implementation = "sdpa"
    loop = tower(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).pooler_output
    batch_windows(tower)
    assert tower.config._attn_implementation == NAME
    batched = tower(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).pooler_output
    assert torch.allclose(batched, loop, atol=1e-5)


@torch.no_grad()
def test_calls_are_as_many_as_there_are_sizes(monkeypatch):
    """Not as windows, or images: in a block of windows one per size of window, in others one per size of image."""
    backbone = TINY["qwen2_5_vl"]()
    sizes: list[tuple[int, ...]] = []
    attend = windows.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        sizes.append(tuple(query.shape))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(windows, "scaled_dot_product_attention", count)
    rows = [[picture(196, 112, 0)], [picture(196, 112, 1)], [picture(112, 112, 2), picture(168, 196, 3)]]
    backbone.encode(backbone.prepare(["?"] * 3, rows))
    whole, rest = 16 * 4, {8 * 4, 12 * 4, 6 * 4}  # patches: windows of 4x4 units; 3, 2 or 1 of them at the edges
    within = [shape for shape in sizes if shape[0] > 2]
    assert len(sizes) == 2 * 4 + 3 and {shape[2] for shape in within} <= {whole, *rest}
    assert sorted(shape[2] for shape in sizes)[-3:] == [16 * 4, 28 * 4, 42 * 4]


@pytest.mark.parametrize("backend", ["eager", "flash_attention_2"])
def test_other_backends_are_left_alone(backend):
    tower = copy.deepcopy(TINY["qwen2_5_vl"]().model.model.visual)
    tower.config._attn_implementation = backend
    batch_windows(tower)
    assert tower.config._attn_implementation == backend


def test_chunks_are_even_and_few():
    found = [windows.even(total, 1024) for total in (0, 1, 128, 1024, 1025, 1100, 2048, 2049, 20064)]
    assert found == [1024, 128, 128, 1024, 640, 640, 1024, 768, 1024] and windows.even(50, 10) == 10
    for total in range(1, 20000, 77):
        step = windows.even(total, 1024)
        assert step <= 1024 and -(-total // step) == -(-total // 1024)
