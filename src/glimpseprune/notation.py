"""YAML as configs are written in it: mappings with keys of text, lists, and scalars that remember what was written.

An unquoted scalar is null, true, false or a decimal number; anything else is text. So dates, clock times, leading
zeros, underscores, ``no`` and ``0x1F`` are what they look like, which YAML 1.1 rewrites. And as ``1.10`` is the name
of a folder as often as a number, the reader is left to say which it is: :class:`Plain` has both.

A file may come from anywhere: it is read up to ``SIZE``, and what its aliases unfold to is bounded. Left out: other
tags than ``!!str``, ``!!map`` and ``!!seq``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SIZE = 1 << 17
"""Bytes of a file at most."""
NODES, DEPTH = 20_000, 50
"""Keys, values and items of a document at most, aliases unfolded, and how deep they may lie."""

CONSTANTS = {word: None for word in ("", "~", "null", "Null", "NULL")}
CONSTANTS |= {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
WHOLE = re.compile(r"0|-?[1-9][0-9]{0,30}")
REAL = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


class Unreadable(ValueError):
    """What is wrong with a document, in one line."""


@dataclass(frozen=True)
class Plain:
    """An unquoted scalar that may be more than text."""

    value: None | bool | int | float
    text: str


class Loader(yaml.SafeLoader):
    """Composes nodes whose tags say what they are in this module's words."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth = getattr(self, "depth", -1) + 1
        if self.depth > DEPTH:  # before the rest is read, whose time would grow with the square of it
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        return "plain" if kind is yaml.ScalarNode and implicit[0] else "text" if kind is yaml.ScalarNode else "many"


def read(path: Path) -> Any:
    """What is in a file, as :func:`parse` gives it.

    Raises:
        Unreadable: it is no YAML, or too large.
        OSError: as ``open``.
    """
    with open(path, "rb", opener=_open_file) as stream:
        written = stream.read(SIZE + 1)
    if len(written) > SIZE:
        raise Unreadable(f"larger than {SIZE >> 10} KiB, which no config is")
    try:
        return parse(written.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"not valid YAML: no UTF-8 text (byte {error.start})") from None


def parse(text: str) -> Any:
    """Nested dicts, lists, texts and :class:`Plain` of a document; {} of an empty one.

    Raises:
        Unreadable: see there.
    """
    try:
        node = Loader(text).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]
        raise Unreadable(f"{where}not valid YAML: {said}") from None
    return {} if node is None else _Reader().read(node)


class _Reader:
    """From nodes to values, counting them."""

    def __init__(self) -> None:
        self.left = NODES

    def read(self, node: yaml.Node, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > DEPTH:
            raise _at(node, "aliases unfold to too much" if self.left < 0 else "nested too deeply")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in ("plain", "text", "many", "str", "map", "seq"):
            raise _at(node, f"tags are not read, such as !{tag}")
        if isinstance(node, yaml.ScalarNode):
            return _plain(node.value) if tag == "plain" else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, depth + 1) for item in node.value]
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for name, item in node.value:
            key, value = self.key(name), self.read(item, depth + 1)
            if key == "<<" and name.tag == "plain":
                for more in value if isinstance(value, list) else [value]:
                    if not isinstance(more, dict):
                        raise _at(name, "<< takes a mapping, or a list of them")
                    merged = more | merged
            elif key in own:
                raise _at(name, f"the key {key!r} is there twice")
            else:
                own[key] = value
        return merged | own

    def key(self, node: yaml.Node) -> str:
        self.left -= 1
        if not isinstance(node, yaml.ScalarNode) or (node.tag == "plain" and node.value in ("", "~", "null")):
            raise _at(node, "a key is a text, not null, a list or a mapping: quote it")
        return node.value


def _plain(text: str) -> Plain | str:
    if text in CONSTANTS:
        return Plain(CONSTANTS[text], text)
    if WHOLE.fullmatch(text):
        return Plain(int(text), text)
    if REAL.fullmatch(text):
        return Plain(float(re.sub(r"\.(?=[a-zA-Z])", "", text)), text)
    return text


def _at(node: yaml.Node, said: str) -> Unreadable:
    return Unreadable(f"line {node.start_mark.line + 1}: not valid YAML: {said}")


def _open_file(path: str, flags: int) -> int:
    """An ordinary file; a pipe would be waited for."""
    found = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "not an ordinary file")
    return found
