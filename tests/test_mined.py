"""Questions chosen by how well they were answered."""

from __future__ import annotations

import json

import pytest

from conftest import picture
from glimpseprune import prepare
from glimpseprune.config import UserError
from glimpseprune.data.shards import Shards, write
from glimpseprune.data.sources import mined
from glimpseprune.types import Sample

RIGHT = {"a": [0, 0], "b": [0, 1], "c": [1, 1], "d": [1, 0]}


@pytest.fixture
def asked(tmp_path) -> dict[str, str]:
    """Four questions with two answers each, and one that was not asked."""
    data, file = tmp_path / "all", tmp_path / "predictions.jsonl"
    samples = [Sample(key, "what?", ("x",), [picture(28, 28)]) for key in "abcde"]
    write(samples, data, split="train")
    write(samples[3:], data, split="val")
    lines = [{"method": "glimpse", "key": key, "score": score} for key, scores in RIGHT.items() for score in scores]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"root": str(data), "predictions": str(file)}


def keys(split: str = "train", **options: object) -> str:
    return "".join(sample.key for sample in mined.samples(mined.Options(**options), split))


def test_chosen_by_the_share_of_right_answers(asked):
    assert keys(**asked) == "abd"  # below 1
    assert keys(**asked, above=0.0) == "bd"
    assert keys(**asked, below=0.5) == "a"
    assert keys("val", **asked) == "de"


def test_others_are_drawn_by_the_seed(asked):
    assert keys(**asked, others=1.0) == "abcd"  # never one that was not asked
    drawn = {keys(**asked, below=0.0, others=0.5, seed=seed) for seed in range(20)}
    assert len(drawn) > 3 and keys(**asked, below=0.0, others=0.5, seed=1) in drawn


def test_prepare_writes_them(asked, tmp_path):
    options = json.dumps(asked)
    prepare.main(["source=mined", f"out={tmp_path / 'out'}", f"options={options}", "splits=[train, val]"])
    shards = Shards(tmp_path / "out", "train")
    assert [shards.read(index).key for index in range(len(shards))] == list("abd")


@pytest.mark.parametrize("text", ["", "{", '{"key": "a"}\n', '{"method": "m", "key": "a", "score": "x"}\n', "[3]\n"])
def test_predictions_that_are_none_are_named(asked, tmp_path, text):
    (tmp_path / "predictions.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"predictions\.jsonl"):
        keys(**asked)


def test_one_of_several_methods_must_be_named(asked, tmp_path):
    with open(tmp_path / "predictions.jsonl", "a") as stream:
        stream.write(json.dumps({"method": "none", "key": "c", "score": 0}) + "\n")
    with pytest.raises(UserError, match="glimpse, none: give one"):
        keys(**asked)
    assert keys(**asked, method="none") == "c"
