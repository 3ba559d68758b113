"""An exported folder is the trained model: for transformers, and for us, wherever it is moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

import glimpseprune
from conftest import TINY, prompts
from glimpseprune import checkpoint, config, export
from glimpseprune.backbones.qwen2_5_vl import Backbone
from glimpseprune.export import save_processor
from glimpseprune.options import TrainConfig
from glimpseprune.pruners import build
from test_evaluate import OPTIONS, data, save_run, scored  # noqa: F401  (data is a fixture)


def exported(ckpt: str, out: Path, *args: str) -> Path:
    export.main([f"ckpt={ckpt}", f"out={out}", *args])
    return out


def answers(model: checkpoint.GlimpsePrune) -> tuple[Tensor, list[Tensor]]:
    rollout = model.generate(**prompts(model.backbone), max_new_tokens=8)
    return rollout.tokens, rollout.keep


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    prompt = {name: value.to(model.device) for name, value in prompt.items()}
    return model(**prompt).logits[prompt["attention_mask"].bool()]


@pytest.mark.parametrize("trained", ["lora", "decoder", None])
def test_round_trip(trained, tiny_folder, tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", tiny_folder, 4, stage="grpo", init_from="gone", trained=trained)
    before, base = checkpoint.load(run), checkpoint.load(backbone=tiny_folder)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").touch()  # of one that was killed
    umask = os.umask(0o027)
    out = exported(run, tmp_path / "out")
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert not (tmp_path / ".out.partial").exists()
    prompt = prompts(before.backbone)
    plain, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.allclose(logits(plain, prompt), logits(before.backbone.model, prompt), atol=1e-5)
    changed = not torch.allclose(logits(plain, prompt), logits(base.backbone.model, prompt), atol=1e-2)
    assert changed == (trained is not None)

    shutil.move(out, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    tokens, keep = answers(glimpseprune.load("moved"))
    wanted, masks = answers(before)
    assert torch.equal(tokens, wanted) and all(map(torch.equal, keep, masks))
    assert any(0 < mask.float().mean() < 1 for mask in masks)


@pytest.mark.parametrize("trained", ["lora", "decoder"])
def test_folder_holds_no_trace_of_how_it_was_made(trained, tiny_folder, tmp_path):
    run = save_run(tmp_path / "run", tiny_folder, 4, stage="grpo", init_from="gone", trained=trained)
    out = exported(run, tmp_path / "out")
    texts = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".jinja", ".yaml")]
    assert not any("probed_" in text or "windows_like" in text or tiny_folder in text for text in texts)
    base = load_file(f"{tiny_folder}/model.safetensors")
    merged = load_file(out / "model.safetensors")
    assert {name: x.shape for name, x in merged.items()} == {name: x.shape for name, x in base.items()}
    pruner = build("glimpse", OPTIONS, TINY["qwen2_5_vl"]())
    assert load_file(out / "trainable.safetensors").keys() == pruner.state_dict().keys()  # and nothing of the LVLM
    assert yaml.safe_load((out / "config.yaml").read_text())["backbone"]["path"] == "."
    saved = config.read(TrainConfig, out / "config.yaml")
    assert saved.backbone.path == str(out) and saved.lora is None and saved.init_from is None
    ours, theirs = Backbone.load_processor(out), Backbone.load_processor(tiny_folder)
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab() and ours.chat_template == theirs.chat_template


def test_exported_run_can_be_evaluated(tiny_folder, data, tmp_path):  # noqa: F811
    run = save_run(tmp_path / "run", tiny_folder, 4, data, stage="grpo", trained="lora")
    _, before = scored(run, tmp_path / "before", "controls=[none+]")
    rows, after = scored(str(exported(run, tmp_path / "out")), tmp_path / "after")
    assert list(rows) == ["none", "glimpse", "random", "oracle", "zero"]
    assert after["glimpse"] == before["glimpse+"] and after["none"] == before["none+"]


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_backbone(name, tmp_path):
    backbone = TINY[name]()
    backbone.model.save_pretrained(tmp_path / "base")
    save_processor(backbone.processor, tmp_path / "base")
    run = save_run(tmp_path / "run", str(tmp_path / "base"), 4, trained="lora")
    out, before = exported(run, tmp_path / "out"), checkpoint.load(run)
    plain, prompt = backbone.model_class.from_pretrained(out), prompts(before.backbone)
    assert torch.allclose(logits(plain, prompt), logits(before.backbone.model, prompt), atol=1e-5)
    after = checkpoint.load(out)
    assert torch.equal(answers(after)[0], answers(before)[0])
    assert all(torch.equal(x, prompt[key]) for key, x in prompts(after.backbone).items())
    assert after.processor.image_processor.to_dict() == before.processor.image_processor.to_dict()


def test_weights_in_another_dtype(tiny_folder, tmp_path):
    run = save_run(tmp_path / "run", tiny_folder, 4, trained="lora")
    out = exported(run, tmp_path / "out", "dtype=bfloat16")
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    described = json.loads((out / "config.json").read_text())
    sections = [described, described["text_config"], described["vision_config"]]
    assert {section.get("dtype", "bfloat16") for section in sections} == {"bfloat16"}
    assert checkpoint.load(out).backbone.model.dtype == torch.bfloat16


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_what_is_there_is_not_overwritten(taken, tmp_path, capsys):
    out = tmp_path / "out"
    precious = out / "precious" if taken == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("here before")
    with pytest.raises(SystemExit):
        export.main(["ckpt=whatever", f"out={out}"])
    assert "give another" in capsys.readouterr().err
    assert precious.read_text() == "here before" and len(list(tmp_path.iterdir())) == 1
