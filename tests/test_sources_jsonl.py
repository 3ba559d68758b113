"""Rows of a user's own, through the command: every form of file, every kind of bad row, no picture in two splits."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import picture
from glimpseprune import prepare
from glimpseprune.config import UserError, merge_options
from glimpseprune.data.shards import Shards
from glimpseprune.data.sources import _fields, _rows, _splits, jsonl
from glimpseprune.types import Sample

ALL_TRAIN = {"train": 1.0}
ROWS = [
    {"image": "photos/0.png", "question": "what?", "answer": "a", "boxes": [[2, 3, 20, 21]], "kind": "word"},
    {"image": "photos/0.png", "question": "how many?", "answer": 3},
    {"image": "photos/1.png", "question": "which, \"those\"\nor these?", "answer": ["b", "c"], "boxes": [4, 5, 6, 7]},
    {"image": "photos/2.png", "question": "ü 本?", "answer": "0.50"},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        picture(40 + number, 30, number).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def write_rows(file: Path, rows: list) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        with open(file, "w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(
                stream, ["image", "question", "answer", "boxes", "kind"], delimiter=",\t"[file.suffix == ".tsv"]
            )
            table.writeheader()
            table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return file


def read(file: Path, split: str = "train", start: int = 0, stop: int | None = None, **options: object) -> list:
    options = merge_options(jsonl.Options, {"path": str(file), **options}, "options")
    return list(jsonl.samples(options, split, start, stop))


def only(folder: Path, row: object, **options: object) -> Sample | Exception:
    (found,) = read(write_rows(folder / "rows.jsonl", [row]), **{"shares": ALL_TRAIN, **options})
    return found


def cause(folder: Path, row: object, **options: object) -> str:
    """Why prepare leaves a row out."""
    file = write_rows(folder / "bad.jsonl", [ROWS[0], row])
    argv = [f"options.path={file}", "options.shares={train: 1}", *(f"options.{k}={v}" for k, v in options.items())]
    prepare.main(["source=jsonl", f"out={folder / 'data'}", "overwrite=true", *argv])
    entry = json.loads((folder / "data" / "manifest.json").read_text())["splits"]["train"]
    assert entry["count"] == entry["invalid"]["count"] == 1
    return entry["invalid"]["first"][0]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_all_forms_of_a_table_say_the_same(folder, ending):
    file = write_rows(folder / f"rows{ending}", ROWS)
    samples = read(file, shares=ALL_TRAIN)
    assert [sample.question for sample in samples] == [row["question"] for row in ROWS]
    assert [sample.answers for sample in samples] == [("a",), ("3",), ("b", "c"), ("0.50",)]
    assert [sample.boxes for sample in samples] == [[[(2, 3, 20, 21)]], None, [[(4, 5, 6, 7)]], None]
    assert [sample.kind for sample in samples] == ["word", "all", "all", "all"]
    assert [sample.key for sample in samples] == [f"rows-{number:07d}" for number in (1, 2, 3, 4)]
    assert [sample.scene for sample in samples] == [row["image"] for row in ROWS]
    assert samples[0].images[0] is samples[1].images[0]
    assert np.array_equal(samples[2].images[0], picture(41, 30, 1))


def test_one_command_makes_shards(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_rows(folder / "rows.jsonl", ROWS)
    prepare.main(["source=jsonl", "options.path=rows.jsonl", "out=data/mine", "options.shares={train: 1}"])
    shards = Shards("data/mine", "train")
    assert [shards.read(index).question for index in range(len(shards))] == [row["question"] for row in ROWS]


def test_json_may_hold_its_rows_inside(folder):
    for held in ({"info": "of a set", "data": ROWS}, {str(number): row for number, row in enumerate(ROWS)}):
        (folder / "rows.json").write_text(json.dumps(held))
        assert [sample.question for sample in read(folder / "rows.json", shares=ALL_TRAIN)] == [
            r["question"] for r in ROWS
        ]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(read(folder / "rows.json", shares=ALL_TRAIN)) == len(ROWS)


def test_parquet(folder):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    held = {"bytes": (folder / "photos" / "3.png").read_bytes(), "path": None}
    rows = [{"image": held, "question": f"{number}?", "answer": [str(number)]} for number in range(50)]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=20)
    samples = read(folder / "rows.parquet", shares=ALL_TRAIN)
    assert [sample.answers for sample in samples] == [(str(number),) for number in range(50)]
    assert np.array_equal(samples[0].images[0], picture(43, 30, 3))
    for start, stop in ((0, 3), (18, 24), (45, 99), (7, 8)):
        assert [s.key for s in read(folder / "rows.parquet", start=start, stop=stop, shares=ALL_TRAIN)] == [
            s.key for s in samples[start:stop]
        ]
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="bad.parquet: cannot be read"):
        read(folder / "bad.parquet")


def test_rows_of_parquet_that_are_read_in_their_order_are_read_once(folder, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"n": n} for n in range(90)]), folder / "n.parquet", row_group_size=20)
    rows, opened = _rows.table(folder / "n.parquet"), []
    whole = _rows.Parquet._file
    monkeypatch.setattr(_rows.Parquet, "_file", lambda self: (opened.append(1), whole(self))[1])
    for numbers, times in (([0, 1, 5, 17, 19], 1), ([25, 26, 39], 1), ([88, 89], 2), ([3, 2], 4)):
        assert [rows.read(number)["n"] for number in numbers] == numbers
        assert len(opened) == times, numbers


def test_without_pyarrow_parquet_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (folder / "rows.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(folder / "rows.parquet")


# --------------------------------------------------------------------------------------------------------------- fields


def test_fields_are_mapped_and_may_lead_inside(folder):
    row = {
        "images": ["0.png", "1.png"],
        "talk": [{"from": "human", "value": "<image>\n<image>\nwhat?"}, {"value": "x"}],
        "said": [{"answer": "yes"}, {"answer": "yes"}, {"answer": "no"}],
        "id": "odd/key 7",
        "topic": 5,
        "page": "p1",
    }
    names = {"question": "talk.0.value", "answer": "said.answer", "key": "id", "kind": "topic", "scene": "page"}
    sample = only(folder, row, images=str(folder / "photos"), suffix="\nBriefly.", dataset="pages", **names)
    assert sample.question == "what?\nBriefly."
    assert sample.answers == ("yes", "yes", "no")
    assert sample.key.startswith("odd-key-7-")
    assert (sample.kind, sample.scene, sample.dataset) == ("5", "p1", "pages")
    assert [image.size for image in sample.images] == [(40, 30), (41, 30)]


def test_different_texts_have_different_keys():
    texts = ["a", "a b", "a-b", "a/b", "a.b", "x" * 80, "x" * 81, "x" * 90, "ü", "本"]
    keys = [_fields.name_of(text) for text in texts]
    assert len(set(keys)) == len(texts)
    assert keys[0] == "a" and keys[2] == "a-b"


@pytest.mark.parametrize(
    ("frame", "order", "box"),
    [
        ("pixels", "xyxy", [4, 6, 20, 15]),
        ("pixels", "xywh", [4, 6, 16, 9]),
        ("pixels", "cxcywh", [12, 10.5, 16, 9]),
        ("pixels", "yxyx", [6, 4, 15, 20]),
        ("fraction", "xyxy", [0.1, 0.2, 0.5, 0.5]),
        ("fraction", "cxcywh", [0.3, 0.35, 0.4, 0.3]),
        ("thousand", "xywh", [100, 200, 400, 300]),
        ("thousand", "yxyx", [200, 100, 500, 500]),
    ],
)
def test_boxes_of_any_frame_and_order(folder, frame, order, box):
    sample = only(folder, {**ROWS[0], "boxes": [box]}, frame=frame, order=order)
    assert np.allclose(sample.boxes, [[[4, 6, 20, 15]]])


def test_boxes_are_in_pixels_of_the_picture_as_it_is_shown(folder):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(40, 30).save(folder / "photos" / "turned.jpg", exif=turned)
    sample = only(folder, {**ROWS[0], "image": "photos/turned.jpg", "boxes": [[0, 0, 1, 1]]}, frame="fraction")
    assert sample.boxes == [[(0, 0, 30, 40)]]


def test_boxes_of_several_pictures(folder):
    row = {**ROWS[0], "image": ["photos/0.png", "photos/1.png"]}
    assert only(folder, {**row, "boxes": [[], [[1, 2, 3, 4]]]}).boxes == [[], [(1, 2, 3, 4)]]
    assert only(folder, {**row, "boxes": [[], []]}).boxes is None
    assert "a list for each" in str(only(folder, {**row, "boxes": [[1, 2, 3, 4]]}))


def test_a_box_over_the_edge_by_a_rounding_is_put_on_it(folder):
    assert only(folder, {**ROWS[0], "boxes": [[-0.4, 0, 40.9, 31]]}).boxes == [[(0, 0, 40, 30)]]


def test_a_bad_box_may_be_dropped_alone(folder):
    file = write_rows(folder / "rows.jsonl", [{**ROWS[0], "boxes": [[1, 2, 3, 4], [5, 50, 6, 60]]}, ROWS[1]])
    argv = [f"options.path={file}", "options.shares={train: 1}", "options.bad_boxes=drop"]
    prepare.main(["source=jsonl", f"out={folder / 'data'}", *argv])
    assert Shards(folder / "data", "train").read(0).boxes == [[(1, 2, 3, 4)]]
    entry = json.loads((folder / "data" / "manifest.json").read_text())["splits"]["train"]
    assert entry["count"] == 2 and "invalid" not in entry
    assert entry["lacking"]["first"] == ["rows-0000001: box (5, 50, 6, 60) is not inside its image of 40 x 30"]


# ------------------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "photos/9.png"}, 'bad:2: there is no image "photos/9.png"'),
        ({"image": "photos"}, "it is no file"),
        ({"image": "."}, "lies outside of the folder"),
        ({"image": "photos/0.png/x"}, "there is no image"),
        ({"image": ""}, "an image must be the path of a file"),
        ({"image": None}, "an image must be the path of a file, not null"),
        ({"image": [], "boxes": None}, "0 images: there must be 1 to 64"),
        ({"image": 5}, "an image must be the path of a file"),
        ({"image": "https://x.org/a.png"}, "is an address"),
        ({"image": "a\0b"}, "there is no image"),
        ({"image": "cut.png"}, "cannot be read"),
        ({"image": "text.png"}, "is no picture that can be read"),
        ({"image": "thin.png"}, "the sides differ by more than"),
        ({"question": " "}, "question must be a text that is not empty"),
        ({"question": 7}, "field 'question' must be a text"),
        ({"answer": None}, "an answer must be a text or a number, not null"),
        ({"answer": True}, "an answer must be a text or a number, not bool"),
        ({"answer": {"a": 1}}, "an answer must be a text or a number, not dict"),
        ({"answer": []}, "answers must be one or more texts"),
        ({"boxes": [[1, 2, 3]]}, "it must be four finite numbers"),
        ({"boxes": [0]}, "it must be four finite numbers"),
        ({"boxes": [[1, 2, 3, 10**400]]}, "too large"),
        ({"boxes": [[1, 2, 3, float("nan")]]}, "it must be four finite numbers"),
        ({"boxes": [["1", 2, 3, 4]]}, "it must be four finite numbers"),
        ({"boxes": [[9, 2, 3, 4]]}, "is not inside its image of 40 x 30"),
        ({"boxes": [[1, 2, 3, 40]]}, "is not inside its image of 40 x 30"),
        ({"boxes": [[1, 2, 3, 31.5]]}, "is not inside its image of 40 x 30"),
        ({"boxes": "1 2 3 4"}, "boxes must be four numbers"),
        ({"boxes": [[[[[1]]]]]}, "boxes must be four numbers"),
        ({"key": {}}, "a key must be a text or a number"),
    ],
)
def test_a_bad_row_is_left_out_and_says_why(folder, change, said):
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "photos" / "0.png").read_bytes()[:-2000])
    Image.new("L", (2010, 10)).save(folder / "thin.png")
    assert said in cause(folder, {**ROWS[0], **change})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "the row is no JSON"),
        ("[" * 100_000, "the row is no JSON"),
        ("[1]", "the row is no object with fields, but a list"),
        ('{"image": "photos/0.png", "question": "?"}', "there is no field 'answer', only 'image', 'question'"),
        ('{"x": "' + "a" * (1 << 20) + '"}', "the row has 1048585 bytes"),
    ],
)
def test_a_line_that_is_no_row_is_left_out_and_says_why(folder, line, said):
    assert said in cause(folder, line)


def test_no_path_leads_out_of_the_folder(folder):
    secret = folder.parent / f"{folder.name}-secret.png"
    picture(40, 30).save(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "away").symlink_to(folder.parent)
    (folder / "inner.png").symlink_to(folder / "photos" / "0.png")
    for name in (f"../{secret.name}", str(secret), "link.png", f"away/{secret.name}", f"photos/../../{secret.name}"):
        assert "lies outside of the folder" in str(only(folder, {**ROWS[0], "image": name})), name
    for name in ("inner.png", "photos/../photos/0.png", str(folder / "photos" / "0.png")):
        found = only(folder, {**ROWS[0], "image": name})
        assert found.scene == "photos/0.png", name


def test_a_pipe_or_a_huge_file_is_not_read(folder):
    os.mkfifo(folder / "pipe.png")
    with open(folder / "huge.png", "wb") as stream:
        stream.truncate(1 << 40)
    assert "it is no file" in str(only(folder, {**ROWS[0], "image": "pipe.png"}))
    assert "has 1099511627776 bytes" in str(only(folder, {**ROWS[0], "image": "huge.png"}))
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError, match="it is no file"):
        read(folder / "pipe.jsonl")


def odd(rng: np.random.Generator, depth: int = 0) -> object:
    """Any JSON, with what is most likely to be stumbled over."""
    texts = ["", "a", "photos/0.png", "\ud800", "a\0", "../..", "/", "x" * 9000, "https://x", "photos/cut.png"]
    plain = [*texts, 0, -1, 10**400, 1e308, 0.5, True, None]
    kind = rng.integers(8) if depth < 4 else 7
    if kind == 0:
        return [odd(rng, depth + 1) for _ in range(rng.integers(6))]
    if kind == 1:
        names = rng.choice(["bytes", "path", "text", "0", "a.b"], rng.integers(3))
        return {str(name): odd(rng, depth + 1) for name in names}
    if kind == 2:
        numbers = [*range(-5, 45), 0.25, 10**400, -(10**400), 1e308, float("nan"), "1"]
        return [[numbers[at] for at in rng.integers(len(numbers), size=4)] for _ in range(rng.integers(3))]
    return plain[rng.integers(len(plain))]


@pytest.mark.parametrize("frame", ["pixels", "fraction", "thousand"])
def test_whatever_a_row_holds_it_is_a_sample_or_unfit(folder, frame):
    (folder / "photos" / "cut.png").write_bytes((folder / "photos" / "0.png").read_bytes()[:500])
    rng = np.random.default_rng(7)
    names = ["image", "question", "answer", "boxes", "kind", "key", "scene", "width", "height", "images", "answers"]
    rows = []
    for _ in range(600):
        changed = {str(name): odd(rng) for name in rng.choice(names, rng.integers(1, 4))}
        rows.append({**ROWS[rng.integers(4)], **changed})
    file = write_rows(folder / "rows.jsonl", rows)
    found = [each for split in jsonl.splits for each in read(file, split, frame=frame, order="cxcywh")]
    assert len(found) == len(rows)
    fit = [each for each in found if isinstance(each, Sample)]
    assert all(isinstance(each, _splits.Unfit) for each in found if not isinstance(each, Sample))
    assert 30 < len(fit) < 570


def test_bad_rows_are_counted_by_cause(folder):
    bad = [{**ROWS[0], "image": f"no{number}.png"} for number in range(7)] + [
        {**ROWS[0], "boxes": [n, 0, 1, 99]} for n in (2, 3)
    ]
    file = write_rows(folder / "rows.jsonl", [bad[0], *ROWS, *bad[1:]])
    prepare.main(["source=jsonl", f"out={folder / 'data'}", f"options.path={file}"])
    splits = json.loads((folder / "data" / "manifest.json").read_text())["splits"]
    told = [entry["invalid"] for entry in splits.values() if "invalid" in entry]
    assert sum(entry["count"] for entry in splits.values()) == len(ROWS)
    assert sum(each["count"] for each in told) == len(bad)
    counts = {cause: sum(each["reasons"].get(cause, 0) for each in told) for each in told for cause in each["reasons"]}
    assert counts == {"there is no image …": 7, "box (…, …, …, …) is not inside its image of … x …": 2}


def test_a_key_that_stands_twice_is_a_bad_row(folder):
    rows = [{**ROWS[0], "id": "a"}, {**ROWS[1], "id": "b"}, {**ROWS[2], "id": "a"}]
    found = read(write_rows(folder / "rows.jsonl", rows), shares=ALL_TRAIN, key="id")
    assert [getattr(each, "key", "") for each in found] == ["a", "b", "rows:3"]
    assert str(found[2]) == "another row before it has this key"


def test_lines_are_counted_as_an_editor_does(folder):
    file = folder / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(ROWS[0]).encode(), b"", json.dumps(ROWS[1]).encode()]))
    assert [sample.key for sample in read(file, shares=ALL_TRAIN)] == ["rows-0000001", "rows-0000003"]


def test_cells_that_are_no_row_are_named(folder):
    (folder / "rows.csv").write_text("image,question,answer\nphotos/0.png,a?,b\nphotos/0.png,a?,b,c\nphotos/0.png,a?\n")
    found = read(folder / "rows.csv", shares=ALL_TRAIN)
    assert [str(each) for each in found[1:]] == [
        "the row has more cells than the first line has names",
        "there is no field 'answer', only 'image', 'question'",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "no.jsonl"}, "no.jsonl: cannot be read: No such file"),
        ({"path": "rows.txt"}, r"rows.txt: its name must end in one of .jsonl, .ndjson"),
        ({"path": "rows.json"}, "rows.json: cannot be read: it must be a list"),
        ({"images": "nowhere"}, "options.images=nowhere: there is no such folder"),
        ({"shares": {"train": 0.5}}, "must add up to 1"),
        ({"shares": {"dev": 1}}, "options.shares.dev: the splits are train, val, test"),
        ({"shares": {"train": 2, "val": -1}}, "options.shares.train: give 0 to 1"),
        ({"order": "xyx"}, "options.order: expected 'xyxy'"),
        ({"imgae": "x"}, "did you mean 'options.image'"),
    ],
)
def test_mistakes_in_the_options_are_answered(folder, monkeypatch, options, said):
    monkeypatch.chdir(folder)
    (folder / "rows.json").write_text("3")
    write_rows(folder / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=said):
        read(**{"file": "rows.jsonl", **options}) if "path" not in options else read(options["path"])


# --------------------------------------------------------------------------------------------------------------- splits


def many(folder: Path, count: int = 300) -> Path:
    """Rows on pictures that are links to a few, which count as those; every third is on two of them."""
    names = [f"photos/{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        if not (folder / name).exists():
            Image.new("L", (8, 8), number % 256).save(folder / name)
    rows = [{"image": name, "question": f"{turn}?", "answer": "a"} for name in names for turn in range(2)]
    rows += [{"image": [names[n], names[n + 1]], "question": "2?", "answer": "a"} for n in range(0, count - 1, 6)]
    return write_rows(folder / "rows.jsonl", rows)


def scenes(file: Path, **options: object) -> dict[str, set[str]]:
    return {
        split: {name for each in read(file, split, **options) for name in each.scene.split()} for split in jsonl.splits
    }


def test_no_picture_is_in_two_splits(folder):
    file = many(folder)
    found = scenes(file, shares={"train": 0.6, "val": 0.2, "test": 0.2})
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]
    counts = {split: len(names) for split, names in found.items()}
    assert sum(counts.values()) == 300
    assert 140 < counts["train"] < 220 and 30 < counts["val"] < 90
    assert found != scenes(file, shares={"train": 0.6, "val": 0.2, "test": 0.2}, seed=1)


def test_more_rows_move_no_others(folder):
    file = many(folder)
    before = scenes(file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, "image": row["image"][::-1] if isinstance(row["image"], list) else row["image"]} for row in rows]
    Image.new("L", (8, 8)).save(folder / "new.png")
    after = scenes(write_rows(file, [{"image": "new.png", "question": "?", "answer": "a"}, *rows[::-1]]))
    assert all(before[split] <= after[split] for split in before)


def test_a_field_may_name_the_split(folder):
    rows = [{**ROWS[0], "set": name} for name in ("train", "validation", "dev", "Test", "other")]
    file = write_rows(folder / "rows.jsonl", rows)
    assert [each.key for each in read(file, "train", split_field="set")] == ["rows-0000001", "rows:5"]
    assert [each.key for each in read(file, "val", split_field="set")] == ["rows-0000002", "rows-0000003"]
    assert [each.key for each in read(file, "test", split_field="set")] == ["rows-0000004"]


def test_workers_write_the_same_folder_and_the_rows_are_read_once(folder, monkeypatch):
    file = many(folder, 60)
    loads, read_rows = [], _rows.Lines.__init__
    monkeypatch.setattr(_rows.Lines, "__init__", lambda self, path: (loads.append(path), read_rows(self, path))[1])
    for workers in (1, 3):
        argv = [f"options.path={file}", "shard_size=5", f"workers={workers}"]
        prepare.main(["source=jsonl", f"out={folder / str(workers)}", *argv])
    one, three = ({p.name: p.read_bytes() for p in (folder / name).iterdir()} for name in ("1", "3"))
    assert one == three
    assert len(loads) == 1


def test_a_file_that_has_changed_is_read_again(folder):
    file = write_rows(folder / "rows.jsonl", ROWS)
    assert len(read(file, shares=ALL_TRAIN)) == 4
    write_rows(file, ROWS[:2])
    assert len(read(file, shares=ALL_TRAIN)) == 2
