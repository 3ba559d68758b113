"""What bash offers behind the command: its verbs, and the keys of each, as the schemas have them."""

from __future__ import annotations

import subprocess

import pytest

from glimpseprune import __main__, completion


def test_verbs_then_keys(capsys):
    assert set(completion.words([])) == set(__main__.verbs())
    train = completion.words(["train"])
    assert {"out=", "backbone.path=", "pruner.options=", "trainer.max_steps="} <= set(train)
    assert completion.words(["train", "conf/demo.yaml", "out=x"]) == train
    assert completion.words(["preflight"]) == ["train", "evaluate"]
    assert "make_data=" in completion.words(["preflight", "train"]) and "data.split=" in completion.words(["evaluate"])
    assert completion.words(["preflight", "nothing"]) == completion.words(["nothing"]) == []
    assert all(completion.words([verb]) for verb in set(__main__.verbs()) - {"completion"})
    completion.main(["words", "export"])
    assert "dtype=" in capsys.readouterr().out.split()


def test_other_shells_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        completion.main(["fish"])
    assert stop.value.code == 2 and "completion bash" in capsys.readouterr().err


def test_bash_completes(tmp_path):
    """With a command in the place of ours, which says what was asked of it."""
    script = (
        completion.SCRIPT
        + """
glimpseprune() {
    case "$*" in "completion words") echo train evaluate;; "completion words train") echo out= data.path=;; esac
}
compopt() { echo "compopt $*"; }
try() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _glimpseprune; echo "${COMPREPLY[*]}"; }
try glimpseprune ev; try glimpseprune train da; try glimpseprune train out = run; try glimpseprune train out =
"""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n") == ["evaluate", "compopt -o nospace", "data.path=", "", "", ""], done.stderr
