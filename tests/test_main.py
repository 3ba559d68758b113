"""The one command: its verbs are the modules that have a main, and what is told names the way that was typed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glimpseprune import __main__ as command
from glimpseprune import config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def typed(monkeypatch):
    """As if the console command had been typed."""
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/glimpseprune"])


def output(capsys, code: int, *argv: str) -> str:
    """What a call that ends with ``code`` prints."""
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == code
    return captured.out + captured.err


def test_help_lists_every_verb_with_what_it_does(typed, capsys):
    command.main(["--help"])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.partition("verbs:\n")[2].splitlines()}
    assert {"prepare", "train", "evaluate", "export", "pretrain", "plan", "preflight", "demo"} <= set(lines)
    assert "config" not in lines and "Train: glimpseprune train conf/stage1.yaml" in lines["train"]
    command.main([])
    assert capsys.readouterr().out == out


def test_verbs_are_found_in_the_folder(tmp_path, monkeypatch):
    (tmp_path / "report.py").write_text('"""Say it: ``src.report``.\n\nMore."""\n\n\ndef main(argv=None): ...\n')
    (tmp_path / "cost.py").write_text('"""Counts."""\n\nname = "main"\n')
    monkeypatch.setattr(command, "__file__", str(tmp_path / "__main__.py"))
    assert command.verbs() == {"report": "Say it: ``src.report``."}


def test_every_verb_has_its_shim():
    shims = {file.stem for file in (ROOT / "src").glob("[a-z]*.py")}
    assert shims == set(command.verbs())
    for name in shims:
        assert f"from glimpseprune.{name} import main\n" in (ROOT / "src" / f"{name}.py").read_text()


def test_an_unknown_verb_gets_the_nearest_one(typed, capsys):
    said = output(capsys, 2, "evalute", "ckpt=x")
    assert said.startswith("error: no 'evalute'") and "did you mean 'evaluate'?" in said and said.count("\n") == 1


def test_help_and_advice_name_what_was_typed(typed, capsys, monkeypatch):
    assert output(capsys, 0, "evaluate", "--help").startswith("usage: glimpseprune evaluate [config.yaml ...]")
    assert output(capsys, 0, "preflight", "train", "-h").startswith("usage: glimpseprune preflight train [config.yaml")
    base = f"backbone.path={ROOT}/data/tiny-qwen2_5_vl"
    said = output(capsys, 2, "preflight", "train", base, "data.path=nowhere/at/all", "out=nowhere/either")
    assert "make them with `glimpseprune prepare source=<name> out=nowhere/at/all`" in said
    said = output(capsys, 2, "preflight", "evaluate", "ckpt=nowhere/at/all")
    assert "nowhere/at/all" in said and "src." not in said
    assert "src." not in output(capsys, 0, "demo", "--help")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "src/glimpseprune/__main__.py")])
    assert output(capsys, 0, "plan", "--help").startswith("usage: python -m glimpseprune plan [config.yaml ...]")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "src/plan.py")])
    assert output(capsys, 0, "plan", "--help").startswith("usage: python -m src.plan [config.yaml ...]")


def test_as_typed_leaves_alone_what_is_no_command(typed):
    text = "see src/glimpseprune/config.py, or run `python -m src.prepare out=x` (or src.plan); mysrc.plan"
    said = config.as_typed(text)
    assert said == (
        "see src/glimpseprune/config.py, or run `glimpseprune prepare out=x` (or glimpseprune plan); mysrc.plan"
    )


@pytest.mark.parametrize("verb", ["evaluate", "plan"])
def test_in_processes_of_their_own(verb):
    for argv in (["-m", f"src.{verb}"], ["-m", "glimpseprune", verb]):
        env = {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([sys.executable, *argv, "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: python {' '.join(argv)} [config.yaml ...]")


@pytest.mark.parametrize("argv", [["-m", "src.plan"], ["-m", "glimpseprune", "plan"], ["glimpseprune", "plan"]])
def test_before_a_command_listens_a_signal_ends_it_without_a_word(argv, tmp_path):
    """While it is imported; nothing has begun."""
    (tmp_path / "yaml.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\n")
    (tmp_path / "glimpseprune").write_text("from glimpseprune.__main__ import main\nmain()\n")
    argv = [str(tmp_path / argv[0]) if argv[0] == "glimpseprune" else argv[0], *argv[1:]]
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_while_its_module_is_imported_it_says_how_to_go_on(typed, capsys, monkeypatch):
    monkeypatch.setattr(command, "import_module", lambda _: config.interrupt(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    said = output(capsys, 143, "plan", "image=448x448")
    signal.signal(signal.SIGTERM, before)
    assert said == "\ninterrupted (SIGTERM): nothing is half-written; again: glimpseprune plan image=448x448\n"
