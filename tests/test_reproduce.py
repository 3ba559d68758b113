"""Published numbers beside ours; and every configuration of conf/paper, by the schema of what reads it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from glimpseprune import config, lookup, reproduce
from glimpseprune.config import UserError
from glimpseprune.data.sources import viscot
from glimpseprune.evaluate import EvaluateConfig, planned
from glimpseprune.integrations._asked import arguments, require_options
from glimpseprune.options import PrunerOptions, TrainConfig
from glimpseprune.reproduce import ReproduceConfig

PAPER = Path(__file__).parent.parent / "conf" / "paper"
BOUNDS = {"11": 0.111, "22": 0.222, "33": 0.333}
METHODS = ["glimpse", "fastv", "pyramiddrop", "visionzip", "divprune"]
TABLES = sorted(file.stem for file in PAPER.glob("*.yaml") if not file.stem.startswith("retention"))
COSTS = {"kept": 0.1, "kv": 0.2, "mean_tokens": 70.5, "decoder_flops": 0.7, "prefill_flops": 0.8}


# ------------------------------------------------------------------------------------------------------ the command


def evaluation(folder: Path, **scores: dict[str, float]) -> None:
    """As ``src.evaluate`` leaves it: methods with their scores by kind of question."""
    rows: list[dict[str, Any]] = []
    for method, kinds in scores.items():
        rows += [{"method": method, "kind": kind, "accuracy": score, **COSTS} for kind, score in kinds.items()]
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(rows))


def lmms_eval(folder: Path, *kept: int | None, **scores: float) -> None:
    """As lmms-eval leaves it, in a folder with the name of the model; ``kept`` of ten tokens by each answer."""
    place = folder / "model"
    place.mkdir(parents=True, exist_ok=True)
    results = {task: {"alias": task, "score,none": score, "score_stderr,none": "N/A"} for task, score in scores.items()}
    number = len(list(place.iterdir()))
    (place / f"2026-01-0{number + 1}_results.json").write_text(json.dumps({"results": results}))
    costs = [None if tokens is None else {**COSTS, "visual": 10, "kept": tokens} for tokens in kept]
    lines = [json.dumps({"doc_id": 0, "token_counts": [each]}) + "\n" for each in costs]
    if lines:
        (place / f"2026-01-0{number + 1}_samples_a.jsonl").write_text("".join(lines))


def run(folder: Path, *lines: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    numbers = [line | {"source": "the paper"} for line in lines]
    given = {"sets": ["a", "b"], "costs": ["kept", "mean_tokens"], "published": numbers, "metrics": {}} | options
    file = folder.parent / "published.yaml"
    file.write_text(yaml.safe_dump(given))
    return reproduce.run(config.load(ReproduceConfig, [str(file), f"folder={folder}"]))


def cell(rows: list[dict[str, Any]], method: str, bound: str | None, column: str) -> tuple[Any, Any]:
    (row,) = (row for row in rows if (row["method"], row["bound"]) == (method, bound))
    return row[column]["here"], row[column]["published"]


def test_evaluations_stand_beside_what_is_published(tmp_path, capsys):
    folder = tmp_path / "runs"
    evaluation(folder / "11", none={"all": 0.7, "a": 0.8, "b": 0.6}, glimpse={"all": 0.5, "a": 0.4, "b": 0.6})
    evaluation(folder / "22", glimpse={"all": 0.5, "a": 0.8})
    rows = run(
        folder,
        {"method": "glimpse", "column": "mean", "value": 0.76},  # its bound is not said: beside both
        {"method": "glimpse", "bound": "22", "column": "a", "value": 0.81},
        {"method": "glimpse+", "column": "mean", "value": 0.84},
    )
    assert cell(rows, "none", None, "mean") == (pytest.approx(0.7), None)
    assert cell(rows, "none", None, "relative") == (1.0, None)
    assert cell(rows, "glimpse", "11", "mean") == (pytest.approx(0.5), 0.76)
    assert cell(rows, "glimpse", "11", "relative") == (pytest.approx(0.75), None)
    assert cell(rows, "glimpse", "22", "mean") == (None, 0.76)  # b is not there
    assert cell(rows, "glimpse", "22", "a") == (0.8, 0.81)
    assert cell(rows, "glimpse", "22", "relative") == (1.0, None)
    assert cell(rows, "glimpse+", None, "mean") == (None, 0.84)
    assert cell(rows, "glimpse", "11", "kept") == (0.1, None)
    assert json.loads((folder / "reproduce.json").read_text()) == rows
    said = (folder / "reproduce.md").read_text()
    assert "| glimpse | 11% | 40.0 / - | 60.0 / - | 50.0 / 76.0 | 75.0 / - | 10.0 / - | 70.5 / - |" in said
    assert "glimpse mean, glimpse a, glimpse+ mean: the paper" in said
    assert "80.0 / 81.0" in capsys.readouterr().out


def test_a_set_may_be_a_task_of_several(tmp_path):
    """And one without a verdict has no score."""
    folder = tmp_path / "runs" / "11"
    folder.mkdir(parents=True)
    row = {"method": "none", "kind": "all", "kept": 1.0}
    rows = [{**row, "task": "a", "accuracy": 0.5}, {**row, "task": "b", "accuracy": None}]
    (folder / "scores.json").write_text(json.dumps(rows))
    made = run(folder.parent)
    assert [cell(made, "none", None, name)[0] for name in ("a", "b", "mean", "kept")] == [0.5, None, None, 1.0]


def test_what_lmms_eval_wrote_stands_beside_it_too(tmp_path):
    """Of several runs the newest; a score beyond 1 is no share, and takes part in no mean. An answer out of a cache has
    no costs."""
    folder = tmp_path / "runs"
    lmms_eval(folder / "none", a=0.1, b=1500.0)
    lmms_eval(folder / "none", a=0.8)
    lmms_eval(folder / "11" / "fastv", 1, 3, None, a=0.4, b=1200.0)
    (folder / "cache").mkdir()
    line = {"method": "fastv", "bound": "11", "column": "relative", "value": 0.681}
    rows = run(folder, line, metrics={"a": "score,none", "b": "score,none"})
    assert [row["method"] for row in rows] == ["none", "fastv"]
    assert cell(rows, "fastv", "11", "kept") == (pytest.approx(0.2), None)
    assert cell(rows, "fastv", "11", "mean_tokens") == (70.5, None)
    assert cell(rows, "none", None, "a") == (0.8, None)
    assert cell(rows, "fastv", "11", "relative") == (pytest.approx((0.5 + 0.8) / 2), 0.681)
    assert cell(rows, "fastv", "11", "mean") == (None, None)
    said = (folder / "reproduce.md").read_text()
    assert "1200.0 / -" in said and "65.0 / 68.1" in said and "without a number, here or published: mean" in said


def test_what_cannot_be_a_table_is_refused(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    with pytest.raises(UserError, match="nothing was measured there"):
        run(folder)
    with pytest.raises(UserError, match="published: no column 'c', there are a, b, mean"):
        run(folder, {"method": "x", "column": "c", "value": 1})
    with pytest.raises(UserError, match="costs: no 'watts', choose from kept"):
        run(folder, costs=["watts"])
    (folder / "11" / "fastv").mkdir(parents=True)
    (folder / "11" / "fastv" / "x_results.json").write_text("[]")
    with pytest.raises(UserError, match="x_results.json: not what lmms-eval writes for"):
        run(folder)


# ---------------------------------------------------------------------------------------------- the tables of the paper


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_its_numbers_and_its_script(table):
    cfg = config.load(ReproduceConfig, [str(PAPER / "published" / f"{table}.yaml"), "folder=x"])
    assert len(cfg.sets) == (12 if table.startswith("freeform") else 10)
    assert (PAPER.parent.parent / "slurm" / "paper" / f"{table}.sh").is_file()
    assert {number.method for number in cfg.published} <= {"none", "glimpse+", *METHODS}
    assert {number.bound for number in cfg.published} <= {None, *BOUNDS}
    if table.startswith("freeform"):
        assert set(cfg.sets) == set(viscot.SETS)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("table", [table for table in TABLES if table.startswith("freeform")])
def test_a_table_in_prose_is_an_evaluation(table, bound):
    own = "_llava1_5" if "llava" in table else ""
    files = [str(PAPER / f"{table}.yaml"), str(PAPER / f"retention_{bound}{own}.yaml")]
    check(config.load(EvaluateConfig, files), bound)


@pytest.mark.parametrize("own", ["", "_llava1_5"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_is_one_for_every_method(bound, own):
    """Without the table, which names tasks."""
    file = str(PAPER / f"retention_{bound}{own}.yaml")
    check(config.load(EvaluateConfig, [file, "ckpt=x", f"methods={json.dumps(METHODS)}"]), bound)


def check(cfg: EvaluateConfig, bound: str) -> None:
    """That methods and options are known, and that all are left the same share of the tokens."""
    assert cfg.methods == METHODS and cfg.controls == (["none"] if bound == "11" else [])
    plan = planned(cfg, TrainConfig(out="", pruner=PrunerOptions("glimpse")))
    assert plan.keys() == set(METHODS)
    assert all(left(name, options) == pytest.approx(BOUNDS[bound], abs=5e-4) for name, options in plan.items())


def left(method: str, options: Any) -> float:
    """The share of the visual tokens that decoding sees at most; numbers of them are out of LLaVA-1.5's 576."""
    given = config.merge_options(lookup.find("glimpseprune.pruners", method).Options, options, "options")
    if method == "glimpse":
        return given.max_keep
    if method == "visionzip" and given.dominant_count is not None:
        return (given.dominant_count + given.contextual_count) / 576
    if method == "visionzip":
        return given.dominant + given.contextual
    return given.keep_ratio[-1] if method == "pyramiddrop" else given.keep_ratio


@pytest.mark.parametrize("table", [table for table in TABLES if table.startswith("short")])
def test_a_table_of_short_answers_is_a_list_of_runs(table):
    """As lmms-eval takes its arguments apart; one per bound and method, and the unpruned model."""
    numbers = config.load(ReproduceConfig, [str(PAPER / "published" / f"{table}.yaml"), "folder=x"])
    runs = yaml.safe_load((PAPER / f"{table}.yaml").read_text())
    places = []
    for run in runs:
        assert run["model"] == "glimpseprune" and run["log_samples"] is True
        assert run["tasks"].split(",") == numbers.sets
        made, options = arguments(taken_apart(run["model_args"]) | {"batch_size": str(run["batch_size"])})
        require_options(made.pruner, options)
        assert (made.ckpt is not None) == (made.pruner == "glimpse") and made.backbone and made.dtype == "bfloat16"
        bound, _, method = run["output_path"].removeprefix(f"runs/paper/{table}/").partition("/")
        assert (method or bound) == made.pruner
        if method:
            assert left(method, options) == pytest.approx(BOUNDS[bound], abs=5e-4)
        places.append(run["output_path"])
    assert len(set(places)) == len(runs) == 1 + len(BOUNDS) * len(METHODS)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
@pytest.mark.parametrize("table", [table for table in TABLES if table.startswith("short")])
def test_the_tasks_and_their_metrics_are_those_of_lmms_eval(table):
    from lmms_eval.tasks import TaskManager

    cfg = config.load(ReproduceConfig, [str(PAPER / "published" / f"{table}.yaml"), "folder=x"])
    manager = TaskManager("ERROR")
    assert set(cfg.sets) <= set(manager.all_tasks)
    for task in cfg.sets:
        described = manager._get_config(task)
        known = [f"{each['metric']},none" for each in described["metric_list"]]
        assert cfg.metrics[task] in known if task in cfg.metrics else known == ["submission,none"], task


def taken_apart(text: str) -> dict[str, Any]:
    """What lmms-eval does with ``--model_args``, where it is installed, else for texts like these."""
    if find_spec("lmms_eval") is not None:
        from lmms_eval.utils import simple_parse_args_string

        return simple_parse_args_string(text)
    found: dict[str, Any] = {}
    for part in text.replace("[", "\0[").replace(",", "\0,").split("\0,"):
        name, sign, value = part.replace("\0", "").partition("=")
        if sign:
            found[name] = value
        else:  # of a list
            found[list(found)[-1]] += f",{name}"
    return {name: value if value.startswith("[") else number(value) for name, value in found.items()}


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
