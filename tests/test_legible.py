"""Legible: nothing that a terminal acts on and nothing that no encoding has, on one line, and all else as it is."""

import pytest

from glimpseprune.legible import legible


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wie viele – 几个? 👩\u200d👧 é [b] {{ x }}", "wie viele – 几个? 👩\u200d👧 é [b] {{ x }}"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]8;;http://x\x07", "\\x1b]8;;http://x\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\ud800b\udfff", "a\\ud800b\\udfff"),
        ("one\ntwo\r\nthree\tfour\0", "one\\ntwo\\r\\nthree\\tfour\\x00"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\ue000\U000f0000", "\\ue000\\U000f0000"),
        ("no\u00a0break", "no\u00a0break"),
        (7, "7"),
    ],
)
def test_what_is_shown(text, said):
    assert legible(text) == said
    said.encode()


def test_long_texts_are_cut():
    assert legible("a" * 9, 9) == "a" * 9
    assert legible("a" * 10, 9) == "a" * 8 + "…"
    assert len(legible("x" * 10**7)) == 2000
