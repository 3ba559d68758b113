"""Evaluating a stage-2 run: the base, the first stage and the trained language model in one table; k answers each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from conftest import picture
from glimpseprune import checkpoint, evaluate, lora
from glimpseprune.backbones import LVLM
from glimpseprune.data import shards
from glimpseprune.options import BackboneOptions, DataOptions, LoraOptions, PrunerOptions, TrainConfig
from glimpseprune.types import Sample

OPTIONS = {
    "prune_layer": 1,
    "probe_layers": [0, 1],
    "vision_layers": [2, 1],
    "width": 16,
    "cond_width": 16,
    "num_heads": 2,
    "dropout": 0.0,
}
QUESTIONS = ["what?", "why is it so?", "how many?", "which one is left of the other?", "where?"]
SIZES = [(140, 112), (112, 168), (84, 84), (196, 112), (112, 112)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Five questions on pictures of five sizes, all with a box: two batches, the last one not full."""
    folder = tmp_path_factory.mktemp("data")
    samples = [
        Sample(f"{i}", question, ("a",), [picture(*size, i)], [[(0, 0, 40, 40)]], kind="odd" if i % 2 else "even")
        for i, (question, size) in enumerate(zip(QUESTIONS, SIZES))
    ]
    shards.write(samples, folder, split="test")
    return str(folder)


def save_run(folder: Path, base: str, seed: int, data: str = "unused", **options: Any) -> str:
    """A run folder as training leaves it. ``trained``: what of the language model is not the base's, which every part
    of ``TrainConfig`` may come with."""
    trained = options.pop("trained", None)
    cfg = TrainConfig(
        out=str(folder),
        backbone=BackboneOptions(path=base),
        pruner=PrunerOptions("glimpse", OPTIONS | options.pop("pruner", {})),
        data=DataOptions(path=data),
        lora=LoraOptions(rank=4, alpha=16.0) if trained == "lora" else None,
        **options,
    )
    torch.manual_seed(seed)
    model = checkpoint.load(backbone=cfg.backbone, pruner=cfg.pruner, lora=cfg.lora)
    with torch.no_grad():
        for parameter in model.pruner.vip.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, parameter in model.backbone.text_model.layers[2:].named_parameters():
            if trained == "decoder" or (trained == "lora" and lora.is_adapter(name)):
                parameter += 0.1 * torch.randn_like(parameter)
                parameter.requires_grad_(True)  # what training would save
    checkpoint.save(folder, cfg, checkpoint.trained(model.pruner, model.backbone))
    return str(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_folder, data) -> str:
    return save_run(tmp_path_factory.mktemp("first"), tiny_folder, 1, data)


@pytest.fixture(scope="module")
def second(tmp_path_factory, tiny_folder, data, first) -> str:
    """A stage-2 run with adapters."""
    folder = tmp_path_factory.mktemp("second")
    # Other tower layers than the first stage's pruner sees: the one encoded batch has to serve both.
    options = {"stage": "grpo", "init_from": first, "trained": "lora", "pruner": {"vision_layers": [0, 1]}}
    return save_run(folder, tiny_folder, 2, data, **options)


def scored(ckpt: str, out: Path, *args: str) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple]]]:
    """Rows over all kinds by method, and what each method said about each sample, with how many tokens."""
    small = ["data.workers=0", "data.batch_size=3", "max_new_tokens=4", "pictures=0"]
    evaluate.main([f"ckpt={ckpt}", f"out={out}", *small, *args])
    rows = {row["method"]: row for row in json.loads((out / "scores.json").read_text()) if row["kind"] == "all"}
    said: dict[str, list[tuple]] = {method: [] for method in rows}
    for line in map(json.loads, (out / "predictions.jsonl").read_text().splitlines()):
        said[line["method"]].append((line["key"], line["prediction"], line["kept"]))
    return rows, said


def text_of(said: list[tuple]) -> list[str]:
    return [prediction for _, prediction, _ in said]


@pytest.mark.parametrize("trained", ["lora", "decoder"])
def test_one_table_compares_base_first_stage_and_stage_two(trained, first, second, tiny_folder, data, tmp_path):
    run = second
    if trained == "decoder":
        options = {"stage": "grpo", "init_from": first, "trained": "decoder", "pruner": {"vision_layers": [0, 1]}}
        run = save_run(tmp_path / "run", tiny_folder, 2, data, **options)
    rows, said = scored(run, tmp_path, "controls=[none,none+,glimpse,random,oracle,zero]")
    assert list(rows) == ["none", "glimpse", "none+", "glimpse+", "random", "oracle", "zero"]
    _, alone = scored(first, tmp_path / "first", "controls=[none]")
    assert said["none"] == alone["none"] and said["glimpse"] == alone["glimpse"]
    assert text_of(said["none+"]) != text_of(said["none"]) and said["glimpse+"] != said["glimpse"]
    assert [kept for *_, kept in said["random"]] == [kept for *_, kept in said["glimpse+"]]
    # The controls run on the trained language model, as any pruner that is asked for does.
    zero = ["pruner.name=random", "pruner.options={keep: 0, min_keep: 0}"]
    _, alone = scored(run, tmp_path / "zero", "controls=[]", *zero)
    assert said["zero"] == alone["random+"]


def test_methods_of_a_first_stage_keep_their_names(first, tmp_path):
    rows, _ = scored(first, tmp_path)
    assert list(rows) == ["none", "glimpse", "random", "oracle", "zero"]
    assert not any("k" in row for row in rows.values())


def test_reinforced_pruner_of_an_untouched_language_model(first, tiny_folder, data, tmp_path):
    run = save_run(tmp_path / "run", tiny_folder, 2, data, stage="grpo", init_from=first)
    rows, _ = scored(run, tmp_path, "controls=[none,glimpse]")
    assert list(rows) == ["none", "glimpse", "glimpse+"]


@pytest.mark.parametrize("init_from", ["gone/away", None, "itself"])
def test_first_stage_that_is_not_there_is_left_out(init_from, second, tiny_folder, data, tmp_path, capsys, monkeypatch):
    # "gone/away" has the form of a hub id, and whoever owns that name there is not to be asked.
    monkeypatch.setattr(checkpoint, "_download", lambda name: pytest.fail(f"looked for {name} on the hub"))
    init_from = second if init_from == "itself" else init_from  # a run with adapters of its own
    options = {"stage": "grpo", "init_from": init_from, "trained": "lora"}
    rows, _ = scored(save_run(tmp_path / "run", tiny_folder, 3, data, **options), tmp_path, "controls=[none,glimpse]")
    assert list(rows) == ["none", "glimpse+"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 1 and str(init_from or "null") in lines[0]


def test_time_to_first_token_is_from_the_images_on(second, tmp_path, monkeypatch):
    """Every method waits for the tower, though one encoded batch serves several of them."""
    encode = LVLM.encode

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return encode(*args, **kwargs)

    monkeypatch.setattr(LVLM, "encode", slow)
    rows, _ = scored(second, tmp_path, "controls=[none,random]")
    assert all(row["time_to_first_token"] > 0.3 for row in rows.values())


def test_one_cold_sample_is_the_greedy_answer(second, tmp_path):
    rows, said = scored(second, tmp_path / "greedy", "controls=[]")
    cold, sampled = scored(second, tmp_path / "cold", "controls=[]", "samples=1", "temperature=1e-6")
    assert sampled == said
    row = cold["glimpse+"]
    assert row["k"] == 1 and row["pass_at_k"] == row["accuracy"] == rows["glimpse+"]["accuracy"]


def parity(self, texts, samples) -> list[float]:
    """A score that answers of a random model have half of the time."""
    return [float(crc32(text.encode()) % 2) for text in texts]


@pytest.mark.parametrize("keep", ["", "sample_keep=true"])
def test_k_answers_are_scored_by_their_mean_and_their_best(keep, second, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.Evaluation, "scores", parity)
    args = ["controls=[none]", "samples=4", "temperature=1", *filter(None, [keep])]
    rows, said = scored(second, tmp_path, *args)
    row, lines = rows["glimpse+"], said["glimpse+"]
    assert [key for key, *_ in lines] == [key for key in "01234" for _ in range(4)]
    groups = [parity(None, text_of(lines[i : i + 4]), None) for i in range(0, 20, 4)]
    assert row["accuracy"] == pytest.approx(sum(map(sum, groups)) / 20)
    assert row["pass_at_k"] == pytest.approx(sum(map(max, groups)) / 5) and row["pass_at_k"] > row["accuracy"]
    assert row["kept_tokens"] == pytest.approx(sum(kept for *_, kept in lines) / 20, abs=0.01)
    assert row["k"] == 4 and row["n"] == 5 and "k" not in rows["none"] and len(said["none"]) == 5
    masks = [{kept for *_, kept in lines[i : i + 4]} for i in range(0, 20, 4)]
    assert max(map(len, masks)) > 1 if keep else max(map(len, masks)) == 1
    assert scored(second, tmp_path / "again", *args)[1] == said  # the seed decides
    assert scored(second, tmp_path / "other", *args, "seed=1")[1] != said


def test_masks_of_a_gate_without_doubt_are_those_of_the_threshold(second, tmp_path):
    """Every drawn row belongs to its prompt: where the gate is sure, all k are the greedy mask and answer."""
    from safetensors.torch import load_file, save_file

    sure = tmp_path / "sure"
    sure.mkdir()
    weights = load_file(f"{second}/trainable.safetensors")
    for name in [name for name in weights if "attn_out_projs" in name]:
        weights[name] = weights[name] * 1e4
    save_file(weights, sure / "trainable.safetensors")
    (sure / "config.yaml").write_text(Path(second, "config.yaml").read_text())
    _, greedy = scored(str(sure), tmp_path / "greedy", "controls=[]")
    _, drawn = scored(str(sure), tmp_path / "drawn", "controls=[random]", "samples=3", "sample_keep=true")
    assert drawn["glimpse+"] == [line for line in greedy["glimpse+"] for _ in range(3)]
    assert [kept for *_, kept in drawn["random"]] == [kept for *_, kept in greedy["glimpse+"]]
    assert len({kept for *_, kept in greedy["glimpse+"]}) > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["samples=2"], "temperature=1"),
        (["samples=0"], "at least 1"),
        (["temperature=-1"], "at least 0"),
        (["controls=[nothing]"], "none+"),
        (["sample_keep=true", "pruner.name=random"], "no gate"),
        (["controls=[none+]"], "not a stage-2 run"),
    ],
)
def test_options_that_make_no_sense(args, message, first, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([f"ckpt={first}", *args])
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
