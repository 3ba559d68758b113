"""The command ``glimpseprune <verb>``: every module of the package that has a ``main`` is a verb.

What ``python -m src.<verb>`` is in a checkout, wherever the package was installed. The folder is the list of verbs:
their first lines are read, and only the one that is asked for is imported.
"""

from __future__ import annotations

import ast
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

_typed = __name__ == "__main__" or Path(sys.argv[0]).name == "glimpseprune"
if _typed and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a command listens, Ctrl-C ends this as SIGTERM does

from glimpseprune import config, lookup  # noqa: E402


def verbs() -> dict[str, str]:
    """Each verb with the first line of its module's docstring."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = file.read_text(encoding="utf-8")
        if "\ndef main(" in source:
            found[file.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    verb, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = verbs()
    if verb in ("-h", "--help"):
        lines = [f"  {name:<{max(map(len, known))}}  {said.replace('``', '')}" for name, said in known.items()]
        usage = ["usage: glimpseprune <verb> [config.yaml ...] [key=value ...]", "       glimpseprune <verb> --help"]
        print(config.as_typed("\n".join([*usage, "", "verbs:", *lines])))
        return
    with config.answering(f"python -m src.{verb}", arguments):
        lookup.choose(verb, known, "glimpseprune")
        command = import_module(f"glimpseprune.{verb}").main
    command(arguments)


if __name__ == "__main__":
    main()
