"""Every shipped YAML is valid, options of the method included, and what the README names is there."""

import re
from pathlib import Path

import pytest

from glimpseprune import config, training
from glimpseprune.options import TrainConfig
from glimpseprune.pruners import options_of
from glimpseprune.tiny.config import PretrainConfig

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "conf").rglob("*.yaml")) + sorted((ROOT / "experiments").glob("*/config.yaml"))
FILES = [file for file in FILES if ROOT / "conf" / "paper" not in file.parents]  # tests/test_reproduce.py


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_config_is_valid(file):
    if file.parent.name == "tiny-base":
        assert config.load(PretrainConfig, [str(file)]).lessons
        return
    cfg = config.load(TrainConfig, [str(file), "out=x", "data.path=x", "backbone.path=x"])
    assert options_of(cfg.pruner.name, cfg.pruner.options)
    assert training.stage_of(cfg.stage).best


def test_published_settings_are_those_of_the_paper():
    settings = {"qwen2_5_vl_3b": 23, "qwen2_5_vl_7b": 18, "llava1_5_7b": 21, "llava1_5_13b": 26}
    for name, layer in settings.items():
        cfg = config.load(TrainConfig, [str(ROOT / f"conf/backbones/{name}.yaml"), "out=x", "data.path=x"])
        assert cfg.pruner.options["prune_layer"] == layer == cfg.pruner.options["probe_layers"][0]


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"(conf/[\w/]+\.yaml)", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"python -m src\.(\w+)", text):
        assert (ROOT / "src" / f"{command}.py").is_file(), command
