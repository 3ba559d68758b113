"""What every file in backbones/ must do; a new one is tested as soon as it is there."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import PICTURES, QUESTIONS, TINY, VOCABULARY, picture, prompt, prompts
from glimpseprune import backbones, cost
from glimpseprune.backbones import _lvlm, _tiny
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


@pytest.fixture
def convolutions():
    """How cuDNN's are computed, with torch's own default, which a run of the tests on a GPU may have changed."""
    setting = torch.backends.cudnn.conv
    own, setting.fp32_precision = setting.fp32_precision, "tf32"
    yield setting
    setting.fp32_precision = own


@torch.no_grad()
def test_rows_do_not_depend_on_the_batch(tiny, convolutions) -> None:
    layers = (tiny.vision_layers[0],)
    together = tiny.encode(prompts(tiny), Needs(states=layers))
    states = together.states[layers[0]].split(together.counts)
    for row in range(len(QUESTIONS)):
        alone, mask = tiny.encode(prompt(tiny, row), Needs(states=layers)), together.mask[row]
        torch.testing.assert_close(together.embeds[row][mask], alone.embeds[0])
        torch.testing.assert_close(states[row], alone.states[layers[0]])
        assert torch.equal(together.positions[..., row, :][..., mask], alone.positions[..., 0, :])


@torch.no_grad()
@pytest.mark.parametrize(("own", "inside"), [("tf32", "ieee"), ("ieee", "ieee"), ("none", "none")])
def test_convolutions_of_float32_are_not_rounded(tiny, own, inside, convolutions) -> None:
    """Whatever is set for others stays set, after an error too."""
    convolutions.fp32_precision, seen = own, []
    patches = next(module for module in tiny.model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))

    def look(*_) -> None:
        seen.append(convolutions.fp32_precision)
        if len(seen) > 1:
            raise RuntimeError("broken")

    handle = patches.register_forward_pre_hook(look)
    try:
        tiny.encode(prompt(tiny))
        assert seen == [inside] and convolutions.fp32_precision == own
        with pytest.raises(RuntimeError, match="broken"):
            tiny.encode(prompt(tiny))
        assert convolutions.fp32_precision == own
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("corner", [(0, 0), (126, 0), (0, 126), (126, 126), (63, 63)], ids=str)
def test_what_the_tower_made_lies_where_the_layout_says(tiny, corner) -> None:
    """A white square in the picture moves the cells that show it most: in order, of every part, of states and keys. A
    part that shows nothing of it, such as a tile elsewhere, stays as it was."""
    before = PICTURES[2][0].resize((168, 168))  # more than a window of Qwen2.5-VL's
    after = before.copy()
    after.paste((255, 255, 255), (*corner, corner[0] + 42, corner[1] + 42))
    layer = tiny.vision_layers[0]
    needs = Needs(states=(layer,), keys=(layer,))
    encoded = [tiny.encode(tiny.prepare(["?"], [[image]]), needs) for image in (before, after)]
    (x0, x1), (y0, y1) = ((edge / 168, (edge + 42) / 168) for edge in corner)
    for of in ("states", "keys"):
        old, new = (getattr(one, of)[layer].flatten(1) for one in encoded)
        layout = encoded[0].layouts[0][0]
        moved = (old - new).norm(dim=1).split([len(part.cells) for part in layout.parts])
        for part, own in zip(layout.parts, moved, strict=True):
            assert not own[~torch.tensor(part.cells)].any()
            left, top, right, bottom = part.box
            if x1 <= left or right <= x0 or y1 <= top or bottom <= y0:
                assert not own.any(), (of, part)
                continue
            row, col = divmod(int(own.argmax()), part.grid[1])
            begin, end = (left + edge / part.cols * (right - left) for edge in (col, col + 1))
            upper, lower = (top + edge / part.rows * (bottom - top) for edge in (row, row + 1))
            assert x0 < end and begin < x1 and y0 < lower and upper < y1, (of, part)


@torch.no_grad()
def test_keys_and_attention(tiny) -> None:
    inputs, layers = prompts(tiny), (tiny.vision_layers[0], tiny.vision_layers[-1])
    encoded = tiny.encode(inputs, Needs(keys=layers, attention=layers))
    tokens = sum(encoded.counts)
    cells = torch.tensor([cell for row in encoded.layouts for x in row for part in x.parts for cell in part.cells])
    for layer in layers:
        keys, attention = encoded.keys[layer], encoded.attention[layer]
        assert keys.ndim == 3 and keys.shape[0] == tokens and keys[0].numel() == tiny.vision_width
        assert attention.shape == (tokens,) and attention.isfinite().all()
        assert (attention[cells] > 0).all() and not attention[~cells].any() and not keys[~cells].any()
    assert not encoded.states
    assert torch.equal(encoded.embeds, tiny.encode(inputs).embeds)  # looking changes nothing
    eager = type(tiny).tiny("eager").encode(inputs, Needs(keys=layers, attention=layers))
    for layer in layers:
        torch.testing.assert_close(encoded.keys[layer], eager.keys[layer])
        torch.testing.assert_close(encoded.attention[layer], eager.attention[layer])
    for row in range(len(QUESTIONS)):
        alone = tiny.encode(prompt(tiny, row), Needs(keys=layers, attention=layers))
        for of in ("keys", "attention"):
            together = getattr(encoded, of)[layers[1]].split(encoded.counts)[row]
            torch.testing.assert_close(together, getattr(alone, of)[layers[1]])


@torch.no_grad()
def test_negative_layers_count_from_the_last(tiny) -> None:
    last = tiny.vision_layers[-1]
    encoded = tiny.encode(prompt(tiny), Needs((-1, last), (-1, last), (-1, last)))
    for found in (encoded.states, encoded.keys, encoded.attention):
        assert list(found) == [-1, last] and torch.equal(found[-1], found[last])


SIZES = [(112, 168), (28, 28), (33, 400), (400, 33), (2, 300), (300, 2), (1, 300), (300, 1)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(20, 500, (24, 2)).tolist()]


def test_layout_of_says_what_the_processor_makes(tiny) -> None:
    """How many tokens, and in what grids; with the pixel bounds that this processor has."""
    bounds = [tiny.processor.image_processor.size.get(name) for name in ("shortest_edge", "longest_edge")]
    for number, size in enumerate(SIZES):
        try:
            ((made,),) = tiny.layouts(tiny.prepare(["?"], [[picture(*size, number)]]))
        except UserError as error:
            if error.__cause__ is None:
                raise
            with pytest.raises(ValueError, match=str(error.__cause__)[:20]):
                tiny.layout_of(tiny.model.config, size, *bounds)
            continue
        assert tiny.layout_of(tiny.model.config, size, *bounds) == made, size
        assert tiny.visual_tokens(size, *bounds) == made.count
        assert made.map(torch.ones(made.count, dtype=torch.bool)).all()
        assert not made.map(torch.zeros(made.count, dtype=torch.bool)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", range(len(QUESTIONS)))
def test_flops_are_those_that_torch_counts(name, row) -> None:
    """Of tower and projector, decoder layers and the last position's lm_head, in Hugging Face's own forward."""
    tiny = TINY[name]("eager")  # torch counts no fused kernels of the CPU
    inputs = prompt(tiny, row)
    (layouts,) = tiny.layouts(inputs)
    visual = sum(layout.count for layout in layouts)
    flops = cost.prefill_flops(tiny.shapes, inputs["input_ids"].shape[1] - visual, layouts, [(tiny.num_layers, visual)])
    counts = count(tiny, **inputs)
    assert flops.decoder == sum(counts[layer] for layer in tiny.text_model.layers)
    assert flops.lm_head == counts[tiny.lm_head]
    vision = counts[tiny.model] - flops.decoder - flops.lm_head - counts.get(tiny.text_model.rotary_emb, 0)
    assert flops.tower + flops.projector == vision


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_decoding_are_those_that_torch_counts(name) -> None:
    tiny = TINY[name]("eager")
    one = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        cache = tiny.model(input_ids=one.expand(1, 9)).past_key_values
    counts = count(tiny, input_ids=one, past_key_values=cache)
    layers = sum(counts[layer] for layer in tiny.text_model.layers)
    assert cost.decode_flops(tiny.shapes, 9) == layers + counts[tiny.lm_head]
    assert cost.decode_flops(tiny.shapes, [(1, 9), (tiny.num_layers - 1, 9)]) == cost.decode_flops(tiny.shapes, 9)
    assert cost.layer_flops(tiny.shapes.decoder, 1, 9) * tiny.num_layers == layers


@torch.no_grad()
def count(tiny, **inputs) -> dict[nn.Module, int]:
    """FLOPs by module, as torch counts them while Hugging Face's model runs."""
    modules = {name: module for name, module in tiny.model.named_modules() if name}
    with FlopCounterMode(display=False) as counter:
        tiny.model(**inputs, logits_to_keep=1)
    # the name of a submodule begins with the class of the model
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return {module: counts[name] for name, module in modules.items() if name in counts} | {
        tiny.model: counter.get_total_flops()
    }


@pytest.mark.parametrize("name", NAMES)
def test_published_models_have_the_matrices_that_are_declared(name) -> None:
    """Weight by weight, on the meta device; and their images can be laid out."""
    module, published = find("glimpseprune.backbones", name), backbones.published()
    assert module.PUBLISHED
    for model in module.PUBLISHED:
        config = published[model]()
        skeleton, shapes = backbones.skeleton(config), backbones.describe(config)
        assert type(skeleton) is module.Backbone and skeleton.shapes == shapes
        decoder, tower = shapes.decoder, shapes.tower
        linear = cost.layer_flops(decoder, 1) - 4 * decoder.heads * decoder.head_width  # of the one pair
        assert 2 * weights(skeleton.text_model) == decoder.layers * linear, model
        assert weights(skeleton.lm_head) == decoder.width * decoder.vocab, model
        block = 4 * tower.width**2 + (3 if tower.gated else 2) * tower.width * tower.mlp
        projector = sum(inner * outer for inner, outer in shapes.projector)
        vision = weights(skeleton.model) - weights(skeleton.text_model) - weights(skeleton.lm_head)
        assert vision == tower.patch * tower.width + tower.layers * block + projector, model
        assert backbones.layout_of(config, (640, 480)).count > 0


def weights(module: nn.Module) -> int:
    """Of linear maps and convolutions, without biases."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(x.weight.numel() for x in module.modules() if isinstance(x, kinds))


@torch.no_grad()
def test_a_projector_makes_the_decoders_inputs(tiny) -> None:
    """Of the states of cells, one by one; without a projector several go into each."""
    assert (tiny.projector is None) == (tiny.shapes.projector[0][0] != tiny.vision_width)
    encoded = tiny.encode(prompts(tiny), Needs(states=(tiny.feature_layer,)))
    if tiny.projector is not None:
        cell = [cell for row in encoded.layouts for layout in row for part in layout.parts for cell in part.cells]
        made = tiny.projector(encoded.states[tiny.feature_layer][cell])
        torch.testing.assert_close(made, encoded.embeds[encoded.visual][cell])


def test_the_tiny_model_has_the_sizes_that_tests_ask_for(tiny) -> None:
    config = tiny.text_model.config
    assert {name: getattr(config, name) for name in _tiny.DECODER if "tie" not in name} == {
        name: value for name, value in _tiny.DECODER.items() if "tie" not in name
    }
    assert {1, 2} <= set(tiny.vision_layers) and len(tiny.vision_layers) < 9
    assert tiny.feature_layer in tiny.vision_layers
    assert set(tiny.image_keys) < set(tiny.prompt_keys) == set(prompt(tiny))


def test_embed_and_logits(tiny) -> None:
    ids = torch.tensor([[9, 10]])
    assert tiny.embed(ids).shape == (1, 2, tiny.hidden_size)
    assert tiny.logits(tiny.embed(ids)).shape == (1, 2, VOCABULARY)
    assert len(tiny.text_model.layers) == tiny.num_layers
    assert tiny.device == next(tiny.model.parameters()).device


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
    # torchvision, where it is installed, rounds pictures otherwise
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], atol=0.02, rtol=0)
    torch.testing.assert_close(loaded.encode(inputs).embeds, tiny.encode(inputs).embeds)
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
    with pytest.raises(UserError, match="choices are auto, eager, sdpa, flash_attention_2"):
        backbones.load(tiny_folder, attn="flash")
    monkeypatch.setattr(_lvlm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash-attn"):
        backbones.load(tiny_folder, attn="flash_attention_2")
    monkeypatch.setattr(_lvlm, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="CUDA"):
        backbones.load(tiny_folder, attn="flash_attention_2")


def test_sliding_windows_are_refused(tiny) -> None:
    for key, value in (("layer_types", ["full_attention", "sliding_attention"]), ("sliding_window", 8)):
        model = copy.deepcopy(tiny.model)
        setattr(model.model.language_model.config, key, value)
        with pytest.raises(UserError, match="sliding-window"):
            type(tiny)(model)


def test_a_checkpoint_that_lacks_tensors(tiny, tmp_path) -> None:
    tiny.model.save_pretrained(tmp_path)
    save_processor(tiny.processor, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    gone = sorted(saved)[len(saved) // 2]
    del saved[gone]
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors, such as "):
        backbones.load(tmp_path)


def test_a_chat_template_in_a_file_of_its_own(tiny, tmp_path) -> None:
    """As older repositories have it: chat_template.json, which tokenizers do not read."""
    tiny.model.save_pretrained(tmp_path)
    save_processor(tiny.processor, tmp_path)
    template = tmp_path / "chat_template.jinja"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    assert torch.equal(prompts(backbones.load(tmp_path))["input_ids"], prompts(tiny)["input_ids"])
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(UserError, match="chat template"):
        backbones.load(tmp_path)


def test_a_prompt_that_lacks_a_tensor(tiny) -> None:
    for name in tiny.image_keys[1:]:
        inputs = prompt(tiny)
        del inputs[name]
        with pytest.raises(UserError, match=f"the prompt has no {name}"):
            tiny.encode(inputs)
