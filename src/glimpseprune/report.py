"""Report: ``python -m src.report <folder>``.

Makes of an evaluation's folder what goes into a note, a paper and a browser: ``report.md``, ``report.tex`` (a table
for ``booktabs``), ``frontier.png`` (accuracy against what it costs) and ``report.html``, one file with the tables, the
plot, pictures of what was kept and some answers. The table that ``src.evaluate`` prints is made here, too, of the same
columns. All text that comes from data is escaped for where it goes. Left out: anything that would need the model.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimpseprune import config, files
from glimpseprune.config import MISSING, UserError, option
from glimpseprune.legible import legible
from glimpseprune.results import KEPT, PREDICTIONS, Evaluated, read, read_lines

KEYS = set(
    "task method kind accuracy accuracy_ci relative difference difference_ci kept kept_tokens mean_tokens "
    "prefill_flops decoder_flops kv cut n coverage mask_iou mask_recall mask_precision f1_ci pass_at_k k "
    "time_to_first_token peak_bytes".split()
)
"""Of a row of scores.json; another one is a metric."""
CONTROLS = ("none", "none+", "random", "oracle", "zero")


@dataclass
class ReportConfig:
    folder: str = option(MISSING, "an evaluation's, with scores.json")
    out: str | None = option(None, "where the report goes (default: there)")
    plot: bool = option(True, "draw frontier.png, which needs matplotlib")
    answers: int = option(24, "questions whose answers are shown", least=0, most=10**6)

    BARE = "folder"


@config.entry(ReportConfig)
def main(cfg: ReportConfig) -> None:
    run(cfg)


def run(cfg: ReportConfig) -> None:
    """Read, and write the four files."""
    evaluation = read(cfg.folder)
    plot = frontier(evaluation.rows) if cfg.plot else None
    out = Path(cfg.out or cfg.folder)
    files.write(out / "report.md", markdown(evaluation, plot is not None))
    files.write(out / "report.tex", latex(evaluation.rows))
    if plot is not None:
        files.write(out / "frontier.png", plot)
    files.write(out / "report.html", page(evaluation, plot, cfg.answers))
    made = ["report.md", "report.tex", *(["frontier.png"] if plot else []), "report.html"]
    print(f"{', '.join(made)} are in {out}")


# --------------------------------------------------------------------------------------------------------- the columns


@dataclass(frozen=True)
class Column:
    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    """Of a row; empty where it has no such number."""


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those of a table of ``rows``, numbers that no row has left out. The first two, kind and method, are text."""
    drawn = sorted({row["k"] for row in rows if "k" in row})
    known = [
        Column("accuracy", lambda row: percent(row, "accuracy") + half(row, "accuracy_ci")),
        *(Column(metric, lambda row, metric=metric: percent(row, metric)) for metric in metrics(rows)),
        *(Column(f"pass@{k}", lambda row, k=k: percent(row, "pass_at_k") if row.get("k") == k else "") for k in drawn),
        Column("relative", lambda row: percent(row, "relative")),
        Column("to none", lambda row: points(row, "difference") + half(row, "difference_ci")),
        Column("kept", lambda row: percent(row, "kept") + tokens(row)),
        Column("KV", lambda row: percent(row, "kv")),
        Column("mean tokens", lambda row: number(row, "mean_tokens", ".1f")),
        Column("decoder FLOPs", lambda row: number(row, "decoder_flops", ".3f")),
        Column("all FLOPs", lambda row: number(row, "prefill_flops", ".3f")),
        Column("first token", lambda row: number(row, "time_to_first_token", ".0f", 1e3, " ms")),
        Column("memory", lambda row: number(row, "peak_bytes", ".2f", 2**-30, " GiB")),
        Column("samples", lambda row: number(row, "n", "d")),
        Column("judged", lambda row: percent(row, "coverage")),
    ]
    text = [Column("kind", about), Column("method", lambda row: str(row.get("method", "")))]
    return text + [column for column in known if any(map(column.cell, rows))]


def about(row: Mapping[str, Any]) -> str:
    """What a row is about: the kind of question, of a task if it has one."""
    task, kind = row.get("task", ""), str(row.get("kind", ""))
    return kind if not task else task if kind == "all" else f"{task}: {kind}"


def metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics beside the accuracy."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in KEYS))


def number(row: Mapping[str, Any], key: str, form: str, factor: float = 1, unit: str = "") -> str:
    value = row.get(key)
    return "" if value is None else f"{value if form == 'd' else value * factor:{form}}{unit}"


def percent(row: Mapping[str, Any], key: str) -> str:
    return number(row, key, ".1%")


def points(row: Mapping[str, Any], key: str) -> str:
    """A difference of percentages."""
    return number(row, key, "+.1f", 100)


def half(row: Mapping[str, Any], key: str) -> str:
    """Half an interval, in points."""
    return "" if row.get(key) is None else f" ± {50 * (row[key][1] - row[key][0]):.1f}"


def tokens(row: Mapping[str, Any]) -> str:
    return "" if row.get("kept_tokens") is None else f" ({row['kept_tokens']:.1f})"


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[list[str]]]]:
    """Headings, and the cells of each row in groups of one kind, which only the first row of a group names."""
    shown = columns(rows)
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        group = groups.setdefault(about(row), [])
        kind, *others = [column.cell(row) for column in shown]
        group.append(["" if group else kind, *(cell or "-" for cell in others)])
    return [column.heading for column in shown], list(groups.values())


def print_table(rows: Sequence[Mapping[str, Any]], skipped: int = 0) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headings, groups = cells(rows)
    table = Table(
        title="accuracy and cost of pruned prefill" + (f" ({skipped} damaged samples skipped)" if skipped else "")
    )
    for place, heading in enumerate(headings):
        table.add_column(Text(legible(heading)), justify="left" if place < 2 else "right", no_wrap=place > 0)
    for group in groups:
        for row in group:
            table.add_row(*(Text(legible(cell, 200)) for cell in row))  # no markup: it comes from data
        table.add_section()
    Console(width=Console(width=999).measure(table).maximum).print(table)  # as wide as it is, wherever it goes


def say_cut(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line on answers that max_new_tokens ended; empty where there are none."""
    shares = [f"{named(row)} {row['cut']:.1%}" for row in rows if row["kind"] == "all" and row.get("cut")]
    return f"cut at max_new_tokens, and scored as they stand: {', '.join(shares)} of the answers" if shares else ""


def named(row: Mapping[str, Any]) -> str:
    """A row's method, of a task if it has one."""
    return f"{row['task']}: {row['method']}" if row.get("task") else row["method"]


def summaries(summary: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """By task; under no name where there are none."""
    if summary is None:
        return {}
    return {task: each for task, each in summary["tasks"].items() if each} if "tasks" in summary else {"": summary}


def say_summary(summary: Mapping[str, Any] | None) -> str:
    """Lines on the kinds that need the tokens; empty where there are none."""
    return "\n".join(say_kinds(task, each) for task, each in summaries(summary).items())


def say_kinds(task: str, summary: Mapping[str, Any]) -> str:
    kinds = ", ".join(summary["kinds"])
    said = [legible(f"over the kinds {f'of {task} ' * bool(task)}that need the tokens ({kinds}):")]
    for name, scores in summary["methods"].items():
        accuracy = percent(scores, "accuracy") + half(scores, "accuracy_ci")
        flops = "FLOPs: decoder {decoder_flops:.3f}, all {prefill_flops:.3f}".format(**scores)
        said.append(
            f"  {name:10} {accuracy:>12} = {scores['relative']:6.1%} of unpruned, {scores['kept']:.1%} kept, {flops}"
        )
    return "\n".join(said)


# ------------------------------------------------------------------------------------------------- Markdown and LaTeX


def markdown(evaluation: Evaluated, plot: bool) -> str:
    parts = [
        "# Evaluation",
        "\n".join(f"- {name}: {markdown_text(value)}" for name, value in facts(evaluation).items()),
        markdown_table(evaluation.rows),
    ]
    if evaluation.summary is not None:
        parts.append("Over the kinds of question that need the visual tokens:")
        parts.append(markdown_table(summary_rows(evaluation.summary)))
    if plot:
        parts.append("![accuracy against cost](frontier.png)")
    parts.append(LEGEND)
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    headings, groups = cells(rows)
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    lines += [list(map(markdown_text, row)) for group in groups for row in group]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Plain text for a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", legible(" ".join(text.split())))


LEGEND = """\
accuracy: mean score ± half its 95% interval (bootstrap over samples), in points; to none: difference to the unpruned
model in points, paired over samples; kept: visual tokens left for decoding; KV: visual tokens in the cache, mean over
layers; mean tokens: visual tokens that a decoder layer saw in prefill; decoder FLOPs and all FLOPs: of the decoder with
all decisions, and of the whole prefill, as ratios to the unpruned model."""


def facts(evaluation: Evaluated) -> dict[str, str]:
    """What was evaluated, and how."""
    asked, found = evaluation.description.get("asked", {}), evaluation.description.get("settings") or {}
    data, budget = by_task(asked.get("data", {})), asked.get("budget") or {}
    metric = {task: ", ".join(names) for task, names in by_task(asked.get("metric", [])).items()}
    judge = asked.get("judge") or {}
    known = {
        "checkpoint": asked.get("ckpt"),
        "backbone": asked.get("backbone", {}).get("path"),
        **{f"data {task}".strip(): each and f"{each['path']}, split {each['split']}" for task, each in data.items()},
        **{f"metrics {task}".strip(): names for task, names in metric.items()},
        "judge": judge and f"{judge['model']}, temperature {judge['temperature']}",
        "budget": ", ".join(f"{name} {value}" for name, value in budget.items()),
        **{name: json.dumps(setting["options"]) for name, setting in found.items()},
    }
    return {name: str(value) for name, value in known.items() if value}


def by_task(said: Any) -> dict[str, Any]:
    """What evaluation.yaml says of each task; under no name where there are none."""
    return {"": said} if isinstance(said, list) or "path" in said or not said else said


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The summary as rows of a table."""
    return [
        {"task": task, "kind": ", ".join(each["kinds"]), "method": name, **scores, "n": None}
        for task, each in summaries(summary).items()
        for name, scores in each["methods"].items()
    ]


def latex(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""A ``tabular`` between ``\toprule`` and ``\bottomrule``, a ``\midrule`` between kinds."""
    headings, groups = cells(rows)
    lines = [f"\\begin{{tabular}}{{ll{'r' * (len(headings) - 2)}}}", "\\toprule", latex_row(headings)]
    for group in groups:
        lines += ["\\midrule", *map(latex_row, group)]
    return "\n".join(["% \\usepackage{booktabs}", *lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def latex_row(cells: Iterable[str]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"


def latex_text(text: str) -> str:
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    marks |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}"}
    marks |= {"±": r"$\pm$", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
    marks |= {"[": "{[}", "]": "{]}"}  # behind the end of a row it would be an option
    return "".join(marks.get(mark, mark) for mark in legible(" ".join(text.split())))


# ------------------------------------------------------------------------------------------------------------ pictures

AXES = {
    "decoder_flops": "decoder FLOPs (with decisions), ratio",
    "prefill_flops": "all FLOPs of prefill, ratio",
    "mean_tokens": "visual tokens a layer saw, mean",
    "kv": "visual tokens in the KV cache, share",
}


def frontier(rows: Sequence[Mapping[str, Any]], kind: str = "all") -> bytes:
    """Accuracy against four costs, as PNG: a point per row, lines between rows of one method; controls in grey.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "frontier.png needs the package matplotlib: pip install 'glimpseprune[report]', or give plot=false"
        ) from None

    rows = [{**row, "method": named(row)} for row in rows if row["kind"] == kind and row["accuracy"] is not None]
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(2, 2, sharey=True).flat, AXES.items()):
        draw(axis, [row for row in rows if row.get(key) is not None], key)
        axis.set_xlabel(label)
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.25)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False)
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=120, metadata={"Software": None})
    return found.getvalue()


def draw(axis: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Each method in the plot of one cost."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [name for name in methods if name not in CONTROLS]
    for name in methods:
        points = sorted((row for row in rows if row["method"] == name), key=lambda row: row[key])
        y = [100 * row["accuracy"] for row in points]
        spans = [row.get("accuracy_ci") or [row["accuracy"]] * 2 for row in points]
        bars = [[max(0.0, value - 100 * low) for value, (low, _) in zip(y, spans)]]
        bars += [[max(0.0, 100 * high - value) for value, (_, high) in zip(y, spans)]]
        place = CONTROLS.index(name) if name in CONTROLS else own.index(name) % 10
        style = {"color": "0.55", "marker": "*xs^v"[place]} if name in CONTROLS else {"color": f"C{place}"}
        style = {"marker": "oDPXpdh<>8"[place % 10], **style}
        x = [row[key] for row in points]
        axis.errorbar(x, y, yerr=bars, markersize=8, capsize=3, linewidth=1.2, label=literal(name), **style)
        if name == "none":
            axis.axhline(y[0], color="0.85", linewidth=1, zorder=0)


def literal(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# ---------------------------------------------------------------------------------------------------------------- HTML

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top }
td.text, th.text { text-align: left; overflow-wrap: anywhere }
tr.first td { border-top: 2px solid #b0b0b0 }
.scroll { overflow-x: auto }
.right { color: #14692c } .wrong { color: #a12020 }
img { max-width: 100%; height: auto }
p.legend, .facts { color: #555 }
"""


def page(evaluation: Evaluated, plot: bytes | None, answers: int) -> str:
    """One HTML file that needs no other."""
    said = "<br>".join(html.escape(f"{name}: {value}") for name, value in facts(evaluation).items())
    parts = ["<h1>Evaluation</h1>", f"<p class=facts>{said}</p>", html_table(evaluation.rows)]
    if evaluation.summary is not None:
        parts.append("<h2>Kinds of question that need the visual tokens</h2>")
        parts.append(html_table(summary_rows(evaluation.summary)))
    parts.append(f"<p class=legend>{html.escape(LEGEND)}</p>")
    if plot is not None:
        parts.append(f"<h2>Accuracy against cost</h2><img alt='accuracy against cost' src='{embedded(plot)}'>")
    for picture in sorted((evaluation.folder / KEPT).glob("*.png")):
        name = html.escape(picture.stem)
        parts.append(f"<h2>Kept by {name}</h2><p class=legend>Bright: kept for decoding; outlined: the evidence.</p>")
        parts.append(f"<img alt='kept by {name}' src='{embedded(picture.read_bytes())}'>")
    parts.append(html_answers(read_lines(evaluation.folder / PREDICTIONS), answers))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{STYLE}</style>"
    return "\n".join([head, *parts, "</html>"]) + "\n"


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    headings, groups = cells(rows)
    lines = [html_row(headings, "th")]
    for group in groups:
        lines += [html_row(row, "td", first=place == 0) for place, row in enumerate(group)]
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def html_row(cells: Sequence[str], tag: str, first: bool = False, text: int = 2) -> str:
    """``text``: so many cells are no numbers."""
    made = (f"<{tag}{' class=text' * (at < text)}>{html.escape(cell)}</{tag}>" for at, cell in enumerate(cells))
    return f"<tr{' class=first' * first}>{''.join(made)}</tr>"


def html_answers(records: Iterable[Mapping[str, Any]], count: int) -> str:
    """What each method said to ``count`` questions, those before all on which methods disagree."""
    asked: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        asked.setdefault((record.get("task"), record["key"]), {}).setdefault(record["method"], record)
    chosen = sorted(asked.values(), key=lambda said: len({record["score"] for record in said.values()}) == 1)[:count]
    methods = list(dict.fromkeys(name for said in chosen for name in said))
    rows = [html_row(["question", "answers", *methods], "th", text=len(methods) + 2)]
    for said in chosen:
        record = next(iter(said.values()))
        shown = [("", record["question"]), ("", " | ".join(record["answers"]))]
        for found in map(said.get, methods):
            score = None if found is None else found["score"]
            right = "" if score is None else "right" if score >= 0.5 else "wrong"
            shown.append((right, found["prediction"] if found else ""))
        rows.append("<tr>" + "".join(f"<td class='text {kind}'>{html.escape(x)}</td>" for kind, x in shown) + "</tr>")
    return f"<h2>Answers</h2><div class=scroll><table>{''.join(rows)}</table></div>" if chosen else ""
