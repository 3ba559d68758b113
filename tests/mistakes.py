"""Wrong arguments of every command: a valid set in which one thing is broken, drawn by a seed from the schemas."""

from __future__ import annotations

import json
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from PIL import Image
from safetensors.torch import save_file

from glimpseprune import compare as side_by_side
from glimpseprune import (
    config,
    demo,
    evaluate,
    export,
    lookup,
    plan,
    preflight,
    prepare,
    pretrain,
    report,
    reproduce,
    train,
)
from glimpseprune.data import shards
from glimpseprune.options import BackboneOptions, DataOptions, PrunerOptions, TrainConfig
from glimpseprune.tiny.config import PretrainConfig
from glimpseprune.types import Sample

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train": (train.main, [], TrainConfig),
    "evaluate": (evaluate.main, [], evaluate.EvaluateConfig),
    "prepare": (prepare.main, [], prepare.PrepareConfig),
    "pretrain": (pretrain.main, [], PretrainConfig),
    "plan": (plan.main, [], plan.PlanConfig),
    "preflight train": (preflight.main, ["train"], preflight.TrainCheck),
    "preflight evaluate": (preflight.main, ["evaluate"], preflight.EvaluateCheck),
    "report": (report.main, [], report.ReportConfig),
    "compare": (side_by_side.main, [], side_by_side.CompareConfig),
    "reproduce": (reproduce.main, [], reproduce.ReproduceConfig),
    "export": (export.main, [], export.ExportConfig),
    "demo": (demo.main, [], demo.DemoConfig),
}
"""What each is called with, arguments that come first, and its schema."""
OPTIONS = {
    f"{package}.{name}": lookup.find(f"glimpseprune.{package}", name).Options
    for package in ("pruners", "data.sources")
    for name in lookup.names(f"glimpseprune.{package}")
    if hasattr(lookup.find(f"glimpseprune.{package}", name), "Options")
}
"""Of methods and sources, which commands take as mappings."""

FILES = {
    "torn": "trainer: {max_steps: 3",
    "tab": "data:\n\tpath: d",
    "list": "- a\n- b",
    "text": "just words",
    "twice": "seed: 1\nseed: 2",
    "null-key": "null: 3",
    "list-key": "[a]: 3",
    "tag": "seed: !!python/object/apply:os.getcwd []",
    "bomb": "a: &a [1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcde", "bcdef")),
    "loop": "a: &a [*a]",
    "deep": "x: " + "[" * 5000,
    "binary": "\0\1\2",
    "documents": "a: 1\n---\nb: 2",
    "extends-null": "extends: null",
    "extends-itself": "extends: extends-itself.yaml",
    "extends-nothing": "extends: nowhere.yaml",
    "extends-number": "extends: [7, {a: b}]",
    "large": "note: " + "x" * 200_000,
}
"""No configs, by the names of their files."""


@dataclass
class World:
    """What commands are pointed at: shards, a run, two evaluations, a backbone, and things that are none of these."""

    folder: Path

    def __post_init__(self) -> None:
        pixels = Image.new("RGB", (56, 56), "red")
        samples = [Sample(f"k{i}", "what?", ("it",), [pixels], [[(0, 0, 28, 28)]]) for i in range(4)]
        for split in ("train", "val", "test"):
            shards.write(samples, self.folder / "data", split=split)
        backbone = BackboneOptions(path=self.backbone)
        saved = TrainConfig(
            out=self.at("run"),
            backbone=backbone,
            pruner=PrunerOptions("random"),
            data=DataOptions(path=self.at("data")),
        )
        config.save(saved, self.folder / "run" / "config.yaml")
        save_file({}, self.folder / "run" / "trainable.safetensors")
        row = {"method": "none", "kind": "all", "accuracy": 1.0, "relative": 1.0, "kept": 1.0, "n": 4}
        asked = {
            "data": {"path": "d", "split": "test", "limit": None, "manifest": "m"},
            "metric": ["exact_match"],
            "max_new_tokens": 64,
        }
        for seed, name in enumerate(("eval", "eval2", "paper/11")):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name / "scores.json").write_text(json.dumps([row]))
            (self.folder / name / "evaluation.yaml").write_text(json.dumps({"asked": {**asked, "seed": seed}}))
        (self.folder / "file").write_text("a file")
        (self.folder / "empty").mkdir()
        (self.folder / "foreign").mkdir()
        (self.folder / "foreign" / "thesis.txt").write_text("not ours")
        for name, text in FILES.items():
            (self.folder / f"{name}.yaml").write_text(text)

    @property
    def backbone(self) -> str:
        return str(ROOT / "data" / "tiny-qwen2_5_vl")

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def valid(self, command: str) -> list[str]:
        out, backbone, data = f"out={self.at('new')}", f"backbone.path={self.backbone}", f"data.path={self.at('data')}"
        small = ["data.batch_size=2", "data.workers=0"]
        training = [out, backbone, data, *small, "trainer.accelerator=cpu", "trainer.max_steps=1"]
        evaluation = [out, backbone, data, *small, "methods=[random]", "device=cpu"]
        return {
            "train": training,
            "preflight train": training,
            "plan": training,
            "evaluate": evaluation,
            "preflight evaluate": evaluation,
            "prepare": [out, "source=tags", "options.count={train: 2, val: 2, test: 2}"],
            "pretrain": [out, "accelerator=cpu"],
            "report": [out, f"folder={self.at('eval')}", "plot=false"],
            "compare": [out, f"folders=[{self.at('eval')},{self.at('eval2')}]"],
            "reproduce": [out, f"folder={self.at('paper')}", "sets=[all]"],
            "export": [out, f"ckpt={self.at('run')}"],
            "demo": [out, f"data={self.at('demo-data')}"],
        }[command]

    # ----------------------------------------------------------------------------------------------- one thing wrong

    def draw(self, seed: int, count: int) -> Iterator[tuple[str, list[str]]]:
        """So many (command, arguments), all commands in turn."""
        rng = random.Random(seed)
        ways = [
            self.value,
            self.value,
            self.value,
            self.in_a_file,
            self.key,
            self.path,
            self.place,
            self.together,
            self.rest,
        ]
        for number in range(count):
            command = list(COMMANDS)[number % len(COMMANDS)]
            while (wrong := rng.choice(ways)(rng, command)) is None:
                pass
            given = {argument.partition("=")[0].removeprefix("-") for argument in wrong}
            kept = [argument for argument in self.valid(command) if argument.partition("=")[0] not in given]
            yield command, [*COMMANDS[command][1], *kept, *(argument for argument in wrong if argument[:1] != "-")]

    def value(self, rng: random.Random, command: str) -> list[str]:
        """A value that its key cannot have."""
        key, kind, item = rng.choice(keys(command))
        text = rng.choice(unfit(kind, item))
        return [f"{key}={text}"]

    def in_a_file(self, rng: random.Random, command: str) -> list[str]:
        """The same, in a YAML file; there a text can be a list."""
        key, kind, item = rng.choice(keys(command))
        bad = [value for value in unfit(kind, item) if "\0" not in value and "\udcff" not in value and value]
        if kind is str:
            bad = ["[a, b]", "{a: b}", "null", "''"]
        file = self.folder / f"drawn-{rng.randrange(10**9)}.yaml"
        *sections, last = key.split(".")
        indents = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
        file.write_text("\n".join([*indents, f"{'  ' * len(sections)}{last}: {rng.choice(bad)}"]) + "\n")
        return [str(file), f"-{key}"]

    def key(self, rng: random.Random, command: str) -> list[str]:
        """A key that there is not, or an argument that is none."""
        key = rng.choice(keys(command))[0]
        at = rng.randrange(len(key))
        misspelt = [
            key[:at] + "qx" + key[at:],
            f"{key}.{rng.choice('xyz')}x",
            f"{key}qx",
            f"qx.{key}",
            "",
            ".",
            f"{key}.",
        ]
        unknown = [f"{rng.choice(misspelt)}={rng.choice(['1', 'x', '[]', '{}'])}"]
        return (
            unknown if rng.random() < 0.8 else [rng.choice(["+x", "nowhere.yaml", "qx.yml", self.at("file") + ".yaml"])]
        )

    def path(self, rng: random.Random, command: str) -> list[str] | None:
        """A place where something should be, and is not."""
        wanted = {
            "train": ["backbone.path", "data.path", "init_from", "trainer.strategy"],
            "preflight train": ["backbone.path", "data.path", "init_from"],
            "plan": ["backbone.path"],
            "evaluate": ["ckpt", "backbone.path", "data.path"],
            "preflight evaluate": ["ckpt", "backbone.path", "data.path"],
            "export": ["ckpt", "backbone.path"],
            "pretrain": ["resume"],
            "report": ["folder"],
            "reproduce": ["folder"],
        }
        wrong = rng.choice(["missing", "missing/below", "file", "file/below", "empty", "foreign", "deep.yaml"])
        places = [self.at(wrong), f"{self.at('run')}/{wrong}", "/dev/null", "no-such-owner/no-such-name", "~nobody/x"]
        if command == "compare":
            return [f"folders=[{self.at('eval')},{rng.choice(places)}]"]
        if command == "prepare":
            return ["source=mined", f"options.root={rng.choice(places)}", "options.predictions=x", "-options.count"]
        if command not in wanted:
            return None
        key = rng.choice(wanted[command])
        return [f"{key}={rng.choice(places)}", *["-backbone.path"] * (key == "init_from")]

    def place(self, rng: random.Random, command: str) -> list[str] | None:
        """A place that cannot be written to."""
        wrong = ["file", "file/below", "file/below/that"]
        ours = ["train", "prepare", "pretrain", "export"]  # which want a folder for themselves
        if command == "plan":
            return None
        if command == "demo":
            return [f"{rng.choice(['out', 'data'])}={self.at(rng.choice(wrong))}"]
        return [f"out={self.at(rng.choice(wrong + ['foreign'] * (command in ours)))}"]

    def together(self, rng: random.Random, command: str) -> list[str] | None:
        """What is right by itself, but not with the rest."""
        trainings = [
            ["stage=nonsense"],
            ["pruner.name=nonsense"],
            ["pruner.name=random"],
            ["pruner.options.probe_layers=[99]"],
            ["pruner.options.vision_layers=[99]"],
            ["pruner.options.probe=nonsense"],
            ["pruner.options.dropout=1.5"],
            ["pruner.options.threshold=.nan"],
            ["pruner.options.prune_layer=1.5"],
            ["pruner.options.max_keep=2"],
            ["pruner.options.nonsense=1"],
            ["pruner.options.num_heads=7"],
            ["pruner.options.width=30"],
            ["train=[lora]"],
            ["train=[vip,vip]"],
            ["train=[]"],
            ["train=[nonsense]"],
            ["train=[vision]"],
            ["lora={rank: 0}", "train=[lora]"],
            ["lora={modules: [nonsense]}"],
            ["lora={modules: []}"],
            ["lora={first_layer: 99}"],
            ["lora={dropout: 1}"],
            ["backbone.min_pixels=100000", "backbone.max_pixels=1000"],
            ["stage=grpo", "grpo.num_masks=3"],
            ["stage=grpo", "grpo.beta=0.1"],
            ["stage=grpo", "rewards.functions={nonsense: 1}"],
            ["stage=grpo", "rewards.functions={exact_match: 0}"],
            ["stage=grpo", "rewards.functions={judge: 1}"],
            ["stage=grpo", "rewards.judge.base_url=x"],
        ]
        starts = [
            ["trainer.nodes=2"],
            ["pruner.options.init_token=nonsense-of-a-token"],
            ["trainer.accelerator=gpu"],
            ["trainer.devices=0"],
            ["trainer.devices=1.5"],
            ["trainer.devices=[0,0]"],
            ["trainer.devices=9999"],
            ["trainer.strategy=nonsense"],
            ["trainer.strategy=zero3"],
            ["backbone.attention=flash_attention_2"],
            ["data.batch_size=1000"],
            ["resume=true"],
            ["loss.kl=0", "loss.pressure=0"],
            ["data.prepare={source: nonsense}", f"data.path={self.at('new-data')}"],
            ["data.prepare={source: tags, shard_size: 0}", f"data.path={self.at('new-data')}"],
            ["data.prepare={source: tags, options: {size: 1}}", f"data.path={self.at('new-data')}"],
        ]
        evaluations = [
            ["methods=[nonsense]"],
            ["methods=[random,random]"],
            ["methods=[]"],
            ["methods=[random]", "options.fastv.layer=2"],
            ["options.random.nonsense=1"],
            ["options.random.keep_ratio=2"],
            ["options.random=3"],
            ["options=3"],
            ["options.random.seed=.nan"],
            ["pruner.name=random"],
            ["metric=nonsense"],
            ["metric=3"],
            ["metric=[]"],
            ["metric=[exact_match,3]"],
            ["metric={a: 1}"],
            ["metric=null"],
            ["controls=[nonsense]"],
            ["controls=[random,random]"],
            ["samples=2"],
            ["budget.kept=.1", "budget.kv=.2"],
            ["data.split=nonsense"],
        ]
        loads = [
            ["device=cuda"],
            ["device=cuda:99"],
            ["device=tpu"],
            ["backbone.attention=flash_attention_2"],
            ["sample_keep=true"],
            ["methods=[glimpse]"],
            ["methods=[fastv]", "options.fastv.layer=99"],
            ["controls=[none+]"],
            ["methods=[visionzip]", "options.visionzip.layer=99"],
        ]
        plans = [
            ["image=large"],
            ["image=0x10"],
            ["image=99999x1"],
            ["limits=[0]"],
            ["limits=[9]", "data.path=-"],
            ["stage=nonsense"],
            ["pruner.name=nonsense"],
            ["trainer.strategy=nonsense"],
            ["lora={first_layer: 99}"],
        ]
        sources = [
            ["source=nonsense"],
            ["splits=[nonsense]"],
            ["splits=[]"],
            ["options.size=100"],
            ["options.min_tags=9", "options.max_tags=8"],
            ["options.kinds=[nonsense]"],
            ["options.kinds=[]"],
            ["options.wear=2"],
            ["options.count={nonsense: 3}"],
            ["options.count.train=0"],
            ["options.nonsense=3"],
            ["options.seed=-1"],
            ["options=3"],
            ["source=mined", "-options.count"],
        ]
        lessons = [
            ["lessons=[]"],
            ["lessons=[3]"],
            ["lessons=[{size: 100}]"],
            ["lessons=[{steps: 0}]"],
            ["lessons=[{nonsense: 1}]"],
            ["lessons=[{min_tags: 9, max_tags: 8}]"],
            ["model.heads=3"],
            ["model.hidden=100"],
            ["model.kv_heads=3"],
            ["model.vision_heads=5"],
            ["model.vision_full=[9]"],
            ["aux_layer=6"],
            ["accelerator=gpu"],
            ["model.layers=1", "aux_layer=2"],
        ]
        found = {
            "train": trainings + starts,
            "preflight train": [["stage=nonsense"], ["pruner.name=nonsense"], *trainings[6:11]],
            "plan": plans,
            "evaluate": evaluations + loads,
            "preflight evaluate": evaluations,
            "prepare": sources,
            "pretrain": lessons,
            "compare": [["kind=nonsense"], ["folders=[]"], ["folders=null"], [f"folders=[{self.at('eval')}]"]],
            "export": [["backbone.dtype=int8"], ["dtype=auto"], ["backbone.path=3"], ["ckpt=3"]],
            "demo": [["overrides=[nonsense]"], ["overrides=[trainer.max_step=3]"], ["overrides=[seed=-1]"]],
        }
        return rng.choice(found[command]) if command in found else None

    def rest(self, rng: random.Random, command: str) -> list[str] | None:
        """A file that is no config; a mandatory key that is not given; two values where one is due."""
        if rng.random() < 0.5:
            return [self.at(f"{rng.choice(list(FILES))}.yaml")]
        mandatory = {
            "train": "out data.path backbone.path",
            "prepare": "out source",
            "export": "out ckpt",
            "report": "folder",
            "reproduce": "folder",
        }
        mandatory |= {"compare": "folders", "evaluate": "data.path backbone.path methods"}
        return ["-" + rng.choice(mandatory[command].split())] if command in mandatory else None


@cache
def keys(command: str) -> list[tuple[str, Any, Any]]:
    """Each (key, type, field) of a command, those of methods and sources included."""
    found = list(_keys(COMMANDS[command][2]))
    if command in ("train", "preflight train"):
        found += list(_keys(OPTIONS["pruners.glimpse"], "pruner.options."))
    elif "evaluate" in command:
        found += list(_keys(OPTIONS["pruners.random"], "options.random."))
    elif command == "prepare":
        found += list(_keys(OPTIONS["data.sources.tags"], "options."))
    return found


def _keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(schema)
    for item in fields(schema):
        kind = hints[item.name]
        if kind is Any:
            continue
        yield f"{prefix}{item.name}", kind, item
        for part in (kind, *get_args(kind)):
            if is_dataclass(part) and get_origin(kind) is not list:
                yield from _keys(part, f"{prefix}{item.name}.")


def unfit(kind: Any, item: Any) -> list[str]:
    """What a key of this type cannot be, as it is typed."""
    within = item.metadata.get("range", config.Range())
    nothing = [] if types.NoneType in get_args(kind) else ["null"]
    parts = [part for part in get_args(kind) if part is not types.NoneType] if get_origin(kind) in UNIONS else [kind]
    (part,) = parts
    if part in (int, float):
        return [*numbers(part, within), *nothing, "many", "[1]", "{a: 1}", "true", "${nope}", "1,5"]
    if part is bool:
        return ["maybe", "[]", "{}", "null", "0.5", "'2'", "${nope}"]
    if part is str:
        form = ["nonsense!"] * bool(item.metadata.get("form", ("", ""))[0])
        empty = [] if len(get_args(kind)) > 1 else [""]  # among a method's options it is null
        return [*empty, "a" * 300, "${nope}", "\\${x}", "a${", "\udcff", "a\0b", *form]
    if get_origin(part) is Literal:
        return ["nonsense", "3", "[]", "{}", "''", "${nope}", *nothing]
    if is_dataclass(part):
        return ["3", "text", "[]", "true", "{qx: 1}", *nothing]
    inner = get_args(part)
    if get_origin(part) is dict:
        return [
            "3",
            "text",
            "[1]",
            "{a: ${nope}",
            *([f"{{a: {x}}}" for x in numbers(float, within)] if float in inner else []),
        ]
    (element, *_) = inner
    if element in (int, float):
        return ["3", "text", "{a: 1}", "[x]", "[null]", "[[1]]", *(f"[{x}]" for x in numbers(element, within))]
    return ["3", "text", "{a: 1}", "[null]", "[[a]]", "[{a: 1}]", "[", "[a,"]


UNIONS = (Union, types.UnionType)


def numbers(kind: type, within: config.Range) -> list[str]:
    """Beyond both ends, and no numbers."""
    ends = [end for end in (within.above, within.below) if end is not None]
    ends += [within.least - 1] if within.least is not None else []
    ends += [within.most + 1] if within.most is not None else []
    return [
        *(str(kind(number)) for number in (*ends, -(10**30), 10**30)),
        ".nan",
        ".inf",
        *["0.5", "1e3"] * (kind is int),
    ]
