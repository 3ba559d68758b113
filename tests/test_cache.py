"""The cache: whole files only, whoever is killed when; one brings what several want; the limit holds."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from glimpseprune import files
from glimpseprune.config import UserError
from glimpseprune.data.cache import DATA, Cache

fork = multiprocessing.get_context("fork")


def put(size: int, mark: Path | None = None):
    def make(file: Path) -> None:
        if mark is not None:
            with open(mark, "a") as stream:
                stream.write("x")
        files.write(file, b"a" * size)

    return make


def names(cache: Cache) -> set[str]:
    return {file.name for file in cache.folder.iterdir() if file.name.endswith(DATA)}


def read(cache: Cache, name: str, size: int, mark: Path | None = None) -> int:
    with cache.open(name, put(size, mark)) as stream:
        return len(stream.read())


def test_those_used_longest_ago_leave(tmp_path):
    cache = Cache(tmp_path, 300)
    for name in "abc":
        assert read(cache, name, 100) == 100
    read(cache, "a", 100)
    read(cache, "d", 100)
    assert names(cache) == {cache.path(name, DATA).name for name in "acd"}
    read(cache, "e", 250)
    assert names(cache) == {cache.path("e", DATA).name}


def test_what_is_larger_than_all_is_refused_and_takes_nothing_with_it(tmp_path):
    cache = Cache(tmp_path, 300)
    read(cache, "a", 100)
    with pytest.raises(UserError, match=r"data.cache_gb=3e-07"):
        cache.open("b", put(400), size=400)
    assert names(cache) == {cache.path("a", DATA).name}
    with pytest.raises(UserError, match="a shard has"):
        cache.open("b", put(400))  # found out when it is there
    assert cache.path("b", DATA).name not in names(cache)


def test_several_processes_bring_it_once(tmp_path):
    cache, mark = Cache(tmp_path / "cache", 10**6), tmp_path / "mark"

    def slow(file: Path) -> None:
        time.sleep(0.2)
        put(1000, mark)(file)

    def work():
        with cache.open("a", slow) as stream:
            os._exit(0 if len(stream.read()) == 1000 else 1)

    processes = [fork.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert mark.read_text() == "x"


@pytest.mark.parametrize("during", ["making", "made"])
def test_a_process_that_is_killed_leaves_nothing_that_counts(tmp_path, during):
    cache, begun = Cache(tmp_path / "cache", 10**6), fork.Event()

    def stuck(file: Path) -> None:
        with files.stream(file) as stream:
            stream.write(b"half")
            stream.flush()
            if during == "making":
                begun.set()
                time.sleep(60)
        begun.set()
        time.sleep(60)

    process = fork.Process(target=lambda: cache.open("a", stuck))
    process.start()
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert read(cache, "b", 10) == 10
    assert not list(cache.folder.glob("*.partial"))  # not even its disk
    assert read(cache, "a", 1000) == (1000 if during == "making" else 4)


def test_a_failure_leaves_nothing_and_may_be_tried_again(tmp_path):
    cache = Cache(tmp_path, 1000)

    def fails(file: Path) -> None:
        with files.stream(file) as stream:
            stream.write(b"half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        cache.open("a", fails)
    assert not list(tmp_path.iterdir())
    assert read(cache, "a", 5) == 5


def test_no_name_leads_out(tmp_path):
    cache = Cache(tmp_path / "cache", 1000)
    for name in ("../../x", "/etc/passwd", "a" * 10**4, "\udc80"):
        assert read(cache, name, 5) == 5
    assert len(names(cache)) == 4
    assert {file.name for file in tmp_path.iterdir()} == {"cache"}


def test_the_limit_holds_while_many_are_at_it(tmp_path):
    cache = Cache(tmp_path, 5000)

    def work(rank: int):
        for turn in range(20):
            assert read(cache, f"{(rank * 7 + turn * 3) % 15}", 1000) == 1000
        os._exit(0)

    processes = [fork.Process(target=work, args=(rank,)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sum(file.stat().st_size for file in cache.folder.glob(f"*{DATA}")) <= 5000
