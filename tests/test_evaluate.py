"""Evaluating a stage-2 run: the base, the first stage and the trained language model in one table; k answers each.
Several methods on one model, at equal budgets; in several processes; gone on with after a kill; never replaced unasked.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import devices
from conftest import launched, picture
from glimpseprune import checkpoint, config, cost, evaluate, evaluation, hub, lora, results
from glimpseprune.backbones import LVLM
from glimpseprune.data import shards
from glimpseprune.data.collate import Collator
from glimpseprune.options import BackboneOptions, DataOptions, LoraOptions, PrunerOptions, TrainConfig
from glimpseprune.types import Sample
from staged import FLOPS
from test_budget import QUESTIONS, SIZES

OPTIONS = {
    "prune_layer": 1,
    "probe_layers": [0, 1],
    "vision_layers": [2, 1],
    "width": 16,
    "cond_width": 16,
    "num_heads": 2,
    "dropout": 0.0,
}


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
    model = checkpoint.load(backbone=cfg.backbone, pruner=cfg.pruner, lora=cfg.lora, fresh=True)
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
    return table(out, f"ckpt={ckpt}", *args)


def table(out: Path, *args: str) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple]]]:
    """:func:`scored` with the checkpoint, if any, among the arguments."""
    small = ["data.workers=0", "data.batch_size=3", "max_new_tokens=4", "pictures=0", "bootstrap=20"]
    evaluate.main([f"out={out}", *small, *args])
    rows = {row["method"]: row for row in rows_of(out) if row["kind"] == "all"}
    said: dict[str, list[tuple]] = {method: [] for method in rows}
    for line in map(json.loads, (out / "predictions.jsonl").read_text().splitlines()):
        said[line["method"]].append((line["key"], line["prediction"], line["kept"]))
    return rows, said


def test_no_sample_ends_an_evaluation_whatever_it_says(first, tmp_path, capsys):
    """Valid ones that say what terminals, templates and processors act on, and one that is damaged."""
    image = picture(112, 168, 0)
    token = "<|vision_start|><|image_pad|><image></s>{{ x }} \u2028 \x1b[31m"
    samples = [
        Sample("a", f"what is {token}?", (token,), [image], [[(0, 0, 112, 0)]], kind="[/counting] \x1b[2J"),
        Sample("b", "why?", ("a",), [image], [[(0, 0, 40, 40)]], kind="../../all"),
        Sample("c", "why?", ("a",), [image], [[(0, 0, 40, 40)]]),
    ]
    shards.write(samples, tmp_path / "data", split="test")
    tar = tmp_path / "data" / "test-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"why?", b"who?", 1))
    with pytest.warns(UserWarning, match=r"\(b\): the checksum of the json is another"):
        rows, said = table(
            tmp_path / "out", f"ckpt={first}", f"data.path={tmp_path}/data", "pictures=2", "controls=[none]"
        )
    assert [key for key, *_ in said["glimpse"]] == ["a", "c"]
    assert results.read_lines(tmp_path / "out" / "predictions.jsonl")[0]["question"] == f"what is {token}?"
    printed = capsys.readouterr().out
    assert "[/counting] \\x1b[2J" in printed
    assert "\x1b" not in printed
    assert "1 damaged" in printed


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "scores.json").read_text())


def lines_of(out: Path, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().split("\n")[:-1]]


def refused(capsys, *args: str) -> str:
    """The one line with which arguments are answered."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(list(args))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ")
    return error


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
    monkeypatch.setattr(hub, "_downloaded", lambda name, *_: pytest.fail(f"looked for {name} on the hub"))
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
    sure = tmp_path / "sure"
    sure.mkdir()
    weights = load_file(f"{second}/trainable.safetensors")
    for name in [name for name in weights if "attn_out_projs" in name]:
        weights[name] = weights[name] * 1e4
    save_file(weights, sure / "trainable.safetensors")
    (sure / "config.yaml").write_text(Path(second, "config.yaml").read_text())
    rows, greedy = scored(str(sure), tmp_path / "greedy", "controls=[]")
    others, drawn = scored(str(sure), tmp_path / "drawn", "controls=[random]", "samples=3", "sample_keep=true")
    assert others["glimpse+"]["decoder_flops"] == rows["glimpse+"]["decoder_flops"]
    assert others["random"]["decoder_flops"] < others["glimpse+"]["decoder_flops"]  # which decides for nothing
    assert drawn["glimpse+"] == [line for line in greedy["glimpse+"] for _ in range(3)]
    assert [kept for *_, kept in drawn["random"]] == [kept for *_, kept in greedy["glimpse+"]]
    assert len({kept for *_, kept in greedy["glimpse+"]}) > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["samples=2"], "temperature=1"),
        (["samples=0"], "samples: give 1 to 4096, got 0"),
        (["temperature=-1"], "temperature: give 0 to 100, got -1"),
        (["controls=[nothing]"], "none+"),
        (["sample_keep=true", "pruner.name=random"], "no gate"),
        (["controls=[none+]"], "not a stage-2 run"),
    ],
)
def test_options_that_make_no_sense(args, message, first, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([f"ckpt={first}", *args])
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------------- several methods


def test_methods_without_weights_need_no_checkpoint(tiny_folder, data, tmp_path):
    base = [f"backbone.path={tiny_folder}", f"data.path={data}"]
    rows, said = table(tmp_path, *base, "methods=[random]", "options.random.keep_ratio=0.5")
    assert list(rows) == ["none", "random", "oracle", "zero"]  # the control of that name is the method
    half = [int(0.5 * line["visual"]) for line in lines_of(tmp_path) if line["method"] == "random"]
    assert [kept for *_, kept in said["random"]] == half
    _, alone = table(tmp_path / "pruner", *base, "pruner.name=random", "pruner.options.keep_ratio=0.5", "controls=[]")
    assert alone["random"] == said["random"]


def test_methods_share_a_backbone_and_each_encoded_batch(first, staged, data, tmp_path, monkeypatch):
    from glimpseprune.backbones import LVLM

    needs, encode = [], LVLM.encode
    monkeypatch.setattr(LVLM, "encode", lambda *args: (needs.append(args[2]), encode(*args))[1])
    rows, said = scored(first, tmp_path, "methods=[staged,glimpse]", "options.staged.keep_ratio=0.25")
    assert list(rows) == ["none", "staged", "glimpse", "random", "oracle", "zero"]
    assert len(needs) == 2 and {(n.states, n.attention) for n in needs} == {((2, 1), (-1,))}
    for name, more in (("staged", ["options.staged.keep_ratio=0.25"]), ("glimpse", [])):
        _, alone = scored(first, tmp_path / name, f"methods=[{name}]", "controls=[]", *more)
        assert alone[name] == said[name]
    # The controls are those of the checkpoint's own method, wherever it stands in the list.
    assert [kept for *_, kept in said["random"]] == [kept for *_, kept in said["glimpse"]]


def test_controls_of_a_method_with_several_stops_follow_all_of_them(tiny_folder, staged, data, tmp_path):
    table(
        tmp_path,
        f"backbone.path={tiny_folder}",
        f"data.path={data}",
        "methods=[staged]",
        "options.staged.keep_ratio=0.3",
    )
    lines = lines_of(tmp_path)
    cuts = {name: [line["cuts"] for line in lines if line["method"] == name] for name in ("staged", "random", "zero")}
    counts = [line["visual"] for line in lines if line["method"] == "none"]
    assert cuts["staged"] == cuts["random"] == [[round(0.65 * count), round(0.3 * count)] for count in counts]
    assert cuts["zero"] == [[0, 0]] * 5
    costs = {name: [line["kv"] for line in lines if line["method"] == name] for name in cuts}
    assert costs["staged"] == costs["random"]  # the second stop leaves the cache alone in both


def test_costs_in_the_table_are_what_each_layer_saw(tiny_folder, staged, data, tmp_path, monkeypatch):
    """A probe counts the tokens that run through every decoder layer; one sample per batch, so that none is padding."""
    from glimpseprune import decoder

    seen, run_layers = [], decoder.run_layers

    def count(backbone, state, stop, **more):
        made = run_layers(backbone, state, stop, **more)
        seen.extend([int(state.visual.sum())] * (stop - state.depth) if state.hidden.shape[1] > 1 else [])
        return made

    monkeypatch.setattr(decoder, "run_layers", count)
    args = ["methods=[staged]", "controls=[]", "options.staged.keep_ratio=0.3", "data.batch_size=1"]
    with launched():
        rows, _ = table(tmp_path, f"backbone.path={tiny_folder}", f"data.path={data}", *args)
    backbone = checkpoint.load(backbone=tiny_folder).backbone
    layers, lines = backbone.num_layers, lines_of(tmp_path)
    assert len(seen) == 5 * layers
    means, ratios = [], []
    for line, size in zip(lines, SIZES):
        own, seen = seen[:layers], seen[layers:]
        layout = backbone.layout_of(backbone.model.config, size)
        prompt = backbone.prepare([line["question"]], [[picture(*size)]])
        text = prompt["input_ids"].shape[1] - layout.count
        means.append(sum(own) / layers)
        ran = sum(cost.layer_flops(backbone.shapes.decoder, text + tokens) for tokens in own) + 2 * FLOPS
        ratios.append(ran / (layers * cost.layer_flops(backbone.shapes.decoder, text + layout.count)))
    assert rows["staged"]["mean_tokens"] == pytest.approx(sum(means) / 5, abs=0.005)
    assert rows["staged"]["decoder_flops"] == pytest.approx(sum(ratios) / 5, abs=5e-5)
    assert rows["staged"]["decoder_flops"] < rows["staged"]["prefill_flops"] < 1


def test_a_method_that_looks_before_the_tower_has_its_own_encoding(tiny_folder, staged, data, tmp_path, monkeypatch):
    from glimpseprune import pruners
    from glimpseprune.backbones import LVLM

    def look(self, backbone, prompt):
        return prompt, [7e5] * len(prompt["input_ids"])

    needs, encode = [], LVLM.encode
    monkeypatch.setattr(LVLM, "encode", lambda *args: (needs.append(args[2].attention), encode(*args))[1])
    args = [f"backbone.path={tiny_folder}", f"data.path={data}", "methods=[random,staged]", "controls=[none]"]
    plain, _ = table(tmp_path / "plain", *args)
    assert needs == [(-1,), (-1,)]
    monkeypatch.setattr(pruners.find("glimpseprune.pruners", "staged").Pruner, "look", look, raising=False)
    rows, _ = table(tmp_path / "looks", *args)
    assert needs[2:] == [(), (-1,)] * 2
    assert rows["staged"]["decoder_flops"] > plain["staged"]["decoder_flops"]  # what the look costs
    assert rows["staged"]["kept_tokens"] == plain["staged"]["kept_tokens"]


def test_one_budget_for_all_methods(first, staged, data, tmp_path, capsys):
    args = ["methods=[none,glimpse,staged,random]", "budget.kept=0.4", "options.random.seed=3"]
    rows, _ = scored(first, tmp_path, *args)
    token = sum(1 / line["visual"] for line in lines_of(tmp_path) if line["method"] == "glimpse") / 5
    for name in ("glimpse", "staged", "random"):
        assert rows[name]["kept"] == pytest.approx(0.4, abs=token)
    assert rows["none"]["kept"] == 1 and rows["zero"]["kept"] == 0
    settings = yaml.safe_load((tmp_path / "evaluation.yaml").read_text())["settings"]
    assert set(settings) == {"glimpse", "staged", "random"}
    assert settings["glimpse"]["options"]["width"] == 16 and settings["random"]["options"]["seed"] == 3
    for name, found in settings.items():
        assert found["reached"]["kept"] == pytest.approx(rows[name]["kept"], abs=1e-4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("budget kept=0.4: ")]
    assert [line.split()[2] for line in said] == ["glimpse", "staged", "random"] and "keep_ratio=" in said[1]


def test_the_first_stage_has_the_budget_of_the_second(second, tmp_path):
    rows, _ = scored(second, tmp_path, "controls=[none,glimpse,random]", "budget.mean_tokens=14", "budget.samples=5")
    assert list(rows) == ["none", "glimpse", "glimpse+", "random"]
    for name in ("glimpse", "glimpse+", "random"):
        assert rows[name]["mean_tokens"] == pytest.approx(14, abs=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["methods=[glimpse]"], "glimpse has weights that are learned, and backbone.path has none"),
        (["methods=[radnom]"], "did you mean 'random'"),
        (["methods=[random,random]"], "random is there twice"),
        (["methods=[random]", "options.random.kep=1"], "unknown key 'options.random.kep': did you mean"),
        (["methods=[random]", "options.oracle.dilate=1"], "options.oracle: methods=['random'] has no such method"),
        (["methods=[random]", "options.random.keep_ratio=2"], "options.random.keep_ratio: give 0 to 1, got 2"),
        (["methods=[random]", "pruner.name=random"], "say the same thing"),
        (["methods=[random]", "budget.kept=2"], "budget.kept: give above 0, up to 1, got 2"),
        (["methods=[random]", "budget.kept=.5", "budget.kv=.5"], "kept and kv are given"),
        (["methods=[random]", "budget.decoder_flops=.01"], "options.random"),
        (["methods=[random]", "metric=[exact_match,anlz]"], "did you mean 'anls'"),
        (["methods=[random]", "metric={a: 1}"], "list of names"),
        ([], "methods=[...]"),
    ],
)
def test_methods_and_budgets_that_make_no_sense(args, message, tiny_folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    base = [f"backbone.path={tiny_folder}", f"data.path={data}", f"out={out}", "data.workers=0"]
    assert message in refused(capsys, *base, *args)
    assert not out.exists()


def test_what_is_missing_is_named(first, tiny_folder, data, tmp_path, capsys):
    assert "data.path" in refused(capsys, "methods=[random]", f"backbone.path={tiny_folder}")
    run = save_run(tmp_path / "run", tiny_folder, 1, data)
    config.save(
        replace(config.read(TrainConfig, f"{run}/config.yaml"), pruner=PrunerOptions("random")), f"{run}/config.yaml"
    )
    assert "holds those of random" in refused(capsys, f"ckpt={run}", "methods=[glimpse]", f"out={tmp_path / 'out'}")
    assert "what is evaluated is glimpse" in refused(capsys, f"ckpt={first}", "options.random.keep_ratio=1")


# --------------------------------------------------------------------------------------------- scores, intervals, time


def test_several_metrics_intervals_and_differences(first, tmp_path, monkeypatch):
    from glimpseprune import metrics

    def parity_of(prediction, answers):
        return float(crc32(prediction.encode()) % 2)

    def length(prediction, answers):
        return min(1.0, len(prediction) / 10)

    for metric in (parity_of, length):
        metric.__module__ = metrics.__name__
        monkeypatch.setattr(metrics, metric.__name__, metric, raising=False)
    rows, _ = scored(first, tmp_path, "metric=[parity_of,length]", "bootstrap=100")
    lines = lines_of(tmp_path)
    scores = {name: [line["score"] for line in lines if line["method"] == name] for name in rows}
    for name, row in rows.items():
        assert row["accuracy"] == pytest.approx(sum(scores[name]) / 5)
        lengths = [min(1.0, len(line["prediction"]) / 10) for line in lines if line["method"] == name]
        assert row["length"] == pytest.approx(sum(lengths) / 5, abs=1e-4)
        assert row["difference"] == pytest.approx(row["accuracy"] - rows["none"]["accuracy"])
        low, high = row["accuracy_ci"]
        assert 0 <= low <= row["accuracy"] <= high <= 1 and (high > low) == (0 < row["accuracy"] < 1)
        low, high = row["difference_ci"]
        assert low <= row["difference"] <= high
        if scores[name] == scores["none"]:
            assert (low, high) == (0, 0)  # paired: the same samples are drawn for both
    assert any(0 < row["accuracy"] < 1 for row in rows.values()) and rows["none"]["difference_ci"] == [0, 0]
    kinds = {(row["method"], row["kind"]): row for row in rows_of(tmp_path)}
    assert set(kinds["glimpse", "odd"]["accuracy_ci"]) <= {0, 0.5, 1} and "time_to_first_token" in rows["none"]


def test_memory_is_the_most_that_a_method_or_its_encoding_took(first, tmp_path, monkeypatch):
    """As on CUDA, where it is measured; the first measurement of a batch is that of the encoding."""
    from contextlib import contextmanager

    peaks = iter([7, *[5] * 4, 3, *[9] * 4])  # encoding, then (whole, first token) of none and glimpse, twice

    @contextmanager
    def measure(device):
        measured = cost.Measured(seconds=0.25)
        yield measured
        measured.peak_bytes = next(peaks)

    monkeypatch.setattr(cost, "measure", measure)
    rows, _ = scored(first, tmp_path, "controls=[none]", "limit=4")
    assert {row["peak_bytes"] for row in rows.values()} == {9}
    assert {line["peak_bytes"] for line in lines_of(tmp_path, "timings.jsonl")} == {7, 9}
    assert {row["time_to_first_token"] for row in rows.values()} == {0.5}


def test_text_of_the_data_survives_wherever_it_is_written(first, tmp_path, capsys):
    kind, question = "[red]x[/red] \\[bold", "is [/link] 'a' < \"b\"?\u2028 \\ [blue]"
    samples = [Sample("0", question, ("[/]",), [picture(84, 84)], kind=kind)]
    shards.write(samples, tmp_path / "data", split="test")
    scored(first, tmp_path, f"data.path={tmp_path / 'data'}", "controls=[none,random]")
    printed = " ".join(capsys.readouterr().out.split())
    assert kind in printed
    assert {(line["kind"], line["question"]) for line in lines_of(tmp_path)} == {(kind, question)}
    assert {row["kind"] for row in rows_of(tmp_path)} == {"all", kind}


def test_pictures_of_every_method_that_is_asked_for(first, staged, tmp_path):
    scored(first, tmp_path, "methods=[staged,glimpse]", "pictures=2", "controls=[none,random]")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"staged.png", "glimpse.png"}
    assert (tmp_path / "kept.png").read_bytes() == (tmp_path / "kept" / "staged.png").read_bytes()


def test_commands_are_light_until_something_runs():
    """A typo is answered before torch has loaded, and Lightning is none of an evaluation's business."""
    code = "import glimpseprune.evaluate, glimpseprune.report, glimpseprune.compare, sys\n"
    code += "print([name for name in ('torch', 'transformers', 'lightning', 'matplotlib') if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------------- interrupted, again


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nor memory, which a GPU has and says."""
    measured = ("time_to_first_token", "peak_bytes")
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


@pytest.mark.parametrize("more", [[], ["samples=2", "temperature=1"]])
def test_an_interrupted_evaluation_goes_on(more, first, tmp_path, monkeypatch):
    scored(first, tmp_path / "whole", *more)
    scored(first, tmp_path / "again", *more)
    file = tmp_path / "again" / "predictions.jsonl"
    text = file.read_bytes()
    assert text == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    # Killed while the second batch was written: none and glimpse have answered it, random in part.
    keys = [(line["method"], line["key"]) for line in lines_of(tmp_path / "again")]
    place = keys.index(("random", "4"))
    file.write_bytes(b"\n".join(text.split(b"\n")[:place]) + b"\n" + text.split(b"\n")[place][:40])
    (tmp_path / "again" / "scores.json").unlink()
    asked, answer = [], evaluate.Evaluation.answer
    monkeypatch.setattr(
        evaluate.Evaluation, "answer", lambda self, *args: (asked.append(args[0].name), answer(self, *args))[1]
    )
    scored(first, tmp_path / "again", "resume=true", *more)
    assert asked == ["random", "oracle", "zero"]
    assert sorted(file.read_bytes().split(b"\n")) == sorted(text.split(b"\n"))
    assert without_time(rows_of(tmp_path / "again")) == without_time(rows_of(tmp_path / "whole"))
    assert all("time_to_first_token" in row for row in rows_of(tmp_path / "again") if row["kind"] == "all")
    asked.clear()
    scored(first, tmp_path / "again", "resume=true", *more)  # nothing is left to do
    assert asked == [] or more  # of k draws the last sample may lack some


@pytest.mark.parametrize("place", ["draw", "add"])
def test_an_interrupted_evaluation_keeps_its_pictures_and_the_one_before(place, first, tmp_path, monkeypatch):
    scored(first, tmp_path / "whole", "pictures=4")
    scored(first, tmp_path / "again", "limit=2")
    finished = (tmp_path / "again" / "predictions.jsonl").read_bytes()
    calls, write = [], getattr(results.Folder, place)

    def die(self, *args):
        calls.append(args)
        return write(self, *args) if len(calls) < 2 else 1 / 0

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(results.Folder, place, die)
        scored(first, tmp_path / "again", "pictures=4")
    scored(first, tmp_path / "again", "pictures=4", "resume=true")
    for name in ("kept.png", "kept/glimpse.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "again" / "earlier" / "1" / "predictions.jsonl").read_bytes() == finished
    files = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    scored(first, tmp_path / "again", "pictures=4", "resume=true")  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in files] == before


def test_resume_begins_where_there_is_nothing(first, tmp_path):
    rows, _ = scored(first, tmp_path / "new", "resume=true", "controls=[none]")
    assert list(rows) == ["none", "glimpse"]


def test_budgets_are_found_once(first, staged, tmp_path, capsys):
    args = ["methods=[staged]", "budget.kv=0.6", "controls=[none]"]
    rows, said = scored(first, tmp_path, *args)
    (tmp_path / "scores.json").unlink()
    capsys.readouterr()
    again, same = scored(first, tmp_path, *args, "resume=true")
    assert "budget kv" not in capsys.readouterr().out and same == said
    assert again["staged"]["kv"] == rows["staged"]["kv"] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["limit=2"], "data.limit was null, is 2"),
        (["metric=anls"], 'metric was ["exact_match"], is ["anls"]'),
        (["options.glimpse.threshold=0.1"], "options.glimpse.threshold was null, is 0.1"),
        (["max_new_tokens=5"], "max_new_tokens was 4, is 5"),
    ],
)
def test_an_earlier_evaluation_is_neither_mixed_nor_lost(args, message, first, tmp_path, capsys):
    scored(first, tmp_path, "controls=[none]")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    where = [f"ckpt={first}", f"out={tmp_path}", "controls=[none]", "data.workers=0", "bootstrap=20"]
    said = refused(capsys, *where, "max_new_tokens=4", "resume=true", *args)
    assert message in said and "leave resume out, which keeps it in earlier/" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    scored(first, tmp_path, "controls=[none]", *args)
    assert (tmp_path / "evaluation.yaml").read_bytes() != before["evaluation.yaml"]
    aside = tmp_path / "earlier" / "1"
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()} == before


def test_other_weights_under_the_same_name_are_another_evaluation(first, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(first, run)
    scored(str(run), tmp_path / "out", "controls=[none]")
    weights = load_file(run / "trainable.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, run / "trainable.safetensors")
    args = [f"ckpt={run}", f"out={tmp_path / 'out'}", "controls=[none]", "max_new_tokens=4", "bootstrap=20"]
    assert "weights was" in refused(capsys, *args, "resume=true")


def test_what_was_there_stays_until_the_first_batch_is_done(first, tmp_path, monkeypatch):
    scored(first, tmp_path, "controls=[none]")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def die(*_):
        raise RuntimeError("died")

    monkeypatch.setattr(evaluate.Evaluation, "records", die)
    with pytest.raises(RuntimeError, match="died"):
        scored(first, tmp_path, "controls=[none]", "overwrite=true", "limit=4")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_damaged_lines_are_told(first, tmp_path, capsys):
    scored(first, tmp_path, "controls=[none]")
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(b'{"method"\n' + file.read_bytes())
    args = [f"ckpt={first}", f"out={tmp_path}", "controls=[none]", "max_new_tokens=4", "bootstrap=20", "resume=true"]
    assert "line 1 is damaged" in refused(capsys, *args)


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.skipif(devices.device == "cuda", reason="forked processes cannot use a GPU")
def test_two_processes_make_the_rows_of_one(first, staged, tmp_path, monkeypatch):
    """Five samples in batches of one: an odd one out, for whom the other process waits with padding."""
    args = ["methods=[glimpse,staged]", "budget.kept=0.4", "data.batch_size=1", "temperature=1", "samples=2"]
    scored(first, tmp_path / "one", *args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        small = ["data.workers=0", "max_new_tokens=4", "pictures=0", "bootstrap=20", f"out={tmp_path / 'two'}"]
        evaluate.main([f"ckpt={first}", *small, *args])

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=work, args=(rank,), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")
    assert without_time(rows_of(tmp_path / "two")) == without_time(rows_of(tmp_path / "one"))
    assert len(lines_of(tmp_path / "two", "timings.jsonl")) == len(lines_of(tmp_path / "one", "timings.jsonl"))


# -------------------------------------------------------------------------------------------- samples without boxes


def test_the_oracle_is_measured_where_there_are_boxes_whatever_their_order(first, tmp_path):
    """Batches of three: the first one has only boxed samples, some, or none."""
    boxed = [
        Sample(f"{i}", "what?", ("a",), [picture(140, 112, i)], [[(0, 0, 20, 20)]] if i < 3 else None, kind="one")
        for i in range(5)
    ]
    rows = {}
    for name, order in {"first": boxed, "last": boxed[::-1], "some": boxed[:3], "none": boxed[3:]}.items():
        shards.write(order, tmp_path / name, split="test")
        args = ["methods=[random]", "controls=[none,oracle]", f"data.path={tmp_path / name}"]
        rows[name], said = scored(first, tmp_path / f"out-{name}", *args)
        assert [key for key, *_ in said.get("oracle", [])] == [s.key for s in order if s.boxes]
    own, same = (without_time([rows[name]["oracle"]]) for name in ("first", "last"))
    assert own == same == without_time([rows["some"]["oracle"]]) and own[0]["n"] == 3 and own[0]["kept"] < 0.5
    assert "oracle" not in rows["none"] and rows["first"]["none"]["n"] == 5 and list(rows["first"])[-1] == "oracle"
    assert rows["first"]["random"]["accuracy_ci"] == rows["last"]["random"]["accuracy_ci"]  # of all five


def test_what_was_measured_on_few_samples_has_no_row():
    scores = evaluate.Scores(["exact_match"], {}, 0, 0)
    scores.samples = {
        "none": dict.fromkeys("abcd", []),
        "oracle": dict.fromkeys("ab", []),
        "random": dict.fromkeys("abc"),
    }
    assert scores.left_out() == {"oracle": (2, 4)}


def test_no_boxes_for_an_oracle_that_is_asked_for(first, tmp_path, capsys):
    shards.write([Sample("a", "what?", ("a",), [picture(140, 112)])], tmp_path / "data", split="test")
    args = [f"ckpt={first}", "methods=[oracle]", f"data.path={tmp_path / 'data'}", f"out={tmp_path / 'out'}"]
    assert "no sample of" in refused(capsys, *args, "data.workers=0") and not (tmp_path / "out").exists()


def test_pictures_of_neighbours_are_seen_once(first, tmp_path, monkeypatch):
    """Three questions on each of four pictures, in batches of three to which the pictures do not keep; what is said and
    what it costs is what it is without sharing anything."""
    samples = [
        Sample(f"{i}", QUESTIONS[i % 4], ("a",), [picture(*SIZES[i // 3], i // 3)], [[(0, 0, 40, 40)]])
        for i in range(1, 12)
    ]
    shards.write(samples, tmp_path / "data", split="test")
    towers: list[int] = []
    kind = type(checkpoint.load(first).backbone)
    own = kind.run_tower

    def run_tower(self, pictures, needs):
        towers.append(len(self.image_layouts(pictures)))
        return own(self, pictures, needs)

    monkeypatch.setattr(kind, "run_tower", run_tower)
    args = [f"data.path={tmp_path / 'data'}", "controls=[none,random]"]
    rows, said = scored(first, tmp_path / "shared", *args)
    assert towers == [2, 1, 1]  # samples 1 2 3, 4 5 6, 7 8 9 and 10 11
    monkeypatch.setattr(evaluation.Sights, "__init__", lambda self: vars(self).update(limit=0, held={}))
    towers.clear()
    assert scored(first, tmp_path / "by batch", *args)[1] == said and towers == [2, 2, 2, 1]
    monkeypatch.setattr(kind, "prepare", lambda self, *args: dict(self.unshared(LVLM.prepare(self, *args))))
    towers.clear()
    separate, other = scored(first, tmp_path / "separate", *args)
    assert towers == [3, 3, 3, 2] and other == said
    for name, row in separate.items():
        times = {key for key in row if key.startswith(("time", "peak"))}
        assert {key: x for key, x in row.items() if key not in times} == {
            key: x for key, x in rows[name].items() if key not in times
        }


def test_what_is_held_of_pictures_counts_as_it_did(first, monkeypatch):
    """In seconds, and never more bytes than there may be."""
    from contextlib import contextmanager

    @contextmanager
    def measure(device):
        measured = cost.Measured()
        yield measured
        measured.seconds = 1.0

    monkeypatch.setattr(cost, "measure", measure)
    model = checkpoint.load(first)
    collate, needs = Collator(model.backbone), model.pruner.needs
    a, b, c = (Sample(str(i), "why?", ("a",), [picture(112, 112, i)]) for i in range(3))
    sights = evaluation.Sights()
    with torch.inference_mode():
        seconds = [
            sights.encode(model.backbone, collate(batch), needs)[1].seconds for batch in ([a, b], [b, c], [c, c])
        ]
        assert seconds == [1.0, 1.5, 2.0] and len(sights.held) == 2
        (one,) = {seen.nbytes for seen, _ in sights.held.values()}
        sights.limit = one
        expected = model.backbone.encode(collate([b, c]).prompt, needs)
        found, _ = sights.encode(model.backbone, collate([b, c]), needs)
        torch.testing.assert_close(found.embeds, expected.embeds)
        assert len(sights.held) == 1 and sights.held == {key: x for key, x in sights.held.items() if x[0].nbytes == one}
        assert sights.encode(model.backbone, collate([a]), replace(needs, states=()))[0].states == {}
