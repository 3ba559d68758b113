"""What is missing is told in one line before a job is queued, and what is there is not complained about."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from glimpseprune import preflight

SMALL = {
    "source": "tags",
    "options": {"size": 224, "min_tags": 4, "max_tags": 4, "count": {"train": 6, "val": 3, "test": 3}},
}


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """Those of a training on data that it can make and weights that are there."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "base").mkdir()
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "base" / "model.safetensors")
    return [
        "conf/stage1.yaml",
        f"backbone.path={tmp_path}/base",
        f"data.path={tmp_path}/data",
        f"data.prepare={json.dumps(SMALL)}",
        f"out={tmp_path}/run",
    ]


def refused(capsys, command: str, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        preflight.main([command, *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_training_with_all_it_needs(arguments, capsys, tmp_path):
    preflight.main(["train", *arguments])
    assert "will be made" in capsys.readouterr().out and not (tmp_path / "data").exists()
    preflight.main(["train", *arguments, "make_data=true"])
    assert "6 train, 3 val" in capsys.readouterr().out
    made = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    preflight.main(["train", *arguments, "make_data=true"])
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == made
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("trainer.max_step=3", "did you mean 'trainer.max_steps'"),
        ("pruner.options={thresold: 0.4}", "pruner.options.threshold"),
        ("stage=glimpze", "did you mean 'glimpse'"),
        ("data.prepare=null", "python -m src.prepare"),
        ("data.prepare={sauce: tags}", "unknown key 'data.prepare.sauce'"),
        ("backbone.path=no/such-model", "hf download no/such-model"),
        ("init_from=runs/none", "init_from=runs/none: no checkpoint at 'runs/none': there is no such folder"),
        ("resume=true", "has no checkpoint"),
    ],
)
def test_training_that_would_fail(arguments, capsys, wrong, said):
    assert said in refused(capsys, "train", [*arguments, wrong])


def test_a_run_folder_in_use(arguments, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "is not empty" in refused(capsys, "train", arguments)


def test_a_job_that_slurm_started_again_goes_on_by_itself(arguments, capsys, tmp_path, monkeypatch):
    last = tmp_path / "run" / "checkpoints" / "step-00000004.ckpt"
    last.parent.mkdir(parents=True)
    (tmp_path / "run" / "slurm-job").write_text("17")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    preflight.main(["train", *arguments])
    assert "starts in" in capsys.readouterr().out  # it came to no checkpoint
    last.touch()
    nothing = hashlib.sha256().hexdigest()
    (last.parent / "checkpoints.json").write_text(json.dumps({last.name: {"sha256": nothing, "step": 4}}))
    preflight.main(["train", *arguments, "overwrite=true"])
    assert f"continues from {last}" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # the run of another job, even if this one was requeued, too
    assert "is not empty" in refused(capsys, "train", arguments)


def test_weights_must_be_complete(arguments, capsys, tmp_path):
    base = tmp_path / "base"
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 files of weights are missing" in refused(capsys, "train", arguments)
    for path in base.iterdir():
        path.unlink()
    assert "there are no weights" in refused(capsys, "train", arguments)


def test_evaluation(arguments, capsys, tmp_path):
    run = tmp_path / "run"
    assert "there is no such folder" in refused(capsys, "evaluate", [f"ckpt={run}"])
    preflight.main(["evaluate", f"ckpt={run}", "planned=true"])
    assert "did you mean 'limit'" in refused(capsys, "evaluate", [f"ckpt={run}", "planned=true", "limi=3"])
    run.mkdir()
    lines = [f"out: {run}", f"backbone: {{path: {tmp_path}/base}}", f"data: {{path: {tmp_path}/data}}"]
    (run / "config.yaml").write_text("\n".join(lines))
    assert "holds no weights" in refused(capsys, "evaluate", [f"ckpt={run}"])
    (run / "trainable.safetensors").touch()
    assert "no usable shards" in refused(capsys, "evaluate", [f"ckpt={run}"])
    preflight.main(["train", *arguments[:-1], f"out={tmp_path}/other", "make_data=true"])
    preflight.main(["evaluate", f"ckpt={run}"])
    assert f"evaluates {run} on the split test" in capsys.readouterr().out
    assert "did you mean 'random'" in refused(capsys, "evaluate", [f"ckpt={run}", "methods=[radnom]"])
    (run / "predictions.jsonl").touch()
    assert "overwrite=true" in refused(capsys, "evaluate", [f"ckpt={run}"])
    preflight.main(["evaluate", f"ckpt={run}", "resume=true"])
    bare = [f"backbone.path={tmp_path}/base", f"data.path={tmp_path}/data", "methods=[random]", f"out={tmp_path}/new"]
    preflight.main(["evaluate", *bare])
    assert f"evaluates random on {tmp_path}/base" in capsys.readouterr().out
    assert "options.random.kep" in refused(capsys, "evaluate", [*bare, "options.random.kep=1"])


def test_a_command_is_needed(capsys):
    assert "train or evaluate" in refused(capsys, "conf/stage1.yaml", [])
