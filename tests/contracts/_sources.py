"""Raw files for the sources that need some: name of a source -> what writes them into a folder, and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import picture
from glimpseprune.data.shards import write
from glimpseprune.types import Sample

SPLITS = ("train", "val", "test")
COUNT = 14  # of each split


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Two questions on each picture, one split after the other."""
    rows = []
    for place in range(3 * COUNT):
        split, name = SPLITS[place % 3], f"{place % 3}-{place // 6}.png"
        picture(30, 40, place // 6).save(folder / name)
        rows.append({"image": name, "question": f"{place}?", "answer": "a", "boxes": [[1, 2, 3, 4]], "split": split})
    return rows


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def jsonl(folder: Path) -> dict[str, Any]:
    _lines(folder / "rows.jsonl", _rows(folder))
    return {"path": str(folder / "rows.jsonl"), "split_field": "split"}


def hf(folder: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(_rows(folder)).save_to_disk(folder / "saved")
    return {"path": str(folder / "saved"), "images": str(folder), "split_field": "split"}


def mined(folder: Path) -> dict[str, Any]:
    for split in SPLITS:
        write([Sample(f"{split}-{n}", "?", ("a",), [picture(28, 28, n)]) for n in range(COUNT)], folder, split=split)
    _lines(folder / "said.jsonl", [{"method": "m", "key": f"train-{n}", "score": 0} for n in range(COUNT)])
    return {"root": str(folder), "predictions": str(folder / "said.jsonl")}


def viscot(folder: Path) -> dict[str, Any]:
    (folder / "cot" / "vsr").mkdir(parents=True)
    (folder / "benchmark").mkdir()
    rows = _rows(folder / "cot" / "vsr")
    size = {"width": 30, "height": 40}
    _lines(folder / "vsr_cot_train.jsonl", [{**row, **size, "bboxs": row["boxes"]} for row in rows])
    paths = [(f"cot/vsr/{row['image']}", f"cot/vsr/{row['image']}###[1, 2, 3, 4]") for row in rows]
    talks = [[{"value": text} for text in (row["question"], "", "", row["answer"])] for row in rows]
    benchmark = [{"image": image, "conversations": talk} for image, talk in zip(paths, talks)]
    (folder / "benchmark" / "vsr.json").write_text(json.dumps(benchmark))
    return {"root": str(folder), "val": 0.5}


def official(folder: Path) -> dict[str, Any]:
    rows = [{"imgname": row["image"], "query": row["question"], "label": row["answer"]} for row in _rows(folder)]
    for split in SPLITS:
        (folder / split).mkdir()
        (folder / split / f"{split}_human.json").write_text(json.dumps(rows))
    return {"set": "chartqa", "root": str(folder)}


RAW = {"jsonl": jsonl, "hf": hf, "mined": mined, "viscot": viscot, "official": official}
