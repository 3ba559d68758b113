"""Commands that something happens to at any moment: nothing is lost, nothing is left running, what is said leads on.

A round starts a command as a user does, has a fault happen at a moment that a seed draws, and does what it is then told
until the command has ended well. What that leaves is what an undisturbed one leaves, and what was in the folder before
is whole all the time. All commands and faults, many times: `make test-faults`.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from glimpseprune import results, runs
from glimpseprune.config import UserError
from glimpseprune.data.journal import JOURNAL
from glimpseprune.running.checkpoints import newest
from test_evaluate import save_run

ROOT = Path(__file__).parent.parent
ROUNDS = int(os.environ.get("KILLS", 1))
COMMANDS, FAULTS = ("train", "prepare", "evaluate", "export"), ("SIGKILL", "SIGINT", "SIGTERM", "full disk")
PAIRS = [(command, fault) for command in COMMANDS for fault in FAULTS]
if "KILLS" not in os.environ:  # those that take least
    PAIRS = [("prepare", "SIGINT"), ("prepare", "full disk")]
KEYS = "backbone.path", "data.path"
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "268435456"}  # Makefile
PATIENCE = 120
"""Seconds for which any process is waited for."""


# ------------------------------------------------------------------------------------------------------ what is started


class Started:
    """A process at work in a session of its own, as in a terminal of its own.

    ``fork``: of this process, which need not import torch again; else as a user starts it.
    """

    def __init__(self, argv: list[str], log: Path, fork: bool = False) -> None:
        self.log, self.fork = log, fork
        self.began = time.perf_counter()
        if fork:
            self.process = multiprocessing.get_context("fork").Process(target=become, args=[argv, log])
            self.process.start()
            return
        env = os.environ | MALLOC | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        with open(log, "wb") as err:
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
                preexec_fn=heed,
            )

    @property
    def code(self) -> int | None:
        return self.process.exitcode if self.fork else self.process.poll()

    @property
    def err(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, sign: Callable[[], bool], within: float = PATIENCE) -> bool:
        """Wait for ``sign``, or until it has ended; whether the sign came."""
        end = time.perf_counter() + within
        while self.code is None and time.perf_counter() < end:
            if sign():
                return True
            time.sleep(0.002)
        return False

    def wait(self) -> int:
        self.until(lambda: False)
        if (code := self.code) is None:
            self.process.kill()
            raise AssertionError(f"it does not end: {self.err[-2000:]}")
        return code

    def others(self) -> list[str]:
        """Processes of its session that are not at their end."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                name, _, rest = stat.read_text().rpartition(")")
                state, _, _, session, *_ = rest.split()
                if int(session) == self.process.pid and state != "Z":
                    found.append(name)
        return found


def heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored, if we are in a background


def become(argv: list[str], log: Path) -> None:
    """Be the command ``argv``, in a fork."""
    os.setsid()
    os.chdir(ROOT)
    heed()
    torch.set_num_threads(1)  # makes its pool anew, which two threads at a time cannot
    for number, (name, path) in enumerate((("stdin", os.devnull), ("stdout", os.devnull), ("stderr", log))):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
        setattr(sys, name, open(number, "w" if number else "r", buffering=1))  # noqa: SIM115 (ends with the process)
    module, *arguments = argv[argv.index("-m") + 1 :]
    verb, *arguments = arguments if module == "glimpseprune" else [module.removeprefix("src."), *arguments]
    file = "glimpseprune/__main__.py" if module == "glimpseprune" else f"{verb}.py"
    sys.argv = [str(ROOT / "src" / file), *arguments]
    atexit._clear()
    try:
        import_module(f"glimpseprune.{verb}").main(arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


@dataclass
class Work:
    """A command, all but its ``out``; ``before``: with which further arguments what was there before was made, and
    ``over``: those with which it is run where that is."""

    name: str
    args: list[str]
    before: list[str] | None = None
    over: list[str] = field(default_factory=list)

    def argv(self, out: Path, *more: str, installed: bool = False) -> list[str]:
        way = ["glimpseprune", self.name] if installed else [f"src.{self.name}"]
        return [sys.executable, "-m", *way, *self.args, f"out={out}", *more]


# -------------------------------------------------------------------------------------------------------- what is left


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bytes_of(out: Path) -> dict[str, str]:
    """Every file that says something of a result."""
    return {name: digest(out / name) for name in runs.inside(out) if not runs.matches(name, runs.LIVE)}


def result(out: Path) -> dict[str, object]:
    """Every file, of those that say when or how fast with what they say beside it."""
    found: dict[str, object] = {}
    for name in runs.inside(out):
        path = out / name
        if name.startswith((f"{results.EARLIER}/", f"{JOURNAL}/", "tensorboard/")) or name == runs.MARKER:
            continue
        if name == runs.INDEX:
            index = json.loads(path.read_text())
            last = max(index)  # of the others, one of an interruption may have taken the place of an earlier one
            found[name] = last, min((entry["score"] for entry in index.values() if "score" in entry), default=None)
            assert {*index} == {file.name for file in path.parent.glob("*.ckpt*")}
        elif name.endswith(".ckpt"):
            continue
        elif name == results.TIMINGS:
            found[name] = None
        elif name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in line.items() if key[:5] != "perf/"} for line in lines]
        elif name == results.SCORES:
            rows = json.loads(path.read_text())
            found[name] = [{key: value for key, value in row.items() if key != "time_to_first_token"} for row in rows]
        elif name == results.PREDICTIONS:
            found[name] = sorted(path.read_text().split("\n"))
        elif name.endswith(".safetensors"):  # whose metadata have no order
            found[name] = {key: save({key: tensor}) for key, tensor in load_file(path).items()}
        else:
            found[name] = digest(path)
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name, "none") != other.get(name, "none"))


def seen(place: Path) -> set[str]:
    """Names in ``place`` that say that a command is about to write its result."""
    locks = (*runs.PASSING, results.LOCK)
    with suppress(OSError):
        there = {name for name in runs.inside(place / "out") if not runs.matches(name, locks)}
        return there | {name for name in os.listdir(place) if name != "out"}
    return set()


@dataclass
class Whole:
    """A command that nothing happened to: what it left, how long it took, and for how long of that it wrote."""

    work: Work
    left: dict[str, object]
    seconds: float
    writing: float
    before: Path | None

    def lay(self, place: Path, over: bool) -> None:
        """An empty ``place``, or one where there is something before."""
        place.mkdir(exist_ok=True)
        for there in place.iterdir():
            shutil.rmtree(there)
        if over:
            shutil.copytree(self.before, place / "out")

    def is_there(self, out: Path) -> bool:
        try:
            return out.is_dir() and not differences(result(out), self.left)
        except (AssertionError, ValueError):  # in the middle of something
            return False

    def lost(self, place: Path) -> list[str]:
        """Files of what was before that are nowhere any more, though nothing has taken their place."""
        out, before = place / "out", bytes_of(self.before)
        spots = [out, out / runs.ASIDE / "run", out / results.EARLIER / "1", place / ".out.old"]
        there = [bytes_of(spot) for spot in spots if spot.is_dir()]
        gone = [name for name, value in before.items() if all(found.get(name) != value for found in there)]
        if gone and self.work.name == "train":  # the new run can be gone on with
            with suppress(UserError):
                if (last := newest(out)) is not None and digest(last) not in before.values():
                    return []
        return [] if self.is_there(out) else gone


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> str:
    base, data = (next(arg.partition("=")[2] for arg in recipe if arg.startswith(key)) for key in KEYS)
    return save_run(tmp_path_factory.mktemp("trained") / "run", base, 1, data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request) -> Callable[[str], Whole]:
    """Each command, once undisturbed; of a few seconds."""

    def work(name: str) -> Work:
        if name == "prepare":
            tags = ["source=tags", "options.size=224", "options.min_tags=4", "options.max_tags=4", "workers=2"]
            count, fewer = (f"options.count={{train: {n}, val: 4, test: 4}}" for n in (40, 8))
            return Work(name, [*tags, "shard_size=8", count], [fewer], ["overwrite=true"])
        if name == "train":
            steps = ["data.val_samples=2", "data.workers=1", "trainer.max_steps=5", "trainer.val_every=2"]
            args = [*request.getfixturevalue("recipe"), "data.batch_size=2", *steps]
            return Work(name, args, ["seed=1", "trainer.max_steps=2"], ["overwrite=true"])
        ckpt = [f"ckpt={request.getfixturevalue('trained')}"]
        if name == "export":
            return Work(name, ckpt)
        few = ["limit=6", "data.batch_size=2", "controls=[none]", "max_new_tokens=4", "bootstrap=20", "pictures=3"]
        return Work(name, [*ckpt, *few], ["limit=2"])

    @cache
    def make(name: str) -> Whole:
        command, place = work(name), tmp_path_factory.mktemp(name) / "place"
        place.mkdir()
        started = Started(command.argv(place / "out"), place.with_name("log"))
        assert started.until(lambda: bool(seen(place))), started.err
        first = time.perf_counter() - started.began
        assert started.wait() == 0, started.err
        seconds, before = time.perf_counter() - started.began, None
        if command.before is not None:
            before = place.with_name("before")
            started = Started(command.argv(before, *command.before), place.with_name("log"), fork=True)
            assert started.wait() == 0, started.err
        return Whole(command, result(place / "out"), seconds, seconds - first, before)

    return make


# ------------------------------------------------------------------------------------------------------ what may happen


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own; skipped where none may be mounted."""
    place = tmp_path / "place"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True).returncode:
        pytest.skip("a small disk that can be filled takes the right to mount one")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(file: Path) -> None:
    with open(file, "ab", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while stream.write(bytes(size)) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def happen(fault: str, started: Started, filler: Path) -> None:
    pid = started.process.pid
    if fault == "full disk":
        fill(filler)
    elif fault == "SIGINT":
        os.killpg(pid, signal.SIGINT)  # as a terminal does
    else:
        os.kill(pid, signal.Signals[fault])


def advised(err: str) -> list[str] | None:
    """The command that the last line names, if it names one."""
    line = err.rstrip("\n").rpartition("\n")[2]
    for said in ("go on with: ", "again: "):
        if said in line:
            python, *rest = shlex.split(line.partition(said)[2])
            assert python == "python", line
            return [sys.executable, *rest]
    return None


def corrected(argv: list[str], line: str, first: list[str]) -> list[str]:
    """``argv`` as ``line`` says it should be; ``first`` where it has nothing to go on with."""
    if "leave" in line:  # it had not begun, and what is there is what was there before
        return first
    kept = [arg for arg in argv if arg not in ("resume=true", "overwrite=true")]
    if "start without it" in line:
        return [*kept, *["overwrite=true"] * ("overwrite=true" in line)]
    for said in ("resume=true", "overwrite=true"):
        if said in line and said not in argv:
            return [*kept, said]
    raise AssertionError(f"{line!r} says nothing that could be done")


def check_end(fault: str, code: int, err: str, untouched: bool, done: bool) -> None:
    assert "Traceback" not in err and "Exception ignored" not in err
    if fault == "SIGKILL":
        assert code == -signal.SIGKILL
    elif fault == "full disk":
        assert code == 2 and err.rstrip("\n").rpartition("\n")[2].startswith("error: ") and "the disk is full" in err
    elif code == -signal.Signals[fault]:  # before it has begun, or after its end
        assert untouched or done, "it was at work, and says nothing"
    elif code:
        assert code == 128 + signal.Signals[fault] and f"interrupted ({fault})" in err and advised(err)
    else:
        assert done, "exit code 0, but it is not done"


def lead_on(argv: list[str], first: list[str], log: Path, done: Callable[[], bool]) -> None:
    """Run ``argv``, and then what is said until it is done; ``first`` is what something happened to."""
    for _ in range(4):
        started = Started(argv, log, fork=True)
        code, err = started.wait(), started.err
        assert "Traceback" not in err, f"{shlex.join(argv)}: {err[-3000:]}"
        if code == 0 or (code == 2 and done()):
            return
        assert code == 2, f"{shlex.join(argv)}: {err[-3000:]}"
        argv = corrected(argv, err.rstrip("\n").rpartition("\n")[2], first)
    raise AssertionError(f"round in circles: {shlex.join(argv)}: {err[-3000:]}")


def happened(whole: Whole, fault: str, place: Path, log: Path, rng: random.Random) -> bool:
    """A round; False if the command was at its end before."""
    work, out, filler = whole.work, place / "out", place / "filler"
    over, installed, at_work = whole.before is not None and rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.7
    whole.lay(place, over)
    before, names = bytes_of(place), seen(place)
    argv = work.argv(out, *(work.over if over else ()), installed=installed)
    started = Started(argv, log, fork=at_work)
    if at_work and not started.until(lambda: seen(place) != names):
        return False
    begun, length = time.perf_counter(), "writing" if at_work else "seconds"
    moment = rng.random() * getattr(whole, length)
    started.until(lambda: False, moment)
    if started.code is not None:  # this machine has less to do than it had
        setattr(whole, length, min(getattr(whole, length), 1.2 * (time.perf_counter() - begun)))
        return False
    happen(fault, started, filler)
    code = started.wait()
    end = time.perf_counter() + 5
    while (left := started.others()) and time.perf_counter() < end:
        time.sleep(0.01)
    if fault == "full disk":
        filler.unlink()
    if code == 0 and fault in ("full disk", "SIGKILL"):  # it had no need of more, or was at its end
        assert whole.is_there(out), "exit code 0, but it is not done"
        return False
    try:
        assert not left, f"still there: {left}"
        check_end(fault, code, started.err, bytes_of(place) == before, whole.is_there(out))
        assert not over or not (gone := whole.lost(place)), f"lost: {gone}"
        again = advised(started.err) if fault.startswith("SIG") else None
        if again is None and rng.random() < 0.5 and work.name in ("train", "evaluate", "prepare"):
            again = [*(arg for arg in argv if arg != "overwrite=true"), "resume=true"]
        lead_on(again or argv, argv, log.with_name("again"), lambda: whole.is_there(out))
        wrong = differences(result(out), whole.left)
        assert not wrong, f"another result: {wrong}"
        assert os.listdir(place) == ["out"], f"left: {os.listdir(place)}"
        assert not (out / JOURNAL).exists()
        if over and work.name == "evaluate":
            assert bytes_of(out / results.EARLIER / "1") == bytes_of(whole.before)
    except AssertionError as error:
        where = f"{moment:.2f} s after it had {'begun to write' if at_work else 'been started'}, over={over}"
        raise AssertionError(f"{fault} {where}: exit code {code}: {error}\n{started.err[-3000:]}") from None
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("command", "fault"), PAIRS)
def test_at_any_moment(command, fault, whole, tmp_path, request):
    rng, undisturbed = random.Random(f"{command} {fault}"), whole(command)
    place = request.getfixturevalue("disk") if fault == "full disk" else tmp_path / "place"
    rounds, missed, wrong = 0, 0, []
    print(f"{command}: {undisturbed.seconds:.1f} s, writes for {undisturbed.writing:.1f} s")
    while rounds < ROUNDS and missed < 3 * ROUNDS + 5:
        try:
            took = happened(undisturbed, fault, place, tmp_path / "log", rng)
        except AssertionError as error:
            took = True
            wrong.append(f"round {rounds}: {error}")
            print(wrong[-1])
        print(".", end="", flush=True)
        rounds, missed = rounds + took, missed + (not took)
    assert rounds == ROUNDS, f"{missed} of {rounds + missed} ended before"
    assert not wrong, f"{len(wrong)} of {rounds}:\n\n" + "\n\n".join(wrong)
