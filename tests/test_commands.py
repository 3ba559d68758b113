"""Every command of README.md, CONTRIBUTING.md and experiments/*/run.sh is given to a shell, and dry-run.

The shell runs the text itself, with its loops and variables, in a copy of the repository where programs only write down
what they were asked. Then the real config loader reads the real arguments of each command, in order: a run folder must
have been trained, and data prepared, before something starts from it. Jobs of SLURM are dry-run by their own scripts.
"""

import os
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from glimpseprune import config, lookup, preflight, prepare, resources, training
from glimpseprune.pruners import options_of
from glimpseprune.running import strategies

ROOT = Path(__file__).parent.parent
RUNS = sorted((ROOT / "experiments").glob("*/run.sh"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PROGRAMS = "python glimpseprune make tensorboard pre-commit torchrun pip cp".split()
WRITE_DOWN = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\0'; } >> "$WRITTEN"
"""
SBATCH = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec bash "$@"
"""


class Loaded(Exception):
    """What a command would have been given."""

    def __init__(self, cfg: object):
        self.cfg = cfg


class Shell:
    """A copy of the repository in which programs only write down how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, folder / "written"
        for name in ("conf", "slurm", "experiments"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "data").mkdir()
        (folder / "data" / "tiny-qwen2_5_vl").symlink_to(ROOT / "data" / "tiny-qwen2_5_vl")
        places = [Path("bin", name) for name in PROGRAMS] + [Path(".venv/bin", name) for name in PROGRAMS]
        for place in (*places, Path(".ci/run"), Path("bin/sbatch")):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(SBATCH if place.name == "sbatch" else WRITE_DOWN)
            (folder / place).chmod(0o755)

    def run(self, *argv: str) -> list[list[str]]:
        """Each command, with its arguments, that bash was to start."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        own = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "WRITTEN": str(self.written), "DRY_RUN": "1"}
        self.written.write_bytes(b"")
        done = subprocess.run(
            ["bash", "-eu", *argv], cwd=self.folder, env=clean | own, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [call.split("\0") for call in self.written.read_text().split("\0\0")[:-1]]


class DryRun:
    """Commands, one after the other, up to the point where they have read their configs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        load = config.load

        def stop(*args: object, **kwargs: object) -> None:
            raise Loaded(load(*args, **kwargs))

        monkeypatch.setattr(config, "load", stop)
        self.capsys, self.prepared, self.count = capsys, set(), 0

    def __call__(self, program: str, *arguments: str) -> None:
        self.count += 1
        if "-m" in arguments:
            module, *arguments = arguments[arguments.index("-m") + 1 :]
            assert module.startswith("src.") and (ROOT / "src" / f"{module[4:]}.py").is_file(), module
            self.command(module.removeprefix("src."), arguments)
        elif program == "glimpseprune":
            self.command(arguments[0], list(arguments[1:]))
        elif program == "make":
            makefile = (ROOT / "Makefile").read_text()
            for word in arguments[2 * (arguments[0] == "-o") :]:  # what make is to take for done
                name, sign, _ = word.partition("=")
                assert re.search(rf"^{name}\s*\?=" if sign else rf"^{name}:", makefile, re.MULTILINE), word

    def command(self, verb: str, arguments: list[str]) -> None:
        try:
            import_module(f"glimpseprune.{verb}").main([word for word in arguments if word != "..."])
        except Loaded as found:
            check = getattr(self, verb, None)
            if check is not None:
                check(found.cfg)
        except SystemExit:
            error = self.capsys.readouterr().err
            assert "..." in arguments and "missing mandatory key" in error, (verb, arguments, error)
        else:
            pytest.fail(f"{verb} read no config")

    # -------------------------------------------------------------------------------- what loading a config leaves open

    def prepare(self, cfg: prepare.PrepareConfig) -> None:
        config.merge_options(lookup.find(prepare.SOURCES, cfg.source).Options, cfg.options, "options")
        self.prepared.add(cfg.out)

    def train(self, cfg: Any) -> None:
        training.require(cfg.stage)
        options_of(cfg.pruner.name, cfg.pruner.options)
        self.backbone(cfg.backbone.path)
        assert cfg.trainer.strategy in strategies.NAMES or Path(resources.find(cfg.trainer.strategy)).is_file()
        if prepare.described(cfg.data.path, cfg.data.prepare):
            self.prepared.add(cfg.data.path)
        assert cfg.data.path in self.prepared, f"{cfg.data.path} was not prepared"
        assert cfg.init_from is None or self.is_run(cfg.init_from), f"init_from={cfg.init_from} was not trained"
        config.save(cfg, Path(cfg.out) / "config.yaml")

    def evaluate(self, cfg: Any) -> None:
        preflight.check_options(cfg)
        without = cfg.ckpt in (None, config.MISSING)
        assert without or self.is_run(cfg.ckpt) or self.is_hub_id(cfg.ckpt), f"ckpt={cfg.ckpt} was not trained"
        assert cfg.data.path is None or cfg.data.path in self.prepared, f"{cfg.data.path} was not prepared"

    def export(self, cfg: Any) -> None:
        assert self.is_run(cfg.ckpt), f"ckpt={cfg.ckpt} was not trained"

    def plan(self, cfg: Any) -> None:
        self.backbone(cfg.backbone.path)
        options_of(cfg.pruner.name, cfg.pruner.options)

    def is_run(self, path: str) -> bool:
        return (Path(resources.find(path)) / "config.yaml").is_file()

    def is_hub_id(self, path: str) -> bool:
        return bool(re.fullmatch(r"[\w-]+/[\w.-]+", path)) and path.split("/")[0] not in ("data", "runs", "conf")

    def backbone(self, path: str) -> None:
        assert self.is_hub_id(path) or (Path(resources.find(path)) / "config.json").is_file(), path


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path)


@pytest.fixture
def dry_run(monkeypatch, capsys):
    return DryRun(monkeypatch, capsys)


@pytest.mark.parametrize("text", TEXTS, ids=lambda file: file.name)
def test_commands_of_the_texts(text, shell, dry_run):
    written = text.read_text()
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", written, re.MULTILINE | re.DOTALL):
        for call in shell.run("-c", block):
            dry_run(*call)
    assert dry_run.count > 3
    for command in re.findall(r"`make ([^`]+)`", written):
        dry_run("make", command.split()[0])


def test_commands_of_the_experiments(shell, dry_run):
    """In the order of their names: later ones start from runs of earlier ones."""
    for script in RUNS:
        before = dry_run.count
        for call in shell.run(str(script.relative_to(ROOT))):
            dry_run(*call)
        assert dry_run.count > before, script


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python -m src.trian x.yaml", "src.trian"),
        ("python -m src.train conf/stage1.yaml trainer.max_step=3 ...", "did you mean 'trainer.max_steps'"),
        ("python -m src.train conf/stage3.yaml ...", "cannot read config file conf/stage3.yaml"),
        ("python -m src.prepare source=tags out=d options.sise=3", "did you mean 'options.size'"),
        ("python -m src.train conf/demo.yaml", "runs/demo-data was not prepared"),
        ("glimpseprune evaluate ckpt=runs/demo", "ckpt=runs/demo was not trained"),
        ("sbatch slurm/stage1.sh conf/smoke.yaml trainer.max_step=3", "did you mean 'trainer.max_steps'"),
        ("sbatch --nodes=2 slurm/stage3.sh conf/smoke.yaml", "slurm/stage3.sh: No such file"),
        ("make demonstration", "demonstration"),
        ("make test ARG=x", "ARG=x"),
        ("no-such-program x", "no-such-program: command not found"),
    ],
)
def test_what_would_not_run_is_seen(text, said, shell, dry_run):
    with pytest.raises((AssertionError, config.UserError), match=re.escape(said)):
        for call in shell.run("-c", text):
            dry_run(*call)
