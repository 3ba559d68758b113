"""Lookup: folders and modules as registries, on a package made for the test."""

import inspect
import shutil
import sys
from importlib import import_module
from typing import get_type_hints

import pytest

from conftest import TINY
from glimpseprune import lookup, pruners
from glimpseprune.config import UserError

CAT = """
name = 'cat'
def borrowed(prediction): return 1.0
"""
FUNCTIONS = """
from os.path import join
from zoo_of_lookup.cat import borrowed

def metric(prediction, answers): return 1.0
def summary(predictions): return {}
def _hidden(prediction): return 0.0
constant = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "zoo_of_lookup"
    folder.mkdir()
    for name, text in {
        "__init__": "", "cat": CAT, "dog": "raise RuntimeError('not to be imported')", "_private": "",
        "functions": FUNCTIONS, "broken": "import no_such_module_here",
    }.items():  # fmt: skip
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder.name
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_names_and_find(package):
    assert lookup.names(package) == ["broken", "cat", "dog", "functions"]
    assert lookup.find(package, "cat").name == "cat"


def test_unknown_name_lists_the_choices(package):
    with pytest.raises(UserError, match=r"^no 'cta' in zoo_of_lookup: did you mean 'cat'\? choices are broken, cat"):
        lookup.find(package, "cta")
    with pytest.raises(UserError, match="^no '_private' in"):
        lookup.find(package, "_private")
    with pytest.raises(UserError, match="^no 'zzz' in zoo_of_lookup: choices are"):
        lookup.find(package, "zzz")


def test_an_error_inside_a_module_is_not_hidden(package):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        lookup.find(package, "broken")


def test_functions(package):
    module = f"{package}.functions"
    assert list(lookup.functions(module, "prediction")) == ["metric"]
    assert lookup.function(module, "metric", "prediction")("a", []) == 1.0
    with pytest.raises(UserError, match="did you mean 'metric'"):
        lookup.function(module, "metrik", "prediction")
    with pytest.raises(UserError, match="choices are metric$"):  # what a module imports is not its own
        lookup.function(module, "borrowed", "prediction")


def test_modules_that_have_moved_answer_where_they_were():
    from glimpseprune.training.options import TrainConfig

    from glimpseprune import options
    from glimpseprune.data.module import Deal
    from glimpseprune.data.stream import Deal as Here
    from glimpseprune.running import slurm as there
    from glimpseprune.training import slurm

    assert (TrainConfig, slurm, Deal) == (options.TrainConfig, there, Here)
    assert "options" not in lookup.names("glimpseprune.training")  # which is no stage


# ------------------------------------------------------------------------------------------------ files of a user's own

OWN = """
from dataclasses import dataclass
from glimpseprune.config import option
from glimpseprune.pruners.random import Pruner

@dataclass
class Options:
    keep_ratio: float = option(0.5, "share that stays", least=0, most=1)

splits = ("train",)
def samples(options, split): return iter(())
"""


def test_a_file_is_found_by_its_path_and_run_once(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("runs = []\nruns.append(1)\n" + OWN)
    monkeypatch.chdir(tmp_path)
    found = lookup.find("glimpseprune.pruners", "./mine.py")
    assert found is lookup.find("glimpseprune.data.sources", str(tmp_path / "mine.py"))
    assert found.runs == [1]
    assert found.Options(0.25).keep_ratio == 0.25
    assert get_type_hints(found.Options) == {"keep_ratio": float}
    assert "mine" not in lookup.names("glimpseprune.pruners")


def test_a_pruning_method_of_ones_own(tmp_path):
    file = shutil.copy(pruners.random.__file__, tmp_path / "mine.py")
    built = pruners.build(str(file), {"keep_ratio": 0.3}, TINY["qwen2_5_vl"]())
    assert built.options.keep_ratio == 0.3
    assert type(built) is not pruners.random.Pruner
    assert inspect.getsource(type(built)) == inspect.getsource(pruners.random.Pruner)
    with pytest.raises(UserError, match="did you mean 'pruner.options.keep_ratio'"):
        pruners.options_of(str(file), {"keep_rato": 0.3})


def test_files_that_are_none_of_the_kind_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^there is no file './none.py' \(seen from "):
        lookup.find("glimpseprune.pruners", "./none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"^empty.py defines no Options and no Pruner: see glimpseprune.pruners"):
        lookup.find("glimpseprune.pruners", "empty.py")
    (tmp_path / "broken.py").write_text("import no_such_module_here")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
            lookup.find("glimpseprune.pruners", "broken.py")


@pytest.mark.parametrize("package", ["glimpseprune.pruners", "glimpseprune.data.sources"])
def test_every_module_defines_what_its_package_says(package):
    defines = import_module(package).DEFINES
    for name in lookup.names(package):
        assert all(hasattr(lookup.find(package, name), each) for each in defines), name
