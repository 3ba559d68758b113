"""What the package brings along is found in any directory, after what is there, and travels in the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from glimpseprune import checkpoint, config, preflight, resources
from glimpseprune.config import UserError
from glimpseprune.data.sources import tags
from glimpseprune.metrics import exact_match
from glimpseprune.options import BackboneOptions, TrainConfig
from glimpseprune.running import strategies

ROOT = Path(__file__).parent.parent
BASE, PRUNER = "data/tiny-qwen2_5_vl", "data/demo-pruner"


def test_what_is_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resources.find("conf/stage1.yaml") == str(resources.SHIPPED / "conf" / "stage1.yaml")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "stage1.yaml").touch()
    assert resources.find("conf/stage1.yaml") == "conf/stage1.yaml"
    assert resources.find(BASE) == str(resources.SHIPPED / BASE)


@pytest.mark.parametrize(
    "path", ["", ".", "conf/none.yaml", "org/model", "/conf", "../config.py", "conf/../../cost.py"]
)
def test_what_is_nowhere_stays_as_it_is(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert resources.find(path) == path


def test_commands_find_it_in_an_empty_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = config.load(TrainConfig, ["conf/demo.yaml"])
    assert (cfg.stage, cfg.backbone.path, cfg.loss.pressure) == ("glimpse", BASE, 2.0)  # and what it extends
    for name in strategies.ZERO:
        stage = strategies.read(name)["zero_optimization"]["stage"]
        assert stage == int(name[4]) == strategies.read(f"conf/deepspeed/{name}.json")["zero_optimization"]["stage"]
    preflight.main(["train", "conf/smoke.yaml"])
    assert f"backbone {BASE}; data runs/smoke-data (will be made)" in capsys.readouterr().out
    assert checkpoint.load(backbone=BASE).backbone.num_layers == 6
    assert not any(tmp_path.iterdir())


def test_the_shipped_pruner_knows_its_task(tmp_path, monkeypatch):
    """In an empty directory: on unseen handwriting, with hardly any token left."""
    monkeypatch.chdir(tmp_path)
    model = checkpoint.load(PRUNER)
    samples = list(tags.samples(tags.Options(), "test", 0, 24))
    inputs = model.backbone.prepare([sample.question for sample in samples], [sample.images for sample in samples])
    rollout = model.generate(**inputs, max_new_tokens=8)
    texts = model.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
    assert sum(exact_match(text, sample.answers) for text, sample in zip(texts, samples)) >= 20
    assert all(0 < keep.float().mean() < 0.2 for keep in rollout.keep)


@pytest.mark.slow
def test_the_wheel_brings_it(tmp_path):
    """Built without network, unpacked, and used where there is nothing else."""
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    for folder in ("src", "conf", BASE, PRUNER):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (entry,) = (archive.read(name) for name in archive.namelist() if name.endswith("entry_points.txt"))
    points = [line for line in entry.decode().splitlines() if line]
    assert points[:2] == ["[console_scripts]", "glimpseprune = glimpseprune.__main__:main"]
    assert points[2:] == ["[lmms_eval.models]", "glimpseprune = glimpseprune.integrations:manifest"]
    shipped = site / "glimpseprune" / "shipped"
    for folder in ("conf", BASE, PRUNER):
        there = {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*") if file.is_file()}
        found = {str(file.relative_to(shipped)) for file in (shipped / folder).rglob("*") if file.is_file()}
        assert there and there == found
    assert (site / "glimpseprune" / "py.typed").is_file()
    assert wheel.stat().st_size < 2**23
    command = [sys.executable, "-m", "glimpseprune", "plan", "conf/stage1.yaml", "conf/backbones/tiny.yaml"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "fits: " in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------- what a run says of folders


def saved_run(folder: Path, **values: str) -> dict:
    """A run's config with these places, saved, and as it stands in the file."""
    cfg = TrainConfig(out="-", backbone=BackboneOptions(path=values["backbone"]), init_from=values.get("init_from"))
    cfg.data.path = values.get("data", "no/data/here")
    config.save(cfg, folder / "config.yaml")
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_run_names_its_folders_from_where_it_lies(tmp_path, monkeypatch):
    for name in ("project/models/base", "project/data", "project/runs/first", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    run = Path("runs/second")
    said = saved_run(run, backbone="models/base", data=str(tmp_path / "project/data"), init_from="runs/first")
    assert said["backbone"]["path"] == "../../models/base" and said["data"]["path"] == "../../data"
    assert said["init_from"] == "../first" and said["seen"]["init_from"] == str(tmp_path / "project/runs/first")
    read = config.read(TrainConfig, run / "config.yaml")
    assert (read.backbone.path, read.data.path, read.init_from) == ("models/base", "data", "runs/first")
    again = config.load(TrainConfig, [str(run / "config.yaml"), "out=-"])  # the config of another training
    assert (again.backbone, again.data, again.init_from) == (read.backbone, read.data, read.init_from)
    config.save(read, run / "config.yaml")
    assert yaml.safe_load((run / "config.yaml").read_text()) == said

    monkeypatch.chdir(tmp_path / "elsewhere")
    read = config.read(TrainConfig, tmp_path / "project/runs/second/config.yaml")
    assert read.backbone.path == str(tmp_path / "project/models/base")
    shutil.copytree(tmp_path / "project/runs/second", "copy")  # without its folders: where they were
    read = config.read(TrainConfig, Path("copy/config.yaml"))
    assert read.backbone.path == str(tmp_path / "project/models/base")
    assert read.data.path == str(tmp_path / "project/data") and read.init_from == str(tmp_path / "project/runs/first")
    (tmp_path / "project").rename(tmp_path / "moved")  # with them
    read = config.read(TrainConfig, tmp_path / "moved/runs/second/config.yaml")
    assert read.backbone.path == str(tmp_path / "moved/models/base")
    read = config.read(TrainConfig, Path("copy/config.yaml"))
    assert read.backbone.path == "../../models/base"
    with pytest.raises(UserError, match="no checkpoint at '../../models/base': there is no such folder"):
        checkpoint.load("copy")


@pytest.mark.parametrize("name", ["owner/model", "data/tiny-qwen2_5_vl", "gone/for/good", "/gone", "../gone"])
def test_what_is_no_folder_of_this_machine_is_named_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert saved_run(tmp_path / "run", backbone=name)["backbone"]["path"] == name
    assert config.read(TrainConfig, tmp_path / "run" / "config.yaml").backbone.path == name


def test_a_folder_that_holds_its_model_needs_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)
    for inside, text in ((".", "."), ("model", "./model")):
        said = saved_run(tmp_path / "run", backbone=str(tmp_path / "run" / inside))
        assert said["backbone"]["path"] == text and "seen" not in said
        monkeypatch.chdir(tmp_path / "run" / "model")
        read = config.read(TrainConfig, Path("../config.yaml"))
        assert Path(read.backbone.path).resolve() == tmp_path / "run" / inside


def test_what_is_shipped_goes_by_its_name(tmp_path):
    said = saved_run(tmp_path / "run", backbone=str(ROOT / BASE), init_from=str(resources.SHIPPED / PRUNER))
    assert said["backbone"]["path"] == BASE and said["init_from"] == PRUNER and "seen" not in said


def test_configs_of_older_runs_are_read_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.yaml"
    monkeypatch.chdir(tmp_path / "here")
    for path in ("base", "../here/base", str(tmp_path / "here/base")):
        file.write_text(f"out: runs/x\nbackbone: {{path: {path}}}\ndata: {{path: d}}\n")
        assert Path(config.read(TrainConfig, file).backbone.path).resolve() == tmp_path / "here/base"


def test_home_is_where_it_is_for_the_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert resources.find("~/base") == str(tmp_path / "base")
    assert resources.find("~nobody-of-that-name/base") == "~nobody-of-that-name/base"
