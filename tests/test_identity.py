"""There is one package: `python -m src.x` is that of the checkout, and a second identity is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    """Python in the checkout, with another copy of the package ahead of all that is installed."""
    (tmp_path / "glimpseprune").mkdir()
    for name in ("__init__", "train"):
        (tmp_path / "glimpseprune" / f"{name}.py").write_text("def main(argv=None): print('the other copy')\n")

    def run(*argv: str) -> subprocess.CompletedProcess:
        env = {"PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    return run


def test_the_checkout_runs_its_own_package(run):
    assert run("-c", "from glimpseprune.train import main; main()").stdout == "the other copy\n"
    done = run("-m", "src.train", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m src.train "), done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import glimpseprune, src.train", f"before src, whose package is {ROOT / 'src' / 'glimpseprune'}"),
        ("import src.glimpseprune.config", "import glimpseprune, not src.glimpseprune"),
        ("import src.train, src.glimpseprune", "import glimpseprune, not src.glimpseprune"),
    ],
    ids=["elsewhere", "alone", "beside"],
)
def test_a_second_identity_is_refused(run, tmp_path, code, said):
    done = run("-c", code)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ImportError: ") and said in done.stderr
    if code.startswith("import glimpseprune"):
        assert f"glimpseprune was imported from {tmp_path / 'glimpseprune'} before" in done.stderr


def test_both_names_of_a_command_are_one(run):
    code = "import src.train, glimpseprune.train; print(src.train.main is glimpseprune.train.main)"
    assert run("-c", code).stdout == "True\n"


def test_shims_do_not_stand_in_for_libraries_of_their_names(run):
    code = "import sys; before = list(sys.path); import src.evaluate; print(sys.path == before)"
    assert run("-c", code).stdout == "True\n"
