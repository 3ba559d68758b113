"""Tables of the library ``datasets``: saved ones, Parquet files, a name; where it is installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from conftest import picture
from glimpseprune import prepare
from glimpseprune.config import UserError, merge_options
from glimpseprune.data.shards import Shards
from glimpseprune.data.sources import hf

COUNT = 12


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return pytest.importorskip("datasets")


def table(datasets, many: bool = False):
    """Rows with the picture inside: numbers 0 to COUNT, two rows on each picture; or a list of two pictures."""
    image = datasets.Image()
    features = {
        "image": datasets.List(image) if many else image,
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
    }
    rows = [
        {
            "image": [picture(40, 30, n // 2), picture(30, 40, n // 2)] if many else picture(40, 30, n // 2),
            "question": f"{n}?",
            "answers": [str(n), "x"],
            "bbox": [[1, 2, 3, 4]],
        }
        for n in range(COUNT)
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def read(path, split: str = "train", start: int = 0, stop: int | None = None, **options: object) -> list:
    return list(hf.samples(merge_options(hf.Options, {"path": str(path), **options}, "options"), split, start, stop))


def test_a_saved_table(datasets, tmp_path):
    table(datasets).save_to_disk(tmp_path / "saved")
    given = {"shares": {"train": 1}, "boxes": "bbox", "order": "xywh"}
    samples = read(tmp_path / "saved", **given)
    assert [sample.question for sample in samples] == [f"{number}?" for number in range(COUNT)]
    assert samples[5].answers == ("5", "x")
    assert samples[5].boxes == [[(1, 2, 4, 6)]]
    assert np.array_equal(samples[5].images[0], picture(40, 30, 2))
    assert samples[4].scene == samples[5].scene != samples[6].scene
    assert [sample.key for sample in read(tmp_path / "saved", start=3, stop=5, **given)] == [
        s.key for s in samples[3:5]
    ]


def test_no_picture_is_in_two_splits(datasets, tmp_path):
    table(datasets).save_to_disk(tmp_path / "saved")
    shares = {"train": 0.4, "val": 0.3, "test": 0.3}
    scenes = [{s.scene for s in read(tmp_path / "saved", split, shares=shares)} for split in hf.splits]
    assert sum(map(len, scenes)) == len(set.union(*scenes)) == COUNT // 2


def test_parts_keep_their_names(datasets, tmp_path):
    parts = {"train": table(datasets), "validation": table(datasets).select(range(3))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    prepare.main(
        ["source=hf", f"options.path={tmp_path / 'saved'}", f"out={tmp_path / 'out'}", "workers=2", "shard_size=5"]
    )
    assert len(Shards(tmp_path / "out", "train")) == COUNT
    assert len(Shards(tmp_path / "out", "val")) == 3
    assert np.array_equal(Shards(tmp_path / "out", "val").read(2).images[0], picture(40, 30, 1))
    parts["extra"] = parts["train"]
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "more")
    with pytest.raises(UserError, match="part 'extra' is none of train, val, test"):
        read(tmp_path / "more")


def test_lists_of_pictures(datasets, tmp_path):
    table(datasets, many=True).save_to_disk(tmp_path / "saved")
    sample = read(tmp_path / "saved", shares={"train": 1})[0]
    assert [image.size for image in sample.images] == [(40, 30), (30, 40)]


def test_a_folder_of_parquet_files(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        table(datasets).to_parquet(tmp_path / "files" / f"{split}-00000.parquet")
    assert len(read(tmp_path / "files")) == len(read(tmp_path / "files", "test")) == COUNT


def test_what_is_no_table_is_named(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"options.path=.*empty: cannot be read as a table"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"options.path=no/such-name-anywhere: cannot be read as a table"):
        read("no/such-name-anywhere")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read("a/b")
