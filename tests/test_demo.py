"""The demo's commands: shown as they are run, never again what is done, and nothing replaced unasked."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from glimpseprune import demo, tasks


@pytest.fixture
def ran(monkeypatch, tmp_path) -> list[tuple[str, list[str]]]:
    """What was run instead of the commands, which leave behind what tells that they were."""
    calls: list[tuple[str, list[str]]] = []

    def module(name: str) -> SimpleNamespace:
        verb = name.rpartition(".")[2]

        def main(args: list[str]) -> None:
            calls.append((verb, args))
            given = dict(arg.partition("=")[::2] for arg in args)
            if verb == "prepare":
                counts = given["options.count"].strip("{}").split(", ")
                splits = {split: {"count": int(number)} for split, _, number in (c.partition(": ") for c in counts)}
                Path(given["out"]).mkdir(parents=True, exist_ok=True)
                (Path(given["out"]) / "manifest.json").write_text(json.dumps({"splits": splits}))
            if verb == "train":
                (Path(given["out"]) / "checkpoints").mkdir(parents=True, exist_ok=True)
                (Path(given["out"]) / "checkpoints" / "checkpoints.json").touch()
                (Path(given["out"]) / "trainable.safetensors").touch()

        return SimpleNamespace(main=main)

    monkeypatch.setattr(demo, "import_module", module)
    monkeypatch.chdir(tmp_path)
    return calls


def test_what_is_shown_is_what_is_run(ran, capsys):
    demo.main([])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if line.startswith("python -m src.")]
    assert shown == [f"python -m src.{verb} {shlex.join(args)}" for verb, args in ran]
    assert [verb for verb, _ in ran] == ["prepare", "train", "evaluate"]


def test_the_task_is_evaluated_as_its_file_says(ran):
    """But an evaluation of before there were tasks is shown, and not refused for being another one."""
    demo.main([])
    assert ran[-1] == ("evaluate", ["ckpt=runs/demo", "tasks=[tags]", "data.path=runs/demo-data", "resume=true"])
    assert ran[0][1][0] == f"source={tasks.find('tags').prepare['source']}"
    Path("runs/demo/scores.json").write_text("[]")
    Path("runs/demo/evaluation.yaml").write_text("asked: {ckpt: runs/demo}")
    demo.main([])
    assert ran[-1] == ("evaluate", ["ckpt=runs/demo", "resume=true"])
    Path("runs/demo/evaluation.yaml").write_text("asked: {tasks: [tags]}")
    demo.main([])
    assert "tasks=[tags]" in ran[-1][1]


def test_what_is_done_is_not_done_again_and_never_replaced(ran):
    demo.main([])
    first = list(ran)
    assert not [arg for _, args in first for arg in args if arg.startswith("overwrite")]
    ran.clear()
    demo.main([])
    assert [verb for verb, _ in ran] == ["train", "evaluate"] and all("resume=true" in args for _, args in ran)
    ran.clear()
    demo.main(["overwrite=true"])
    assert [verb for verb, args in ran if "overwrite=true" in args] == ["prepare", "train"]


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_anew(ran):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/config.yaml").touch()
    demo.main([])
    assert "overwrite=true" in dict(ran)["train"]
    ran.clear()
    Path("runs/other/.replaced").mkdir(parents=True)  # the run before, which nobody has asked to replace
    Path("runs/other/config.yaml").touch()
    demo.main(["out=runs/other"])
    assert "overwrite=true" not in dict(ran)["train"]


def test_a_private_look_beside_the_glimpse(ran, capsys):
    demo.main(["early=true"])
    assert [verb for verb, _ in ran] == ["prepare", "train", "evaluate", "train", "evaluate", "compare"]
    assert ran[-1][1] == ["runs/demo", "runs/demo-early", "out=runs/demo-early/compare"]
    assert ran[3][1][0] == "conf/early.yaml" and "out=runs/demo-early" in ran[3][1]
    with pytest.raises(SystemExit):
        demo.main(["early=true", "plus=true"])
    assert "give one of plus=true and early=true" in capsys.readouterr().err


def test_stage_2_leaves_stage_1_alone(ran):
    demo.main([])
    ran.clear()
    demo.main(["plus=true", "overwrite=true"])
    assert [verb for verb, _ in ran] == ["prepare", "train", "evaluate"]
    assert {dict(arg.partition("=")[::2] for arg in args).get("out", "") for _, args in ran} == {
        "runs/demo-data-hard",
        "runs/demo-plus",
        "",
    }


def test_other_data_are_not_mistaken_for_the_demos(ran, capsys):
    demo.main([])
    with pytest.raises(SystemExit) as stop:
        demo.main(["test_samples=12"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: other data are in runs/demo-data")
