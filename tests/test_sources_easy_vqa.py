"""easy-VQA, on a package of a few pictures that stands in for it; and on the real one where it is installed."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageDraw

from glimpseprune.config import UserError
from glimpseprune.data.sources import easy_vqa
from glimpseprune.data.sources.easy_vqa import Options

PICTURES = 60


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Two questions on each picture; the shape of picture n begins n % 20 pixels from the left."""
    for part in ("train", "test"):
        (tmp_path / "data" / part / "images").mkdir(parents=True)
        rows = []
        for number in range(PICTURES):
            image = Image.new("RGB", (64, 64), (250, 240, 235))
            ImageDraw.Draw(image).rectangle((number % 20, 10, 39, 29), "blue")
            image.save(tmp_path / "data" / part / "images" / f"{number}.png")
            rows += [
                ["what shape?", "rectangle", number],
                ["is it blue?", "yes", number],
                ["what color?", "blue", number],
            ]
        (tmp_path / "data" / part / "questions.json").write_text(json.dumps(rows))
    module = ModuleType("easy_vqa")
    module.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    easy_vqa._questions.cache_clear()
    yield
    easy_vqa._questions.cache_clear()


def test_questions_with_the_box_of_their_shape(package):
    found = list(easy_vqa.samples(Options(size=128), "test", 21, 24))
    assert [(s.question, s.answers, s.kind) for s in found] == [
        ("what shape?", ("rectangle",), "shape"),
        ("is it blue?", ("yes",), "yesno"),
        ("what color?", ("blue",), "colour"),
    ]
    assert all(s.boxes == [[(14.0, 20.0, 80.0, 60.0)]] for s in found)
    assert found[0].images[0].size == (128, 128)
    assert np.array_equal(np.asarray(found[0].images[0])[40, 40], (0, 0, 255))


def test_no_picture_is_in_two_splits(package):
    scenes = [{s.scene for s in easy_vqa.samples(Options(val=0.3), split)} for split in easy_vqa.splits]
    assert sum(map(len, scenes)) == len(set.union(*scenes)) == 2 * PICTURES
    assert 5 < len(scenes[1]) < 35
    assert scenes[1] != {s.scene for s in easy_vqa.samples(Options(val=0.3, seed=1), "val")}


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    easy_vqa._questions.cache_clear()
    with pytest.raises(UserError, match="pip install easy-vqa"):
        next(easy_vqa.samples(Options(), "train"))


def test_the_real_package_is_read_whole():
    pytest.importorskip("easy_vqa")
    counts = [len(easy_vqa._questions(split, 0.05, 0)) for split in easy_vqa.splits]
    assert counts[0] + counts[1] == 38575 and counts[2] == 9673
    assert 0.03 < counts[1] / 38575 < 0.07
