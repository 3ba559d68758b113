"""What prepare tells: how far it is, what became of every row, and under which licence."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from conftest import picture
from glimpseprune import prepare
from glimpseprune.data import shards
from glimpseprune.data.progress import EVERY, Watch, clock_time, said
from glimpseprune.data.shards import write_manifest


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    picture(40, 30).save(tmp_path / "a.png")
    good = {"image": "a.png", "question": "?", "answer": "a"}
    rows = [
        good,
        {**good, "image": "nowhere.png"},
        {**good, "image": "elsewhere.png"},
        {**good, "question": " "},
        {**good, "answer": None},
        {"question": "?", "answer": "a"},
        {**good, "boxes": [[0, 0, 99, 9]]},
        {**good, "boxes": [[0, 0, 9, 9]]},
        "no row",
        {**good, "image": "../a.png"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


ARGV = ["source=jsonl", "options.path=rows.jsonl", "options.shares={train: 1}", "out=out"]


def entry(folder: Path) -> dict:
    return json.loads((folder / "out" / "manifest.json").read_text())["splits"]["train"]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_row_is_written_or_counted_by_its_cause(folder, capsys, workers):
    prepare.main([*ARGV, f"workers={workers}", "shard_size=3"])
    found = entry(folder)
    assert found["rows"] == 10 and found["count"] == 2
    assert found["invalid"]["reasons"] == {
        "there is no image …": 2,
        "question must be a text that is not empty": 1,
        "an answer must be a text or a number, not null": 1,
        "there is no field 'image', only 'question', 'answer'": 1,
        "box (…, …, …, …) is not inside its image of … x …": 1,
        "the row is no object with fields, but a str": 1,
        "image … lies outside of the folder of the images": 1,
    }
    assert sum(found["invalid"]["reasons"].values()) == found["invalid"]["count"] == 8
    assert found["invalid"]["examples"]["there is no image …"] == [
        'rows:2: there is no image "nowhere.png"',
        'rows:3: there is no image "elsewhere.png"',
    ]
    printed = capsys.readouterr().out
    assert "train: 2 of 10 samples written, 8 left out\n" in printed
    assert "│ train │ left out │       2 │ there is no image" in printed
    assert printed.count("│ train │ left out │") == 7


def test_a_part_that_is_left_out_is_told_beside_it(folder, capsys):
    prepare.main([*ARGV, "options.bad_boxes=drop", "max_pixels=1000", "large_images=shrink"])
    found = entry(folder)
    assert (found["count"], found["invalid"]["count"]) == (3, 7)
    assert found["lacking"]["reasons"] == {"box (…, …, …, …) is not inside its image of … x …": 1}
    assert found["changed"]["count"] == 3
    printed = capsys.readouterr().out
    assert "train: 3 of 10 samples written, 7 left out, 1 without a part, 3 stored otherwise\n" in printed
    assert "│ train │ without a" in printed and "│ train │ stored" in printed


def test_causes_beyond_counting_are_counted_together(tmp_path):
    kinds = [f"of a kind called {'x' * n}" for n in (*range(shards._CAUSES + 5), 1)]
    invalid = [(f"k{n}", kind) for n, kind in enumerate(kinds)]
    shard = {"name": "a", "count": 1, "bytes": 1, "sha256": "", "keys": ["a"], "kinds": {"all": 1}, "invalid": invalid}
    told = write_manifest(tmp_path, "train", [shard])["invalid"]
    assert told["count"] == sum(told["reasons"].values()) == len(invalid)
    assert told["reasons"]["of a kind called x"] == 2
    assert told["reasons"][shards.OTHER_CAUSES] == 5
    assert len(told["examples"][shards.OTHER_CAUSES]) == 3


def test_a_manifest_says_how_it_was_made_and_under_which_licence(folder, capsys):
    prepare.main([*ARGV, "workers=2"])
    assert "licence: not declared: give license=<text>" in capsys.readouterr().out
    assert entry(folder)["license"] is None
    prepare.main([*ARGV, "license=CC BY 4.0 [/x]", "overwrite=true"])
    assert "licence: CC BY 4.0 [/x]\n" in capsys.readouterr().out
    assert entry(folder)["license"] == "CC BY 4.0 [/x]"
    prepared = json.loads((folder / "out" / "manifest.json").read_text())["prepared"]
    assert (
        prepared["source"] == "jsonl"
        and prepared["splits"] == ["train"]
        and prepared["options"]["path"] == "rows.jsonl"
    )
    assert not {"workers", "out", "overwrite", "resume", "max_invalid"} & prepared.keys()
    prepare.main(["source=tags", "out=tags", "options.count={train: 1, val: 1, test: 1}", "options.size=336"])
    assert "licence: of scikit-learn's bundle" in capsys.readouterr().out


def test_mined_questions_have_the_licence_of_those_that_were_asked(folder, capsys):
    prepare.main([*ARGV, "license=mine alone"])
    key = entry(folder)["shards"] and shards.Shards(folder / "out", "train").read(0).key
    (folder / "said.jsonl").write_text(json.dumps({"method": "m", "key": key, "score": 0}) + "\n")
    argv = ["source=mined", "options.root=out", "options.predictions=said.jsonl", "splits=[train]", "out=mined"]
    prepare.main(argv)
    assert capsys.readouterr().out.endswith("licence: mine alone\n")


# ------------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((5000, 20000, 0, 50.0), "5000 of 20000 samples (25.0%), 100/s, 2:30 left"),
        ((5000, 20000, 4000, 50.0), "5000 of 20000 samples (25.0%), 20/s, 12:30 left, 4000 were there"),
        ((20000, 20000, 0, 4000.0), "20000 of 20000 samples (100.0%), 5/s, in 1:06:40"),
        ((5000, None, 0, 50.0), "5000 samples, 100/s"),
        ((0, 20000, 0, 0.0), "0 of 20000 samples (0.0%)"),
        ((3, 3, 3, 1.0), "3 of 3 samples (100.0%), 3 were there"),
        ((0, 0, 0, 1.0), "0 of 0 samples (0.0%)"),
    ],
)
def test_how_far_it_is(given, words):
    assert said(*given) == words


def test_times_are_rounded_as_people_say_them():
    assert [clock_time(s) for s in (0, 59.4, 59.6, 3599.7, 36000)] == ["0:00", "0:59", "1:00", "1:00:00", "10:00:00"]


def watched(terminal: bool) -> str:
    """What is shown of 100 samples in 100 s."""
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with Watch(console, lambda: now[0]) as watch:
        watch.begin("train [/x]", 100)
        for done in range(1, 101):
            now[0] += 1
            watch.at(done)
        watch.end(100)
    return out.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then():
    lines = watched(False).splitlines()
    assert lines[0] == "train [/x]: 30 of 100 samples (30.0%), 1/s, 1:10 left" and EVERY == 30
    assert lines[-1] == "train [/x]: 100 of 100 samples (100.0%), 1/s, in 1:40"
    assert len(lines) == 4


def test_on_a_terminal_there_is_a_bar_with_the_time_that_is_left():
    shown = watched(True)
    assert "train [/x]" in shown and "\x1b[" in shown
    assert "1 of 100 samples (1.0%), 1/s, 1:39 left" in shown
    assert "100 of 100 samples (100.0%), 1/s, in 1:40" in shown
