"""Text that comes from data or a model, made safe to show: on a terminal, in a picture, on a board.

What a terminal would act on (control characters, and with them escape sequences), what no encoding has (lone
surrogates), and what moves text about (marks of direction, ends of lines) is shown by its number, as Python would write
it. Markup is the business of whoever knows one: rich gets a ``Text``, a page is escaped by ``report``.
"""

from __future__ import annotations

import unicodedata

__all__ = ["legible", "surrogate"]

SHOWN = 2000  # most characters of one text
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # control, format, surrogate, private use, ends of lines
_JOINERS = "\u200c\u200d"  # of letters in some scripts, and of emoji


def legible(text: object, most: int = SHOWN) -> str:
    """``text`` on one line, at most so many characters of it."""
    text = str(text)
    cut = text if len(text) <= most else text[: most - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(map(_shown, cut))


def surrogate(text: str) -> str:
    """The first half of a surrogate pair, which no encoding has and so no tokenizer takes, by its number; empty where
    there is none."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])
    return ""


def _shown(mark: str) -> str:
    if mark.isprintable() or mark in _JOINERS or unicodedata.category(mark) not in _HIDDEN:
        return mark
    return mark.encode("unicode_escape").decode("ascii")
