"""Compare: ``python -m src.compare runs/a runs/b ... out=runs/compare``.

Puts evaluations side by side. Those that differ in nothing but seeds (of the training, of what it started from, of the
evaluation) become one, its numbers means ± standard deviations over seeds; a single one has its bootstrap interval.
Prints a table and writes ``compare.md`` and ``compare.json``. Evaluations of other data, or by other metrics, are
refused. Left out: tests of significance between seeds, for which there are mostly too few of them.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from glimpseprune import config, files
from glimpseprune.config import MISSING, UserError, option
from glimpseprune.legible import legible
from glimpseprune.report import LEGEND, about, by_task, markdown_text
from glimpseprune.results import Evaluated, difference, read

SHARED = ("data", "metric", "max_new_tokens")
"""What evaluations must have in common."""
NUMBERS = ("accuracy", "relative", "difference", "kept", "kv", "mean_tokens", "decoder_flops", "prefill_flops")


@dataclass
class CompareConfig:
    folders: list[str] = option(MISSING, "of evaluations; two or more")
    out: str = option("runs/compare", "where compare.md and compare.json go")
    kind: str = option("all", "kind of question that is printed; compare.md has all of them")

    BARE = "folders"


@config.entry(CompareConfig)
def main(cfg: CompareConfig) -> None:
    run(cfg)


def run(cfg: CompareConfig) -> list[dict[str, Any]]:
    """Compare, print, write; the rows of compare.json."""
    evaluations = [read(folder) for folder in cfg.folders]
    require_comparable(evaluations)
    rows = [row for group in groups(evaluations) for row in group.rows()]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if cfg.kind not in kinds:
        raise UserError(f"kind={cfg.kind}: the evaluations have {', '.join(kinds)}")
    out = Path(cfg.out)
    files.write_json(out / "compare.json", rows, indent=1)
    files.write(out / "compare.md", markdown(rows, kinds))
    print_table([row for row in rows if row["kind"] == cfg.kind], cfg.kind)
    print(f"compare.md and compare.json are in {out}")
    return rows


def require_comparable(evaluations: Sequence[Evaluated]) -> None:
    """Raises UserError where two evaluations do not measure the same, or are the same."""
    if len(evaluations) < 2:
        raise UserError("give two folders of evaluations, or more")
    for evaluation in evaluations:
        if "asked" not in evaluation.description:
            raise UserError(f"{evaluation.folder} has no evaluation.yaml to say what it measured: evaluate again")
    first, *others = evaluations
    for other in others:
        pair = [{key: measured(e)[key] for key in SHARED} for e in (first, other)]
        if said := difference(*pair):
            raise UserError(f"{first.folder} and {other.folder} measure different things: {said}")
    for a, b in combinations(evaluations, 2):
        if identity(a) == identity(b) and seeds(a) == seeds(b):
            raise UserError(f"{a.folder} and {b.folder} are one evaluation twice: same configuration, same seed")


def measured(evaluation: Evaluated) -> dict[str, Any]:
    """What was asked for, the data by what they are, wherever they lie."""
    asked = evaluation.description["asked"]
    data = {task: without_path(each) for task, each in by_task(asked["data"]).items()}
    return {**asked, "data": data.get("", data)}


def without_path(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "path" or not data["manifest"]}


def identity(evaluation: Evaluated) -> str:
    """All that decides what an evaluation measures, but seeds."""
    trained = evaluation.description.get("trained")
    free = {"bootstrap"} if trained is None else {"bootstrap", "ckpt", "weights"}
    asked = {name: value for name, value in measured(evaluation).items() if name not in free}
    return json.dumps(without_seeds({"asked": asked, "trained": trained}), sort_keys=True)


def without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_seeds(item) for name, item in value.items() if name != "seed"}
    return value


def seeds(evaluation: Evaluated) -> list[int]:
    """Of the evaluation, the training, what that started from, and so on."""
    found, trained = [evaluation.description["asked"]["seed"]], evaluation.description.get("trained")
    while isinstance(trained, dict):
        found.append(trained["seed"])
        trained = trained.get("init_from")
    return found


@dataclass
class Group:
    """Evaluations that differ in nothing but seeds."""

    evaluations: list[Evaluated]

    @property
    def label(self) -> str:
        """Their folders, where they differ as {a,b}."""
        names = [str(evaluation.folder) for evaluation in self.evaluations]
        if len(names) == 1:
            return names[0]
        start = os.path.commonprefix(names)
        end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]
        return f"{start}{{{','.join(name[len(start) : len(name) - len(end)] for name in names)}}}{end}"

    def rows(self) -> list[dict[str, Any]]:
        """One per kind and method, over the evaluations that have it."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for evaluation in self.evaluations:
            for row in evaluation.rows:
                found[about(row), row["method"]].append(row)
        return [self.row(kind, method, rows) for (kind, method), rows in found.items()]

    def row(self, kind: str, method: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        first = self.evaluations[0].description["asked"]
        made = {"evaluation": self.label, "method": method, "kind": kind, "seeds": len(rows), "n": rows[0]["n"]}
        metrics = dict.fromkeys(name for names in by_task(first["metric"]).values() for name in names[1:])
        for name in (*NUMBERS, *metrics):
            values = [row[name] for row in rows if row.get(name) is not None]
            made[name] = round(mean(values), 4) if values else None
            if len(rows) > 1:
                made[f"{name}_std"] = round(stdev(values), 4) if len(values) > 1 else None
        return made | ({} if len(rows) > 1 else {k: v for k, v in rows[0].items() if k.endswith("_ci")})


def groups(evaluations: Sequence[Evaluated]) -> list[Group]:
    found: dict[str, list[Evaluated]] = defaultdict(list)
    for evaluation in evaluations:
        found[identity(evaluation)].append(evaluation)
    return [Group(members) for members in found.values()]


# ------------------------------------------------------------------------------------------------------------ the table

FORMS = {
    "accuracy": ("accuracy", ".1f", 100, "%"),
    "relative": ("relative", ".1f", 100, "%"),
    "difference": ("to none", "+.1f", 100, ""),
    "kept": ("kept", ".1f", 100, "%"),
    "kv": ("KV", ".1f", 100, "%"),
    "mean_tokens": ("mean tokens", ".1f", 1, ""),
    "decoder_flops": ("decoder FLOPs", ".3f", 1, ""),
    "prefill_flops": ("all FLOPs", ".3f", 1, ""),
}


def cell(row: Mapping[str, Any], name: str) -> str:
    """A number ± its standard deviation over seeds, or half its interval where there is one evaluation only."""
    _, form, factor, unit = FORMS.get(name, (name, ".1f", 100, "%"))
    if row.get(name) is None:
        return "-"
    ends, spread = row.get(f"{name}_ci"), row.get(f"{name}_std")
    if ends is not None:
        spread = (ends[1] - ends[0]) / 2
    return f"{row[name] * factor:{form}}{unit}" + ("" if spread is None else f" ± {spread * factor:{form.strip('+')}}")


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text; an evaluation is named once."""
    known = ("evaluation", "method", "kind", "seeds", "n", *NUMBERS)
    names = [*NUMBERS, *(name for name in rows[0] if name not in known and not name.endswith(("_std", "_ci")))]
    headings = ["evaluation", "method", *(FORMS.get(name, (name,))[0] for name in names), "seeds", "samples"]
    made, last = [], None
    for row in rows:
        label = row["evaluation"] if row["evaluation"] != last else ""
        last = row["evaluation"]
        made.append([label, row["method"], *(cell(row, name) for name in names), str(row["seeds"]), str(row["n"])])
    return headings, made


def print_table(rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headings, made = cells(rows)
    table = Table(title=Text(legible(f"evaluations side by side, kind of question: {kind}")))
    for place, heading in enumerate(headings):
        table.add_column(Text(legible(heading)), justify="left" if place < 2 else "right", no_wrap=place > 0)
    for place, row in enumerate(made):
        if row[0] and place:
            table.add_section()
        table.add_row(*(Text(legible(cell, 200)) for cell in row))  # no markup: it comes from data
    Console(width=Console(width=999).measure(table).maximum).print(table)  # as wide as it is, wherever it goes


def markdown(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    parts = ["# Evaluations side by side"]
    for kind in kinds:
        headings, made = cells([row for row in rows if row["kind"] == kind])
        lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)], *(map(markdown_text, row) for row in made)]
        parts += [f"## {markdown_text(kind)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, LEGEND, "Over several seeds: mean ± standard deviation."]) + "\n"
