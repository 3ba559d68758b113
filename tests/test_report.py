"""A report says what the folder says, in every format, whatever characters the data have; or what is wrong with it."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from glimpseprune import report, results

KIND = "a|b & <i>c</i> 50%_{x} #1 $y$ \\z ~^ [tag] `q`"
METHODS = ["none", "glimpse+", "fastv", "random", "zero"]
PROMPT = "<script>alert('x')</script> & \"quoted\"\u2028|x|"


def row(method: str, kind: str, place: int) -> dict:
    """Of scores.json, with numbers of its own."""
    accuracy, cost = 0.9 - 0.1 * place, 1 - 0.15 * place
    found = {"method": method, "kind": kind, "accuracy": accuracy, "accuracy_ci": [accuracy - 0.02, accuracy + 0.04]}
    found |= {
        "relative": accuracy / 0.9,
        "difference": accuracy - 0.9,
        "difference_ci": [accuracy - 0.93, accuracy - 0.87],
    }
    found |= {
        "kept": cost,
        "kept_tokens": 144 * cost,
        "mean_tokens": 144 * (1 + cost) / 2,
        "prefill_flops": 0.5 + cost / 2,
    }
    return found | {"decoder_flops": cost + 0.011, "kv": cost, "n": 32, "cut": 0.0, "anls": accuracy + 0.05}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An evaluation's, with two kinds of question, three predictions and a picture."""
    rows = [row(name, kind, place) for kind in ("all", KIND) for place, name in enumerate(METHODS)]
    rows[0]["time_to_first_token"] = 0.0425
    summary = {"kinds": [KIND], "methods": {r["method"]: dict(list(r.items())[2:]) for r in rows[5:]}}
    asked = {
        "ckpt": "runs/<x>",
        "backbone": {"path": "b_c"},
        "metric": ["exact_match", "anls"],
        "budget": {"kept": 0.11},
    }
    asked["data"] = {"path": "d", "split": "test"}
    said = {"asked": asked, "settings": {"fastv": {"options": {"layer": 3}}}}
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "evaluation.yaml").write_text(json.dumps(said))
    records = [
        {"key": key, "method": name, "question": PROMPT + key, "answers": ["<a>", "b"], "prediction": p, "score": s}
        for key in "12"
        for name, p, s in (("none", "<b>yes</b>", 1.0), ("fastv", "no & so", 0.0 if key == "2" else 1.0))
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(map(results.line, records)), encoding="utf-8")
    (tmp_path / "kept").mkdir()
    Image.new("RGB", (9, 7), (200, 30, 90)).save(tmp_path / "kept" / "glimpse+.png")
    return tmp_path


@pytest.fixture
def made(folder, capsys) -> Path:
    before = sorted(path.name for path in folder.iterdir())
    report.main([str(folder)])
    found = {path.name for path in folder.iterdir()} - set(before)
    assert found == {"report.md", "report.tex", "frontier.png", "report.html"}
    assert "report.html" in capsys.readouterr().out
    return folder


def unescaped(cell: str) -> str:
    return re.sub(r"\\([^A-Za-z0-9\s])", r"\1", cell)


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Cells of each table, split at what Markdown takes for a separator."""
    tables = [[line for line in part.split("\n") if line.startswith("|")] for part in text.split("\n\n")]
    return [[re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in table] for table in tables if table]


def test_markdown_has_every_number_and_every_kind(made):
    text = (made / "report.md").read_text()
    table, summary = markdown_tables(text)
    headings, _, *rows = table
    assert headings[:5] == ["kind", "method", "accuracy", "anls", "relative"]
    assert {"to none", "kept", "KV", "mean tokens", "decoder FLOPs", "all FLOPs", "first token"} <= set(headings)
    assert len(rows) == 10 and len(summary) == 7
    assert all(len(line) == len(lines[0]) for lines in (table, summary) for line in lines)
    assert unescaped(rows[5][0]) == KIND and not any(line[0] for line in rows[6:])
    cells = dict(zip(headings, rows[2]))
    assert cells["method"] == "fastv" and cells["accuracy"] == "70.0% ± 3.0" and cells["to none"] == "-20.0 ± 3.0"
    assert (cells["decoder FLOPs"], cells["all FLOPs"], cells["KV"]) == ("0.711", "0.850", "70.0%")
    assert cells["kept"] == "70.0% (100.8)" and cells["samples"] == "32" and cells["anls"] == "75.0%"
    assert dict(zip(headings, rows[0]))["first token"] == "42 ms" and cells["first token"] == "-"
    assert unescaped(summary[2][0]) == KIND and "(frontier.png)" in text and "layer" in text


def test_latex_is_balanced_and_escaped(made):
    lines = (made / "report.tex").read_text().splitlines()
    width = len(re.search(r"\{(l+r+)\}", lines[1])[1])
    body = [line for line in lines if line.endswith(r" \\")]
    assert len(body) == 11 and lines.count(r"\midrule") == 2
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == width - 1
        plain = re.sub(
            r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textquotedbl)\{\}", "", line
        )
        plain = re.sub(r"\\[&%$#_{}]|\$\\pm\$|\{\[\}|\{\]\}", "", plain)
        assert not re.search(r"[%$#_{}~^<>|\"\[\]]|\\(?!\\$|$)", plain), plain


class Page(HTMLParser):
    """What a browser would show and fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows, self.tags, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.fetched += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_html_stands_alone_and_shows_what_the_data_say(made):
    page = Page((made / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "i", "b", "a"} & set(page.tags)
    assert len(page.fetched) == 2 and all(source.startswith("data:image/png;base64,") for source in page.fetched)
    plot, kept = (base64.b64decode(source.partition(",")[2]) for source in page.fetched)
    assert plot == (made / "frontier.png").read_bytes() and kept == (made / "kept" / "glimpse+.png").read_bytes()
    assert [cells[0] for cells in page.rows[1:11]] == ["all", *[""] * 4, KIND, *[""] * 4]
    assert page.rows[3][1:3] == ["fastv", "70.0% ± 3.0"]
    assert page.rows[-3] == ["question", "answers", "none", "fastv"]
    # The question on which they disagree comes first.
    assert page.rows[-2] == [PROMPT + "2", "<a> | b", "<b>yes</b>", "no & so"] and page.rows[-1][0] == PROMPT + "1"


def test_plot_shows_every_method(made, monkeypatch):
    """Points of each row at its cost and accuracy, with its interval, in each of the four plots."""
    from matplotlib.figure import Figure

    picture = Image.open(io.BytesIO((made / "frontier.png").read_bytes()))
    assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    rows = results.read(made).rows
    report.frontier(rows)
    axes = drawn[0].axes
    assert len(axes) == 4
    for axis, key in zip(axes, ("decoder_flops", "prefill_flops", "mean_tokens", "kv")):
        found = {bars.get_label(): bars for bars in axis.containers}
        assert list(found) == METHODS
        for place, name in enumerate(METHODS):
            line, _, (spans,) = found[name].lines
            assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((rows[place][key], 90 - 10 * place))
            ends = spans.get_segments()[0][:, 1]
            assert list(ends) == pytest.approx([100 * end for end in rows[place]["accuracy_ci"]])


def test_without_matplotlib_one_line_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        report.main([str(folder)])
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "glimpseprune[report]" in error and "\n" not in error
    assert not (folder / "report.md").exists()
    report.main([str(folder), "plot=false", f"out={folder / 'there'}"])
    assert {path.name for path in (folder / "there").iterdir()} == {"report.md", "report.tex", "report.html"}
    assert "frontier.png" not in (folder / "there" / "report.md").read_text()


@pytest.mark.parametrize(
    ("left", "message"),
    [([], "no evaluation is there"), (["predictions.jsonl"], "resume=true"), (["scores.json"], "cannot be read")],
)
def test_what_is_no_evaluation_is_told(left, message, tmp_path, capsys):
    for name in left:
        (tmp_path / name).write_text("{")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert message in capsys.readouterr().err


def test_one_folder_at_a_time(capsys):
    with pytest.raises(SystemExit):
        report.main(["a", "b"])
    assert "give one folder, not 2: a b" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["plot=false"])
    assert "missing mandatory key 'folder'" in capsys.readouterr().err


def test_rows_of_older_evaluations_have_fewer_columns(tmp_path):
    rows = [
        {name: value for name, value in row("none", "all", 0).items() if name in ("method", "kind", "accuracy", "n")}
    ]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    report.main([f"folder={tmp_path}", "plot=false"])
    assert markdown_tables((tmp_path / "report.md").read_text())[0][2] == ["all", "none", "90.0%", "32"]


def test_the_table_shows_what_comes_from_data_as_text(capsys):
    hostile = "[/counting] \x1b[31m\ud800\nend"
    report.print_table([{"kind": hostile, "method": "none", "accuracy": 0.5}])
    printed = capsys.readouterr().out
    assert "[/counting] \\x1b[31m\\ud800\\nend" in printed
    assert "\x1b[31m" not in printed
    assert len(report.markdown_table([{"kind": "a\nb | c", "method": "x" * 5000}]).splitlines()) == 3
    assert "\\x1b" in report.say_summary({"kinds": ["\x1b[2J"], "methods": {}})
