"""What a preparation did, as tables and sentences, read from the entries of splits in a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from glimpseprune.legible import legible

Entries = Mapping[str, Mapping[str, Any]]
"""Split -> what the manifest says of it."""
WORDS = {"invalid": "left out", "lacking": "without a part", "changed": "stored otherwise"}


def written(title: str, entries: Entries) -> Table:
    """What was written of each split."""
    table = Table(title=Text(legible(title), "table.title"))
    for column in ("split", "samples", "kinds", "shards", "MB"):
        table.add_column(column, justify="left" if column in ("split", "kinds") else "right")
    for split, entry in entries.items():
        kinds = ", ".join(f"{kind} {number}" for kind, number in entry["kinds"].items())
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        row = split, str(entry["count"]), kinds, str(len(entry["shards"])), f"{size:.1f}"
        table.add_row(*(Text(legible(cell)) for cell in row))
    return table


def left_out(entries: Entries) -> Table:
    """What of each split is not there, only in part, or not as it was: by its cause, with an example."""
    table = Table(title=Text("what is not as the source has it", "table.title"))
    for column in ("split", "what", "samples", "cause", "for example"):
        table.add_column(column, justify="right" if column == "samples" else "left", overflow="fold")
    for split, entry in entries.items():
        for name, word in WORDS.items():
            told = entry.get(name, {"reasons": {}})
            for cause, number in told["reasons"].items():
                row = split, word, str(number), cause, told["examples"][cause][0]
                table.add_row(*(Text(legible(cell)) for cell in row))
    return table


def summary(entry: Mapping[str, Any]) -> str:
    """How many samples there are, of how many, and what became of the others."""
    said = [f"{entry['count']} of {entry['rows']} samples written"]
    said += [f"{told['count']} {word}" for name, word in WORDS.items() if (told := entry.get(name))]
    if found := entry.get("sample"):
        said.append(f"{found['drawn']} were drawn from {found['of']} with seed {found['seed']}")
    return ", ".join(said)
