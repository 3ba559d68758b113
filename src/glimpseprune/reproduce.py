"""Reproduce: ``python -m src.reproduce conf/paper/published/<table>.yaml runs/paper/<table>``.

Puts what was measured here beside what is published, number by number, and writes ``reproduce.md`` and
``reproduce.json``. ``conf/paper`` has a file per table, docs/reproduce.md says how each is run. The folder holds, per
bound on the visual tokens kept (``11``, ``22``, ``33``, in percent), an evaluation (scores.json), or what lmms-eval
wrote for each method (``11/fastv/.../*_results.json``; the newest counts; ``none/`` is the unpruned model). A column is
a set (a kind of question, or a task), a cost, ``mean``, in which each set counts alike, where all were measured and are
shares, or ``relative``, the mean over the sets of the score divided by the unpruned model's. What is not known, or was
not measured, is an empty cell: nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from glimpseprune import config, files
from glimpseprune.config import MISSING, UserError, option
from glimpseprune.legible import legible
from glimpseprune.report import markdown_text
from glimpseprune.results import SCORES, read

NONE = "none"
COSTS = ("kept", "kv", "mean_tokens", "decoder_flops", "prefill_flops")
MEAN, RELATIVE = "mean", "relative"
RESULTS, SAMPLES = "*_results.json", "_samples_"
"""Of lmms-eval: a run's scores, and what stands before the name of the task in that of a log of its samples."""

Key = tuple[str, str | None]
"""A method, and the bound on the share of the visual tokens that it keeps, in percent; None: there is no bound."""


@dataclass
class Number:
    """One that is published."""

    method: str = option(MISSING, "as a row of the table is called")
    bound: str | None = option(None, "of the visual tokens kept at most, in percent; null: not said, or none")
    column: str = option(MISSING, "a set, a cost, mean or relative")
    value: float = option(MISSING, "shares as 0 to 1", least=0, most=1e4)
    source: str = option(MISSING, "where it stands, and what it is about")


@dataclass
class ReproduceConfig:
    folder: str = option(MISSING, "with what was measured, bound by bound")
    out: str | None = option(None, "where reproduce.md and reproduce.json go (default: there)")
    title: str = option("published and here", "of the table")
    sets: list[str] = option([], "columns with scores: kinds of question, or lmms-eval's tasks")
    costs: list[str] = option([], f"further columns, of {', '.join(COSTS)}")
    metrics: dict[str, str] = option({}, "lmms-eval's task -> the metric that is its score, as its results name it")
    published: list[Number] = option([], "what is known of the table")

    BARE = "folder"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.costs if name not in COSTS]:
            raise UserError(f"costs: no '{unknown[0]}', choose from {', '.join(COSTS)}")
        for number in self.published:
            if number.column not in self.columns:
                raise UserError(f"published: no column '{number.column}', there are {', '.join(self.columns)}")

    @property
    def columns(self) -> list[str]:
        return [*self.sets, MEAN, RELATIVE, *self.costs]


@config.entry(ReproduceConfig)
def main(cfg: ReproduceConfig) -> None:
    run(cfg)


def run(cfg: ReproduceConfig) -> list[dict[str, Any]]:
    """Read, print, write; the rows of reproduce.json."""
    rows = table(cfg, with_means(measured(cfg), cfg.sets))
    out = Path(cfg.out or cfg.folder)
    files.write_json(out / "reproduce.json", rows, indent=1)
    files.write(out / "reproduce.md", markdown(cfg, rows))
    print_table(cfg, rows)
    print(f"reproduce.md and reproduce.json are in {out}")
    return rows


# ---------------------------------------------------------------------------------------------------- what was measured


def measured(cfg: ReproduceConfig) -> dict[Key, dict[str, float]]:
    """Numbers of each method at each bound, by column.

    Raises:
        UserError: there are none.
    """
    folder = Path(cfg.folder)
    found: dict[Key, dict[str, float]] = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        rows = evaluated(place, cfg) if (place / SCORES).is_file() else answered(place, cfg)
        for method, numbers in rows:
            found.setdefault((method, None if method == NONE else place.name), {}).update(numbers)
    if not found:
        raise UserError(
            f"{folder}: nothing was measured there: neither <bound>/{SCORES} nor <bound>/<method>/{RESULTS}"
        )
    return found


def evaluated(place: Path, cfg: ReproduceConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Methods of one of our evaluations; a set is a kind of question, or a task of several."""
    rows = read(place).rows
    for method in dict.fromkeys(row["method"] for row in rows):
        own: dict[str, Mapping[str, Any]] = {}
        for row in (row for row in rows if row["method"] == method):
            own.setdefault(row["kind"], row)
            if row["kind"] == "all" and "task" in row:
                own[row["task"]] = row
        numbers = {name: own[name].get("accuracy") for name in cfg.sets if name in own}
        numbers |= {name: own.get("all", {}).get(name) for name in cfg.costs}
        yield method, {name: value for name, value in numbers.items() if value is not None}


def answered(place: Path, cfg: ReproduceConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Methods that lmms-eval has run, a folder each; ``place`` itself is that of the unpruned model."""
    for folder in [place] if place.name == NONE else sorted(path for path in place.glob("*") if path.is_dir()):
        scores: dict[str, float] = {}
        for file in by_age(folder, RESULTS):
            with reading(file):
                results = json.loads(file.read_text(encoding="utf-8"))["results"]
                said = {task: results[task].get(name) for task, name in cfg.metrics.items() if task in results}
            scores |= {task: float(value) for task, value in said.items() if isinstance(value, int | float)}
        if scores:
            yield folder.name, scores | logged(folder, cfg.costs)


def logged(folder: Path, costs: Sequence[str]) -> dict[str, float]:
    """Means over the answers in the logs of all tasks; those out of a cache have no costs and do not count."""
    newest = {file.name.partition(SAMPLES)[2]: file for file in by_age(folder, f"*{SAMPLES}*.jsonl")}
    found: dict[str, list[float]] = {name: [] for name in costs}
    for file in newest.values():
        with reading(file), open(file, encoding="utf-8") as lines:
            for answer in filter(None, (answer for line in lines for answer in json.loads(line)["token_counts"])):
                for name in costs:
                    found[name].append(answer[name] / (answer["visual"] if name == "kept" else 1))
    return {name: fmean(values) for name, values in found.items() if values}


def by_age(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Errors about what is in a file name it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not what lmms-eval writes for this model ({error})") from None


def with_means(found: Mapping[Key, dict[str, float]], sets: Sequence[str]) -> dict[Key, dict[str, float]]:
    """Each with its ``mean`` over the ``sets``, if all are there and shares, and ``relative`` to the unpruned model's
    scores, over those that both have."""
    base = found.get((NONE, None), {})
    made = {}
    for key, numbers in found.items():
        scores = {name: numbers[name] for name in sets if name in numbers}
        shares = [score / base[name] for name, score in scores.items() if base.get(name)]
        whole = len(scores) == len(sets) > 0 and max(scores.values()) <= 1
        made[key] = numbers | ({MEAN: fmean(scores.values())} if whole else {})
        made[key] |= {RELATIVE: fmean(shares)} if shares else {}
    return made


# --------------------------------------------------------------------------------------------------------- side by side


def table(cfg: ReproduceConfig, found: Mapping[Key, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row per method and bound, measured or published; a published number without a bound stands beside all."""
    named = dict.fromkeys([*(method for method, _ in found), *(number.method for number in cfg.published)])
    methods = sorted(named, key=lambda method: method != NONE)  # which comes first
    rows = []
    for method in methods:
        bounds = {bound for name, bound in found if name == method}
        bounds |= {number.bound for number in cfg.published if number.method == method and number.bound is not None}
        for bound in sorted(bounds or {None}, key=str):
            here = found.get((method, bound), {})
            both = {c: {"here": here.get(c), "published": published(cfg, method, bound, c)} for c in cfg.columns}
            rows.append({"method": method, "bound": bound, **both})
    return rows


def published(cfg: ReproduceConfig, method: str, bound: str | None, column: str) -> float | None:
    """The number for this bound, else the one that says none."""
    about = {n.bound: n.value for n in cfg.published if (n.method, n.column) == (method, column)}
    return about.get(bound, about.get(None))


def shown(value: float | None, column: str) -> str:
    """Shares in percent; what is none, such as a number of tokens or a score beyond 1, as it is."""
    if value is None:
        return "-"
    return f"{value:.1f}" if column == "mean_tokens" or value > 2 else f"{100 * value:.1f}"


def cells(cfg: ReproduceConfig, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text; a cell is "here / published"."""
    columns = [name for name in cfg.columns if any(row[name][side] is not None for row in rows for side in row[name])]
    made = [
        [row["method"], "" if row["bound"] is None else f"{row['bound']}%"]
        + [" / ".join(shown(row[name][side], name) for side in ("here", "published")) for name in columns]
        for row in rows
    ]
    return ["method", "kept at most", *columns], made


def left_out(cfg: ReproduceConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """Which columns have no number at all."""
    empty = [name for name in cfg.columns if all(row[name][side] is None for row in rows for side in row[name])]
    return f"without a number, here or published: {', '.join(empty)}" if empty else ""


def sources(cfg: ReproduceConfig) -> list[str]:
    """Where the published numbers stand, each with the methods that it is about."""
    found: dict[str, dict[str, None]] = {}
    for number in cfg.published:
        found.setdefault(number.source, {})[f"{number.method} {number.column}"] = None
    return [f"{', '.join(about)}: {source}" for source, about in found.items()]


LEGEND = "Each cell: measured here / published, in percent where it is a share; - where it is not known."


def print_table(cfg: ReproduceConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headings, made = cells(cfg, rows)
    grid = Table(title=Text(legible(f"{cfg.title}: here / published")))
    for place, heading in enumerate(headings):
        grid.add_column(Text(legible(heading)), justify="left" if place < 1 else "right", no_wrap=True)
    for row in made:
        grid.add_row(*(Text(legible(cell, 200)) for cell in row))  # no markup: it comes from data
    Console(width=Console(width=999).measure(grid).maximum).print(grid)  # as wide as it is, wherever it goes
    for line in filter(None, [left_out(cfg, rows), *(f"published, {said}" for said in sources(cfg))]):
        print(legible(line))


def markdown(cfg: ReproduceConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    headings, made = cells(cfg, rows)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *made]
    lines = [lines[0], lines[1], *(list(map(markdown_text, line)) for line in lines[2:])]
    parts = [f"# {markdown_text(cfg.title)}", "\n".join(f"| {' | '.join(line)} |" for line in lines), LEGEND]
    parts += [markdown_text(left_out(cfg, rows)), "\n".join(f"- {markdown_text(said)}" for said in sources(cfg))]
    return "\n\n".join(filter(None, parts)) + "\n"
