"""What is written is true as far as a machine can tell: cited sections exist, links lead somewhere, commands parse.

Commands in Markdown and in comments of conf/ go through the real parser of the command's options, and so do the options
of methods and sources. Nothing is run. Blocks of commands and run.sh are test_commands.py's.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from glimpseprune import config
from glimpseprune.config import UserError
from glimpseprune.lookup import find
from glimpseprune.options import TrainConfig
from glimpseprune.pruners import options_of

ROOT = Path(__file__).parent.parent
SHIMS = {path.stem: path.read_text() for path in (ROOT / "src").glob("*.py") if path.stem != "__init__"}
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "data").glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")]
)
SOURCES = [
    path
    for folder, ending in (("src", "py"), ("tests", "py"), ("benchmarks", "py"), ("conf", "yaml"), ("experiments", "*"))
    for path in sorted((ROOT / folder).rglob(f"*.{ending}"))
    if path.suffix in (".py", ".yaml", ".md", ".sh") and path != Path(__file__)
]
PAGE = r"\b(method|evaluation)\.md"  # what docstrings cite
CITATION = re.compile(r"docs/(\w+)\.md((?:(?:,|\s+and|\s+to)?[\s#]+§\d+(?:\.\d+)*)+)")


def headings(page: str) -> set[str]:
    return set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE))


def test_cited_sections_exist():
    cited = 0
    for path in SOURCES:
        text = path.read_text()
        found = list(CITATION.finditer(text))
        where = path.relative_to(ROOT)
        if path.suffix != ".md":  # pages link to pages, everything else cites a section
            assert len(found) == len(re.findall(PAGE, text)), f"{where}: cite as docs/method.md §1.2"
        for citation in found:
            sections = re.findall(r"§([\d.]*\d)", citation[2])
            assert not set(sections) - headings(citation[1]), f"{where}: {citation[0]}"
            cited += len(sections)
    assert cited > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)]*))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, anchor
    for target in re.findall(
        r"\bmake ([a-z]+(?:-[a-z]+)*)\b", "\n".join(re.findall(r"`[^`]+`|^make .*", text, re.MULTILINE))
    ):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"make {target}"


class Parsed(Exception):
    """Raised in place of running a command."""


@pytest.fixture
def parse(tmp_path, monkeypatch) -> Callable[..., Any]:
    """Read the arguments of a command as the command would, in a folder laid out like the repository.

    A run folder that is started from is there, as the run before it left its options, or else those of the demo.
    """
    for name in ("conf", "data", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    load, demo = config.load, config.read(TrainConfig, ROOT / "experiments/demo/config.yaml")

    def only_load(*arguments: Any, **options: Any) -> None:
        try:
            raise Parsed(load(*arguments, **options))
        except UserError as error:
            raise Parsed(error) from None

    def run(command: str, arguments: Sequence[str]) -> Any:
        for argument in arguments:
            key, _, value = argument.partition("=")
            if key in ("init_from", "ckpt") and not Path(value, "config.yaml").exists():
                config.save(demo, Path(value, "config.yaml"))
        monkeypatch.setattr(config, "load", only_load)
        main = import_module(re.search(r"from (glimpseprune[\w.]*) import main", SHIMS[command])[1]).main
        with pytest.raises(Parsed) as parsed:
            main(list(arguments))
        monkeypatch.setattr(config, "load", load)
        cfg = parsed.value.args[0]
        if isinstance(cfg, UserError):
            raise cfg
        if command == "train":
            options_of(cfg.pruner.name, cfg.pruner.options)
            config.save(cfg, Path(cfg.out, "config.yaml"))
        if command == "prepare":
            config.merge_options(find("glimpseprune.data.sources", cfg.source).Options, cfg.options, "options")
        return cfg

    return run


COMMAND = re.compile(rf"(?:\bsrc\.(\w+)|\bglimpseprune ({'|'.join(SHIMS)})\b)(?!\.py)([^`]*)")


@pytest.mark.parametrize(
    "path", [*PAGES, *sorted((ROOT / "conf").rglob("*.yaml"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_in_text_parse(path, parse):
    """A line that is a command must be whole, but for what "..." stands for; one in a sentence may be a part of it."""
    for line in path.read_text().splitlines():
        whole = re.match(r"[#\s]*(python -m|glimpseprune )", line) and "..." not in line
        for module, verb, rest in COMMAND.findall(line):
            assert module in ("", *SHIMS), line
            words = shlex.split(re.sub(r"<[^>]*>", "x", re.split(r"\s{2,}", rest)[0]), comments=True)
            if not whole and not words:
                continue
            try:
                parse(module or verb, [word for word in words if word != "..."])
            except UserError as error:
                assert "missing mandatory key" in str(error) and not whole, f"{line}: {error}"
