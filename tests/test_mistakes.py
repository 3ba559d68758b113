"""Wrong arguments, whatever they are: one line, exit code 2, before a model is loaded, and nothing is written."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import transformers

from glimpseprune import demo
from glimpseprune.tiny import module
from mistakes import COMMANDS, World

COUNT = 200


class Begun(BaseException):
    """A command has found nothing wrong, and would begin its work."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture(scope="module")
def drawn(world) -> dict[str, list[list[str]]]:
    """Wrong arguments of each command."""
    found: dict[str, list[list[str]]] = {command: [] for command in COMMANDS}
    for command, argv in world.draw(seed=2024, count=COUNT):
        found[command].append(argv)
    return found


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch, tmp_path):
    def begin(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", begin)
    monkeypatch.setattr(module, "PretrainModule", begin)
    monkeypatch.setattr(demo, "step", begin)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "SLURM_STEP_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size * path.is_file()) for path in paths}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_broken_is_begun(command, world):
    main, first, _ = COMMANDS[command]
    try:
        main([*first, *world.valid(command)])
    except Begun:
        pass
    finally:
        shutil.rmtree(world.at("new"), ignore_errors=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_two_hundred_mistakes(command, world, drawn, tmp_path, capfd):
    before, began = snapshot(world.folder, tmp_path), time.process_time()
    for argv in drawn[command]:
        with pytest.raises(SystemExit) as stop:
            COMMANDS[command][0](argv)
            pytest.fail(f"{command} takes {argv}")
        said = capfd.readouterr().err
        assert (stop.value.code, said[:7], said.count("\n")) == (2, "error: ", 1), (argv, said)
        assert snapshot(world.folder, tmp_path) == before, argv
    assert len(drawn[command]) >= COUNT // len(COMMANDS)
    assert (time.process_time() - began) / len(drawn[command]) < 1
