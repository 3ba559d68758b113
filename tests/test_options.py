"""Every option of every command, method and source: a number has its range, and what contradicts is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from glimpseprune import config
from glimpseprune.config import Range, UserError, option
from glimpseprune.options import TrainConfig
from mistakes import COMMANDS, OPTIONS

SCHEMAS = {name: schema for name, (_, _, schema) in COMMANDS.items()} | OPTIONS


def numeric(kind: Any) -> bool:
    return kind in (int, float) or any(map(numeric, get_args(kind)))


def every(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each (key, type, field), of sections and lists of them, too."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        kind = hints[item.name]
        yield f"{prefix}{item.name}", kind, item
        for part in (kind, *get_args(kind)):
            if is_dataclass(part):
                yield from every(part, f"{prefix}{item.name}.")


def without_range(schema: type) -> list[str]:
    """Numeric options that say no end, below or above."""
    missing = []
    for key, kind, item in every(schema):
        within = item.metadata.get("range", Range())
        if numeric(kind) and (within.least is within.above or within.most is within.below):
            missing.append(key)
    return missing


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_number_has_a_range_and_every_default_is_in_it(name):
    assert without_range(SCHEMAS[name]) == []
    config.check(SCHEMAS[name]())


def test_an_option_without_a_range_is_seen():
    @dataclass
    class Part:
        rate: float | None = option(None, most=1)

    @dataclass
    class Schema:
        count: int = option(1, least=0, most=9)
        sizes: list[int] = option([1])
        plain: dict[str, float] = option({})
        part: Part = option(Part)

    globals().update(Part=Part)  # where type hints are looked up
    assert without_range(Schema) == ["sizes", "plain", "part.rate"]


@dataclass
class Numbers:
    whole: int = option(1, least=1, most=8)
    open: float = option(0.5, above=0, below=1)
    maybe: int | None = option(None, least=0, most=9)
    pair: tuple[float, float] = option((0.9, 0.98), least=0, below=1)
    each: dict[str, float] = option({}, least=-1, most=1)
    free: float = 0.0
    place: str = option("auto", form=(r"auto|\d+", "auto or a number"))
    note: str = ""


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("whole=0", "whole: give 1 to 8, got 0"),
        ("whole=9", "whole: give 1 to 8, got 9"),
        ("open=0", "open: give above 0, below 1, got 0.0"),
        ("open=1", "open: give above 0, below 1, got 1.0"),
        ("open=.nan", "open: give above 0, below 1, got nan"),
        ("free=.nan", "free: give a finite number, got nan"),
        ("free=-.inf", "free: give a finite number, got -inf"),
        ("maybe=-1", "maybe: give 0 to 9, got -1"),
        ("pair=[.9]", "pair: expected tuple[float, float], got [0.9]"),
        ("pair=[.9,1]", "pair[1]: give at least 0, below 1, got 1.0"),
        ("each.a=2", "each.a: give -1 to 1, got 2.0"),
        ("place=none", "place: give auto or a number, got 'none'"),
        ("place=", "place: give a text that is not empty"),
        ("note=a\0b", "note: got 'a\\x00b', which has characters that are no text"),
        ("note=\udcff", "note: got '\\udcff', which has characters that are no text"),
        (f"note={'x' * 300}", "a name has 255 bytes at most"),
        ("note=\\${x}", "note: got '${x}', but ${...} stands for the value of another key"),
    ],
)
def test_what_is_out_of_range_is_told(argument, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config.load(Numbers, [argument])


def test_what_is_in_range_is_taken():
    argv = ["whole=8", "open=.999", "maybe=null", "pair=[0,0]", "each={a: -1, b: 1}", "free=-1e9", "place=12", "note="]
    assert config.load(Numbers, argv) == Numbers(8, 0.999, None, (0.0, 0.0), {"a": -1.0, "b": 1.0}, -1e9, "12", "")
    with pytest.raises(UserError, match="p.whole: give 1 to 8"):
        config.merge_options(Numbers, Numbers(whole=0), "p")  # made in Python, checked all the same


def test_help_says_the_range(capsys):
    with pytest.raises(SystemExit):
        config.load(Numbers, ["--help"])
    assert re.search(r"whole .* 1 to 8\n.*open .* above 0, below 1\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train=[]", "give one part or more"),
        ("train=[vip,vip]", "each once"),
        ("train=[nothing]", "train: no part 'nothing', choose from glimpse, private, vip, lora, decoder, vision"),
        ("backbone.min_pixels=9 backbone.max_pixels=8", "backbone.min_pixels=9 is above backbone.max_pixels=8"),
        ("grpo.num_masks=3", "grpo.num_masks=3 must divide grpo.num_generations=8"),
        ("loss.kl=0 loss.pressure=0", "there is nothing to train for"),
        ("optim.clip=-1", "optim.clip: give 0 to 1000000, got -1.0"),
        ("grpo.std_floor=0", "grpo.std_floor: give above 0"),
        ("seed=4294967296", "seed: give 0 to 4294967295, got 4294967296"),
        ("backbone.min_pixels=100000000000", "backbone.min_pixels: give 1 to 67108864"),
        ("trainer.devices=1.5", "give auto, a number of devices, or a list such as [2,3], got '1.5'"),
        ("trainer.precision=half", "trainer.precision: expected '32-true' | 'bf16-mixed'"),
        ("resume=2", "resume: expected bool, got 2"),
    ],
)
def test_what_no_training_can_be(arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config.load(TrainConfig, ["out=o", "backbone.path=b", "data.path=d", *arguments.split(" ")])


@pytest.mark.parametrize("storage", ["{secret: x}", "{token: x}", "{client_kwargs: {aws_secret_access_key: x}}"])
def test_a_secret_is_not_taken_into_a_config_that_is_saved(storage):
    with pytest.raises(UserError, match=r"data.storage.*give what is secret in the environment"):
        config.load(TrainConfig, ["out=x", "data.path=s3://b/x", "backbone.path=x", f"data.storage={storage}"])
    given = "data.storage={anon: true, endpoint_url: http://x, client_kwargs: {region_name: y}}"
    cfg = config.load(TrainConfig, ["out=x", "data.path=s3://b/x", "backbone.path=x", given])
    assert cfg.data.storage["client_kwargs"] == {"region_name": "y"}


def test_weights_of_a_mixture_are_numbers_above_0():
    given = ["out=x", "data.path=x", "backbone.path=x"]
    cfg = config.load(TrainConfig, [*given, "data.mix={a/b.c: 2, https://host/d: 0.5}"])
    assert cfg.data.mix == {"a/b.c": 2.0, "https://host/d": 0.5}
    with pytest.raises(UserError, match=r"data.mix.*give above 0, up to 1000000"):
        config.load(TrainConfig, [*given, "data.mix={a: 0}"])
