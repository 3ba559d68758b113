"""Files are written whole, with the permissions of the umask, in one place; a disk that refuses is one line."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import glimpseprune
from glimpseprune import config, files

ROOT = Path(glimpseprune.__file__).parent
RAW = re.compile(
    r"""\.write_text\(|\.write_bytes\(|\bopen\([^)\n]*["'][wax]b?\+?["']|json\.dump\(|yaml\.(safe_)?dump\([^)\n]*stream|"""
    r"""\bsave_file\(|torch\.save\(|\.to_csv\(|os\.open\([^)\n]*O_(CREAT|WRONLY|RDWR)"""
)


BLOCK = re.compile(r"\bwith files\.(whole|folder)\(")


def raw(source: str) -> list[str]:
    """Lines that write a file themselves, but those in a block of ``files.whole`` or ``files.folder``."""
    lines = source.splitlines()
    return [
        line.strip()
        for place, line in enumerate(lines)
        if RAW.search(line)
        and not re.search(r"\bwith files\.(whole|folder)\(", " ".join(lines[max(place - 3, 0) : place]))
    ]


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_only_one_module_opens_files_for_writing(file):
    if file.name != "files.py" or file.parent != ROOT:
        assert not raw(file.read_text()), "glimpseprune.files writes them whole"


@pytest.mark.parametrize(
    "source",
    ['path.write_text("x")', 'open(path, "w")', 'open(path, mode="ab")', "json.dump(x, file)", "save_file(x, path)"],
)
def test_a_raw_write_would_be_seen(source):
    assert raw(source)


@pytest.fixture
def umask():
    """Sets the umask of this process for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_of_the_umask(umask, tmp_path, mask, expected):
    umask(mask)
    with files.whole(tmp_path / "a") as partial:
        save_file({"x": torch.ones(2)}, partial)
    files.write(tmp_path / "b", "text")
    with files.folder(tmp_path / "c") as partial:
        save_file({"x": torch.ones(2)}, partial / "d")
    assert [mode(tmp_path / name) for name in ("a", "b", "c/d")] == [expected] * 3
    assert load_file(tmp_path / "a")["x"].tolist() == [1, 1]


def test_what_was_there_stays_until_all_is_written(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, [1])
    with pytest.raises(ZeroDivisionError), files.stream(file) as opened:
        opened.write(b"[2")
        opened.flush()
        assert file.read_text() == "[1]\n"
        raise ZeroDivisionError
    assert file.read_text() == "[1]\n" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_when_it_is_whole_and_takes_leftovers_over(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "torn").touch()
    with pytest.raises(ZeroDivisionError), files.folder(tmp_path / "out") as partial:
        assert os.listdir(partial) == [".lock"]
        (partial / "a").touch()
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)
    (tmp_path / "out").mkdir()  # an empty one may be there
    with files.folder(tmp_path / "out") as partial:
        (partial / "a").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_a_folder_that_is_replaced_stays_until_the_other_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with files.folder(tmp_path / "out") as partial:
        (partial / "new").touch()
        assert os.listdir(tmp_path / "out") == ["old"]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]
    os.rename(tmp_path / "out", tmp_path / ".out.old")  # killed between the two renames
    with pytest.raises(ZeroDivisionError), files.folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("at_one_stroke", [True, False])
def test_a_folder_that_is_replaced_is_there_at_any_moment(tmp_path, monkeypatch, at_one_stroke):
    """Where the system can make two folders change places; else one of the two is, under a name that is known."""
    if not at_one_stroke:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    there, rename = [], os.replace

    def replace(one, other):
        rename(one, other)
        there.append((tmp_path / "out").exists())

    monkeypatch.setattr(os, "replace", replace)
    with files.folder(tmp_path / "out") as partial:
        (partial / "new").touch()
        there.clear()
    assert all(there) == at_one_stroke
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


def test_folders_change_places(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files._exchanged(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    assert not files._exchanged(tmp_path / "a", tmp_path / "c")


def test_work_that_has_a_journal_stays_for_whoever_goes_on(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), files.folder(out, ".journal") as partial:
        (partial / "a").touch()
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)  # it had none yet
    with pytest.raises(ZeroDivisionError), files.folder(out, ".journal") as partial:
        (partial / ".journal").mkdir()
        (partial / "a").touch()
        raise ZeroDivisionError
    assert partial == files.unfinished(out) and sorted(os.listdir(partial)) == [".journal", "a"]
    files.recover(out, ".journal")
    with files.folder(out, ".journal") as partial:
        assert sorted(os.listdir(partial)) == [".journal", ".lock", "a"]
        (partial / "b").touch()
    assert os.listdir(tmp_path) == ["out"] and sorted(os.listdir(out)) == ["a", "b"]


@pytest.mark.parametrize("left", [".out.old", ".out.partial", "out/.journal"])
def test_what_a_killed_process_left_is_put_right_by_the_next_one(tmp_path, left):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "new").touch()
    (tmp_path / left).mkdir()
    (tmp_path / left / "torn").touch()
    files.recover(tmp_path / "out", ".journal")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]
    os.rename(tmp_path / "out", tmp_path / ".out.old")  # killed between the two renames
    files.recover(tmp_path / "out", ".journal")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]
    (tmp_path / ".out.partial").mkdir()
    with files.lock(tmp_path / ".out.partial"), pytest.raises(files.Held):
        files.recover(tmp_path / "out", ".journal")


def test_one_at_a_time(tmp_path, capsys):
    with files.lock(tmp_path) as file, pytest.raises(SystemExit), config.answering("it"), files.lock(tmp_path):
        pass
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path} is in use by process {os.getpid()} on ") and said.count("\n") == 1
    assert not file.exists()
    with files.lock(tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    if not (child := os.fork()):
        files._claim(tmp_path / ".lock")
        os.write(os.open(tmp_path / ".lock", os.O_RDWR), b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with files.lock(tmp_path):
        pass


def test_a_worker_does_not_keep_the_lock_of_its_parent(tmp_path):
    ready, ended = os.pipe(), os.pipe()
    if not (parent := os.fork()):
        with files.lock(tmp_path):
            if not os.fork():
                os.write(ready[1], b"x")
                os.close(ended[1])
                os.read(ended[0], 1)
                os._exit(0)
            os.read(ready[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    with files.lock(tmp_path):  # though the worker is still there
        os.write(ended[1], b"x")


@pytest.mark.parametrize(
    ("there", "held"),
    [
        ({"host": "elsewhere", "pid": 1}, True),
        ({"host": "elsewhere", "pid": 1, "job": "7"}, False),  # of this job, which SLURM has started again
        ({"host": "elsewhere", "pid": 1, "job": "8"}, True),
        ({"host": None, "pid": 1}, True),  # this machine's first process is alive
        ({"host": None, "pid": 2**22 + 1}, False),
        ({}, False),
    ],
)
def test_where_a_disk_knows_no_locks_the_file_says_who_is_there(there, held, tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", none)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    there = {name: value or socket.gethostname() for name, value in there.items()}
    files.write_json(tmp_path / ".lock", there)
    if not held:
        with files.lock(tmp_path):
            assert files._read(tmp_path / ".lock")["pid"] == os.getpid()
        return
    with pytest.raises(files.Held) as error, files.lock(tmp_path):
        pass
    assert ("remove" in error.value.strerror) == (there["host"] == "elsewhere")
    assert files._read(tmp_path / ".lock") == there


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.folder(tmp_path / "link") as partial:
        (partial / "a").touch()
    (tmp_path / "file").symlink_to("real/b")
    files.write(tmp_path / "file", "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "real"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").is_symlink()
    assert sorted(os.listdir(tmp_path / "real")) == ["a", "b"]


def test_a_growing_file_takes_its_place_at_once(tmp_path):
    (tmp_path / "a").write_text("old")
    with files.growing(tmp_path / "a", "one\n") as opened:
        assert (tmp_path / "a").read_text() == "one\n"
        opened.write("two\n")
    assert (tmp_path / "a").read_text() == "one\ntwo\n" and os.listdir(tmp_path) == ["a"]


# ------------------------------------------------------------------------------------------------- what a disk refuses


def full(_: object = None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped() -> None:
    try:
        full()
    except OSError as error:
        raise RuntimeError("cannot save") from error


def hidden() -> None:
    try:
        full()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


def rust() -> None:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def torch_alone() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize("failing", [full, wrapped, hidden, rust, torch_alone])
def test_a_full_disk_is_one_line_whoever_says_it(failing, tmp_path, capsys):
    """As Python, Lightning, torch and safetensors say it; /dev/full is a disk that is."""
    with pytest.raises(SystemExit) as end, config.answering("it"), files.whole(tmp_path / "a"):
        failing()
    assert end.value.code == 2 and not os.listdir(tmp_path)
    assert capsys.readouterr().err == f"error: {tmp_path / 'a'}: {files.WRONG[errno.ENOSPC]}\n"


def test_real_errors_of_torch_and_safetensors_are_known():
    with pytest.raises((RuntimeError, OSError)) as error:
        torch.save(torch.ones(100000), "/dev/full")
    assert files.trouble(error.value).errno == errno.ENOSPC
    with pytest.raises((RuntimeError, OSError)) as error, open("/dev/full", "wb") as full:
        torch.save(torch.ones(100000), full)
    assert files.trouble(error.value).errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("path", "number"),
    [("file/below", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG), ("loop", errno.ELOOP), ("folder", errno.EISDIR)],
)
def test_a_path_that_cannot_be(path, number, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as end, config.answering("it"):
        files.write(tmp_path / path, "text")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and files.WRONG[number] in said and path[:4] in said


@pytest.mark.parametrize("error", [ConnectionError(errno.ECONNRESET, "reset"), ValueError("[Errno 28]"), OSError()])
def test_what_no_disk_said_is_not_taken_for_it(error):
    assert files.said(error) is None


def test_an_error_on_the_way_of_another_is_not_taken_for_it():
    with pytest.raises(TypeError) as bug:
        try:
            os.stat("/nowhere")
        except OSError:
            raise TypeError from None
    assert files.said(bug.value) is None
