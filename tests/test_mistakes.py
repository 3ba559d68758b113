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
"""Configurations; `experiments` of more seeds found what is fixed by now."""


class Begun(BaseException):
    """A command has found nothing wrong, and would begin its work."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("mistakes"))


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
    files = (path for folder in folders for path in folder.rglob("*") if not path.name.startswith("drawn-"))
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files if not path.is_dir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_broken_is_begun(command, world, tmp_path):
    main, first, _ = COMMANDS[command]
    try:
        main([*first, *world.valid(command)])
    except Begun:
        pass
    finally:
        shutil.rmtree(world.at("new"), ignore_errors=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_two_hundred_mistakes(command, world, tmp_path, capfd):
    """Of one seed, those of one command; ``World.draw`` takes the commands in turn."""
    before, folders = snapshot(world.folder, tmp_path), set(world.folder.iterdir())
    tried, began = 0, time.process_time()
    for name, argv in world.draw(seed=2024, count=COUNT):
        if name != command:
            continue
        with pytest.raises(BaseException) as stop:  # noqa: PT011 (which one is what is tested)
            COMMANDS[command][0](argv)
            pytest.fail(f"{command} {argv}: taken as it is")
        said = capfd.readouterr().err
        assert isinstance(stop.value, SystemExit) and stop.value.code == 2, (argv, repr(stop.value))
        assert said.startswith("error: ") and said.count("\n") == 1, (argv, said)
        assert snapshot(world.folder, tmp_path) == before, argv
        tried += 1
    drawn = {path for path in world.folder.iterdir() if path.name.startswith("drawn-")}
    assert set(world.folder.iterdir()) - drawn == folders - drawn
    assert tried >= COUNT // len(COMMANDS) and (time.process_time() - began) / tried < 1
