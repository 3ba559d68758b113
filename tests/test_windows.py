"""Batched windows give the numbers of the loop over windows."""

import copy

import pytest
import torch

from conftest import TINY, prompts
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


@pytest.mark.parametrize("backend", ["eager", "flash_attention_2"])
def test_other_backends_are_left_alone(backend):
    tower = copy.deepcopy(TINY["qwen2_5_vl"]().model.model.visual)
    tower.config._attn_implementation = backend
    batch_windows(tower)
    assert tower.config._attn_implementation == backend
