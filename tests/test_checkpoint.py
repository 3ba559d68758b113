"""The library's front door: what it takes, what it says of itself, and that it never makes up a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import glimpseprune
from conftest import PICTURES, QUESTIONS, TINY, picture
from glimpseprune import UserError, backbones, checkpoint
from glimpseprune.checkpoint import GlimpsePrune, device_of, load
from glimpseprune.options import BackboneOptions, LoraOptions, PrunerOptions, TrainConfig

OPTIONS = {"prune_layer": 1, "vision_layers": [2, 1], "width": 16, "cond_width": 8, "num_heads": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder) -> Path:
    """A run folder with adapters."""
    folder = tmp_path_factory.mktemp("run")
    options = PrunerOptions("glimpse", OPTIONS)
    cfg = TrainConfig(out=str(folder), backbone=BackboneOptions(path=tiny_folder), pruner=options)
    cfg.data.path, cfg.lora = "unused", LoraOptions(rank=2)
    torch.manual_seed(0)
    model = load(backbone=cfg.backbone, pruner=options, lora=cfg.lora, fresh=True)
    for name, parameter in model.backbone.model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    checkpoint.save(folder, cfg, checkpoint.trained(model.pruner, model.backbone))
    return folder


@pytest.fixture(scope="module")
def model(run) -> GlimpsePrune:
    return load(run)


def refused(act, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        act(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- loading


def test_weights_that_nobody_gave_are_not_made_up(run, tiny_folder, tmp_path, monkeypatch):
    shutil.copy(run / "config.yaml", tmp_path)
    monkeypatch.setattr(backbones, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    said = refused(load, tmp_path)
    assert "glimpse has weights that are learned" in said and "trainable.safetensors" in said
    assert "a bare backbone holds none" in refused(load, backbone=tiny_folder, pruner="glimpse")
    assert "holds none" in refused(load, tmp_path, pruner=PrunerOptions("glimpse", OPTIONS))
    monkeypatch.undo()
    assert load(tmp_path, fresh=True).name == "glimpse"
    assert load(run, pruner="random").name == "random" and load(backbone=tiny_folder).name == "none"


def changed(run: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of ``run`` with other weights; None: without."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    weights = load_file(folder / "trainable.safetensors")
    for name, tensor in tensors.items():
        weights.pop(name)
        weights |= {} if tensor is None else {name: tensor}
    save_file(weights, folder / "trainable.safetensors")
    return folder


def test_every_tensor_of_a_run_is_looked_at(run, model, tmp_path):
    weights = load_file(run / "trainable.safetensors")
    adapters = sorted(name for name in weights if name.startswith("lvlm."))
    for name, put in (("glimpse.embeddings", checkpoint.restore), (adapters[0], checkpoint.restore_lvlm)):
        into = model.pruner if put is checkpoint.restore else model.backbone
        own = {key.removeprefix("lvlm."): x for key, x in weights.items() if (key in adapters) == (name in adapters)}
        key, before = name.removeprefix("lvlm."), [x.clone() for x in into.parameters()] if into is model.pruner else []
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = own[key].clone()
            broken.view(-1)[-1] = value
            assert f"here: tensor '{name}' holds NaN or Inf" in refused(put, into, own | {key: broken}, "here")
        assert f"'{name}' is int8" in refused(put, into, own | {key: own[key].to(torch.int8)}, "here")
        assert f"'{name}'" in refused(put, into, own | {key: own[key][:1, :1]}, "here")
        assert all(map(torch.equal, before, into.parameters()) if before else [True])
    assert "'glimpse.embeddings' is missing" in refused(load, changed(run, tmp_path, **{"glimpse.embeddings": None}))
    shutil.copy(run / "trainable.safetensors", tmp_path)
    said = refused(load, changed(tmp_path, tmp_path / "none", **dict.fromkeys(adapters)))
    assert f"'{adapters[0]}' of an adapter is missing" in said
    assert load(tmp_path / "none", fresh=True).name == "glimpse"  # a training may begin with fresh ones, not with some
    changed(run, tmp_path, **dict.fromkeys(adapters[1:]))
    assert "of an adapter is missing" in refused(load, tmp_path, fresh=True)


def test_published_weights_of_another_structure(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "new_modules_gp.pt")
    for described in ("[]", "{}", "7", "[" * 99999):
        (tmp_path / "config.json").write_text(described)
        refused(load, tmp_path, backbone="unused")


def test_options_for_the_whole_model(run, model, tiny_folder):
    strict = load(run, threshold=0.9, max_keep=0.2, dtype="bfloat16", device="auto")
    assert (strict.options["threshold"], strict.options["max_keep"], strict.options["prune_layer"]) == (0.9, 0.2, 1)
    assert strict.dtype == torch.bfloat16 and strict.device.type == device_of("auto").type
    assert load(backbone=tiny_folder, pruner="random", keep_ratio=0.25).options["keep_ratio"] == 0.25
    assert load(backbone=tiny_folder, dtype=torch.float16).dtype == torch.float16
    assert "did you mean 'threshold'?" in refused(load, run, thresold=0.3)
    assert "did you mean 'device'?" in refused(load, run, devise="cpu")
    assert "max_keep" in refused(load, run, max_keep=7)
    assert "give auto, float32, bfloat16 or float16" in refused(load, run, dtype="int8")
    assert "no 'threshold' in the arguments of load and the options of none" in refused(load, backbone="a", threshold=0)
    assert "give it as ckpt" in refused(load, backbone=run)
    for wrong in (5, b"x", "", None, {"path": tiny_folder}):
        assert "a checkpoint is a folder" in refused(load, wrong) or wrong is None
        assert "a checkpoint is a folder" in refused(load, backbone=wrong) or wrong is None
    for name in ("pruner", "lora"):
        assert f"options.{name.title()}Options" in refused(load, run, **{name: {"rank": 3}})


@pytest.mark.parametrize(
    "device",
    ["cpu", torch.device("cpu"), {"": "cpu"}, {"model.visual": "cpu", "lm_head": torch.device("cpu")}],
    ids=str,
)
def test_one_device_in_many_forms(device):
    assert device_of(device) == torch.device("cpu")


def test_devices_that_are_none(model):
    assert "is on one device" in refused(device_of, {"a": "cpu", "b": "cuda:0"})
    assert "is on one device" in refused(device_of, {})
    assert "give auto, cpu, cuda" in refused(device_of, "gpu0")
    assert "load(dtype=...)" in refused(model.to, torch.bfloat16)
    assert "CUDA devices here" in refused(device_of, "cuda:99")
    assert "give auto, cpu" in refused(device_of, None)
    assert device_of("auto") == device_of({"": "auto"})
    assert model.to("cpu") is model


# --------------------------------------------------------------------------------------------------------------- using


def test_it_says_what_it_is(model, tiny_folder):
    said = repr(model)
    for part in ("qwen2_5_vl", tiny_folder, "pruner=glimpse(", "threshold=0.5", "max_keep=None", "dtype=float32"):
        assert part in said
    assert {"prepare", "generate", "to", "options", "dtype"} <= set(dir(model))
    assert {"load", "GlimpsePrune", "UserError", "__version__"} <= set(dir(glimpseprune))
    assert glimpseprune.__version__[0].isdigit() and glimpseprune.UserError is UserError
    assert Path(glimpseprune.__file__).with_name("py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        glimpseprune.lod  # noqa: B018


def test_options_for_one_call(model):
    inputs = model.prepare(QUESTIONS, PICTURES)
    free = model.generate(**inputs, max_new_tokens=2, threshold=0.0)
    few = model.generate(**inputs, max_new_tokens=2, threshold=0.0, max_keep=0.25)
    for many, keep in zip(free.keep, few.keep):
        assert many.all() and int(keep.sum()) == int(0.25 * len(keep))
    assert model.options["threshold"] == 0.5 and model.options["max_keep"] is None
    state = torch.get_rng_state()
    other = model.with_options(max_keep=0.25, threshold=0.0)
    assert torch.equal(torch.get_rng_state(), state)  # draws stay those of a seed
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(other.pruner.parameters(), model.pruner.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(other.generate(**inputs, max_new_tokens=2).keep, few.keep))
    assert "this backbone needs" in refused(model.with_options, width=32)
    assert "where a training starts" in refused(model.with_options, init_token="a")
    assert "max_keep" in refused(model.generate, **inputs, max_keep=-1.0)
    random = load(backbone=model.backbone.model.name_or_path, pruner="random", keep_ratio=0.5)
    assert random.generate(**inputs, max_new_tokens=1, keep_ratio=1.0).keep[0].all()


def test_generate_answers_in_words(model):
    inputs = model.prepare(QUESTIONS, PICTURES)
    rollout = model.generate(**inputs, max_new_tokens=4, num_return_sequences=2, do_sample=True)
    decoded = model.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
    assert rollout.texts == decoded and len(rollout.texts) == 2 * len(QUESTIONS)
    for wrong in ({}, {"input_ids": None}, {"input_ids": [[1]]}):
        assert "got no input_ids" in refused(model.generate, **wrong, max_new_tokens=2)
    assert "generate(max_new_tokens=many): " in refused(model.generate, **inputs, max_new_tokens="many")
    assert "did you mean 'max_new_tokens'?" in refused(model.generate, **inputs, max_new_token=2)
    assert "did you mean 'threshold'?" in refused(model.generate, **inputs, thresold=0.2)
    assert "max_length" in refused(model.generate, **inputs, max_length=5)
    refused(model.generate, **inputs, do_sample=True, temperature=-1.0, max_new_tokens=2)


def test_images_in_the_forms_that_people_have_them(model, tmp_path):
    image = picture(112, 84)
    array = np.asarray(image)
    image.save(tmp_path / "a.png")
    wanted = model.prepare(["why?"], [[image]])
    forms = [
        image, str(tmp_path / "a.png"), tmp_path / "a.png", array, array.astype(np.float32) / 255,
        torch.tensor(array), torch.tensor(array).permute(2, 0, 1), torch.tensor(array).permute(2, 0, 1) / 255,
        array.transpose(2, 0, 1), array[:, ::-1][:, ::-1],
    ]  # fmt: skip
    for form in forms:
        for questions, images in (("why?", form), ("why?", [form]), ("why?", [[form]]), (["why?"], [form])):
            made = model.prepare(questions, images)
            assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)
    grey = image.convert("L")
    wanted = model.prepare("why?", grey)["pixel_values"]
    for form in (np.asarray(grey), np.asarray(grey)[..., None], torch.tensor(np.asarray(grey))[None]):
        assert torch.equal(model.prepare("why?", form)["pixel_values"], wanted)
    two = model.prepare("why?", [image, array])
    assert len(two["input_ids"]) == 1 and len(two["image_grid_thw"]) == 1 and two["image_index"].tolist() == [0, 0]
    clear = np.concatenate([array, np.full_like(array[..., :1], 255)], 2)
    assert torch.equal(model.prepare("why?", clear)["pixel_values"], model.prepare("why?", image)["pixel_values"])
    assert "system: give a text, not int" in refused(model.prepare, "why?", image, system=5)
    assert "system text" in model.processor.tokenizer.decode(
        model.prepare("why?", image, system="system text")["input_ids"][0]
    )


def test_what_is_no_question_or_no_image_is_told_in_a_sentence(model, tmp_path):
    image, prepare = picture(56, 56), model.prepare
    (tmp_path / "a.png").write_bytes(b"no image")
    for questions, images, said in (
        ([], [], "there is no question"),
        ("q", [], "prompt 0 has no image"),
        ("q", None, "prompt 0 has no image"),
        ("q", [[]], "prompt 0 has no image"),
        (["q", "p"], [image, None], "prompt 1 has no image"),
        (["q"], image, "not one image"),
        (["q", "p"], [image], "2 questions and images for 1 of them"),
        (["q"], [image, image], "one question and images for 2 of them"),
        (["q", "p"], "a.png", "not one image"),
        (3, [image], "a text or a list of texts, not int"),
        (None, [image], "a text or a list of texts, not None"),
        ([b"q"], [image], "question 0: give a text, not bytes"),
        (["q", None], [image, image], "question 1: give a text, not None"),
        ("q", 7, "prompt 0: give a PIL image, a path"),
        ("q", [image, 7], "prompt 0, image 1: give a PIL image, a path"),
        ("q", {"a": image}, "prompt 0: give a PIL image"),
        ("q", tmp_path / "none.png", "there is no file"),
        ("q", "https://a.b/c.png", "is an address on the web"),
        ("q", tmp_path, "cannot be read as an image"),
        ("q", tmp_path / "a.png", "cannot be read as an image"),
        ("q", np.zeros((6, 8, 5), np.uint8), "not one of shape [6, 8, 5]"),
        ("q", np.zeros((2, 8, 8, 3), np.uint8), "not one of shape [2, 8, 8, 3]"),
        ("q", np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        ("q", np.full((8, 8, 3), 255.0), "floats from 255 to 255"),
        ("q", np.full((8, 8, 3), np.nan), "floats from nan"),
        ("q", np.zeros((8, 8, 3), np.int64), "an array of int64"),
        ("q", np.zeros((8, 8), bool), "an array of bool"),
        ("q", Image.new("RGB", (1, 201)), "refuses images of 1x201"),
    ):
        assert said in refused(prepare, questions, images)


# ------------------------------------------------------------------------------------------------- a backbone's folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen3-VL, whose input and output embeddings are the same tensor."""
    made = tmp_path_factory.mktemp("tied")
    backbone = TINY["qwen3_vl"]()
    config = backbone.model.config
    tied = type(config)(**config.to_dict() | {"tie_word_embeddings": True})
    tied.text_config.tie_word_embeddings = True
    state = {name: x.clone() for name, x in backbone.model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, made / "model.safetensors", {"format": "pt"})
    tied.architectures = [type(backbone.model).__name__]
    tied.save_pretrained(made)
    backbone.processor.tokenizer.save_pretrained(made)
    backbone.processor.image_processor.save_pretrained(made)
    return made


def test_a_tied_tensor_may_be_absent(folder):
    model = load(backbone=folder).backbone.model
    assert torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, saved["model.language_model.embed_tokens.weight"])


def test_every_tensor_of_a_backbone_is_looked_at(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    broken = weights[name].clone()
    broken[3, 5] = float("nan")
    layer = {key: x for key, x in weights.items() if "layers.3." not in key}
    fifth = {
        key.replace("layers.3.", "layers.4."): x.clone()
        for key, x in weights.items()
        if "language_model.layers.3." in key
    }
    for changed, said in (
        (weights | {name: broken}, f"tensor '{name}' holds NaN or Inf"),
        (weights | {name: weights[name].half().to(torch.int32)}, f"tensor '{name}' is I32"),
        (
            weights | {name: weights[name][:, :-1].contiguous()},
            f"tensor '{name}' is [48, 31], but its config.json says",
        ),
        (layer, "lacks 11 tensors, such as model.language_model.layers.3."),
        (weights | fifth, "has 11 tensors that the model of its config.json does not, such as model.language_model"),
        ({key: x for key, x in weights.items() if "embed_tokens" not in key}, "lacks"),
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        assert said in refused(load, backbone=tmp_path)
    extra = weights | {
        "model.language_model.rotary_emb.inv_freq": torch.zeros(4),
        "a.position_ids": torch.zeros(1).long(),
    }
    save_file(extra, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(backbone=tmp_path).name == "none"  # older files hold what a model makes by itself
    for value, said in (({"quant_method": "fp8"}, "is quantised"), (None, "")):
        described = json.loads((folder / "config.json").read_text()) | {"quantization_config": value}
        (tmp_path / "config.json").write_text(json.dumps(described))
        if said:
            assert said in refused(load, backbone=tmp_path)
    for text in ("[]", "{", '{"model_type": "qwen3_vl", "text_config": 3}'):
        (tmp_path / "config.json").write_text(text)
        refused(load, backbone=tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "processor" in refused(load, backbone=tmp_path)
