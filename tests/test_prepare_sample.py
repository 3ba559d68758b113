"""A random subset of a source: the same for any number of workers, whether the source knows its length or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from glimpseprune import prepare
from glimpseprune.data.draws import drawn, runs
from glimpseprune.data.shards import Shards

TOTAL = {"train": 40, "val": 3}
SOURCE = '''
"""A source made by a test."""
import dataclasses

from glimpseprune.config import option
from glimpseprune.types import Sample
from PIL import Image

splits = ("train", "val")
TOTAL = {{"train": 40, "val": 3}}

@dataclasses.dataclass
class Options:
    bad: list[int] = option([], "these are invalid")
    log: str = option("", "a line for every sample that is drawn")

{count}

def samples(options, split{parameters}):
    total = TOTAL[split]
    for i in range({range}):
        if options.log:
            with open(options.log, "a") as log:
                log.write(f"{{i}}\\n")
        question = "" if i in options.bad else "how many?"
        yield Sample(f"{{split}}-{{i}}", question, (str(i),), [Image.new("RGB", (8, 6), (i, 2 * i, 3 * i))])
'''
COUNT = "def count(options, split):\n    return TOTAL[split]"
KINDS = {
    "stream": {"parameters": "", "range": "total", "count": ""},
    "stream-of-known-length": {"parameters": "", "range": "total", "count": COUNT},
    "slices": {
        "parameters": ", start=0, stop=None",
        "range": "start, total if stop is None else min(stop, total)",
        "count": "",
    },
    "slices-of-known-length": {
        "parameters": ", start=0, stop=None",
        "range": "start, total if stop is None else min(stop, total)",
        "count": COUNT,
    },
}


@pytest.fixture(params=KINDS)
def source(request, tmp_path) -> str:
    file = tmp_path / f"{request.param}.py"
    file.write_text(SOURCE.format(**KINDS[request.param]))
    return str(file)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(folder: Path, split: str = "train") -> list[int]:
    reader = Shards(folder, split)
    return [int(reader.read(index).answers[0]) for index in range(len(reader))]


def make(tmp_path: Path, source: str, *more: str, name: str = "out") -> dict[str, dict]:
    prepare.main([f"source={source}", f"out={tmp_path / name}", "shard_size=4", "overwrite=true", *more])
    return json.loads((tmp_path / name / "manifest.json").read_text())["splits"]


def test_a_subset_is_random_in_the_order_of_the_source_and_the_same_for_all_workers(tmp_path, source, capsys):
    for workers in (1, 2, 3):
        entries = make(tmp_path, source, "sample=11", "seed=42", f"workers={workers}", name=str(workers))
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    found = numbers(tmp_path / "1")
    assert found == sorted(set(found)) == list(drawn(40, 11, 42, "train")) and found != list(range(11))
    assert [shard["count"] for shard in entries["train"]["shards"]] == [4, 4, 3]
    assert entries["train"]["sample"] == {"drawn": 11, "of": 40, "seed": 42}
    assert numbers(tmp_path / "1", "val") == [0, 1, 2]  # there are no more
    assert entries["val"]["sample"] == {"drawn": 3, "of": 3, "seed": 42}
    assert "11 of 11 samples written, 11 were drawn from 40 with seed 42" in capsys.readouterr().out


def test_invalid_ones_of_a_subset_are_told_and_not_made_up_for(tmp_path, source):
    chosen = list(drawn(40, 11, 0, "train"))
    entry = make(tmp_path, source, "sample=11", f"options.bad=[{chosen[2]},{chosen[5]}]")["train"]
    assert entry["rows"] == 11 and entry["count"] == 9 and entry["invalid"]["count"] == 2
    assert numbers(tmp_path / "out") == [number for number in chosen if number not in (chosen[2], chosen[5])]


def test_of_the_first_few(tmp_path, source):
    entry = make(tmp_path, source, "sample=5", "limit=12", "seed=7")["train"]
    assert numbers(tmp_path / "out") == list(drawn(12, 5, 7, "train"))
    assert entry["sample"]["of"] == 12


def test_only_what_is_taken_is_drawn_where_that_can_be(tmp_path, source):
    make(tmp_path, source, "sample=3", "splits=[train]", f"options.log={tmp_path / 'log'}")
    read = len((tmp_path / "log").read_text().split())
    if "slices" in source:
        assert read == 3 + 40 * ("known" not in source)
    else:
        assert read <= 40 + 40 * ("known" not in source)


def test_a_draw_is_uniform_and_a_smaller_one_a_part_of_a_larger():
    times = np.zeros(20)
    for seed in range(2000):
        times[drawn(20, 5, seed, "train")] += 1
    assert np.all(np.abs(times - 500) < 100)  # five standard deviations
    assert set(drawn(100, 10, 3, "val")) < set(drawn(100, 20, 3, "val"))
    assert list(drawn(100, 10, 3, "val")) != list(drawn(100, 10, 4, "val"))
    assert list(drawn(100, 10, 3, "val")) != list(drawn(100, 10, 3, "train"))
    assert list(drawn(4, 9, 0, "val")) == [0, 1, 2, 3]
    assert not len(drawn(0, 9, 0, "val"))


def test_runs():
    assert list(runs([])) == []
    assert list(runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
