"""Which names are asked of the hub, and what is said when it does not answer. Nothing here asks it."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from glimpseprune import checkpoint, hub
from glimpseprune.config import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What would have been asked of the hub, which cannot be reached."""
    calls = []

    def refuse(name, **settings):
        calls.append((name, settings))
        raise LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return calls


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "llava-hf/llava-1.5-7b-hf", "a/b", "0x_/1.0_-"])
def test_what_can_only_be_an_id_is_asked(name, asked):
    assert hub.is_id(name)
    with pytest.raises(UserError) as error:
        hub.folder(name)
    said = str(error.value)
    assert said.startswith(f"no checkpoint at '{name}': no such folder (seen from ") and "cannot be reached" in said
    assert "\n" not in said and len(asked) == 1 and asked[0][1]["etag_timeout"] <= 10
    with pytest.raises(UserError, match=f"hf download {name}"):
        hub.folder(name, download=False)
    assert asked[1][1]["local_files_only"]


@pytest.mark.parametrize(
    "name",
    [
        "models/bse", "runs/demo", "runs/best", "data/tiny", "conf/x", "./a/b", "./b", "../b", "~/b", "/b", "/a/b",
        "a", "a/b/c", "a/", "/", ".", "a//b", "a/.b", ".a/b", "a b/c", "a/b\n", "models", "a\\b/c d", "", "a/\0",
        "x" * 9999, "notes.txt/b",
    ],
)  # fmt: skip
def test_what_may_be_a_folder_is_not(name, asked):
    assert not hub.is_id(name)
    if name not in (".", "/", "models", ""):
        with pytest.raises(UserError, match="there is no such folder"):
            hub.folder(name)
    assert not asked


def test_why_it_is_not_is_said(asked, tmp_path):
    with pytest.raises(UserError, match=f"seen from {tmp_path}.*'models' is a folder here, so the hub is not asked"):
        hub.folder("models/bse")
    with pytest.raises(UserError, match="'notes.txt' is a file: give the folder"):
        hub.folder("notes.txt")
    assert not asked


def test_folders_here_and_of_the_package_come_first(asked, tmp_path):
    assert hub.folder("models/base").is_dir() and hub.folder(tmp_path / "models").is_dir()
    assert (hub.folder("data/tiny-qwen2_5_vl") / "config.json").is_file()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert str(hub.folder("owner/name")) == "owner/name" and not asked


def test_nothing_that_is_downloaded_says_which_file_is_run(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("raise SystemExit('this was run')")
    saved = "pruner: {name: ./mine.py}\nbackbone: {path: x}\ndata: {path: x}\n"
    (tmp_path / "models" / "base" / "config.yaml").write_text(saved)
    monkeypatch.setattr(hub, "folder", lambda name, *_: tmp_path / "models" / "base")
    with pytest.raises(UserError, match=r"^'owner/name' names the file ./mine.py as its method"):
        checkpoint.read_config("owner/name")
    assert checkpoint.read_config("models/base").pruner.name == "./mine.py"
