"""Run folders: the run before is whole until another has begun, nobody else's files are touched, one at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from glimpseprune import config, files, runs
from glimpseprune.config import FREE, START, UserError
from glimpseprune.options import BackboneOptions, DataOptions, LoraOptions, TrainConfig, TrainerOptions

CFG = TrainConfig(out="x", backbone=BackboneOptions(path="b"), data=DataOptions(path="d"))


def fill(out: Path, text: str, *names: str) -> None:
    for name in names or (runs.CONFIG, runs.WEIGHTS, runs.INDEX, "best/config.yaml", "tensorboard/run/events.1"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


def held(out: Path) -> dict[str, str]:
    """Every file but those that are there while somebody works."""
    return {name: (out / name).read_text() for name in runs.inside(out) if not runs.matches(name, runs.LIVE)}


@pytest.fixture
def out(tmp_path) -> Path:
    """A finished run, of before there were markers."""
    out = tmp_path / "run"
    fill(out, "old")
    config.save(CFG, out / runs.CONFIG)
    return out


def test_a_run_that_ends_before_its_first_step_leaves_the_one_before(out):
    before = held(out)
    with pytest.raises(ZeroDivisionError), runs.Run(out) as run:
        run.claim()
        fill(out, "new", "tensorboard/run/events.2", "heartbeats/rank-0", "bad-batch-0-rank0.json")
        raise ZeroDivisionError
    assert held(out) == before | {"bad-batch-0-rank0.json": "new"}  # which the error names
    assert not (out / runs.MARKER).exists() and not (out / runs.LOCK).exists()


def test_a_resume_that_fails_changes_nothing(out):
    fill(out, "", runs.MARKER)
    before = {name: (out / name).stat().st_mtime_ns for name in runs.inside(out)}
    with pytest.raises(ZeroDivisionError), runs.Run(out) as run:
        run.claim()
        raise ZeroDivisionError
    assert {name: (out / name).stat().st_mtime_ns for name in runs.inside(out)} == before


def test_a_foreign_folder_is_not_even_locked(tmp_path):
    (tmp_path / "thesis.txt").touch()
    before = tmp_path.stat().st_mtime_ns
    with pytest.raises(UserError, match="is not empty, and no run folder"), runs.Run(tmp_path):
        pass
    assert tmp_path.stat().st_mtime_ns == before


def test_where_nothing_was_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), runs.Run(tmp_path / "a" / "b") as run:
        run.claim()
        fill(run.out, "new", "tensorboard/run/events.2")
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())


def begin(out: Path) -> None:
    """A run in the place of another, up to its first step."""
    run = runs.Run(out).__enter__()
    try:
        run.claim()
        fill(out, "new", "tensorboard/run/events.2", "heartbeats/rank-0")
        run.begin(anew=True)
        fill(out, "new", runs.CONFIG, "metrics.jsonl")
    finally:
        run.stack.close()  # as the kernel does when it is killed


def test_the_run_before_is_back_if_the_new_one_is_killed_before_its_first_checkpoint(out):
    before = held(out)
    begin(out)
    assert set(held(out)) >= {runs.CONFIG, "metrics.jsonl", "tensorboard/run/events.2"}
    assert not (out / runs.WEIGHTS).exists() and (out / runs.CONFIG).read_text() == "new"
    with runs.Run(out):
        assert held(out) == before
    assert held(out) == before and not (out / runs.ASIDE).exists()


def test_it_goes_with_the_first_checkpoint_of_the_new_one(out):
    begin(out)
    fill(out, "new", runs.INDEX)
    with runs.Run(out):  # killed before it was deleted
        pass
    assert set(held(out)) == {runs.CONFIG, "metrics.jsonl", runs.INDEX, "tensorboard/run/events.2"}
    assert set(held(out).values()) == {"new"}


@pytest.mark.parametrize("moved", range(7))
def test_a_kill_between_any_two_moves_loses_nothing(out, moved, monkeypatch):
    before, replace_ = held(out), os.replace
    calls: list[object] = []

    def counted(source, target) -> None:
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(target)
        replace_(source, target)

    monkeypatch.setattr("os.replace", counted)
    with suppress(KeyboardInterrupt):
        begin(out)
    calls[:] = [None] * (moved - 2)  # and once more while they are moved back
    with suppress(KeyboardInterrupt), runs.Run(out):
        pass
    monkeypatch.undo()
    with runs.Run(out):
        pass
    assert held(out).items() >= before.items() and held(out).keys() - before <= {"tensorboard/run/events.2"}


def test_only_runs_of_ours_are_replaced(out, tmp_path):
    runs.require_ours(out, TrainConfig)
    fill(out, "ten years", "checkpoints/thesis.tex")
    with pytest.raises(UserError, match="holds checkpoints/thesis.tex, which no run writes"):
        runs.require_ours(out, TrainConfig)
    fill(tmp_path / "thesis", "title: thesis\n", "config.yaml")
    fill(tmp_path / "other", "lessons: []\n", "config.yaml", runs.MARKER)  # a pretraining
    fill(tmp_path / "torn", "{", "config.yaml")
    for name in ("thesis", "other", "torn"):
        with pytest.raises(UserError, match="is not a run folder of this command"):
            runs.require_ours(tmp_path / name, TrainConfig)


def test_all_that_commands_write_is_on_the_list():
    for name in (runs.CONFIG, "metrics.jsonl", "checkpoints/step-00000002.ckpt.partial", "kept/glimpse.png"):
        assert runs.matches(name, runs.OWN), name
    for name in ("notes.txt", "config.yaml.bak", "kept/notes.txt", ".bashrc", "partial"):
        assert not runs.matches(name, runs.OWN), name


def test_what_a_run_that_came_to_nothing_left_is_nothing(tmp_path):
    out = tmp_path / "run"
    assert runs.is_empty(out)
    fill(out, "", runs.MARKER, "tensorboard/run/events", "heartbeats/rank-0", "config.yaml.partial")
    assert runs.is_empty(out)
    fill(out, "", "metrics.jsonl")
    assert not runs.is_empty(out)
    fill(tmp_path / "log", "", "tensorboard/run/events")  # not by us
    assert not runs.is_empty(tmp_path / "log")


def test_two_at_a_time_are_refused(out, capsys):
    before = held(out)
    with runs.Run(out), pytest.raises(SystemExit) as stop, config.answering("it"), runs.Run(out):
        pass
    assert stop.value.code == 2 and "is in use by process" in capsys.readouterr().err
    assert held(out) == before


def test_a_link_stays_and_its_folder_is_used(out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    with runs.Run(tmp_path / "link") as run:
        run.claim()
        run.begin(anew=True)
        fill(out, "new", runs.INDEX)
    assert (tmp_path / "link").is_symlink() and held(out) == {runs.INDEX: "new"}


def test_a_run_that_fails_before_its_first_checkpoint_puts_the_one_before_back_itself(out):
    before = held(out)
    with pytest.raises(ZeroDivisionError), runs.Run(out) as run:
        run.claim()
        run.begin(anew=True)
        fill(out, "new", runs.CONFIG, "bad-batch-1-rank0.json")
        raise ZeroDivisionError
    assert held(out) == before | {"bad-batch-1-rank0.json": "new"}


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage": "grpo"}, 'stage was "glimpse" in x, is "grpo"'),
        ({"seed": 1}, "seed was 0 in x, is 1"),
        ({"backbone": BackboneOptions(path="b", dtype="float32")}, 'backbone.dtype was "auto"'),
        ({"backbone": BackboneOptions(path="/")}, None),  # moved: b is gone
        ({"data": DataOptions(path="d", val_samples=1)}, "data.val_samples was 128"),
        ({"data": DataOptions(path="d", workers=3)}, None),
        ({"lora": LoraOptions()}, "lora.rank was null"),
        ({"trainer": TrainerOptions(max_steps=7, devices="2", strategy="zero2")}, None),
        ({"trainer": TrainerOptions(precision="bf16-mixed")}, "trainer.precision was"),
        ({"out": "y", "resume": True, "overwrite": True}, None),
    ],
)
def test_a_run_goes_on_as_what_it_was(change, said):
    if said is None:
        return runs.require_same(CFG, replace(CFG, **change), "x")
    with pytest.raises(UserError) as error:
        runs.require_same(CFG, replace(CFG, **change), "x")
    assert said in str(error.value) and "trainer.max_steps" in str(error.value) and "watch.*" in str(error.value)


def test_what_was_filled_in_when_the_run_began_is_no_difference():
    saved = replace(CFG, lora=LoraOptions(first_layer=3))
    runs.require_same(saved, replace(CFG, lora=LoraOptions()), "x")
    with pytest.raises(UserError, match=r"lora.first_layer was 3 in x, is 2"):
        runs.require_same(saved, replace(CFG, lora=LoraOptions(first_layer=2)), "x")


def test_paths_are_compared_by_where_they_lead(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert runs.moved(str(tmp_path / "a"), f"{tmp_path}/../{tmp_path.name}/link")
    assert not runs.moved(str(tmp_path / "a"), str(tmp_path / "b"))
    assert runs.moved(str(tmp_path / "gone"), str(tmp_path / "b")) and not runs.moved("gone", "nowhere")


# ------------------------------------------------------------------------------- how a run was started is no part of it


def test_how_a_run_was_started_is_neither_saved_nor_read_from_a_file(tmp_path, capsys):
    cfg = replace(CFG, out="/home/me/x", resume=True, overwrite=True)
    config.save(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert not {"out", "resume", "overwrite"} & config.names(tmp_path / "config.yaml") and "/home/me" not in text
    assert config.read(TrainConfig, tmp_path / "config.yaml") == replace(CFG, out=str(tmp_path))
    (tmp_path / "config.yaml").write_text(f"{text}out: /old\noverwrite: true\nresume: true\n")  # as it was once
    assert config.read(TrainConfig, tmp_path / "config.yaml") == replace(CFG, out=str(tmp_path))
    config.save(replace(cfg, out="old"), tmp_path / "config.yaml")  # a relative one leads nowhere else
    assert config.read(TrainConfig, tmp_path / "config.yaml") == replace(CFG, out="old")
    (tmp_path / "config.yaml").write_text(f"{text}out: old\noverwrite: true\nresume: true\n")
    loaded = config.load(TrainConfig, [f"{tmp_path}/config.yaml"])
    assert loaded == replace(CFG, out="old") and capsys.readouterr().err.count("does not count") == 2
    assert config.load(TrainConfig, [f"{tmp_path}/config.yaml", "overwrite=true"]).overwrite
    (tmp_path / "config.yaml").write_text(f"{text}overwrite: null\n")
    with pytest.raises(UserError, match="overwrite: expected bool, got null"):
        config.load(TrainConfig, [f"{tmp_path}/config.yaml"])


def schemas() -> list[type]:
    from importlib import import_module

    from glimpseprune.__main__ import verbs

    found = [vars(import_module(f"glimpseprune.{verb}")) for verb in verbs()]
    return [kind for module in found for name, kind in module.items() if name.endswith("Config") and name != "Config"]


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_every_key_that_replaces_or_resumes_is_one_of_a_start(schema):
    roles = dict(config.roles(schema))
    assert {roles[key] for key in ("overwrite", "resume") if key in roles} <= {START}
    assert {role for key, role in roles.items() if key == "trainer.max_steps"} <= {FREE}


def test_a_file_that_is_locked_by_nobody_is_no_lock(out):
    files.write_json(out / runs.LOCK, {"host": "gone", "pid": 1})  # the kernel knows better
    with runs.Run(out):
        pass
