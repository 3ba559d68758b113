"""Several tasks in one evaluation; a judge over what was said; averages of kinds; scores that are missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import devices
from conftest import picture
from glimpseprune import compare, evaluate, report, results
from glimpseprune.data import shards
from glimpseprune.data.stream import ShardDataset
from glimpseprune.evaluation import Record
from glimpseprune.metrics import pope_scores
from glimpseprune.scores import Scores
from glimpseprune.types import Sample
from test_budget import QUESTIONS, SIZES
from test_judge import Server, completion

SMALL = ["data.workers=0", "data.batch_size=2", "pictures=1", "bootstrap=20", "controls=[none,random,oracle]"]
METHODS = ["methods=[fastv,visionzip,divprune]"]
ONE = "TASK = Task({data!r}, metrics=('exact_match', 'anls'), max_new_tokens=3, suffix=' Be brief.')\n"
TWO = "TASK = Task({data!r}, 'val', metrics=('pope',), max_new_tokens=2, groups={{'both': ('even', 'odd')}})\n"
JUDGED = "TASK = Task({data!r}, metrics=('judge', 'anls'), max_new_tokens=3, suffix=' Be brief.')\n"


def samples(answer: str) -> list[Sample]:
    return [
        Sample(str(i), question, (answer,), [picture(*size, i)], [[(0, 0, 40, 40)]], kind="odd" if i % 2 else "even")
        for i, (question, size) in enumerate(zip(QUESTIONS, SIZES))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tasks on data of their own, and one that a judge scores."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text, split, answer in (
        ("one", ONE, "test", "a"),
        ("two", TWO, "val", "yes"),
        ("judged", JUDGED, "test", "a"),
    ):
        shards.write(samples(answer), folder / f"{name}-data", split=split)
        task = "from glimpseprune.tasks import Task\n" + text.format(data=str(folder / f"{name}-data"))
        (folder / f"{name}.py").write_text(task)
    return folder


def asked(folder: Path, tiny_folder: str, out: Path, *names: str) -> list[str]:
    tasks = ",".join(str(folder / f"{name}.py") for name in names)
    return [f"backbone.path={tiny_folder}", f"out={out}", f"tasks=[{tasks}]", *METHODS, *SMALL]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "scores.json").read_text())


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: x for key, x in row.items() if key not in ("time_to_first_token", "peak_bytes")} for row in rows]


def lines_of(out: Path) -> list[dict[str, Any]]:
    return results.read_lines(out / "predictions.jsonl")


def test_two_tasks_are_as_two_evaluations(folder, tiny_folder, tmp_path, capsys):
    """Each by its own metric, length, suffix and data; in one table, page and comparison."""
    evaluate.main(asked(folder, tiny_folder, tmp_path / "both", "one", "two"))
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "both")
    assert [row["task"] for row in rows] == sorted(row["task"] for row in rows) and "two: even" in printed
    for name in ("one", "two"):
        evaluate.main(asked(folder, tiny_folder, tmp_path / name, name))
        assert timeless(rows_of(tmp_path / name)) == timeless([row for row in rows if row["task"] == name])
    lines = lines_of(tmp_path / "both")
    assert {(line["task"], line["question"].endswith(" Be brief.")) for line in lines} == {
        ("one", True),
        ("two", False),
    }
    assert {name for line in lines for name in line["metrics"]} == {"exact_match", "anls", "pope"}
    asked_for = yaml.safe_load((tmp_path / "both" / "evaluation.yaml").read_text())["asked"]
    assert asked_for["max_new_tokens"] == {"one": 3, "two": 2} and asked_for["suffix"] == {"one": " Be brief."}
    assert asked_for["data"]["two"]["split"] == "val" and asked_for["tasks"] == ["one", "two"]
    assert (tmp_path / "both" / "kept" / "two-fastv.png").is_file()
    report.main([str(tmp_path / "both")])
    said = (tmp_path / "both" / "report.md").read_text()
    assert "| two: odd | none |" in said and "data one:" in said
    evaluate.main([*asked(folder, tiny_folder, tmp_path / "seed", "one", "two"), "seed=1"])
    compare.main([str(tmp_path / "both"), str(tmp_path / "seed"), f"out={tmp_path / 'compared'}", "kind=two: odd"])
    compared = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert {row["kind"] for row in compared} >= {"one", "two", "two: odd"}


def test_rows_of_pope_and_of_averages(folder, tiny_folder, tmp_path):
    evaluate.main(asked(folder, tiny_folder, tmp_path, "two"))
    rows = {(row["method"], row["kind"]): row for row in rows_of(tmp_path)}
    for name in ("none", "fastv"):
        said = [(line["prediction"], line["answers"][0]) for line in lines_of(tmp_path) if line["method"] == name]
        found = pope_scores(*zip(*said))
        row = rows[name, "all"]
        assert row["accuracy"] == pytest.approx(found["accuracy"], abs=1e-4)
        assert {key: row[key] for key in ("precision", "recall", "f1", "yes_ratio")} == pytest.approx(
            {key: round(value, 4) for key, value in found.items() if key != "accuracy"}
        )
        assert row["f1_ci"][0] <= row["f1"] <= row["f1_ci"][1]
        parts = [rows[name, kind]["accuracy"] for kind in ("even", "odd")]
        both = rows[name, "both"]
        assert both["accuracy"] == pytest.approx(sum(parts) / 2, abs=1e-4) and both["n"] == 5
        assert both["accuracy_ci"][0] <= both["accuracy"] <= both["accuracy_ci"][1]
    assert rows["none", "all"]["mask_recall"] == 1 > rows["none", "all"]["mask_iou"] > 0
    assert rows["oracle", "all"]["mask_iou"] == rows["oracle", "all"]["mask_precision"] == 1


@pytest.mark.skipif(devices.device == "cuda", reason="forked processes cannot use a GPU")
def test_two_tasks_on_two_processes_go_on_after_a_kill(folder, tiny_folder, tmp_path):
    """Three methods; both processes are killed when the second task has begun, and started again."""

    def work(rank: int, port: int, out: Path, kill: bool, *more: str) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if kill:
            batch = evaluate.Evaluation.batch

            def die(self, inputs):
                made = batch(self, inputs)
                if self.named == {"task": "two"} and inputs.samples[0].key in ("2", "4"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return made

            evaluate.Evaluation.batch = die
        evaluate.main([*asked(folder, tiny_folder, out, "one", "two"), "data.batch_size=1", *more])

    def both(out: Path, kill: bool, *more: str) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        pair = [context.Process(target=work, args=(rank, port, out, kill, *more), daemon=True) for rank in (0, 1)]
        for process in pair:
            process.start()
        pair[0].join(120)
        if kill:
            pair[1].kill()  # as torchrun does, where one has died
        pair[1].join(120)
        return [process.exitcode for process in pair]

    assert both(tmp_path / "whole", False) == [0, 0]
    assert both(tmp_path / "killed", True)[0] == -signal.SIGKILL
    unfinished = results.read_lines(tmp_path / "killed" / "unfinished" / "predictions.jsonl")
    assert {line["task"] for line in unfinished} == {"one", "two"} and not (tmp_path / "killed/scores.json").exists()
    assert both(tmp_path / "killed", False, "resume=true") == [0, 0]
    assert timeless(rows_of(tmp_path / "killed")) == timeless(rows_of(tmp_path / "whole"))
    keys = [json.dumps(line) for line in lines_of(tmp_path / "killed")]
    assert sorted(keys) == sorted(json.dumps(line) for line in lines_of(tmp_path / "whole"))
    assert len(keys) == 2 * 5 * 6 > len(unfinished) > 5 * 6


# ------------------------------------------------------------------------------------------------------------- a judge


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = Server(lambda graded, attempt: completion("score: 0.5"))
    threading.Thread(target=started.serve_forever, args=(0.01,), daemon=True).start()
    yield started
    started.shutdown()
    started.server_close()


def test_a_judge_scores_what_was_said(server, folder, tiny_folder, tmp_path, capsys, monkeypatch):
    """A verdict that is missing is left out and told; asked again, the others are not; nothing is answered twice."""
    silent, read = {QUESTIONS[1]}, ShardDataset.__getitem__

    def respond(graded, attempt):
        return (400, {}) if graded["question"] in silent else completion("score: 0.5")

    server.respond = respond
    own = [f"judge.base_url={server.url}", "judge.model=tiny", "judge.retries=0"]
    args = [*asked(folder, tiny_folder, tmp_path / "out", "judged"), *own]
    evaluate.main(args)
    printed = capsys.readouterr().out
    lines = lines_of(tmp_path / "out")
    missing = [line for line in lines if line["score"] is None]
    assert missing and {line["question"] for line in missing} == {f"{QUESTIONS[1]} Be brief."}
    assert f"{len(lines) - len(missing)} of {len(lines)} answers have a verdict; missing are left out" in printed
    for row in rows_of(tmp_path / "out"):
        if row["kind"] == "all":
            spoken = [x["score"] for x in lines if x["method"] == row["method"] and x["score"] is not None]
            assert row["accuracy"] == pytest.approx(sum(spoken) / len(spoken), abs=1e-4)
            assert row["coverage"] == pytest.approx(len(spoken) / 5) and row["n"] == 5 and "anls" in row
    report.main([str(tmp_path / "out")])
    evaluate.main([*args, "resume=true"])  # still silent about them: nothing changes
    assert lines_of(tmp_path / "out") == lines
    sent = len(server.requests)
    silent.clear()
    evaluate.main([*args, "resume=true"])
    assert len(server.requests) - sent == len({line["prediction"] for line in missing if line["prediction"].strip()})
    again = lines_of(tmp_path / "out")
    assert all(line["score"] is not None for line in again) and all(
        r["coverage"] == 1 for r in rows_of(tmp_path / "out")
    )
    assert [{**line, "score": 0, "metrics": 0} for line in again] == [{**x, "score": 0, "metrics": 0} for x in lines]
    assert (tmp_path / "out" / "kept.png").is_file() and not (tmp_path / "out" / "earlier").exists()
    sent = len(server.requests)
    before = (tmp_path / "out" / "scores.json").stat().st_mtime_ns
    monkeypatch.setattr(ShardDataset, "__getitem__", lambda self, index: read(self, 0 if index == 0 else 1 / 0))
    evaluate.main([*args, "resume=true"])  # nothing is left to do
    assert len(server.requests) == sent and (tmp_path / "out" / "scores.json").stat().st_mtime_ns == before


def test_a_judge_that_dies_loses_nothing(server, folder, tiny_folder, tmp_path, capsys, monkeypatch):
    own = [f"judge.base_url={server.url}", "judge.model=tiny", "judge.retries=0", "judge.concurrency=1"]
    args = [*asked(folder, tiny_folder, tmp_path / "out", "judged"), *own]
    with pytest.raises(SystemExit), monkeypatch.context() as patched:
        patched.setattr(server, "respond", lambda graded, attempt: (401, {}))
        evaluate.main(args)
    assert "no answer from the judge 'tiny'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    probed = []

    def once(graded, attempt):
        probed.append(graded)
        return completion("score: 1") if len(probed) == 1 else (401, {})

    server.respond = once
    with pytest.raises(SystemExit):
        evaluate.main(args)
    error = capsys.readouterr().err
    assert "no answer from the judge" in error and "resume=true" in error
    monkeypatch.setattr(evaluate.Evaluation, "answer", lambda *_: pytest.fail("answered again"))
    server.respond = lambda graded, attempt: completion("score: 1")
    evaluate.main([*args, "resume=true"])
    assert all(row["coverage"] == 1 for row in rows_of(tmp_path / "out"))
    assert yaml.safe_load((tmp_path / "out" / "evaluation.yaml").read_text())["asked"]["judge"]["model"] == "tiny"


def record(method: str, key: str, score: float | None, kind: str = "a") -> Record:
    costs = dict.fromkeys(("kept", "visual", "mean_tokens", "prefill_flops", "decoder_flops", "kv"), 1)
    return {"method": method, "key": key, "kind": kind, "score": score, "metrics": {"judge": score}, **costs}


def test_a_method_is_compared_where_both_have_a_verdict():
    scores = Scores(["judge"], {}, 50)
    scores.add(record("none", key, value) for key, value in zip("abcd", (1.0, 0.0, None, 1.0)))
    scores.add(record("fastv", key, value) for key, value in zip("abcd", (0.5, None, 1.0, 0.0)))
    none, fastv = (row for row in scores.rows() if row["kind"] == "all")
    assert none["accuracy"] == pytest.approx(2 / 3, abs=1e-4) and fastv["accuracy"] == 0.5
    assert fastv["difference"] == pytest.approx(0.25 - 1) and fastv["relative"] == 0.25  # on a and d
    assert none["coverage"] == fastv["coverage"] == 0.75 and none["n"] == fastv["n"] == 4
    low, high = fastv["difference_ci"]
    assert -1 <= low <= fastv["difference"] <= high <= -0.5


def test_without_any_verdict_there_is_no_accuracy():
    scores = Scores(["judge"], {}, 50)
    scores.add(record(name, key, None) for name in ("none", "zero") for key in "ab")
    for row in scores.rows():
        assert row["accuracy"] is row["relative"] is row["difference"] is None and row["coverage"] == 0
        assert "accuracy_ci" not in row and row["kept"] == 1
    assert scores.summary(scores.rows()) is None
    report.print_table(scores.rows())


def test_an_average_counts_kinds_alike_and_wants_all_of_them():
    scores = Scores(["judge"], {}, 50)
    kinds = {"a": (1.0,) * 8, "b": (0.0, 1.0)}
    for name, less in (("none", 0.0), ("fastv", 0.5)):
        for kind, values in kinds.items():
            scores.add(record(name, f"{kind}{n}", max(v - less, 0.0), kind) for n, v in enumerate(values))
    groups = {"mean": ("a", "b"), "more": ("a", "c")}
    none, fastv = scores.averages(scores.rows(), groups)
    assert (none["kind"], none["accuracy"], none["n"], none["coverage"]) == ("mean", 0.75, 10, 1)
    assert (fastv["accuracy"], fastv["difference"], fastv["relative"]) == (0.375, -0.375, 0.5)
    assert scores.rows()[0]["accuracy"] == 0.9  # which counts questions
    assert scores.lacking(groups) == {"more": ["c"]}
