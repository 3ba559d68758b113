"""Will it fit: ``python -m src.plan conf/stage1.yaml conf/backbones/qwen2_5_vl_7b.yaml gpu_memory=80 gpus=8``.

Memory per GPU of a training under each strategy, before there are weights, data or a GPU. Parameters are counted on
the model itself, built without storage from its config.json: the very module that would train says what is frozen, what
trains and in which precision. Everything else is arithmetic on shapes (:mod:`.memory`). Takes all keys of src.train
and a few of its own.

What the allocator loses, NCCL and kernels' own workspaces are not counted: ``MARGIN`` and ``RESERVED`` stand for them.
Left out: times. Bytes throughout; GiB are 2**30 bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimpseprune import config, cost, resources
from glimpseprune.config import UserError, option
from glimpseprune.memory import Held, Load, Model, Peak, held, moments
from glimpseprune.options import BackboneOptions, TrainConfig
from glimpseprune.train import inherited

if TYPE_CHECKING:
    from glimpseprune.training._stage import StageModule

GIB = 2**30
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
"""From the least communication to the most."""
MARGIN = 0.08
"""Share of the GPU that is left free, for fragmentation."""
RESERVED = GIB
"""CUDA context, NCCL and cuBLAS."""


@dataclass
class PlanConfig(TrainConfig):
    gpu_memory: float = option(80.0, "memory of a GPU in GiB", above=0, most=1e5)
    gpus: int | None = option(
        None, "GPUs in all (default: trainer.nodes x trainer.devices; `auto` counts as 1)", least=1, most=10**6
    )
    image: str = option(
        "1344x1344",
        "width x height of a prompt's image in pixels",
        form=(r"(?i)[1-9]\d{0,4}x[1-9]\d{0,4}", "width x height in pixels, such as 1344x1344"),
    )
    text: int = option(96, "text tokens of a prompt, chat template included", least=1, most=10**7)
    answer: int | None = option(
        None, "tokens of an answer (default: 32; stage grpo: grpo.max_completion_length)", least=1, most=10**7
    )
    keep: float = option(0.1, "share of the visual tokens that a rollout keeps (stage grpo)", least=0, most=1)
    limits: list[int] = option(
        [],
        "limits of visual tokens per sample: say what each of them, as data.max_tokens, would leave out of data.path",
        least=1,
        most=10**7,
    )


# ---------------------------------------------------------------------------------------------- models without weights


def architecture(path: str) -> Any:
    """The Hugging Face config of a backbone: of a folder, of a download, or, where there is neither, of the published
    model whose name ``path`` contains.

    Raises:
        UserError: none of them.
    """
    from transformers import AutoConfig

    from glimpseprune import backbones

    folder = Path(path)
    if (folder / "config.json").is_file():
        return backbones.architecture(path)
    if not folder.exists():
        with suppress(OSError, ValueError):
            return AutoConfig.from_pretrained(path, local_files_only=True)
    published = backbones.published()
    for name, make in published.items():
        if name in folder.name.lower():
            return make()
    raise UserError(
        f"backbone.path={path}: no folder with config.json, not downloaded (`hf download {path} config.json`), and "
        f"none of {', '.join(published)}"
    )


def skeleton(cfg: TrainConfig, architecture: Any) -> StageModule:
    """The module that would train, on the meta device; raises as :func:`checkpoint.outline`."""
    from glimpseprune import checkpoint
    from glimpseprune.training._stage import StageModule

    outline = checkpoint.outline(architecture, cfg.backbone, cfg.pruner, cfg.lora)
    return StageModule(cfg, outline.backbone, outline.pruner)


def describe(stage: StageModule) -> Model:
    """A stage's module as numbers."""
    pruner, counts = stage.pruner, Counter()
    for parameter in stage.parameters():
        counts[parameter.requires_grad, parameter.element_size()] += parameter.numel()
    layers = enumerate(stage.backbone.text_model.layers)
    trained = [index for index, layer in layers if any(p.requires_grad for p in layer.parameters())]
    probed = max(getattr(pruner, "probe_layers", ()), default=-1) + 1
    steps = [(stop.depth, stop.prune_cache) for stop in pruner.stops]
    first, vip = min(trained, default=None), cost.Vip.of(pruner)
    asks = getattr(getattr(pruner, "options", None), "sight", None) == "question"
    private = len(getattr(pruner, "private", ()))
    return Model(stage.backbone.shapes, stage.depth, first, vip, probed, dict(counts), steps, asks, private)


def visual_tokens(architecture: Any, options: BackboneOptions, image: str) -> int:
    """Visual tokens of an ``image`` of "width x height" pixels, resized as the backbone's processor does.

    Raises:
        UserError: not a size.
    """
    from glimpseprune import backbones

    try:
        width, height = map(int, image.lower().split("x"))
        return backbones.layout_of(architecture, (width, height), *pixel_bounds(options)).count
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"image={image}: give width x height in pixels, such as 1344x1344 ({error})") from None


def pixel_bounds(options: BackboneOptions) -> tuple[int | None, int | None]:
    """Least and most pixels of an image: of the options, of the checkpoint's processor; None: of the published one."""
    file = Path(options.path) / "preprocessor_config.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    size = saved.get("size") or {}
    least = options.min_pixels or saved.get("min_pixels") or size.get("shortest_edge")
    most = options.max_pixels or saved.get("max_pixels") or size.get("longest_edge")
    return least, most


# ------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Row:
    """A strategy, as ``trainer.strategy`` names it: what it holds, and the worst moment of a step."""

    strategy: str
    held: Held
    peak: Peak
    fits: bool

    @property
    def total(self) -> float:
        return self.held.total + self.peak.total


def compare(cfg: PlanConfig, model: Model, load: Load) -> list[Row]:
    """All strategies, from the least communication to the most."""
    peak = max(moments(cfg, model, load), key=lambda peak: peak.total)
    gpus, room = number_of_gpus(cfg), cfg.gpu_memory * GIB * (1 - MARGIN) - RESERVED
    rows = []
    for strategy in STRATEGIES:
        stays = held(strategy, model.counts, gpus, cfg.trainer.precision)
        name = "auto" if gpus == 1 and strategy == "ddp" else strategy  # one process needs no strategy
        rows.append(Row(name, stays, peak, stays.total + peak.total <= room))
    return rows


def number_of_gpus(cfg: PlanConfig) -> int:
    devices = cfg.trainer.devices
    count = int(devices) if devices.isdigit() else devices.strip(",").count(",") + 1  # auto: 1
    return cfg.trainer.nodes * count if cfg.gpus is None else cfg.gpus


def load_of(cfg: PlanConfig, architecture: Any, itemsize: int) -> Load:
    """What a step of ``cfg`` gives to one GPU, when the LVLM's weights have ``itemsize`` bytes per number."""
    answer = cfg.answer or (cfg.grpo.max_completion_length if cfg.stage == "grpo" else 32)
    half = cfg.trainer.precision.startswith(("16", "bf16"))
    visual = visual_tokens(architecture, cfg.backbone, cfg.image)
    return Load(cfg.data.batch_size, cfg.text, visual, answer, 2 if half else itemsize, cfg.keep)


def smaller(cfg: PlanConfig, model: Model, load: Load) -> str | None:
    """The largest lower setting with which a strategy fits, as ``key=value``: the micro-batch first, which changes
    nothing but the time, then the batch per GPU, made up for by accumulation."""
    if cfg.stage == "grpo":
        size = min(cfg.grpo.micro_batch, load.batch * cfg.grpo.num_generations)
        while size > 1:
            size //= 2
            cut = replace(cfg, grpo=replace(cfg.grpo, micro_batch=size))
            if any(row.fits for row in compare(cut, model, load)):
                return f"grpo.micro_batch={size}"
    for size in (n for n in range(load.batch - 1, 0, -1) if load.batch % n == 0):
        if any(row.fits for row in compare(cfg, model, replace(load, batch=size))):
            return f"data.batch_size={size} trainer.accumulate={load.batch // size * cfg.trainer.accumulate}"
    return None


def verdict(cfg: PlanConfig, model: Model, load: Load, rows: list[Row]) -> str:
    """One line: what to use, or what to lower."""
    from glimpseprune.running.strategies import choose

    gpus, trained = number_of_gpus(cfg), sum(number for (trains, _), number in model.counts.items() if trains)
    asked = choose(cfg.trainer.strategy, gpus, cuda=True, deepspeed=True, trained=trained)
    fitting = {row.strategy: row for row in rows if row.fits}
    if not fitting:
        least = min(rows, key=lambda row: row.total)
        lower = smaller(cfg, model, load) or "backbone.max_pixels, or take more or larger GPUs"
        return f"does not fit: {least.strategy} needs least, {_gib(least.total)} GiB; lower {lower}"
    best = fitting.get(asked, next(iter(fitting.values())))
    name = cfg.trainer.strategy if best.strategy == asked else best.strategy
    name += f" ({asked})" if name == "auto" != asked else ""
    line = f"fits: trainer.strategy={name}, {_gib(best.total)} of {cfg.gpu_memory:g} GiB per GPU"
    if best.held.host:
        line += f", {_gib(best.held.host * gpus / cfg.trainer.nodes)} GiB of CPU memory per node"
    if asked in {row.strategy for row in rows} - fitting.keys():
        line += f"; trainer.strategy={asked}, as configured, does not"
    return line


def show(cfg: PlanConfig, model: Model, load: Load, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    gpus, counts = number_of_gpus(cfg), model.counts
    frozen, trained = (sum(n for (trains, _), n in counts.items() if trains == which) for which in (False, True))
    peak = rows[0].peak
    table = Table(
        title=f"{cfg.stage} on {cfg.backbone.path}, GiB per GPU of {gpus}",
        caption=f"{frozen:,} frozen and {trained:,} trained parameters; {load.batch} prompts of {load.text} text and "
        f"{load.visual} visual tokens;\nanswers of {load.answer}; most is needed for: {peak.moment}",
    )
    table.add_column("strategy")
    parts = [part.name for part in fields(Held) if part.name != "host"]
    headings = {"saved": "activations", "cache": "KV cache"}
    steps = [part.name for part in fields(Peak) if part.name != "moment"]
    for heading in (*parts, *(headings.get(name, name) for name in steps), "total", f"fits {cfg.gpu_memory:g}"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [getattr(row.held, name) for name in parts] + [getattr(row.peak, name) for name in steps]
        cells = [_gib(number) for number in (*numbers, row.total)]
        table.add_row(row.strategy, *cells, "yes" if row.fits else "no", style="" if row.fits else "dim")
    Console(width=max(128, Console().width)).print(table)


def show_lengths(cfg: PlanConfig, architecture: Any) -> None:
    """How many visual tokens the training samples have, and what each of ``cfg.limits`` would leave out.

    Raises:
        UserError: there are no data.
    """
    import numpy as np

    from glimpseprune import backbones
    from glimpseprune.data.limits import Limits, dropped, measure
    from glimpseprune.data.order import padded
    from glimpseprune.data.stream import Deal, ShardDataset, Store

    if cfg.data.path == "-":
        raise UserError("limits: give data.path=<folder of shards>, which they are to be tried on")
    bounds = pixel_bounds(cfg.backbone)
    shards = ShardDataset(cfg.data.path, "train", store=Store.of(cfg.data), mix=cfg.data.mix).shards
    found = measure(shards, lambda size: backbones.layout_of(architecture, size, *bounds).count, Limits())
    median, most = (int(np.quantile(found.lengths, share)) for share in (0.5, 1))
    size = cfg.data.batch_size
    step = size * number_of_gpus(cfg)
    deal = Deal(shards.counts, step, True, cfg.seed, together=cfg.data.together, mix=shards.mix, lengths=found.lengths)
    padding = [f"{padded(replace(deal, bucket=bucket).order(), found.lengths, size):.1%}" for bucket in (0, 64 * size)]
    print(
        f"{len(found.lengths)} training samples of {shards.folder}: {int(found.lengths.sum()):,} visual tokens, median "
        f"{median}, most {most}; in batches of {size}, {padding[0]} of the visual columns are padding "
        f"({padding[1]} with data.bucket={64 * size})"
    )
    for limit, count, share in dropped(found, sorted(cfg.limits)):
        of_all = f"{count / len(found.lengths):.1%}"
        print(f"  data.max_tokens={limit} leaves out {count} samples ({of_all}) with {share:.1%} of the visual tokens")


def _gib(number: float) -> str:
    return f"{number / GIB:.1f}"


def _under(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan need not be told."""
    taken = inherited(given)
    return {**taken, "out": "-", "data": {"path": "-"} | taken.get("data", {})}


@config.entry(PlanConfig, _under)
def main(cfg: PlanConfig) -> None:
    cfg.backbone.path = resources.find(cfg.backbone.path)
    found = architecture(cfg.backbone.path)
    stage = skeleton(cfg, found)
    model = describe(stage)
    load = load_of(cfg, found, stage.backbone.lm_head.weight.element_size())
    rows = compare(cfg, model, load)
    show(cfg, model, load, rows)
    print(verdict(cfg, model, load, rows))
    if cfg.limits:
        show_lengths(cfg, found)
