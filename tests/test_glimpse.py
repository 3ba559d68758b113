"""The glimpse's start as a copy of a token: it sees exactly what that token would see in its place."""

import pytest
import torch

from conftest import TINY, prompts
from glimpseprune import attention
from glimpseprune.config import UserError
from glimpseprune.decoder import View, append, branch, run_layers, start
from glimpseprune.pruners import build
from glimpseprune.types import Needs

OPTIONS = {"prune_layer": 0, "probe_layers": [0], "vision_layers": [0], "width": 16, "cond_width": 16, "num_heads": 2}


def test_a_copied_token_sees_what_the_token_sees():
    backbone = TINY["qwen2_5_vl"]()
    pruner = build("glimpse", OPTIONS | {"init_token": "?"}, backbone).eval()
    token = torch.tensor(backbone.processor.tokenizer("?", add_special_tokens=False).input_ids)
    assert torch.allclose(pruner.glimpse()[:, 0], backbone.embed(token).expand(backbone.num_layers, -1), atol=1e-5)
    encoded = backbone.encode(prompts(backbone), Needs(states=(0,)))
    state = run_layers(backbone, start(encoded), 1)
    seen = {}
    appended = append(branch(state), backbone.embed(token).expand(len(encoded.mask), 1, -1))
    size = state.mask.shape[1]

    def see(layer, query, key, scaling):
        seen[layer] = attention.logits(query, key, scaling)[:, :, 0, :size].transpose(1, 2)[state.visual]

    run_layers(backbone, appended, 1, probe=see)
    assert torch.allclose(pruner.probe(View(state, encoded, backbone)), seen[0], atol=1e-5)


@pytest.mark.parametrize("text", ["", "two"])
def test_init_token_must_be_in_the_vocabulary(text):
    with pytest.raises(UserError, match="init_token"):
        build("glimpse", OPTIONS | {"init_token": text}, TINY["qwen2_5_vl"]())
