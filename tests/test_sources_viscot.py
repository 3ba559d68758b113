"""Visual-CoT on rows in its format: every set and path quirk; and on the real rows, where there are some.

``GLIMPSEPRUNE_VISCOT=<folder> make test ARGS="tests/test_sources_viscot.py"`` reads real annotations, of which the
project has none, on pictures made for them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from glimpseprune import prepare
from glimpseprune.config import UserError, merge_options
from glimpseprune.data.shards import Shards
from glimpseprune.data.sources import viscot
from glimpseprune.types import Sample

REAL = os.environ.get("GLIMPSEPRUNE_VISCOT", "")
PLACES = {"textcap": "cot/textvqa", "visual7w": "cot/v7w"}


def place(name: str) -> str:
    return PLACES.get(name, f"cot/{name}")


def trained(name: str, image: str, boxes: list, size: tuple[int, int] = (60, 40), **more: object) -> dict:
    width, height = size
    row = {"question": f"what is in {image}?", "answer": f"of {name}", "image": image, "width": width, "height": height}
    return {**row, "bboxs": boxes, "dataset": name, "split": "train", **more}


def benchmarked(name: str, image: str, box: list, number: int = 0) -> dict:
    path = f"{place(name)}/{image}"
    turns = [f"<image>\nwho is in {image}? {viscot.SENTENCE}", "[0.1, 0.2, 0.3, 0.4]", "<image>", f"answer of {name}"]
    talk = [{"from": ("human", "gpt")[turn % 2], "value": value} for turn, value in enumerate(turns)]
    row = {"dataset": {"visual7w": "v7w"}.get(name, name), "split": "val", "question_id": number}
    return {**row, "image": [path, f"{path}###{box}"], "conversations": talk}


def write(root: Path, train: dict[str, list], benchmark: dict[str, list]) -> None:
    (root / "benchmark").mkdir(parents=True, exist_ok=True)
    for name, rows in train.items():
        (root / f"{name}_cot_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in benchmark.items():
        (root / "benchmark" / f"{name}.json").write_text(json.dumps(rows))


def draw(file: Path, size: tuple[int, int] = (60, 40)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 200).save(file, "JPEG" if file.suffix != ".png" else "PNG")


def read(root: Path, split: str, **options: object) -> list:
    return list(viscot.samples(merge_options(viscot.Options, {"root": str(root), **options}, "options"), split))


@pytest.fixture
def everything(tmp_path) -> Path:
    """A training row and a benchmark row of every set; the pictures of every other set lie in a folder val."""
    for number, name in enumerate(viscot.SETS):
        for image in ("deep/t.jpg", "deep/b.jpg"):
            draw(tmp_path / place(name) / ("val" if number % 2 else "") / image)
    train = {name: [trained(name, "deep/t.jpg", [[1, 2, 30.5, 40]])] for name in viscot.SETS}
    write(tmp_path, train, {name: [benchmarked(name, "deep/b.jpg", [3, 4, 50, 30])] for name in viscot.SETS})
    return tmp_path


def test_all_sets_with_their_paths(everything):
    for split, word, box, answer in (
        ("train", "what", (1, 2, 30.5, 40), "of {}"),
        ("test", "who", (3, 4, 50, 30), "answer of {}"),
    ):
        samples = read(everything, split, val=0)
        assert [sample.dataset for sample in samples] == [sample.kind for sample in samples] == list(viscot.SETS)
        for name, sample in zip(viscot.SETS, samples):
            assert sample.question == f"{word} is in deep/{word == 'what' and 't' or 'b'}.jpg?"
            assert sample.answers == (answer.format(name),)
            assert sample.boxes == [[box]]
            assert not sample.left_out
            assert sample.key == f"viscot-{name}-{split}-1"


def test_one_command_makes_all_splits(everything):
    prepare.main(["source=viscot", f"options.root={everything}", f"out={everything / 'out'}", "options.val=0.4"])
    splits = json.loads((everything / "out" / "manifest.json").read_text())["splits"]
    assert splits["test"]["kinds"] == dict.fromkeys(viscot.SETS, 1)
    assert splits["train"]["count"] + splits["val"]["count"] == len(viscot.SETS)
    assert Shards(everything / "out", "test").read(0).boxes == [[(3, 4, 50, 30)]]


def test_files_of_no_set_are_told(everything, capsys):
    (everything / "benchmark" / "emotic.json").write_text("[]")
    (everything / "emotic_cot_train.jsonl").write_text("")
    prepare.main(["source=viscot", f"options.root={everything}", f"out={everything / 'out'}", "options.val=0.4"])
    said = [f"{name} is of no set that is read" for name in ("benchmark/emotic.json", "emotic_cot_train.jsonl")]
    assert all(f"note: {each}\n" in capsys.readouterr().out for each in said[:1])
    assert json.loads((everything / "out" / "manifest.json").read_text())["notes"] == said


def test_a_box_below_its_page_is_dropped_and_told(tmp_path):
    draw(tmp_path / "cot/dude/a.jpg")
    rows = [
        trained("dude", "a.jpg", boxes) for boxes in ([[5, 80, 9, 90]], [[5, 80, 9, 90], [1, 2, 3, 4]], [[9, 2, 3, 4]])
    ]
    write(tmp_path, {"dude": rows}, {"dude": [benchmarked("dude", "a.jpg", [5, 80, 9, 90])]})
    prepare.main(["source=viscot", f"options.root={tmp_path}", f"out={tmp_path / 'out'}", "options.val=0"])
    shards = Shards(tmp_path / "out", "train")
    assert [shards.read(index).boxes for index in range(3)] == [None, [[(1, 2, 3, 4)]], None]
    assert Shards(tmp_path / "out", "test").read(0).boxes is None
    splits = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    assert splits["train"]["lacking"]["count"] == 3
    assert splits["train"]["lacking"]["reasons"] == {"box (…, …, …, …) is not inside its image of … x …": 3}
    assert splits["test"]["lacking"]["first"] == [
        "viscot-dude-test-1: box (5, 80, 9, 90) is not inside its image of 60 x 40"
    ]


def test_boxes_of_a_picture_of_another_size_are_dropped_and_told(tmp_path):
    draw(tmp_path / "cot/gqa/a.jpg", (40, 60))
    write(tmp_path, {"gqa": [trained("gqa", "a.jpg", [[1, 2, 3, 4]])]}, {})
    (sample,) = read(tmp_path, "train", val=0)
    assert sample.boxes is None
    assert sample.left_out == "boxes in pixels of an image of 60 x 40, but it has 40 x 60"


def test_rows_that_are_none_are_named(tmp_path):
    draw(tmp_path / "cot/vsr/a.jpg")
    good = benchmarked("vsr", "a.jpg", [1, 2, 3, 4])
    bad = [{}, {**good, "conversations": good["conversations"][:2]}, {**good, "image": ["cot/vsr/a.jpg"]}, 5]
    bad += [{**good, "image": ["cot/vsr/a.jpg", "cot/vsr/a.jpg"]}, benchmarked("vsr", "b.jpg", [1, 2, 3, 4])]
    write(tmp_path, {}, {"vsr": [good, *bad]})
    found = read(tmp_path, "test")
    assert isinstance(found[0], Sample)
    assert [each.key for each in found[1:]] == [f"vsr:{number}" for number in range(2, 8)]
    assert str(found[6]) == 'there is no image "cot/vsr/b.jpg"'


def test_only_sets_that_are_asked_for(everything):
    assert [sample.kind for sample in read(everything, "test", sets=["vsr", "dude"])] == ["vsr", "dude"]
    (everything / "benchmark" / "dude.json").unlink()
    assert len(read(everything, "test")) == len(viscot.SETS) - 1
    with pytest.raises(UserError, match="there is no benchmark/dude.json in"):
        read(everything, "test", sets=["vsr", "dude"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sets": ["emotic"]}, "options.sets: no 'emotic'; choices are cub, docvqa"),
        ({"root": "nowhere"}, "options.root=nowhere: there is no such folder"),
        ({"root": "cot"}, r"options.root=cot: there is no <set>_cot_train.jsonl or benchmark/<set>.json"),
    ],
)
def test_mistakes_in_the_options_are_answered(everything, monkeypatch, options, said):
    monkeypatch.chdir(everything)
    with pytest.raises(UserError, match=said):
        viscot.present(merge_options(viscot.Options, {"root": ".", **options}, "options"))


# ------------------------------------------------------------------------------------------------------------ real rows


@pytest.mark.skipif(not REAL, reason="GLIMPSEPRUNE_VISCOT names no folder of real rows")
def test_real_rows_come_back_from_shards(tmp_path):
    """Question, answer and boxes of each, as the file has them, on pictures made for them."""
    expected: dict[str, dict] = {"train": {}, "test": {}}
    sizes: dict[str, tuple[int, int]] = {}
    for name in viscot.SETS:
        if (file := Path(REAL, f"train/{name}_cot_train.jsonl")).exists():
            for line, row in enumerate(map(json.loads, file.read_text().splitlines()), 1):
                sizes[f"{place(name)}/{row['image']}"] = row["width"], row["height"]
                inside = [box for box in row["bboxs"] if box[2] <= row["width"] and box[3] <= row["height"]]
                boxes = [list(map(tuple, inside))] if inside else None
                expected["train"][f"viscot-{name}-train-{line}"] = row["question"], row["answer"], boxes
        for number, row in enumerate(json.loads(Path(REAL, f"benchmark/{name}.json").read_text()), 1):
            path, marked = row["image"]
            box = tuple(map(float, marked.split("###[")[1].rstrip("]").split(",")))
            width, height = sizes.get(path, (1, 1))
            sizes[path] = max(width, int(box[2]) + 1), max(height, int(box[3]) + 1)
            question = row["conversations"][0]["value"].split("\n", 1)[1].split(" Please provide the bounding box")[0]
            answer = row["conversations"][3]["value"]
            expected["test"][f"viscot-{name}-test-{number}"] = question, answer, [[box]]
    for path, size in sizes.items():
        draw(tmp_path / path, size)
    argv = ["source=viscot", f"options.root={REAL}", f"options.images={tmp_path}", f"out={tmp_path / 'out'}"]
    prepare.main([*argv, "options.val=0"])
    splits = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    for split, rows in expected.items():
        shards = Shards(tmp_path / "out", split)
        found = {sample.key: sample for sample in map(shards.read, range(len(shards)))}
        assert "invalid" not in splits[split]
        assert found.keys() == rows.keys()
        for key, (question, answer, boxes) in rows.items():
            assert (found[key].question, found[key].answers, found[key].boxes) == (
                question.strip(),
                (answer.strip(),),
                boxes,
            )
    print(f"{len(expected['train'])} training rows, {len(expected['test'])} of the benchmark")
    print(splits["train"].get("lacking"), splits["test"].get("lacking"))
