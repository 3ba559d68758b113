"""What every file in backbones/ must do; a new one is tested as soon as it has a tiny model in conftest.py."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from conftest import PICTURES, QUESTIONS, TINY, VOCABULARY, prompt, prompts
from glimpseprune import backbones
from glimpseprune.backbones import _lvlm
from glimpseprune.config import UserError
from glimpseprune.export import save_processor
from glimpseprune.lookup import find, names
from glimpseprune.types import Needs

NAMES = names("glimpseprune.backbones")


def test_every_backbone_has_a_tiny_model() -> None:
    assert sorted(TINY) == NAMES


@pytest.fixture(params=NAMES)
def tiny(request):
    return TINY[request.param]()


@torch.no_grad()
def test_encode(tiny) -> None:
    inputs, layers = prompts(tiny), (tiny.vision_layers[1], tiny.vision_layers[0])
    encoded = tiny.encode(inputs, Needs(states=layers))
    batch, size = inputs["input_ids"].shape
    assert encoded.embeds.shape == (batch, size, tiny.hidden_size)
    assert encoded.positions.shape[-2:] == encoded.mask.shape == encoded.visual.shape == (batch, size)
    assert encoded.visual.sum(1).tolist() == encoded.counts
    assert encoded.layouts == tiny.layouts(inputs)
    assert [len(row) for row in encoded.layouts] == [len(row) for row in PICTURES]
    assert not (encoded.visual & ~encoded.mask).any()
    assert sorted(encoded.states) == sorted(layers)
    for state in encoded.states.values():
        assert state.shape == (sum(encoded.counts), tiny.vision_width)
    assert torch.equal(encoded.embeds[~encoded.visual], tiny.embed(inputs["input_ids"])[~encoded.visual])
    assert tiny.encode(inputs).states == {}
    targets = [torch.ones(count, dtype=torch.bool) for count in encoded.counts]
    assert tiny.encode(inputs, targets=targets).targets is targets


@torch.no_grad()
def test_rows_do_not_depend_on_the_batch(tiny) -> None:
    layers = (tiny.vision_layers[0],)
    together = tiny.encode(prompts(tiny), Needs(states=layers))
    states = together.states[layers[0]].split(together.counts)
    for row in range(len(QUESTIONS)):
        alone, mask = tiny.encode(prompt(tiny, row), Needs(states=layers)), together.mask[row]
        torch.testing.assert_close(together.embeds[row][mask], alone.embeds[0])
        torch.testing.assert_close(states[row], alone.states[layers[0]])
        assert torch.equal(together.positions[..., row, :][..., mask], alone.positions[..., 0, :])


@torch.no_grad()
def test_vision_states_are_in_raster_order(tiny) -> None:
    """A change in one corner of the image moves the state of the token there most."""
    picture = PICTURES[2][0].resize((112, 112))
    changed = picture.copy()
    changed.paste((255, 255, 255), (84, 0, 112, 28))
    layer = tiny.vision_layers[0]
    states = [
        tiny.encode(tiny.prepare(["?"], [[image]]), Needs(states=(layer,))).states[layer]
        for image in (picture, changed)
    ]
    rows, cols = tiny.layouts(tiny.prepare(["?"], [[picture]]))[0][0].grids[0]
    moved = (states[0] - states[1]).norm(dim=1).view(rows, cols)
    assert divmod(int(moved.argmax()), cols) in {(0, cols - 1), (1, cols - 1), (0, cols - 2)}


@torch.no_grad()
def test_a_projector_makes_the_decoders_inputs(tiny) -> None:
    """Of the states of cells, one by one; without a projector several go into each."""
    assert (tiny.projector is None) == (tiny.shapes.projector[0][0] != tiny.vision_width)
    encoded = tiny.encode(prompts(tiny), Needs(states=(tiny.feature_layer,)))
    if tiny.projector is not None:
        cell = [cell for row in encoded.layouts for layout in row for part in layout.parts for cell in part.cells]
        made = tiny.projector(encoded.states[tiny.feature_layer][cell])
        torch.testing.assert_close(made, encoded.embeds[encoded.visual][cell])


def test_embed_and_logits(tiny) -> None:
    ids = torch.tensor([[9, 10]])
    assert tiny.embed(ids).shape == (1, 2, tiny.hidden_size)
    assert tiny.logits(tiny.embed(ids)).shape == (1, 2, VOCABULARY)
    assert len(tiny.text_model.layers) == tiny.num_layers
    assert tiny.device == torch.device("cpu")


def test_prepare_pads_on_the_left_and_puts_the_system_prompt_first(tiny) -> None:
    inputs = prompts(tiny)
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"].all()
    text = tiny.processor.tokenizer.decode(tiny.prepare(["why?"], PICTURES[:1], system="be brief")["input_ids"][0])
    assert text.index("be brief") < text.index("why?")
    assert "be brief" not in tiny.processor.tokenizer.decode(tiny.prepare(["why?"], PICTURES[:1])["input_ids"][0])


def test_a_prompt_without_an_image(tiny) -> None:
    with pytest.raises(UserError, match="prompt 1 has no image"):
        tiny.prepare(QUESTIONS[:2], [PICTURES[0], []])
    ids = torch.tensor([[9, 10, 11]])
    with pytest.raises(UserError, match="prompt 0 has no image"):
        tiny.encode({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_image_tokens_that_do_not_match_the_images(tiny) -> None:
    inputs = prompts(tiny)
    column = int((inputs["input_ids"][1] == tiny.image_token_id).nonzero()[-1])
    broken = {**inputs, "input_ids": inputs["input_ids"].clone()}
    broken["input_ids"][1, column] = 9
    count = sum(layout.places for layout in tiny.layouts(inputs)[1])
    with pytest.raises(UserError, match=f"prompt 1 has {count - 1} image tokens, its images make {count}"):
        tiny.encode(broken)
    without = {**inputs, "input_ids": inputs["input_ids"][:2], "attention_mask": inputs["attention_mask"][:2]}
    with pytest.raises(UserError, match="1 more images"):
        tiny.layouts(without)


def test_vision_layers_that_do_not_exist(tiny) -> None:
    with pytest.raises(UserError, match=r"vision layer 9 does not exist"):
        tiny.encode(prompt(tiny), Needs(states=(tiny.vision_layers[0], 9)))


def test_a_backbone_without_processor(tiny) -> None:
    bare = type(tiny)(copy.deepcopy(tiny.model))
    with pytest.raises(UserError, match="no processor"):
        bare.prepare(QUESTIONS[:1], PICTURES[:1])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_load_is_found_by_model_type(name, tmp_path) -> None:
    tiny = TINY[name]()
    tiny.model.save_pretrained(tmp_path)
    save_processor(tiny.processor, tmp_path)
    loaded = backbones.load(tmp_path, dtype="float32", attn="eager")
    assert type(loaded) is find("glimpseprune.backbones", name).Backbone
    assert loaded.attention == "eager" and not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    inputs, expected = prompts(loaded), prompts(tiny)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    torch.testing.assert_close(loaded.encode(inputs).embeds, tiny.encode(expected).embeds)
    assert backbones.load(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16


def test_pixel_bounds(tiny_folder) -> None:
    small = backbones.load(tiny_folder, min_pixels=4 * 28 * 28, max_pixels=6 * 28 * 28)
    layout = small.layouts(small.prepare(["?"], [[PICTURES[0][0].resize((560, 560))]]))[0][0]
    assert layout.count <= 6


def test_folders_that_are_no_checkpoints(tmp_path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        backbones.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        backbones.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert' model, which no backbone knows"):
        backbones.load(tmp_path)


def test_a_folder_without_a_processor(tmp_path) -> None:
    for name in NAMES:
        folder = tmp_path / name
        TINY[name]().model.save_pretrained(folder)
        with pytest.raises(UserError, match="processor"):
            backbones.load(folder)


def test_attention_backends_are_checked_before_loading(tiny_folder, monkeypatch) -> None:
    with pytest.raises(UserError, match="choices are eager, sdpa, flash_attention_2"):
        backbones.load(tiny_folder, attn="flash")
    monkeypatch.setattr(_lvlm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash-attn"):
        backbones.load(tiny_folder, attn="flash_attention_2")
    monkeypatch.setattr(_lvlm, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="CUDA"):
        backbones.load(tiny_folder, attn="flash_attention_2")


def test_sliding_windows_are_refused() -> None:
    model = copy.deepcopy(TINY["qwen2_5_vl"]().model)
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UserError, match="sliding-window"):
        find("glimpseprune.backbones", "qwen2_5_vl").Backbone(model)
