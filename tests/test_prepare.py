"""prepare: the same folder for any number of workers, whole or not at all, and no user mistake without an answer."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from glimpseprune import lookup, prepare
from glimpseprune.data import sources
from glimpseprune.data.journal import JOURNAL
from glimpseprune.data.shards import Shards

SOURCE = '''
"""A source made by a test."""
import dataclasses

from glimpseprune.config import UserError, option
from glimpseprune.types import Sample
from PIL import Image

splits = ("train", "val")

@dataclasses.dataclass
class Options:
    count: int = option(23, "samples of train")
    bad: list[int] = option([], "these are invalid")
    odd: str = option("odd", "a kind")
    lost: int = option(-1, "this one cannot be read")
    twice: bool = option(False, "all keys are the same")
    crash: bool = option(False, "break down in the middle")

def samples(options, split, {parameters}):
    total = options.count if split == "train" else 3
    for i in range({range}):
        if options.crash and i == 5:
            raise RuntimeError("disk on fire")
        if i == options.lost:
            yield OSError("lost [/at] sea")
            continue
        yield Sample(
            key="same" if options.twice else f"{{split}}-{{i}}",
            question="" if i in options.bad else "how many?",
            answers=(str(i),),
            images=[Image.new("RGB", (8, 6), (i, 2 * i, 3 * i))],
            kind="even" if i % 2 == 0 else options.odd,
        )
'''


@pytest.fixture(autouse=True)
def made_sources(tmp_path, monkeypatch):
    """Sources `stream`, read from its beginning only, and `sliced`, whose slices can be drawn alone."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "stream.py").write_text(SOURCE.format(parameters="*_", range="total"))
    sliced = "start, total if stop is None else min(stop, total)"
    (folder / "sliced.py").write_text(SOURCE.format(parameters="start=0, stop=None", range=sliced))
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keys(folder: Path, split: str) -> list[str]:
    reader = Shards(folder, split)
    return [reader.read(i).key for i in range(len(reader))]


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(arg) for arg in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_writes_all_splits_and_a_table(tmp_path, capsys):
    prepare.main(["source=stream", f"out={tmp_path}/data", "shard_size=10", "options.count=23"])
    assert keys(tmp_path / "data", "train") == [f"train-{i}" for i in range(23)]
    assert keys(tmp_path / "data", "val") == ["val-0", "val-1", "val-2"]
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())["splits"]
    assert [shard["count"] for shard in manifest["train"]["shards"]] == [10, 10, 3]
    assert manifest["train"]["source"] == "stream"
    assert manifest["train"]["options"]["count"] == 23
    printed = " ".join(capsys.readouterr().out.split())
    assert "train │ 23 │ even 12, odd 11 │ 3 │" in printed
    assert "val │ 3 │ even 2, odd 1 │ 1 │" in printed
    assert [path.name for path in tmp_path.iterdir() if path.name != "sources"] == ["data"]


@pytest.mark.parametrize("limit", [None, 1, 10, 17, 20, 23, 99])
@pytest.mark.parametrize("source", ["stream", "sliced"])
def test_parts_make_up_the_same_shards_for_any_number_of_them(tmp_path, source, limit):
    options = lookup.find(prepare.SOURCES, source).Options()
    folders = []
    for parts in (1, 2, 3, 5):
        folder = tmp_path / f"of-{parts}"
        folder.mkdir()
        job = prepare.Job(source, options, "train", folder, 5, limit)
        count = Mock()
        entries = [entry for part in range(parts) for entry in job.write(part, parts, count)]
        assert sum(entry["count"] for entry in entries) == count.done.call_count == min(23, limit or 23)
        shutil.rmtree(folder / JOURNAL)
        folders.append(content(folder))
    assert all(folder == folders[0] for folder in folders)
    assert len(folders[0]) == -(-min(23, limit or 23) // 5)


@pytest.mark.parametrize("source", ["stream", "sliced"])
def test_workers_write_the_same_folder(tmp_path, source):
    for workers in (1, 2, 3):
        argv = [f"source={source}", f"out={tmp_path}/{workers}", "shard_size=4", f"workers={workers}", "limit=22"]
        prepare.main(argv)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert keys(tmp_path / "2", "train") == [f"train-{i}" for i in range(22)]


@pytest.mark.parametrize("source", ["stream", "sliced"])
def test_invalid_samples_are_left_out_counted_and_named(tmp_path, capsys, source):
    """Here all of the second shard and more; with any number of workers."""
    bad = [1, *range(4, 8), 9]
    for workers in (1, 2, 3):
        argv = [f"source={source}", f"out={tmp_path}/{workers}", "shard_size=4", f"workers={workers}", "splits=[train]"]
        prepare.main([*argv, f"options.bad={bad}", "options.lost=10", f"max_invalid={len(bad) + 1}"])
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert keys(tmp_path / "1", "train") == [f"train-{i}" for i in range(23) if i not in (*bad, 10)]
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())["splits"]["train"]
    assert [shard["count"] for shard in manifest["shards"]] == [3, 2, 4, 4, 3]
    assert manifest["count"] == 16
    why = "question must be a text that is not empty"
    assert manifest["invalid"]["count"] == 7
    assert manifest["invalid"]["reasons"] == {why: 6, "lost [/at] sea": 1}
    assert manifest["invalid"]["first"][0] == f"train-1: {why}"
    assert manifest["invalid"]["first"][-1] == "OSError: lost [/at] sea"
    assert manifest["invalid"]["examples"][why] == [f"train-{i}: {why}" for i in (1, 4, 5)]
    assert manifest["rows"] == 23
    printed = capsys.readouterr().out
    assert "train: 16 of 23 samples written, 7 left out\n" in printed
    assert "│ train │ left out │       6 │ question must be a" in printed
    assert "│ train │ left out │       1 │ lost [/at] sea" in printed


def test_what_is_printed_is_never_markup(tmp_path, capsys):
    odd = json.dumps("[/odd] \u202e")
    prepare.main(["source=stream", f"out={tmp_path}/[/out]", f"options.odd={odd}", "splits=[val]"])
    printed = capsys.readouterr().out
    assert "[/odd] \\u202e 1" in printed
    assert "[/out]" in printed


def test_chosen_splits_options_and_image_format(tmp_path):
    prepare.main(["source=stream", f"out={tmp_path}/data", "splits=[val]", "image_format=jpg"])
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert list(manifest["splits"]) == ["val"]
    assert b"val-0.0.jpg" in (tmp_path / "data" / "val-000000.tar").read_bytes()


def test_a_folder_is_replaced_only_on_demand_and_only_if_it_is_ours(tmp_path, capsys):
    out = tmp_path / "data"
    out.mkdir()
    argv = ["source=stream", f"out={out}", "splits=[val]"]
    prepare.main(argv)  # an empty folder is free
    before = content(out)
    capsys.readouterr()
    assert "it holds manifest.json, val-000000.tar" in refused(capsys, *argv, "limit=1")
    assert content(out) == before
    prepare.main([*argv, "limit=1", "overwrite=true"])
    assert keys(out, "val") == ["val-0"]
    (out / "thesis.tex").write_text("years of work")
    capsys.readouterr()
    assert "holds thesis.tex" in refused(capsys, *argv, "overwrite=true")
    home = tmp_path / "home"
    home.mkdir()
    (home / "backup.tar").write_text("")
    assert "holds backup.tar" in refused(capsys, "source=stream", f"out={home}", "overwrite=true")
    assert "is a file" in refused(capsys, "source=stream", f"out={out}/thesis.tex", "overwrite=true")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["source=streem"], "did you mean 'stream'?"),
        (["source=stream", "splits=[trian]"], "did you mean 'train'?"),
        (["source=stream", "options.cuont=3"], "unknown key 'options.cuont': did you mean 'options.count'?"),
        (["source=stream", "options.count=many"], "options.count: expected int, got 'many'"),
        (["source=stream", "shard_size=0"], "shard_size: give 1 to 1000000, got 0"),
        (["source=stream", "image_format=gif"], "image_format: expected 'auto' | 'png' | 'jpg', got 'gif'"),
        (["source=stream", "splits=[]"], "splits is empty"),
        (["source=stream", "options.bad=[3]", "max_invalid=0"], "an invalid sample 'train-3': question must be a text"),
        (["source=stream", "options.bad=[1,2,4]", "max_invalid=2"], "more than max_invalid=2 invalid samples, such as"),
        (["source=stream", "options.count=2", "options.bad=[0,1]"], "all 2 samples of split 'train' are invalid, the"),
        (["source=stream", "options.twice=true"], "1 keys stand more than once, such as 'same'"),
        (["source=stream", "options.count=0"], "no samples for split 'train'"),
        ([], "missing mandatory key 'source'"),
    ],
)
def test_mistakes_are_answered_and_leave_nothing_behind(tmp_path, capsys, argv, words):
    assert words in refused(capsys, f"out={tmp_path}/data", "shard_size=5", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_leaves_what_was_there(tmp_path, workers):
    argv = ["source=sliced", f"out={tmp_path}/data", "shard_size=3", f"workers={workers}"]
    prepare.main(argv)
    before = content(tmp_path / "data")
    with pytest.raises(RuntimeError, match="disk on fire"):
        prepare.main([*argv, "overwrite=true", "options.crash=true"])
    assert content(tmp_path / "data") == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".data.partial") == ["data", "sources"]


def test_a_source_may_be_a_file_of_ones_own(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.py").write_text(
        SOURCE.format(parameters="start=0, stop=None", range="start, total if stop is None else min(stop, total)")
    )
    monkeypatch.chdir(own)
    for workers in (1, 2):
        prepare.main(
            ["source=./mine.py", f"out={tmp_path}/{workers}", "options.count=9", "shard_size=4", f"workers={workers}"]
        )
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert keys(tmp_path / "1", "train") == [f"train-{i}" for i in range(9)]
