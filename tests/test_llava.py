"""What the contract tests do not know of LLaVA-1.5 and LLaVA-NeXT: what is refused, tiles, newlines, old folders."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, MistralConfig

from conftest import TINY, picture, prompt, prompts
from devices import put, same
from glimpseprune import backbones
from glimpseprune.backbones import _tiny, llava_next
from glimpseprune.config import UserError
from glimpseprune.decoder import cut, prefill, run_layers, start
from glimpseprune.export import save_processor
from glimpseprune.pruners import build
from glimpseprune.types import Needs

SIZES = [(112, 168), (70, 70), (1, 300), (300, 1), (2, 300), (300, 3)]
SIZES += [tuple(size) for size in np.random.default_rng(1).integers(20, 500, (20, 2)).tolist()]


@pytest.fixture(params=["llava1_5", "llava_next"])
def tiny(request):
    return TINY[request.param]()


@pytest.fixture
def next_():
    return TINY["llava_next"]()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_feature_select_strategy", "full", "only vision_feature_select_strategy=default"),
        ("vision_feature_layer", [-2, -1], "only one layer"),
    ],
)
def test_settings_that_are_refused(tiny, key, value, message) -> None:
    model = copy.deepcopy(tiny.model)
    setattr(model.config, key, value)
    with pytest.raises(UserError, match=message):
        type(tiny)(model)


def test_other_towers_are_refused(tiny) -> None:
    model = copy.deepcopy(tiny.model)
    model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UserError, match="only CLIP"):
        type(tiny)(model)


def save(backbone, folder) -> None:
    backbone.model.save_pretrained(folder)
    save_processor(backbone.processor, folder)


def test_pixel_bounds_are_refused(tiny, tmp_path) -> None:
    save(tiny, tmp_path)
    with pytest.raises(UserError, match="resolutions are fixed"):
        backbones.load(tmp_path, max_pixels=10**6)


@torch.no_grad()
@pytest.mark.parametrize("said", ["null", "nothing"])
def test_folders_of_old_do_not_say_how_many_tokens_an_image_makes(tiny, tmp_path, said) -> None:
    """Neither patch_size nor the class token; the image processor's settings are in a file of their own."""
    save(tiny, tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved.pop("image_processor")))
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        saved[name] = None
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    if said == "nothing":
        (tmp_path / "processor_config.json").unlink()
    loaded = backbones.load(tmp_path)
    inputs = prompts(loaded)
    assert torch.equal(inputs["input_ids"], prompts(tiny)["input_ids"])
    assert same(loaded.encode(inputs).embeds, tiny.encode(inputs).embeds)


def test_an_image_processor_that_cuts_other_tiles(next_, tmp_path) -> None:
    save(next_, tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    saved["image_processor"]["image_grid_pinpoints"].pop()
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="image_grid_pinpoints"):
        backbones.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------- tiles


@torch.no_grad()
def test_tokens_lie_as_hugging_face_packs_them(next_) -> None:
    """Its own function, given numbers in place of features, says which patch is behind each token; -1 is a newline."""
    side = 5
    for sizes in (SIZES[:6], SIZES[6:]):
        layouts = [next_.layout_of(next_.model.config, size) for size in sizes]
        tiles = [len(layout.encoded) for layout in layouts]
        numbers = torch.arange(sum(tiles) * side**2, dtype=torch.float64).view(-1, side**2, 1)
        heights = torch.tensor([(height, width) for width, height in sizes])
        packed, _ = next_.model.model.pack_image_features(
            list(numbers.split(tiles)), heights, "default", image_newline=torch.tensor([-1.0], dtype=torch.float64)
        )
        pool = next_.pooling({"image_sizes": heights})
        ours = pool(torch.nn.functional.pad(numbers + 1, (0, 0, 1, 0)))  # a class token for each tile
        for layout, own, theirs in zip(layouts, ours.split([layout.places for layout in layouts]), packed, strict=True):
            assert torch.equal(own - 1, theirs)
            cells = torch.tensor([cell for part in layout.parts for cell in part.cells])
            assert torch.equal(cells, own[:, 0] > 0)


@torch.no_grad()
def test_tokens_are_the_projected_states_of_the_feature_layer_and_newlines(next_) -> None:
    encoded = next_.encode(prompts(next_), Needs(states=(next_.feature_layer,)))
    tokens = encoded.embeds[encoded.visual]
    cells = [cell for row in encoded.layouts for layout in row for part in layout.parts for cell in part.cells]
    cells = torch.tensor(cells)
    projected = next_.model.model.multi_modal_projector(encoded.states[next_.feature_layer])
    torch.testing.assert_close(tokens[cells], projected[cells])
    assert torch.equal(tokens[~cells], next_.model.model.image_newline.expand_as(tokens[~cells]))


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (336, 336), (1000, 700), (333, 1000), (720, 1280)], ids=str)
def test_a_part_shows_what_its_box_says(size) -> None:
    """Of a picture whose red says how far to the right, and whose green how far down, in the published resolutions."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([(x + 0.5) / width, (y + 0.5) / height, np.ones(x.shape)], -1)
    config = backbones.published()["llava-v1.6-vicuna-7b"]()
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=config.image_grid_pinpoints,
        do_normalize=False,
        do_rescale=False,
    )
    image = Image.fromarray((255 * ramp).round().astype(np.uint8))
    tiles = torch.as_tensor(processor(images=[image], return_tensors="pt")["pixel_values"][0]) / 255  # [tiles, 3, ...]
    layout, places = llava_next.Backbone.layout_of(config, size), llava_next.tiling(config, size)
    assert len(tiles) == len(layout.encoded) == 1 + places.down * places.across
    colours = tiles.unflatten(2, (24, 14)).unflatten(4, (24, 14)).mean((3, 5)).permute(0, 2, 3, 1)  # [tiles, 24, 24, 3]
    fine = colours[1:].unflatten(0, (places.down, places.across)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    fine = fine[places.top : places.top + places.rows, places.left : places.left + places.cols]
    for part, shown in zip(layout.parts, (colours[0], fine), strict=True):
        left, top, right, bottom = part.box
        x = left + (right - left) * (torch.arange(part.cols) + 0.5) / part.cols
        y = top + (bottom - top) * (torch.arange(part.rows) + 0.5) / part.rows
        inside = shown[..., 2] > 254 / 255  # no padding in it
        assert inside.float().mean() > 0.9
        expected = torch.stack([x.expand(part.rows, -1), y[:, None].expand(-1, part.cols)], -1)
        assert (shown[..., :2] - expected)[inside].abs().max() < 0.004


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 300), (300, 3)], ids=str)
def test_slivers_run(next_, size) -> None:
    """Of some, no cell but those of the whole image is left, or only newlines."""
    inputs = next_.prepare(["why?"], [[picture(*size)]])
    encoded = next_.encode(inputs)
    hidden = run_layers(next_, start(encoded), next_.num_layers).hidden
    theirs = next_.model(**inputs, position_ids=encoded.positions).logits
    assert torch.equal(next_.logits(hidden), theirs)


@torch.no_grad()
def test_images_of_different_numbers_of_tiles_in_one_batch(next_) -> None:
    """The processor fills up with empty tiles, which are not run."""
    questions, images = ["why?", "what is it?"], [[picture(60, 60)], [picture(210, 60, 1), picture(150, 140, 2)]]
    needs = Needs(states=(2,), keys=(2,), attention=(2,))
    inputs = next_.prepare(questions, images)
    tiles = [len(layout.encoded) for row in next_.layouts(inputs) for layout in row]
    assert len(set(tiles)) == 3 and inputs["pixel_values"].shape[1] == max(tiles)
    together = next_.encode(inputs, needs)
    for row in range(2):
        alone = next_.encode(next_.prepare(questions[row : row + 1], images[row : row + 1]), needs)
        chosen = next_.encode(next_.choose(inputs, torch.tensor([row])), needs)
        mask = together.mask[row]
        torch.testing.assert_close(together.embeds[row][mask], alone.embeds[0])
        torch.testing.assert_close(chosen.embeds[0][mask], alone.embeds[0])
        for of in ("states", "keys", "attention"):
            mine, chosens, its = (getattr(x, of)[2] for x in (together, chosen, alone))
            torch.testing.assert_close(mine.split(together.counts)[row], its)
            torch.testing.assert_close(chosens, its)


@torch.no_grad()
def test_newlines_that_may_not_go_stay(next_) -> None:
    class Stays(llava_next.Backbone):
        @staticmethod
        def layout_of(config, size, min_pixels=None, max_pixels=None):
            layout = llava_next.Backbone.layout_of(config, size)
            return replace(layout, parts=tuple(replace(part, newline_stays=part.newline) for part in layout.parts))

    stays = Stays(next_.model, next_.processor)
    inputs = prompts(next_)
    ours, theirs = stays.encode(inputs), next_.encode(inputs)
    assert torch.equal(ours.embeds, theirs.embeds)
    newlines = theirs.visual & ~ours.visual
    assert ours.visual.sum(1).tolist() == ours.counts and not (ours.visual & ~theirs.visual).any()
    assert newlines.sum(1).tolist() == [sum(layout.parts[1].rows for layout in row) for row in ours.layouts]
    assert (ours.embeds[newlines] == next_.model.model.image_newline).all()
    left = cut(start(ours), torch.zeros_like(ours.mask))
    assert torch.equal(left.mask.sum(1), (ours.mask & ~ours.visual).sum(1))


# ----------------------------------------------------------------------------------------------------------- Mistral


def mistral(attn: str, **changes) -> LlavaNextForConditionalGeneration:
    """The tiny LLaVA-NeXT on another language model, of two query heads per key head."""
    config = copy.deepcopy(TINY["llava_next"](attn).model.config)
    config.text_config = MistralConfig(**_tiny.DECODER, num_key_value_heads=2, **changes)
    config._attn_implementation = attn
    return put(_tiny.randomise(LlavaNextForConditionalGeneration(config), 0))


@torch.no_grad()
def test_mistral_without_a_window(attn) -> None:
    backbone = llava_next.Backbone(mistral(attn, sliding_window=None), TINY["llava_next"]().processor)
    inputs = prompts(backbone)
    encoded = backbone.encode(inputs)
    state = prefill(backbone, encoded, build("none", {}, backbone))
    theirs = backbone.model(**inputs, position_ids=encoded.positions).logits
    assert torch.equal(backbone.logits(state.hidden)[encoded.mask], theirs[encoded.mask])
    assert backbone.shapes.decoder.kv_heads == 2


def test_mistral_has_a_window_unless_it_is_told_otherwise() -> None:
    with pytest.raises(UserError, match="sliding_window=null"):
        llava_next.Backbone(mistral("sdpa"))


def test_the_published_mistral_has_none(next_) -> None:
    assert backbones.published()["llava-v1.6-mistral-7b"]().text_config.sliding_window is None
    assert prompt(next_)["image_sizes"].tolist() == [[168, 112]]  # height, width
