"""prepare that something ended goes on from the shards that are whole, to the very bytes of one that nothing ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from contracts._sources import RAW
from glimpseprune import files, lookup, prepare
from glimpseprune.config import Interrupted
from glimpseprune.data import job, shards
from glimpseprune.data.journal import JOURNAL, Journal

COUNT, SIZE = 23, 4
SOURCE = '''
"""A source made by a test, which says what it is asked for."""
import dataclasses

from glimpseprune.config import option
from glimpseprune.types import Sample
from PIL import Image

splits = ("train", "val")

@dataclasses.dataclass
class Options:
    bad: list[int] = option([], "these are invalid")
    crash: str = option("", "break down when this file is there")
    log: str = option("", "a line for every sample that is drawn")

def samples(options, split, start=0, stop=None):
    from pathlib import Path
    total = 23 if split == "train" else 5
    for i in range(start, total if stop is None else min(stop, total)):
        if options.log:
            with open(options.log, "a") as log:
                log.write(f"{split}-{i}\\n")
        if i == 13 and options.crash and Path(options.crash).exists():
            raise RuntimeError("disk on fire")
        question = "" if split == "train" and i in options.bad else "how many?"
        yield Sample(f"{split}-{i}", question, (str(i),), [Image.new("RGB", (8, 6), (i, 2 * i, 3 * i))])
'''


@pytest.fixture
def argv(tmp_path) -> list[str]:
    """A preparation, all but its out; samples 4 to 7, a whole shard, are invalid."""
    (tmp_path / "mine.py").write_text(SOURCE)
    options = ["options.bad=[1,4,5,6,7]", f"options.crash={tmp_path / 'crash'}", f"options.log={tmp_path / 'log'}"]
    return [f"source={tmp_path / 'mine.py'}", f"shard_size={SIZE}", *options]


@pytest.fixture
def undisturbed(tmp_path, argv) -> dict[str, bytes]:
    prepare.main([*argv, f"out={tmp_path / 'undisturbed'}"])
    (tmp_path / "log").unlink()
    return content(tmp_path / "undisturbed")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drawn(tmp_path: Path) -> list[str]:
    """Samples that were drawn, since it was last asked."""
    said = (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
    (tmp_path / "log").unlink(missing_ok=True)
    return said


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prepare.main(list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def crashed(tmp_path: Path, *argv: str) -> list[str]:
    """Have it break down in the fourth shard; the shards that are whole then."""
    (tmp_path / "crash").touch()
    with pytest.raises(RuntimeError, match="disk on fire"):
        prepare.main(list(argv))
    (tmp_path / "crash").unlink()
    return Journal(tmp_path / ".out.partial").names()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_it_goes_on_from_what_is_whole(tmp_path, argv, undisturbed, capsys, workers):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    whole = crashed(tmp_path, *argv)
    assert whole == [f"train-{n:06d}.tar" for n in range(3)]
    assert f"note: {len(whole)} shards are whole and kept: resume=true uses them" in capsys.readouterr().err
    assert drawn(tmp_path) == [f"train-{i}" for i in range(14)]
    assert not (tmp_path / "out").exists()
    prepare.main([*argv, "resume=true", f"workers={workers}", "max_invalid=5"])
    assert content(tmp_path / "out") == undisturbed
    assert sorted(drawn(tmp_path)) == sorted([f"train-{i}" for i in range(12, 23)] + [f"val-{i}" for i in range(5)])
    assert f"going on: {len(whole)} shards are whole" in capsys.readouterr().out
    assert not (tmp_path / ".out.partial").exists()


def test_what_was_done_is_not_done_again(tmp_path, argv, undisturbed):
    argv = [*argv, f"out={tmp_path / 'out'}", "resume=true"]
    prepare.main(argv)  # there is nothing to go on with: it begins
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert content(tmp_path / "out") == undisturbed and drawn(tmp_path)
    for more in ((), ("overwrite=true",)):
        prepare.main([*argv, *more])
        assert not drawn(tmp_path)
        assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_without_being_told_it_neither_goes_on_nor_begins_anew(tmp_path, argv, undisturbed, capsys):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    crashed(tmp_path, *argv)
    said = refused(capsys, *argv)
    assert "was interrupted, 3 shards of it are whole: give resume=true to go on" in said and "overwrite=true" in said
    assert len(Journal(tmp_path / ".out.partial").names()) == 3
    drawn(tmp_path)
    prepare.main([*argv, "overwrite=true"])
    assert content(tmp_path / "out") == undisturbed and len(drawn(tmp_path)) == 28


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["shard_size=5"], "shard_size was 4, is 5"),
        (["options.bad=[1]"], "options.bad was [1, 4, 5, 6, 7], is [1]"),
        (["splits=[train]"], 'splits was ["train", "val"], is ["train"]'),
        (["limit=20"], "limit was null, is 20"),
        (["sample=20"], "sample was null, is 20"),
        (["max_pixels=1000"], "max_pixels was null, is 1000"),
        (["image_format=jpg"], 'image_format was "auto", is "jpg"'),
        (["license=mine"], 'license was null, is "mine"'),
    ],
)
def test_what_was_made_otherwise_is_not_gone_on_with(tmp_path, argv, capsys, more, words):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    crashed(tmp_path, *argv)
    said = refused(capsys, *argv, *more, "resume=true")
    assert f"was made otherwise ({words}): leave that as it was, or give overwrite=true" in said
    prepare.main([*argv, "resume=true"])
    said = refused(capsys, *argv, *more, "resume=true")  # nor what is finished
    assert f"was made otherwise ({words}): give overwrite=true or another out" in said
    prepare.main([*argv, *more, "resume=true", "overwrite=true"])


def test_nor_where_a_file_that_rows_are_read_from_has_changed(tmp_path, argv, capsys):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    crashed(tmp_path, *argv)
    with open(tmp_path / "mine.py", "a") as source:
        source.write("\n")
    assert f"({tmp_path / 'mine.py'} changed since)" in refused(capsys, *argv, "resume=true")


def test_too_many_invalid_samples_leave_what_is_whole(tmp_path, argv, undisturbed, capsys):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    said = refused(capsys, *argv, "max_invalid=3")
    assert "more than max_invalid=3 invalid samples, such as 'train-6'" in said
    assert "; 1 shards are whole and kept: set right what is wrong and give resume=true" in said
    drawn(tmp_path)
    assert "more than max_invalid=2" in refused(capsys, *argv, "max_invalid=2", "resume=true")
    assert "train-0" not in drawn(tmp_path)
    assert "more than max_invalid=4" in refused(capsys, *argv, "max_invalid=4", "resume=true")
    prepare.main([*argv, "max_invalid=5", "resume=true"])
    assert content(tmp_path / "out") == undisturbed
    assert "an invalid sample 'train-1'" in refused(capsys, *argv, "overwrite=true", "max_invalid=0")
    assert not (tmp_path / ".out.partial").exists()  # nothing was whole


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tar, said: tar.unlink(),
        lambda tar, said: said.unlink(),
        lambda tar, said: said.write_text("{"),
        lambda tar, said: said.write_text("[]"),
        lambda tar, said: tar.write_bytes(tar.read_bytes()[:-512]),
        lambda tar, said: tar.write_bytes(bytes(len(tar.read_bytes()))),
        lambda tar, said: os.replace(tar, tar.with_name("train-000000.tar")),  # as where they are renamed
    ],
)
def test_a_shard_that_is_not_what_was_said_of_it_is_made_again(tmp_path, argv, undisturbed, spoil):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    crashed(tmp_path, *argv)
    partial = tmp_path / ".out.partial"
    spoil(partial / "train-000002.tar", partial / JOURNAL / "train-000002.json")
    (partial / "train-000007.tar").write_bytes(b"of nobody")
    (partial / "train-000003.tar.partial").write_bytes(b"torn")
    drawn(tmp_path)
    prepare.main([*argv, "resume=true"])
    assert content(tmp_path / "out") == undisturbed
    assert "train-8" in drawn(tmp_path)


def test_what_may_be_replaced_may_be_when_it_goes_on(tmp_path, argv, undisturbed, capsys):
    out = tmp_path / "out"
    prepare.main([*argv, f"out={out}", "splits=[val]"])
    before = content(out)
    crashed(tmp_path, *argv, f"out={out}", "overwrite=true")
    assert content(out) == before
    prepare.main([*argv, f"out={out}", "resume=true"])
    assert content(out) == undisturbed
    (out / "thesis.tex").write_text("years of work")
    (tmp_path / "crash").touch()
    assert "holds thesis.tex" in refused(capsys, *argv, f"out={out}", "overwrite=true")
    assert not (tmp_path / ".out.partial").exists()


def test_what_is_put_there_meanwhile_is_not_replaced(tmp_path, argv, capsys):
    argv = [*argv, f"out={tmp_path / 'out'}"]
    crashed(tmp_path, *argv)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "is not empty (it holds thesis.tex)" in refused(capsys, *argv, "resume=true")
    assert len(Journal(tmp_path / ".out.partial").names()) == 3


def test_an_interruption_names_the_command_that_goes_on(tmp_path, argv, undisturbed, capsys, monkeypatch):
    argv, whole = [*argv, f"out={tmp_path / 'out'}"], shards.write_shard
    calls = []

    def write_shard(*given, **named):
        calls.append(given)
        if len(calls) == 3:
            raise Interrupted(signal.SIGTERM)
        return whole(*given, **named)

    monkeypatch.setattr(shards, "write_shard", write_shard)
    with pytest.raises(SystemExit) as stop:
        prepare.main(argv)
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.rstrip().endswith("resume=true")
    calls.extend("..")
    prepare.main([*argv, "resume=true"])
    assert content(tmp_path / "out") == undisturbed


def killed_at(moment: str, argv: list[str]) -> int:
    """Run a preparation that kills itself when it calls a function of ``files`` for the last time."""

    def run() -> None:
        whole = getattr(files, moment)
        setattr(files, moment, lambda *given: (whole(*given), os.kill(os.getpid(), signal.SIGKILL)))
        prepare.main(argv)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("moment", ["_replace", "_exchanged"])
def test_killed_where_it_takes_its_place(tmp_path, argv, undisturbed, moment, capsys):
    """Whole, with what was there before beside it: the next one clears that away, whatever it is told to do."""
    out = tmp_path / "out"
    prepare.main([*argv, f"out={out}", "splits=[val]"])
    assert killed_at(moment, [*argv, f"out={out}", "overwrite=true"]) == -signal.SIGKILL
    assert content(out / JOURNAL).keys() > {"asked.json"}
    assert {name: data for name, data in content_of_files(out).items()} == undisturbed
    drawn(tmp_path)
    assert "is not empty" in refused(capsys, *argv, f"out={out}")
    prepare.main([*argv, f"out={out}", "resume=true"])
    assert content(out) == undisturbed and not drawn(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name[:4] == ".out"]


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_worker_that_is_killed_is_told(tmp_path, argv, undisturbed, capsys):
    dies = "import os; os.kill(os.getpid(), 9)"
    (tmp_path / "dies.py").write_text(SOURCE.replace('raise RuntimeError("disk on fire")', dies))
    argv = [f"source={tmp_path / 'dies.py'}", *argv[1:], f"out={tmp_path / 'out'}", "workers=2"]
    (tmp_path / "crash").touch()
    said = refused(capsys, *argv)
    assert "a worker was ended from outside" in said and "resume=true" in said
    (tmp_path / "crash").unlink()
    prepare.main([*argv, "resume=true"])
    made = content(tmp_path / "out")
    assert {name: data for name, data in made.items() if name != "manifest.json"} == {
        name: data for name, data in undisturbed.items() if name != "manifest.json"
    }


def test_the_data_of_a_training_go_on_unasked(tmp_path, argv, undisturbed):
    out = str(tmp_path / "out")
    wanted = {
        "source": argv[0].partition("=")[2],
        "shard_size": SIZE,
        "options": {"bad": [1, 4, 5, 6, 7], "crash": str(tmp_path / "crash"), "log": str(tmp_path / "log")},
    }
    (tmp_path / "crash").touch()
    with pytest.raises(RuntimeError):
        prepare.make_missing(out, wanted)
    (tmp_path / "crash").unlink()
    drawn(tmp_path)
    prepare.make_missing(out, wanted)
    assert content(tmp_path / "out") == undisturbed and "train-0" not in drawn(tmp_path)


@pytest.mark.parametrize("name", lookup.names(job.SOURCES))
def test_a_subset_of_any_source_goes_on(tmp_path, name, monkeypatch):
    if name == "easy_vqa":
        pytest.importorskip("easy_vqa")
    few = {"size": 336, "count": {"train": 14, "val": 14, "test": 14}}
    known = {item.name for item in fields(lookup.find(job.SOURCES, name).Options)}
    options = RAW[name](tmp_path) if name in RAW else {key: few[key] for key in few.keys() & known}
    argv = [f"source={name}", f"options={json.dumps(options)}", "sample=5", "seed=42", "shard_size=2"]
    whole, calls = shards.write_shard, []

    def write_shard(*given, **named):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*given, **named)

    prepare.main([*argv, f"out={tmp_path / 'undisturbed'}"])
    monkeypatch.setattr(shards, "write_shard", write_shard)
    with pytest.raises(SystemExit):
        prepare.main([*argv, f"out={tmp_path / 'out'}"])
    assert len(Journal(tmp_path / ".out.partial").names()) == 2
    prepare.main([*argv, f"out={tmp_path / 'out'}", "workers=2", "resume=true"])
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    for split, entry in json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"].items():
        assert entry["rows"] == entry["sample"]["drawn"] == 5 and entry["sample"]["of"] >= 14, split


def test_keys_that_stand_twice_cannot_be_mended_by_going_on(tmp_path, argv, capsys):
    (tmp_path / "same.py").write_text(SOURCE.replace('f"{split}-{i}", question', '"same", question'))
    argv = [f"source={tmp_path / 'same.py'}", *argv[1:]]
    assert "keys stand more than once" in refused(capsys, *argv, f"out={tmp_path / 'out'}")
    assert not (tmp_path / ".out.partial").exists()


def test_reports_that_it_was_there_already(tmp_path, argv):
    crashed(tmp_path, *argv, f"out={tmp_path / 'out'}")
    cfg = prepare.config.load(prepare.PrepareConfig, [*argv, f"out={tmp_path / 'out'}"])
    options = prepare.config.merge_options(prepare.lookup.find(job.SOURCES, cfg.source).Options, cfg.options, "options")
    told = []
    folder = tmp_path / ".out.partial"
    work = job.Job(cfg.source, options, "train", folder, SIZE, max_invalid=99)
    job.write_split(work, 1, lambda done, kept: told.append((done, kept)))
    assert told[:3] == [(4, 4), (8, 8), (12, 12)] and told[-1] == (23, 12)
