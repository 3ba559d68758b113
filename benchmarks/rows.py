"""What was found, as rows: a table to read, JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.clock import Spread


@dataclass
class Row:
    """One figure of one side of a case."""

    case: str
    side: str = ""
    unit: str = "ms"
    value: Spread | None = None
    bound: float | None = None
    """What the machine would need by its measured rates and the cost model, in the same unit."""
    ratio: Spread | None = None
    """To the first side, round by round."""
    ratio_bound: float | None = None
    """The same of the bounds."""
    rate: float | None = None
    """Samples per second."""
    kernels: int | None = None
    syncs: int | None = None
    before: float | None = None
    """The value in a file of another run."""
    rounds: int = 1
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    """For the JSON only."""


COLUMNS = (
    *("case", "side", "", "quartiles", "bound", "x bound", ": first", "quartiles", "bound"),
    *("before", "now : before", "/s", "kernels", "syncs", "n"),
)


def cells(row: Row) -> list[str]:
    value, ratio = row.value, row.ratio
    return [
        row.case,
        row.side,
        f"{number(value.median)} {row.unit}" if value else "",
        f"{number(value.low)} .. {number(value.high)}" if value and row.rounds > 1 else "",
        number(row.bound),
        f"{value.median / row.bound:.2f}" if value and row.bound else "",
        f"{ratio.median:.3f}" if ratio else "",
        f"{ratio.low:.3f} .. {ratio.high:.3f}" if ratio and row.rounds > 1 else "",
        f"{row.ratio_bound:.3f}" if row.ratio_bound else "",
        number(row.before),
        f"{value.median / row.before:.3f}" if value and row.before else "",
        number(row.rate),
        number(row.kernels),
        number(row.syncs),
        str(row.rounds) if value else "",
    ]


def number(value: float | None) -> str:
    """With three digits at least."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def show(rows: Sequence[Row], title: str) -> None:
    """Print the table: rich where it is, plain columns elsewhere; below it what gave no figure, and why."""
    body = [cells(row) for row in rows if row.value or row.kernels is not None]
    used = [place for place, name in enumerate(COLUMNS) if place < 2 or any(row[place] for row in body)]
    names, body = [COLUMNS[place] for place in used], [[row[place] for place in used] for row in body]
    for above, below in reversed(list(zip(body, body[1:]))):
        if above[0] == below[0]:
            below[0] = ""
    if find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for place, name in enumerate(names):
            table.add_column(name, justify="left" if place < 2 else "right", no_wrap=True)
        for row in body:
            table.add_row(*row)
        Console(width=200).print(table)
    else:
        widths = [max(map(len, column)) for column in zip(names, *body)]
        print(title)
        for line in (names, *body):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for row in rows:
        if row.note:
            print(" ".join(filter(None, [f"{row.case}:", row.side, row.note])))


def write(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """As JSON; a file that is there is replaced at once, so that what is read is always whole."""
    content = {**about, "rows": [{k: v for k, v in asdict(row).items() if v not in (None, "", {})} for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(_rounded(content), indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def values(path: Path) -> dict[tuple[str, str], float]:
    """(case, side) -> the median of each row of a file that :func:`write` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["case"], row.get("side", "")): row["value"]["median"] for row in rows if "value" in row}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
