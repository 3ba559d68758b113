"""Completion of the command in bash: ``source <(glimpseprune completion)``, for good in ~/.bashrc.

Verbs, and the keys of each, are asked of the command itself. Left out: other shells, and values; files are completed
as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from glimpseprune import __main__, config

SCRIPT = """_glimpseprune() {
    local word=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    [[ $word == = || ${COMP_WORDS[COMP_CWORD - 1]} == = ]] && return
    local known=$(glimpseprune completion words "${COMP_WORDS[@]:1:COMP_CWORD - 1}" 2> /dev/null)
    COMPREPLY=($(compgen -W "$known" -- "$word"))
    if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _glimpseprune glimpseprune"""


def words(typed: Sequence[str]) -> list[str]:
    """What may follow the words that were ``typed`` behind the command: verbs, commands within a verb, or keys."""
    verbs = __main__.verbs()
    if not typed:
        return list(verbs)
    if typed[0] not in verbs:
        return []
    module = import_module(f"glimpseprune.{typed[0]}")
    entries = {name: item.schema for name, item in vars(module).items() if hasattr(item, "schema")}
    if "main" not in entries and len(typed) == 1:
        return list(entries)
    schema = entries.get("main") or entries.get(typed[min(1, len(typed) - 1)])
    return [f"{key}=" for key, _ in config.roles(schema)] if schema is not None else []


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["words"]:
        print(*words(given[1:]), sep="\n")
        return
    if given in (["-h"], ["--help"]):
        print(config.as_typed(f"usage: python -m src.completion [bash]\n\n{__doc__.strip()}"))
        return
    with config.answering("python -m src.completion"):
        if given not in ([], ["bash"]):
            raise config.UserError(f"completion {' '.join(given)}: there is one for bash: glimpseprune completion bash")
    print(SCRIPT)
