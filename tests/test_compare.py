"""Evaluations side by side: seeds become a mean and a spread, what measures something else is refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from glimpseprune import compare, config
from glimpseprune.options import TrainConfig
from test_evaluate import data, first, save_run, scored  # noqa: F401  (data and first are fixtures)

ASKED = {
    "ckpt": "runs/x",
    "weights": "aa",
    "data": {"path": "data", "split": "test", "limit": None, "manifest": "cc"},
    "metric": ["exact_match", "anls"],
    "max_new_tokens": 8,
    "methods": ["glimpse"],
    "bootstrap": 10,
    "seed": 0,
}
METHODS = ("none", "glimpse", "zero")


def evaluation(
    folder: Path, seed: int = 0, asked: dict | None = None, init: int | None = None
) -> tuple[str, list[dict]]:
    """A folder as an evaluation leaves it, with numbers that follow from the seed; and its rows."""
    trained = {"seed": seed, "loss": {"kl": 1.0}, "init_from": None if init is None else {"seed": init, "stage": "g"}}
    described = copy.deepcopy(ASKED) | {"ckpt": f"runs/{seed}", "weights": str(seed)} | (asked or {})
    rows = []
    for kind in ("all", "a[b]|c"):
        for place, method in enumerate(METHODS):
            accuracy = 0.9 - 0.2 * place + 0.01 * seed * (place == 1)
            row = {"method": method, "kind": kind, "accuracy": accuracy, "relative": accuracy / 0.9}
            row |= {"difference": accuracy - 0.9, "accuracy_ci": [accuracy - 0.03, accuracy + 0.03]}
            row |= {name: 1 - 0.3 * place for name in ("kept", "kv", "decoder_flops", "prefill_flops")}
            rows.append(row | {"mean_tokens": 100 - place, "n": 20, "anls": accuracy + 0.05})
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(rows))
    (folder / "evaluation.yaml").write_text(yaml.safe_dump({"asked": described, "settings": {}, "trained": trained}))
    return str(folder), rows


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit):
        compare.main(list(args))
    return capsys.readouterr().err.strip()


def test_seeds_become_mean_and_spread(tmp_path, capsys):
    seeds = [evaluation(tmp_path / f"run-{seed}" / "evaluation", seed, init=seed + 3) for seed in (0, 1, 4)]
    other = {"methods": ["fastv"], "budget": {"kept": 0.1}}
    alone, rows = evaluation(tmp_path / "fastv", 0, other)
    out = tmp_path / "out"
    found = compare.run(compare.CompareConfig([*(folder for folder, _ in seeds), alone], str(out)))
    assert json.loads((out / "compare.json").read_text()) == found
    by = {(row["evaluation"], row["method"]): row for row in found if row["kind"] == "all"}
    label = f"{tmp_path}/run-{{0,1,4}}/evaluation"
    assert list(by) == [(label, name) for name in METHODS] + [(alone, name) for name in METHODS]
    row = by[label, "glimpse"]
    values = [rows[1]["accuracy"] for _, rows in seeds]
    assert row["seeds"] == 3 and row["n"] == 20
    assert (row["accuracy"], row["accuracy_std"]) == pytest.approx((mean(values), stdev(values)), abs=1e-4)
    assert row["anls_std"] == row["accuracy_std"] and row["kv_std"] == 0 and "accuracy_ci" not in row
    single = by[alone, "glimpse"]
    assert single["seeds"] == 1 and single["accuracy_ci"] == rows[1]["accuracy_ci"] and "accuracy_std" not in single
    printed = capsys.readouterr().out
    assert (
        "71.7% ± 2.1" in printed and "70.0% ± 3.0" in printed and "decoder FLOPs" in printed and "all FLOPs" in printed
    )
    text = (out / "compare.md").read_text()
    assert "## a\\[b\\]\\|c" in text and text.count("71.7% ± 2.1") == 2 and "anls" in text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"metric": ["anls"]}, 'metric was ["exact_match", "anls"], is ["anls"]'),
        ({"data": ASKED["data"] | {"limit": 8}}, "data.limit was null, is 8"),
        ({"data": ASKED["data"] | {"split": "val"}}, 'data.split was "test", is "val"'),
        ({"data": ASKED["data"] | {"manifest": "dd"}}, 'data.manifest was "cc", is "dd"'),
        ({"max_new_tokens": 64}, "max_new_tokens was 8, is 64"),
    ],
)
def test_other_data_and_metrics_are_refused_by_name(asked, said, tmp_path, capsys):
    folders = [evaluation(tmp_path / "a")[0], evaluation(tmp_path / "b", 1, asked)[0]]
    error = refused(capsys, *folders, f"out={tmp_path / 'out'}")
    assert said in error and folders[0] in error and folders[1] in error and not (tmp_path / "out").exists()


def test_data_that_lie_elsewhere_are_the_same_data(tmp_path):
    moved = {"data": ASKED["data"] | {"path": "elsewhere"}}
    folders = [evaluation(tmp_path / "a")[0], evaluation(tmp_path / "b", 1, moved)[0]]
    assert {row["seeds"] for row in compare.run(compare.CompareConfig(folders, str(tmp_path / "out")))} == {2}


def test_what_is_no_pair_is_told(tmp_path, capsys):
    a, b = evaluation(tmp_path / "a")[0], evaluation(tmp_path / "b")[0]
    assert "two folders" in refused(capsys, a)
    assert "one evaluation twice" in refused(capsys, a, b)
    (tmp_path / "b" / "evaluation.yaml").unlink()
    assert "no evaluation.yaml" in refused(capsys, a, b)
    assert "no evaluation is there" in refused(capsys, a, str(tmp_path))
    c = evaluation(tmp_path / "c", 1)[0]
    assert "kind=x" in refused(capsys, a, c, "kind=x", f"out={tmp_path / 'out'}")


def test_runs_of_two_seeds_and_another_threshold(first, data, tiny_folder, tmp_path):  # noqa: F811
    """Real ones: a training's seed, an evaluation's seed, and what its options make another evaluation."""
    second = save_run(tmp_path / "second", tiny_folder, 5, data)
    saved = config.read(TrainConfig, f"{second}/config.yaml")
    config.save(replace(saved, seed=1), f"{second}/config.yaml")
    (a, _), (b, _) = (scored(run, tmp_path / name, "controls=[none]") for run, name in ((first, "a"), (second, "b")))
    scored(first, tmp_path / "c", "controls=[none]", "options.glimpse.threshold=0.1")
    folders = [str(tmp_path / name) for name in "abc"]
    rows = {
        (row["evaluation"], row["method"]): row
        for row in compare.run(compare.CompareConfig(folders, str(tmp_path / "out")))
        if row["kind"] == "all"
    }
    assert len(rows) == 4
    pair = rows[f"{tmp_path}/{{a,b}}", "glimpse"]
    kept = [a["glimpse"]["kept"], b["glimpse"]["kept"]]
    assert pair["kept"] == pytest.approx(mean(kept), abs=1e-4) and pair["kept_std"] == pytest.approx(
        stdev(kept), abs=1e-4
    )
    assert rows[str(tmp_path / "c"), "glimpse"]["kept"] > a["glimpse"]["kept"]
