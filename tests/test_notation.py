"""YAML as configs are written in it: what stays text, what is refused in one line, and how long it may take."""

import os
import time

import pytest

from glimpseprune import notation
from glimpseprune.notation import Plain, Unreadable


@pytest.mark.parametrize(
    "text",
    ["2024_01_01", "2024-01-01", "007", "12:30:45", "no", "on", "0x1F", "+7", "1e", "a#b", "-x", ".", "1_000", "0o17"],
)
def test_what_looks_like_text_is_text(text):
    assert notation.parse(f"key: {text}") == {"key": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("-7", -7), ("0", 0), ("1.10", 1.1), ("10e2", 1000.0), (".5", 0.5), ("1.", 1.0), ("1e-4", 1e-4)]
    + [("-.inf", -float("inf")), ("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
)
def test_numbers_and_constants_keep_how_they_were_written(text, value):
    found = notation.parse(f"a: {text}")["a"]
    assert found == Plain(value, text) and type(found.value) is type(value)
    quoted = notation.parse(f"['{text}', \"{text}\"]")
    assert quoted == [text, text]


def test_merged_keys_and_anchors():
    text = "base: &b {x: one, y: two}\nit: {<<: *b, y: three}\nboth: {<<: [*b, {z: four}]}\n"
    found = notation.parse(text)
    assert found["it"] == {"x": "one", "y": "three"} and found["both"] == {"x": "one", "y": "two", "z": "four"}
    assert notation.parse("") == {} == notation.parse("# nothing")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [", "line 2: not valid YAML"),
        ("a: 1\na: 2", "line 2: not valid YAML: the key 'a' is there twice"),
        ("null: 1", "line 1: not valid YAML: a key is a text"),
        ("? [a]\n: 1", "a key is a text"),
        ("<<: 3", "<< takes a mapping"),
        ("a: !!python/name:os.system", "tags are not read"),
        ("a: !!binary aGk=", "tags are not read"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n" + "".join(
            f"{y}: &{y} [{','.join(['*' + x] * 8)}]\n" for x, y in zip("bcdef", "cdefg")
        ), "aliases unfold to too much"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 30_000, "nested too deeply"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_config_is_told_in_one_line_and_at_once(text, said):
    began = time.process_time()
    with pytest.raises(Unreadable) as caught:
        notation.parse(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - began < 1


def test_files(tmp_path):
    file = tmp_path / "a.yaml"
    for written in (b"\xef\xbb\xbfa: x\n", b"a: x\r\n", b"a: x"):
        file.write_bytes(written)
        assert notation.read(file) == {"a": "x"}
    for written, said in (
        (b"a: caf\xe9", "no UTF-8"),
        ("a: x".encode("utf-16"), "no UTF-8"),
        (b"#" * 200_000, "128 KiB"),
    ):
        file.write_bytes(written)
        with pytest.raises(Unreadable, match=said):
            notation.read(file)
    os.mkfifo(tmp_path / "pipe.yaml")  # nobody writes to it
    for place in (tmp_path / "pipe.yaml", tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(OSError):
            notation.read(place)
