"""What the contract tests do not know of Qwen3-VL: deepstack, and the two forms in which transformers hands it out."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from conftest import TINY, prompts
from glimpseprune import backbones
from glimpseprune.decoder import run_layers, start
from glimpseprune.export import save_processor


@torch.no_grad()
def test_features_are_added_to_the_first_layers_at_visual_columns() -> None:
    backbone = TINY["qwen3_vl"]()
    encoded = backbone.encode(prompts(backbone))
    assert list(encoded.added) == [0, 1, 2]
    for features in encoded.added.values():
        assert not features[~encoded.visual].any() and features[encoded.visual].any(1).all()
    state = run_layers(backbone, start(encoded), 1)
    assert list(state.added) == [1, 2]
    bare = start(encoded)
    bare.added = {}
    difference = state.hidden - run_layers(backbone, bare, 1).hidden
    torch.testing.assert_close(difference, encoded.added[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_come_as_tensors_or_per_image(monkeypatch) -> None:
    """transformers 5.17 and 5.23."""
    backbone = TINY["qwen3_vl"]()
    inputs, inner = prompts(backbone), backbone.model.model
    expected, original = backbone.encode(inputs).added, inner.get_image_features
    counts = [layout.count for row in backbone.layouts(inputs) for layout in row]

    def other(*args, **kwargs):
        found = original(*args, **kwargs)
        deep = [x.split(counts) if isinstance(x, Tensor) else torch.cat(tuple(x)) for x in found.deepstack_features]
        assert all(isinstance(x, Tensor) and x.shape == (sum(counts), 32) or len(x) == len(counts) for x in deep)
        found.deepstack_features = deep
        return found

    monkeypatch.setattr(inner, "get_image_features", other)
    found = backbone.encode(inputs).added
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


@torch.no_grad()
def test_a_config_as_it_is_published(tmp_path) -> None:
    """Rotary settings under their older names; the tower's type is the model's; least and most pixels as edges."""
    tiny = TINY["qwen3_vl"]()
    tiny.model.save_pretrained(tmp_path)
    save_processor(tiny.processor, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["vision_config"]["model_type"] = "qwen3_vl"
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert images["size"] == {"shortest_edge": 4 * 32 * 32, "longest_edge": 48 * 32 * 32}
    images["image_processor_type"] = "Qwen2VLImageProcessorFast"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    loaded = backbones.load(tmp_path)
    ours, theirs = (run_layers(b, start(b.encode(prompts(b))), 4).hidden for b in (loaded, tiny))
    torch.testing.assert_close(ours, theirs)
