"""Config: precedence, strictness and messages, round trip, help, entry points."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from glimpseprune import config
from glimpseprune.config import MISSING, UserError, option


@dataclass
class Trainer:
    max_steps: int = option(10, "optimiser steps")
    lr: float = 1e-3
    layers: list[int] = option([1, 2])
    window: tuple[int, ...] = ()
    size: tuple[int, int] = (4, 4)
    precision: Literal["32", "bf16"] = "32"


@dataclass
class Judge:
    url: str = MISSING
    temperature: float = 0.0


@dataclass
class Config:
    """Docstring of a schema."""

    ckpt: str = option(MISSING, "run folder")
    note: str = ""
    path: str | None = None
    seed: int | None = 0
    fast: bool = False
    trainer: Trainer = option(Trainer(lr=0.5), "optimisation")
    judge: Judge | None = None
    options: dict[str, Any] = option({"kept": 1})
    weights: dict[str, float] = option({})
    out: str = "runs/${trainer.max_steps}"


@dataclass
class Positive:
    value: int = 1

    def __post_init__(self) -> None:
        if self.value < 1:
            raise UserError(f"value must be positive, got {self.value}")


def load(*argv: str) -> Config:
    return config.load(Config, ["ckpt=run", *argv], prog="test")


@dataclass
class Renamed:
    last_steps: int = option(1, "new name", was="keep_steps")


@dataclass
class Holder:
    part: Renamed = option(Renamed)


def test_an_old_name_is_still_read_and_no_longer_written(tmp_path):
    assert config.load(Holder, ["part.keep_steps=3"]).part.last_steps == 3
    (tmp_path / "old.yaml").write_text("part: {keep_steps: 5}")
    read = config.read(Holder, tmp_path / "old.yaml")
    assert read.part.last_steps == 5 and "keep_steps" not in config.to_yaml(read)
    assert config.load(Holder, [str(tmp_path / "old.yaml"), "part.last_steps=6"]).part.last_steps == 6
    with pytest.raises(UserError, match=r"did you mean 'part.last_steps'"):
        config.load(Holder, ["part.last_step=3"])


def test_paths_begin_at_home_in_every_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("path: ~/x\n")
    (tmp_path / "a.yaml").write_text("extends: ~/base.yaml\noptions: {a: {b: [~/y]}, c: ~}\n")
    cfg = load("~/a.yaml", "out=~/runs/~/z", "note=~5 of a~/b")
    assert (cfg.path, cfg.out) == (f"{tmp_path}/x", f"{tmp_path}/runs/~/z")
    assert cfg.options == {"kept": 1, "a": {"b": [f"{tmp_path}/y"]}, "c": None} and cfg.note == "~5 of a~/b"
    assert config.merge_options(Judge, {"url": "~"}, "judge").url == str(tmp_path)
    with pytest.raises(UserError, match="out: '~nobody.here/x' is in the home of a user who is not here"):
        load("out=~nobody.here/x")


def test_defaults():
    cfg = load()
    assert isinstance(cfg, Config) and isinstance(cfg.trainer, Trainer)
    assert cfg.trainer == Trainer(lr=0.5) and cfg.judge is None and cfg.options == {"kept": 1}
    assert type(cfg.trainer.layers) is list and type(cfg.options) is dict and type(cfg.trainer.size) is tuple
    cfg.trainer.layers.append(3)
    assert load().trainer.layers == [1, 2]  # no default is shared


@pytest.mark.parametrize(
    ("argument", "read", "value"),
    [
        ("trainer.lr=1e-4", lambda c: c.trainer.lr, 1e-4),
        ("trainer.lr=1", lambda c: c.trainer.lr, 1.0),
        ("trainer.layers=[3,4]", lambda c: c.trainer.layers, [3, 4]),
        ("trainer.window=[7]", lambda c: c.trainer.window, (7,)),
        ("trainer={max_steps: 3, lr: .1}", lambda c: (c.trainer.max_steps, c.trainer.lr), (3, 0.1)),
        ("trainer.precision=bf16", lambda c: c.trainer.precision, "bf16"),
        ("trainer.precision='32'", lambda c: c.trainer.precision, "32"),
        ("seed=null", lambda c: c.seed, None),
        ("path=null", lambda c: c.path, None),
        ("path=x", lambda c: c.path, "x"),
        ("fast=true", lambda c: c.fast, True),
        ("note=1e5", lambda c: c.note, "1e5"),  # text stays as typed
        ("note=You are: a 'judge' = [", lambda c: c.note, "You are: a 'judge' = ["),
        ("note=", lambda c: c.note, ""),
        ("judge.url=http://x", lambda c: c.judge, Judge("http://x")),
        ("options.threshold=1e-2", lambda c: c.options, {"kept": 1, "threshold": 0.01}),
        ("options.a.b=[1,x]", lambda c: c.options, {"kept": 1, "a": {"b": [1, "x"]}}),
        ("weights.kl=2", lambda c: c.weights, {"kl": 2.0}),
        ("trainer.max_steps=7", lambda c: c.out, "runs/7"),
    ],
)
def test_override(argument, read, value):
    got = read(load(argument))
    assert got == value and type(got) is type(value)


def test_precedence_and_extends(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 1, lr: 1e-1}\noptions: {a: 1}\n")
    (tmp_path / "deep" / "child.yaml").write_text("extends: ../base.yaml\ntrainer: {max_steps: 2}\noptions: {b: 2}\n")
    (tmp_path / "last.yaml").write_text("extends: [base.yaml, deep/child.yaml]\nnote: last\n")
    child, last = str(tmp_path / "deep" / "child.yaml"), str(tmp_path / "last.yaml")
    cfg = load(child)
    assert (cfg.trainer.max_steps, cfg.trainer.lr, cfg.options) == (2, 0.1, {"kept": 1, "a": 1, "b": 2})
    assert load("trainer.max_steps=3", child).trainer.max_steps == 3  # overrides win wherever they stand
    assert load(child, str(tmp_path / "base.yaml")).trainer.max_steps == 1  # files: the later wins
    assert (load(last).note, load(last).trainer.max_steps) == ("last", 2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.max_step=3", "unknown key 'trainer.max_step': did you mean 'trainer.max_steps'?"),
        ("trianer.lr=3", "unknown key 'trianer': did you mean 'trainer'?"),
        ("max_steps=3", "unknown key 'max_steps': did you mean 'trainer.max_steps'?"),
        ("judge.ulr=x", "unknown key 'judge.ulr': did you mean 'judge.url'?"),
        ("trainer.zzz=1", "unknown key 'trainer.zzz': valid here: max_steps, lr, layers, window, size, precision"),
        ("trainer.max_steps=abc", "trainer.max_steps: expected int, got 'abc'"),
        ("trainer.max_steps=1.5", "trainer.max_steps: expected int, got 1.5"),
        ("trainer.max_steps=null", "trainer.max_steps: expected int, got null"),
        ("trainer.max_steps={a: 1}", "trainer.max_steps: expected int, got {'a': 1}"),
        ("trainer.max_steps.a=1", "trainer.max_steps: expected int, got {'a': 1}"),
        ("trainer.layers=3", "trainer.layers: expected list[int], got 3"),
        ("trainer.layers=[1,a]", "trainer.layers: expected list[int], got [1, 'a']"),
        ("trainer.layers={a: 1}", "trainer.layers: expected list[int], got {'a': 1}"),
        ("trainer.size=[1,2,3]", "trainer.size: expected tuple[int, int], got [1, 2, 3]"),
        ("trainer.precision=fp8", "trainer.precision: expected '32' | 'bf16', got 'fp8'"),
        ("weights.kl=x", "weights: expected dict[str, float], got {'kl': 'x'}"),
        ("trainer=3", "trainer: expected a section with keys max_steps, lr, layers, window, size, precision, got 3"),
        ("trainer=null", "trainer: expected a section with keys max_steps, lr, layers, window, size, precision, got n"),
        ("seed=x", "seed: expected int | null, got 'x'"),
        ("fast=maybe", "fast: expected bool, got 'maybe'"),
        ("trainer.layers=[1,", "trainer.layers: cannot read '[1,' as a YAML value"),
        ("judge.temperature=1", "missing mandatory key 'judge.url': give judge.url=<str>"),
        ("out=${nowhere}", "out: Interpolation key 'nowhere' not found"),
        ("trainer.max_steps=${path}", "trainer.max_steps: "),
        ("--fast", "cannot read argument '--fast': give a .yaml file or key=value (--help lists the keys)"),
        ("nowhere.yaml", "cannot read config file nowhere.yaml: No such file or directory"),
    ],
)
def test_mistake(argument, message):
    with pytest.raises(UserError) as caught:
        load(argument)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_missing_mandatory():
    with pytest.raises(UserError, match=r"^missing mandatory key 'ckpt' \(run folder\): give ckpt=<str>$"):
        config.load(Config, [], prog="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_step: 1}", "unknown key 'trainer.max_step': did you mean 'trainer.max_steps'?"),
        ("trainer: {max_steps: abc}", "trainer.max_steps: expected int, got 'abc'"),
        ("a: [1\nb: 2", "line 2: not valid YAML:"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML:"),
        ("- 1", "expected a mapping of keys, got [1]"),
        ("extends: it.yaml", "extends itself"),
    ],
)
def test_mistake_in_file_names_the_file(tmp_path, text, message):
    file = tmp_path / "it.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(file))
    assert str(caught.value).startswith(f"{file}: {message}") and "\n" not in str(caught.value)


def test_round_trip(tmp_path):
    cfg = load("judge.url=x", "options.a=[1,2]", "trainer.window=[1]", "seed=null")
    config.save(cfg, tmp_path / "run" / "config.yaml")
    assert config.read(Config, tmp_path / "run" / "config.yaml") == cfg
    assert "out: runs/10\n" in config.to_yaml(cfg)  # resolved


def test_merge_options():
    assert config.merge_options(Trainer, {"lr": 1}, "pruner.options") == Trainer(lr=1.0)
    assert config.merge_options(Trainer, None, "pruner.options") == Trainer()
    assert config.merge_options(Trainer, Trainer(lr=2.0), "pruner.options").lr == 2.0
    for options, message in [
        ({"lrr": 1}, "unknown key 'pruner.options.lrr': did you mean 'pruner.options.lr'?"),
        ({"lr": "x"}, "pruner.options.lr: expected float, got 'x'"),
        (3, "pruner.options: expected a mapping"),
    ]:
        with pytest.raises(UserError) as caught:
            config.merge_options(Trainer, options, "pruner.options")
        assert str(caught.value).startswith(message)
    with pytest.raises(UserError, match=r"^missing mandatory key 'judge\.url'"):
        config.merge_options(Judge, {}, "judge")


def test_checks_of_the_schema_run():
    with pytest.raises(UserError, match="value must be positive, got 0"):
        config.load(Positive, ["value=0"])


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        config.load(Config, ["--help"], prog="prog", doc="What it does.")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith("usage: prog [config.yaml ...] [key=value ...]\n\nWhat it does.\n")
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.startswith("  ")}
    assert lines["ckpt"] == "ckpt str (mandatory) run folder"
    assert lines["trainer.max_steps"] == "trainer.max_steps int = 10 optimiser steps"
    assert lines["trainer.lr"] == "trainer.lr float = 0.5"  # the default of this section, not that of its class
    assert lines["trainer:"] == "trainer: Trainer optimisation"
    assert lines["judge.url"].startswith("judge.url str")
    assert {key for key, *_ in config._keys(Config)} <= {key.rstrip(":") for key in lines}


def test_entry(capsys):
    @config.entry(Config)
    def main(cfg: Config) -> str:
        if cfg.note == "bad":
            raise UserError("two\nlines")
        return cfg.ckpt

    assert main(["ckpt=a"]) == "a"
    for argv, message in [(["ckpt=a", "note=bad"], "error: two lines\n"), (["ckp=a"], "error: unknown key 'ckp'")]:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        captured = capsys.readouterr()
        assert caught.value.code == 2 and captured.err.startswith(message) and captured.err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["-h"])
    assert caught.value.code == 0 and "usage: " in capsys.readouterr().out


MISSING_PACKAGES = {
    "lightning": ModuleNotFoundError("No module named 'lightning.pytorch'", name="lightning.pytorch"),
    "scikit-learn": ModuleNotFoundError("No module named 'sklearn'", name="sklearn"),
    "tensorboard": ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing"),
}


@pytest.mark.parametrize("package", MISSING_PACKAGES)
def test_a_missing_extra_is_answered_with_the_command_that_brings_it(package, capsys):
    @config.entry(Config)
    def main(cfg: Config) -> None:
        raise MISSING_PACKAGES[package]

    with pytest.raises(SystemExit) as stop:
        main(["ckpt=a"])
    extra = "demo" if package == "scikit-learn" else "train"
    said = f"error: python -m src.test_config needs the package {package}: pip install 'glimpseprune[{extra}]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, said)


def test_another_missing_module_is_a_bug_and_no_extra():
    @config.entry(Config)
    def main(cfg: Config) -> None:
        importlib.import_module("glimpseprune.no_such_module")

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["ckpt=a"])


def test_training_without_lightning(tmp_path, monkeypatch, capsys):
    from glimpseprune import train

    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit) as stop:
        train.main([f"out={tmp_path}/run", "backbone.path=x", "data.path=x"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: python -m src.train needs the package lightning: pip install 'glimpseprune[train]'")


def test_nothing_heavy_is_imported():
    code = f"import sys; sys.path[:] = {sys.path}; import glimpseprune.config, glimpseprune.lookup"
    code += "; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@dataclass
class Folders:
    folders: list[str] = option(MISSING, "some")
    out: str = option("x", "one")

    BARE = "folders"


def test_bare_arguments_are_the_value_of_the_key_that_the_schema_names(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("out: y")
    cfg = config.load(Folders, ["runs/a", str(file), "runs/k=0.1,[b]", "it's: b"])
    assert (cfg.folders, cfg.out) == (["runs/a", "runs/k=0.1,[b]", "it's: b"], "y")
    assert config.load(Folders, ["folders=[c]", "out=z"]) == Folders(["c"], "z")
    with pytest.raises(UserError, match="missing mandatory key 'folders'"):
        config.load(Folders, ["out=z"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_that_says_how_to_go_on(number, capsys):
    before = signal.signal(number, signal.SIG_DFL)  # in the background of a shell SIGINT is ignored
    try:
        with pytest.raises(SystemExit) as stop, config.answering("python -m src.x", ["a=1", "b=x y", "overwrite=true"]):
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert stop.value.code == 128 + number and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    name = signal.Signals(number).name
    again = "python -m src.x a=1 'b=x y' overwrite=true"
    assert capsys.readouterr().err == f"\ninterrupted ({name}): nothing is half-written; again: {again}\n"


def test_a_signal_that_a_library_makes_another_error_of_is_told_as_what_it_is(capsys):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop, config.answering("python -m src.x"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except BaseException:
                raise AttributeError("of None") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (
        stop.value.code == 143
        and "interrupted (SIGTERM): nothing is half-written; again: python -m src.x" in capsys.readouterr().err
    )
    with config.answering("python -m src.x"):
        assert not config.received()  # which was another command's


def test_a_signal_that_comes_where_python_ignores_errors_comes_again(capsys):
    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    before, hook = signal.signal(signal.SIGTERM, signal.SIG_DFL), sys.unraisablehook
    try:
        with pytest.raises(SystemExit) as stop, config.answering("python -m src.x"):
            Last()
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    said = "\ninterrupted (SIGTERM): nothing is half-written; again: python -m src.x\n"
    assert stop.value.code == 143 and capsys.readouterr().err == said and sys.unraisablehook is hook


def test_a_signal_that_is_ignored_stays_so(capsys):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with config.answering("python -m src.x"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not capsys.readouterr().err


def test_advice_is_of_the_innermost_block_that_has_some(capsys):
    with (
        pytest.raises(SystemExit),
        config.answering("python -m src.x", ["a=1", "overwrite=true", "resume=false"]),
        config.advising(lambda: "outer"),
        config.advising(lambda: config.command("resume=true")),
        config.advising(lambda: ""),
    ):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "\ninterrupted (SIGINT): python -m src.x a=1 resume=true\n"
