"""The folder of an evaluation: what was there stays until another one is done; what was cut short is gone on with."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from glimpseprune import results
from glimpseprune.config import UserError
from glimpseprune.results import Folder


def opened(out: Path, asked: str = "a") -> Folder:
    return Folder(out, {"asked": {"metric": asked}, "settings": {"x": 1}})


def record(key: int) -> dict:
    return {"method": "none", "key": str(key)}


def evaluate(out: Path, score: int, asked: str = "a", **allowed: bool) -> list[str]:
    """An evaluation of two batches of one sample; the keys that it did not have to do again."""
    with opened(out, asked) as folder:
        folder.claim()
        kept = folder.earlier(**({"resume": False, "overwrite": False} | allowed), draws=1).records
        done = [one["key"] for one in kept]
        for key in ("1", "2"):
            if key not in done:
                folder.add([record(int(key)) | {"score": score}], [])
        folder.finish([{"score": score}], {"score": score}, {"fastv": b"%d" % score})
        return done


def held(out: Path) -> dict[str, str]:
    return {str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file()}


def test_nothing_is_lost_unasked_and_all_of_it_replaced_when_asked(tmp_path):
    evaluate(tmp_path, 1)
    before = held(tmp_path)
    assert set(before) == {
        *("scores.json", "summary.json", "predictions.jsonl", "timings.jsonl", "evaluation.yaml"),
        *("kept.png", "kept/fastv.png"),
    }
    evaluate(tmp_path, 3)
    evaluate(tmp_path, 4)
    assert held(tmp_path / "earlier" / "1") == before
    assert json.loads(held(tmp_path / "earlier" / "2")["scores.json"]) == [{"score": 3}]
    assert results.read(tmp_path / "earlier" / "2").rows == [{"score": 3}]
    shutil.rmtree(tmp_path / "earlier")
    (tmp_path / "kept" / "gone.png").touch()
    evaluate(tmp_path, 2, overwrite=True)
    after = held(tmp_path)
    assert set(after) == set(before) and {
        line["score"] for line in results.read_lines(tmp_path / "predictions.jsonl")
    } == {2}
    assert json.loads(after["scores.json"]) == [{"score": 2}] and after["kept/fastv.png"] == "2"


def test_what_was_there_stays_until_the_other_is_done(tmp_path):
    evaluate(tmp_path, 1)
    before = held(tmp_path)
    with suppress(ZeroDivisionError), opened(tmp_path, "b") as folder:
        folder.claim()
        folder.earlier(resume=False, overwrite=True, draws=1)
        folder.add([record(1)], [])
        raise ZeroDivisionError
    assert {name: text for name, text in held(tmp_path).items() if not name.startswith("unfinished")} == before
    assert results.read(tmp_path).rows == [{"score": 1}]
    with pytest.raises(UserError, match="interrupted in .*unfinished.*resume=true"):
        evaluate(tmp_path, 2, "b")
    assert evaluate(tmp_path, 2, "b", resume=True) == ["1"]
    assert results.read(tmp_path).description["asked"] == {"metric": "b"}


@pytest.mark.parametrize("moves", range(12))
def test_a_kill_at_any_time_leaves_whole_scores_or_none(tmp_path, moves, monkeypatch):
    """Scores, lines and description are of one evaluation, and the next command ends as if nothing had happened."""
    evaluate(tmp_path, 1)
    replace, calls = os.replace, []

    def counted(*paths) -> None:
        if len(calls) == moves:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    monkeypatch.setattr("os.replace", counted)
    with suppress(KeyboardInterrupt):
        evaluate(tmp_path, 2, "b", overwrite=True)
    monkeypatch.undo()
    try:
        found = results.read(tmp_path)
    except UserError as error:
        assert "resume=true" in str(error)
    else:
        lines = results.read_lines(tmp_path / "predictions.jsonl")
        score = found.rows[0]["score"]
        assert {line["score"] for line in lines} == {score} and found.description["asked"]["metric"] == " ab"[score]
    evaluate(tmp_path, 2, "b", resume=True, overwrite=True)
    found = results.read(tmp_path)
    assert found.rows == [{"score": 2}] and found.description["asked"] == {"metric": "b"}
    assert [line["key"] for line in results.read_lines(tmp_path / "predictions.jsonl")] == ["1", "2"]
    assert not (tmp_path / "unfinished").exists()


def test_one_at_a_time_and_no_folder_where_nothing_came_of_it(tmp_path):
    out = tmp_path / "out"
    with opened(out) as folder:
        folder.claim()
        with opened(out) as other, pytest.raises(UserError, match="is in use by process"):
            other.claim()
    assert not out.exists()


def test_a_full_disk_names_the_file(tmp_path):
    with opened(tmp_path) as folder:
        folder.claim()
        folder.add([record(1)], [])
        folder.streams["predictions.jsonl"].close()
        folder.streams["predictions.jsonl"] = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(OSError, match="No space left on device: .*/predictions.jsonl"):
            folder.add([record(2)], [])
        folder.streams.clear()


def test_an_evaluation_of_before_is_gone_on_with(tmp_path):
    """They grew under their own names."""
    results.files.write(tmp_path / "evaluation.yaml", "asked: {metric: a}\nsettings: {}\n")
    results.files.write(tmp_path / "predictions.jsonl", results.line(record(1)) + '{"method": "no')
    assert evaluate(tmp_path, 3, resume=True) == ["1"]
