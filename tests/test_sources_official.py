"""Sets of the literature, on a few rows in the form of their own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import picture
from glimpseprune import prepare
from glimpseprune.config import UserError, merge_options
from glimpseprune.data.shards import Shards
from glimpseprune.data.sources import official
from glimpseprune.types import Sample

TEN = ["no"] * 3 + ["yes"] * 6 + ["maybe"]


def docvqa(split: str) -> dict:
    row = {
        "questionId": 337,
        "question": "what is the date?",
        "question_types": ["form"],
        "docId": 1,
        "data_split": split,
    }
    return {"dataset_name": "SP-DocVQA", "data": [{**row, "image": "documents/d_1.png", "answers": ["1/8/93", "1/8"]}]}


def problem(**more: object) -> dict:
    row = {"question": "which?", "choices": ["one", "two"], "answer": 1, "hint": "", "subject": "natural science"}
    return {**row, "image": "image.png", "split": "test", **more}


FILES = {
    "docvqa": {"train_v1.0_withQT.json": docvqa("train"), "val_v1.0.json": docvqa("val")},
    "infographicvqa": {
        "infographicsVQA_val_v1.0_withQT.json": {
            "data": [
                {"questionId": 9, "question": "how many?", "image_local_name": "3.jpeg", "answers": ["4"],
                 "answer_type": ["single span"]}
            ]
        }
    },
    "textvqa": {
        "TextVQA_0.5.1_val.json": {
            "data": [{"question": "what brand?", "question_id": 5, "image_id": "0a", "answers": TEN}]
        }
    },
    "vqav2": {
        "v2_OpenEnded_mscoco_val2014_questions.json": {
            "license": {}, "questions": [{"image_id": 42, "question": "is it red?", "question_id": 420}]
        },
        "v2_mscoco_val2014_annotations.json": {
            "annotations": [
                {"question_id": 420, "image_id": 42, "answer_type": "yes/no", "multiple_choice_answer": "yes",
                 "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(TEN)]}
            ]
        },
    },
    "gqa": {
        "testdev_balanced_questions.json": {
            "201": {"imageId": "n1", "question": "is it?", "answer": "no", "types": {"structural": "verify"}}
        }
    },
    "chartqa": {
        "test/test_human.json": [{"imgname": "1.png", "query": "how much?", "label": "14"}],
        "test/test_augmented.json": [{"imgname": "1.png", "query": "what year?", "label": "2005"}],
    },
    "pope": {
        f"coco_pope_{kind}.json": [
            {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": f"a {kind}?", "label": "yes"}
        ] * 2
        for kind in ("random", "popular", "adversarial")
    },
    "scienceqa": {"problems.json": {"7": problem(), "8": problem(image=None), "9": problem(hint="Look.", split="val")}},
}  # fmt: skip
PICTURES = {
    "docvqa": ["documents/d_1.png"],
    "infographicvqa": ["infographicsvqa_images/3.jpeg"],
    "textvqa": ["train_images/0a.jpg"],
    "vqav2": ["val2014/COCO_val2014_000000000042.jpg"],
    "gqa": ["images/n1.jpg"],
    "chartqa": ["test/png/1.png"],
    "pope": ["val2014/COCO_val2014_1.jpg"],
    "scienceqa": ["test/7/image.png", "val/9/image.png"],
}


@pytest.fixture
def roots(tmp_path) -> Path:
    for name, files in FILES.items():
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            lines = name == "pope"
            text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
            (tmp_path / name / file).write_text(text)
        for image in PICTURES[name]:
            (tmp_path / name / image).parent.mkdir(parents=True, exist_ok=True)
            picture(40, 30).save(tmp_path / name / image)
    return tmp_path


def read(roots: Path, name: str, split: str, **more: object) -> list:
    options = merge_options(official.Options, {"set": name, "root": str(roots / name), **more}, "options")
    return list(official.samples(options, split))


EXPECTED = {
    "docvqa": ("val", "what is the date?", ("1/8/93", "1/8"), "form", "val-337"),
    "infographicvqa": ("val", "how many?", ("4",), "single span", "val-9"),
    "textvqa": ("val", "what brand?", tuple(TEN), "all", "val-5"),
    "vqav2": ("val", "is it red?", ("yes",) * 6 + ("no",) * 3 + ("maybe",), "yes/no", "val-420"),
    "gqa": ("test", "is it?", ("no",), "verify", "test-201"),
    "chartqa": ("test", "how much?", ("14",), "human", "test-human-1"),
    "pope": ("test", "a random?", ("yes",), "random", "test-random-1"),
    "scienceqa": ("test", "which?\nA. one\nB. two", ("B",), "natural science", "test-7"),
}


@pytest.mark.parametrize("name", sorted(official.FORMATS))
def test_a_row_of_every_set(roots, name):
    split, question, answers, kind, key = EXPECTED[name]
    sample = read(roots, name, split)[0]
    assert isinstance(sample, Sample), sample
    assert sample.question == question + official.FORMATS[name].suffix
    assert (sample.answers, sample.kind, sample.key, sample.dataset) == (answers, kind, key, name)
    assert sample.images[0].size == (40, 30)
    assert read(roots, name, split, brief=False)[0].question == question


@pytest.mark.parametrize("name", sorted(official.FORMATS))
def test_one_command_makes_the_splits_that_are_there(roots, name):
    prepare.main(["source=official", f"options.set={name}", f"options.root={roots / name}", f"out={roots / 'out'}"])
    splits = json.loads((roots / "out" / "manifest.json").read_text())["splits"]
    there = {
        "docvqa": {"train": 1, "val": 1},
        "chartqa": {"test": 2},
        "pope": {"test": 3},
        "scienceqa": {"test": 1, "val": 1},
    }
    counts = {split: entry["count"] for split, entry in splits.items()}
    assert counts == there.get(name, {EXPECTED[name][0]: 1})
    assert Shards(roots / "out", EXPECTED[name][0]).read(0).answers == EXPECTED[name][2]
    if name == "pope":  # each question stands twice here
        assert splits["test"]["invalid"]["reasons"] == {"another row before it has this key": 3}


def test_what_has_no_picture_is_told(roots, capsys):
    assert len(read(roots, "scienceqa", "val")) == 1
    options = official.Options("scienceqa", str(roots / "scienceqa"))
    assert official.notes(options) == ["1 of 3 questions in problems.json have no picture and are not read"]


def test_a_split_that_is_not_whole_says_so(roots):
    options = official.Options("pope", str(roots / "pope"))
    assert official.notes(options) == []
    next((roots / "pope").rglob("coco_pope_popular.json")).unlink()
    assert official.notes(options) == ["there is no coco_pope_popular.json: test is without its questions"]


def test_questions_with_a_hint(roots):
    assert read(roots, "scienceqa", "val")[0].question.startswith("Context: Look.\nwhich?")


def test_rows_that_are_none_are_named(roots):
    file = roots / "docvqa" / "val_v1.0.json"
    (good,) = docvqa("val")["data"]
    bad = [
        {key: value for key, value in good.items() if key != "answers"},
        {**good, "image": None},
        {**good, "image": "documents/2.png"},
    ]
    file.write_text(json.dumps({"data": bad}))
    (roots / "docvqa" / "train_v1.0_withQT.json").unlink()
    assert [str(each) for each in read(roots, "docvqa", "val") + read(roots, "docvqa", "train")] == [
        "there is no field 'answers'",
        "the row is not as this set has it: 'NoneType' object has no attribute 'rpartition'",
        'there is no image "documents/2.png"',
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"set": "docvq"}, "no 'docvq' in the sets that are known: did you mean 'docvqa'"),
        ({"root": "nowhere"}, "options.root=nowhere: there is no such folder"),
        ({"root": "gqa"}, "options.root=gqa: there is none of the files of docvqa: train_v1.0_withQT.json"),
    ],
)
def test_mistakes_in_the_options_are_answered(roots, monkeypatch, options, said):
    monkeypatch.chdir(roots)
    with pytest.raises(UserError, match=said):
        official.present(merge_options(official.Options, {"set": "docvqa", "root": ".", **options}, "options"))


def test_files_that_are_of_another_set_are_named(roots):
    (roots / "vqav2" / "v2_mscoco_val2014_annotations.json").write_text("[{}]")
    with pytest.raises(UserError, match="is not as this set has it: 'question_id'"):
        read(roots, "vqav2", "val")
