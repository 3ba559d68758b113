"""Imports run one way, from the commands down to the nouns, and each heavy library has its rooms."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glimpseprune.__main__ import verbs

ROOT = Path(__file__).parent.parent / "src" / "glimpseprune"
ORDER = (  # a module imports those of its own line or of lines below it; a folder stands for all in it
    "integrations __init__ __main__",  # and the commands: whatever else has a main
    "training running tiny",
    "evaluation scores judging budget report generate checkpoint rollout data.module",
    "pruners backbones lora data",
    "waves plot",
    "decoder prefix replay steps vip rewards tasks metrics tallies cost memory pictures results intervals processes",
    "attention ragged losses judge verdicts runs sharded weights windows",
    "options images",
    "lookup config hub",
    "notation types resources files legible",
    "host",
)
LEVEL = {room: level for level, line in enumerate(ORDER) for room in line.split()}
ROOMS = {  # what is imported, as a pattern -> where
    r"lightning\b.*": "training running tiny data.module train pretrain",
    r"webdataset\b.*": "data",
    r"omegaconf\b.*": "config",
    r"transformers\..*(Auto|For)\w*(Generation|LM|TextToText)|transformers\.\w+Model": "backbones tiny",
    r"src\b.*": "",
}
ALONE = {"losses": {"torch"}, "vip": {"torch"}}  # nothing else but Python's own
FILES = sorted(ROOT.rglob("*.py"))
COMMANDS = verbs()


def room(module: str, rooms: dict[str, int] | list[str]) -> str | None:
    """The first of ``rooms`` that ``module``, or a folder that it is in, is."""
    parts = module.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in rooms), None)


def level(module: str) -> int | None:
    found = room(module, LEVEL)
    return LEVEL[found] if found else 0 if module in COMMANDS else None


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere below ``node``, but for types; a relative one begins with a dot."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{'.' * child.level}{child.module or ''}.{alias.name}" for alias in child.names)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from imported(child)


def wrong(module: str, source: str) -> Iterator[str]:
    """What ``module`` imports and should not."""
    if level(module) is None:
        yield "is in no line of ORDER: place it"
        return
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        if not top:
            yield f"{name}: imports are absolute"
        elif top == "glimpseprune":
            target = rest if (ROOT / f"{rest.replace('.', '/')}.py").is_file() else rest.rpartition(".")[0] or rest
            if (level(target) or 0) < level(module):
                yield f"{name}: is above it"
        for pattern, rooms in ROOMS.items():
            if re.fullmatch(pattern, name) and not room(module, rooms.split()):
                yield f"{name}: only in {rooms or 'no module'}"
        if module in ALONE and top not in ALONE[module] | sys.stdlib_module_names:
            yield f"{name}: imports only {', '.join(ALONE[module])}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    assert not list(wrong(module.removesuffix(".__init__"), file.read_text()))


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("decoder", "from glimpseprune.backbones.qwen2_5_vl import Backbone", "is above it"),
        ("decoder", "def f():\n    from glimpseprune import pruners", "is above it"),
        ("data.stream", "from glimpseprune.data.module import ShardDataModule", "is above it"),
        ("checkpoint", "from glimpseprune.evaluate import check", "is above it"),
        ("options", "from glimpseprune.judge import Judge", "is above it"),
        ("types", "from .config import UserError", "imports are absolute"),
        ("evaluate", "import lightning as L", "only in training"),
        ("data.stream", "from lightning.pytorch import LightningDataModule", "only in training"),
        ("prepare", "from webdataset import TarWriter", "only in data"),
        ("options", "from omegaconf import MISSING", "only in config"),
        ("plan", "from transformers import AutoModelForImageTextToText", "only in backbones tiny"),
        ("evaluate", "from transformers import Qwen2_5_VLModel", "only in backbones tiny"),
        ("losses", "import numpy as np", "imports only torch"),
        ("train", "from src.train import main", "only in no module"),
        ("novelty", "", "place it"),
    ],
)
def test_what_would_be_wrong_is_seen(module, source, said):
    (found,) = wrong(module, source)
    assert said in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from transformers import AutoConfig, PreTrainedConfig, DynamicCache"),
        ("decoder", "if TYPE_CHECKING:\n    from glimpseprune.backbones import Backbone"),
        ("preflight", "from glimpseprune.evaluate import check"),
        ("losses", "import math\nfrom torch.nn import functional"),
    ],
)
def test_what_is_right_is_left_alone(module, source):
    assert not list(wrong(module, source))
