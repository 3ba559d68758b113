"""Will it fit: ``python -m src.plan conf/stage1.yaml conf/backbones/qwen2_5_vl_7b.yaml gpu_memory=80 gpus=8``.

Memory per GPU of a training under each strategy, before there are weights, data or a GPU. Parameters are counted on
the model itself, built without storage from its config.json: the very module that would train says what is frozen, what
trains and in which precision. Everything else is arithmetic on shapes: what is saved for the backward pass, the caches,
the answer's logits. Takes all keys of src.train and a few of its own.

The arithmetic follows the SDPA backend and the largest moment of a step: every prompt of the batch is as long as the
longest, and is padded as soon as there are two. Not counted: what the allocator loses, NCCL, kernels' own workspaces;
``MARGIN`` and ``RESERVED`` stand for them. Left out: activation checkpointing, CPU offload of anything but ZeRO-3,
times. Bytes throughout; GiB are 2**30 bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimpseprune import config, cost, lookup
from glimpseprune.config import UserError, option
from glimpseprune.train import inherited
from glimpseprune.training.options import BackboneOptions, LoraOptions, TrainConfig

if TYPE_CHECKING:
    from glimpseprune.training._stage import StageModule

GIB = 2**30
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
"""From the least communication to the most."""
MARGIN = 0.08
"""Share of the GPU that is left free, for fragmentation."""
RESERVED = GIB
"""CUDA context, NCCL and cuBLAS."""
BUCKET = 50_000_000
"""Numbers that ZeRO reduces or gathers at once: ``reduce_bucket_size``, ``allgather_bucket_size``, conf/deepspeed."""
LIVE = 1_000_000_000
"""Gathered parameters that ZeRO-3 holds on to: ``stage3_max_live_parameters``, conf/deepspeed."""
PIXELS = (4 * 28 * 28, 16384 * 28 * 28)
"""Least and most pixels of an image, in the preprocessor_config.json of Qwen2.5-VL."""
TIED = ("qwen2.5-vl-3b",)
"""Models of ``cost.SHAPES`` whose lm_head is their embedding."""


@dataclass
class PlanConfig(TrainConfig):
    gpu_memory: float = option(80.0, "memory of a GPU in GiB")
    gpus: int | None = option(None, "GPUs in all (default: trainer.nodes x trainer.devices; `auto` counts as 1)")
    image: str = option("1344x1344", "width x height of a prompt's image in pixels")
    text: int = option(96, "text tokens of a prompt, chat template included")
    answer: int | None = option(None, "tokens of an answer (default: 32; stage grpo: grpo.max_completion_length)")
    keep: float = option(0.1, "share of the visual tokens that a rollout keeps (stage grpo)")


@dataclass(frozen=True)
class Load:
    """What one GPU is given: ``batch`` prompts of ``text`` + ``visual`` tokens, answers of ``answer`` tokens."""

    batch: int
    text: int
    visual: int
    answer: int
    itemsize: int
    """Bytes of a number inside the LVLM."""

    @property
    def prompt(self) -> int:
        """Columns of a prompt."""
        return self.text + self.visual

    @property
    def padded(self) -> bool:
        """Whether attention needs a mask, which is saved in the numbers' own precision, once per layer and row."""
        return self.batch > 1


@dataclass(frozen=True)
class Held:
    """Bytes per GPU for as long as a training lasts; ``host``: bytes in the memory of the CPU for each GPU."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Peak:
    """Bytes per GPU at one moment of a step."""

    moment: str
    saved: float
    """For the backward pass: the activations."""
    cache: float
    """Prompts that wait, and keys and values."""
    logits: float
    """Everything as wide as the vocabulary."""
    scratch: float
    """Of the layer that is being run."""

    @property
    def total(self) -> float:
        return self.saved + self.cache + self.logits + self.scratch


Counts = Mapping[tuple[bool, int], int]
"""(does it train, bytes of a number) -> how many numbers."""


# --------------------------------------------------------------------------------------- what stays: weights and AdamW


def held(strategy: str, counts: Counts, gpus: int, precision: str = "32-true") -> Held:
    """Weights, gradients, AdamW and communication buffers of one of ``STRATEGIES`` on ``gpus`` processes.

    Under DDP everything has the precision its weights have (Lightning's mixed precision casts none of them), and more
    than one process reduces gradients in buckets that are a second copy of them. DeepSpeed casts all weights to the
    half precision it is told, keeps float32 masters and moments of what trains (12 bytes), and splits between the
    processes: these (ZeRO-1), gradients (2), all weights (3), of which at most ``LIVE`` are gathered at a time.
    Source: Rajbhandari et al. 2020, table 1 and figure 1; conf/deepspeed.
    """
    half = precision.startswith(("16", "bf16"))
    cast = half and (precision.endswith("-true") or strategy != "ddp")
    counts = _cast(counts, 2) if cast else counts
    weights = sum(number * size for (_, size), number in counts.items())
    gradients = sum(number * size for (trains, size), number in counts.items() if trains)
    trained = sum(number for (trains, _), number in counts.items() if trains)
    if strategy == "ddp":
        return Held(weights, gradients, 2 * gradients, gradients if gpus > 1 else 0)
    optimizer = 12 * trained / gpus
    buffers = 2 * min(gradients, BUCKET * max((size for (trains, size) in counts if trains), default=0))
    if strategy == "zero1":
        return Held(weights, gradients, optimizer, buffers)
    if strategy == "zero2":
        return Held(weights, gradients / gpus, optimizer, buffers)
    number = sum(counts.values())
    buffers += weights * min(1.0, (LIVE + BUCKET) / number)
    if strategy == "zero3":
        return Held(weights / gpus, gradients / gpus, optimizer, buffers)
    return Held(0, 0, 0, buffers, host=(weights + gradients) / gpus + optimizer)


def _cast(counts: Counts, size: int) -> Counts:
    result: Counter[tuple[bool, int]] = Counter()
    for (trains, _), number in counts.items():
        result[trains, size] += number
    return result


# ----------------------------------------------------------------------------------------- what a step needs: by layers


def layer_saved(
    decoder: cost.Decoder,
    itemsize: int,
    *,
    stc: bool = False,
    lora: LoraOptions | None = None,
    full: bool = False,
) -> float:
    """Bytes per column that one decoder layer saves when its input has a gradient.

    Frozen linear layers save nothing, so what is left are: float32 inputs of both norms; gate, its SiLU and up of the
    MLP; q, k, v (repeated to all heads) and output of attention. ``stc``: attention is gated (attention.py), which
    adds a second one with keys and values eight channels wider. ``lora``: float32 inputs of the adapted layers, and
    what is between A and B. ``full``: inputs of all linear layers and of the norms' weights.
    """
    width, heads, mlp = decoder.width, decoder.heads * decoder.head_width, decoder.mlp
    total = 8 * width + (3 * mlp + 4 * heads) * itemsize
    if stc:
        total += 5 * (heads + 8 * decoder.heads) * itemsize
    if full:
        total += (4 * width + mlp) * itemsize
    if lora is not None:
        inputs = ("q_proj k_proj v_proj", width), ("o_proj", heads), ("gate_proj up_proj", width), ("down_proj", mlp)
        for names, size in inputs:
            adapted = len(set(names.split()) & set(lora.modules))
            # In float32 nothing is cast, and layers with the same input share it.
            copies = adapted if itemsize < 4 or lora.dropout else min(adapted, 1)
            total += copies * size * (5 if lora.dropout else 4) + adapted * 4 * lora.rank
    return total


def mask_saved(itemsize: int, rows: int, queries: int, keys: int) -> float:
    """Bytes of a layer's attention mask: SDPA makes each boolean one a sum in the numbers' own precision."""
    return itemsize * rows * queries * keys


def cache_bytes(decoder: cost.Decoder, itemsize: int, rows: int, columns: int, layers: int) -> float:
    """Keys and values of ``rows`` x ``columns`` in ``layers`` decoder layers."""
    return 2 * decoder.kv_heads * decoder.head_width * itemsize * rows * columns * layers


def scratch_bytes(decoder: cost.Decoder, itemsize: int, columns: int) -> float:
    """What a decoder layer holds while it runs on ``columns`` of all rows, forward or backward, and then drops."""
    heads = decoder.heads * (decoder.head_width + 8)
    return columns * ((4 * decoder.mlp + 4 * heads) * itemsize + 12 * decoder.width)


def tower_bytes(tower: cost.Tower, itemsize: int, visual: int) -> float:
    """What a layer of the vision tower holds while it runs, without gradient, on all ``visual`` tokens of a batch."""
    return visual * tower.merge**2 * (4 * tower.mlp + 8 * tower.width) * itemsize


def prompt_bytes(shapes: cost.Shapes, load: Load, depth: int, vision_layers: int) -> float:
    """A batch of prompts that has run through ``depth`` layers and waits: pixels (float32), tower states, embeddings,
    hidden states, cache."""
    decoder, tower = shapes.decoder, shapes.tower
    pixels = 4 * tower.merge**2 * tower.patch
    states = vision_layers * tower.width * load.itemsize
    columns = load.batch * load.prompt
    return (
        load.batch * load.visual * (pixels + states)
        + columns * 2 * decoder.width * load.itemsize
        + cache_bytes(decoder, load.itemsize, load.batch, load.prompt, depth)
    )


def glimpse_saved(decoder: cost.Decoder, load: Load, layers: int, probes: int) -> float:
    """A glimpse through ``layers`` layers. It is one column, but its keys and values join a copy of the cache, and the
    logits of ``probes`` layers are taken from float32 keys of all heads."""
    probed = 4 * decoder.heads * decoder.head_width * load.batch * load.prompt * probes
    return cache_bytes(decoder, load.itemsize, load.batch, load.prompt + 1, layers) + probed


def through_saved(decoder: cost.Decoder, load: Load, probes: int) -> float:
    """Glimpse and answer through all layers on the whole prompt's cache, for the answer loss (pruners/glimpse.py)."""
    itemsize, queries = load.itemsize, load.answer + 1
    columns = load.prompt + queries
    keys = 2 * decoder.heads * decoder.head_width * itemsize * columns
    row = queries * layer_saved(decoder, itemsize) + keys + mask_saved(itemsize, 1, queries, columns)
    probed = 4 * decoder.heads * decoder.head_width * columns * probes
    return load.batch * (decoder.layers * row + probed)


def vip_saved(vip: cost.Vip, shapes: cost.Shapes, tokens: int, itemsize: int = 4) -> float:
    """The predictor on ``tokens`` visual tokens. Per block: the tower's state; 15 times the width (norms, value, MLP);
    8 times the width of q and k, condition included: their input, q, k and v before and after padding, the output."""
    wide = vip.width + vip.cond_width
    block = 15 * vip.width + 8 * wide + shapes.tower.width
    return tokens * itemsize * (vip.blocks * block + 2 * vip.width + vip.probes * shapes.decoder.heads)


def student_saved(decoder: cost.Decoder, load: Load, depth: int, lora: LoraOptions | None, full: bool) -> float:
    """Stage 1: the gated pass. In layers < ``depth`` the answer's tokens alone run, but gated attention copies the
    prompt's keys and values, twice, to all heads and saves them; from there on all columns run."""
    itemsize, queries = load.itemsize, load.answer - 1
    columns = load.prompt + queries
    per_column = layer_saved(decoder, itemsize, stc=True, lora=lora, full=full)
    keys = decoder.heads * (5 * decoder.head_width + 24) * itemsize * columns
    below = queries * per_column + keys + 2 * mask_saved(itemsize, 1, queries, columns) if queries else 0
    masks = 2 if load.padded else 1
    above = columns * per_column + masks * mask_saved(itemsize, 1, columns, columns)
    return load.batch * (depth * below + (decoder.layers - depth) * above)


def policy_saved(
    decoder: cost.Decoder, load: Load, depth: int, first: int, rows: int, prompts: int, kept: int, **trains: Any
) -> float:
    """Stage 2: the policy loss of a micro-batch of ``rows`` rollouts, ``kept`` columns of their prompts each, when
    layers >= ``first`` train. If that is below ``depth``, their ``prompts`` run again, whole and with gradient."""
    itemsize, queries = load.itemsize, load.answer - 1
    columns = kept + queries
    per_column = layer_saved(decoder, itemsize, **trains)
    above = columns * per_column + mask_saved(itemsize, 1, columns, columns)
    total = rows * (decoder.layers - max(first, depth)) * above
    if first < depth:
        keys = 2 * decoder.heads * decoder.head_width * itemsize * columns
        tokens = queries * per_column + keys + mask_saved(itemsize, 1, queries, columns)
        whole = load.prompt * per_column + load.padded * mask_saved(itemsize, 1, load.prompt, load.prompt)
        total += (depth - first) * (rows * tokens + prompts * whole)
    return total


# ---------------------------------------------------------------------------------------------- the moments of a step


@dataclass(frozen=True)
class Model:
    """What the moments need to know of the model that trains, beside its shapes."""

    shapes: cost.Shapes
    depth: int
    """K, decoder layers that see every token."""
    first: int | None
    """The lowest decoder layer that trains."""
    vip: cost.Vip | None
    """None for a pruner without a gate."""
    probed: int
    """Decoder layers that the glimpse runs through."""
    counts: Counts


def moments(cfg: PlanConfig, model: Model, load: Load) -> list[Peak]:
    """When a training step holds much; which moment is the worst depends on the recipe.

    Raises:
        UserError: a stage that is not one of training's two, or one that this pruner has nothing to train in.
    """
    find = {"glimpse": _stage1, "grpo": _stage2}
    return find[lookup.choose(cfg.stage, find, "the stages that can be planned")](cfg, model, load)


def _stage1(cfg: PlanConfig, model: Model, load: Load) -> list[Peak]:
    if model.vip is None:
        raise UserError(f"stage=glimpse trains the pruner 'glimpse', not '{cfg.pruner.name}'")
    shapes, decoder, b, loss = model.shapes, model.shapes.decoder, load.itemsize, cfg.loss
    words = load.batch * load.answer * decoder.vocab
    waiting = prompt_bytes(shapes, load, model.depth, model.vip.blocks)
    saved, cache, logits = vip_saved(model.vip, shapes, load.batch * load.visual), waiting, 0
    whole = cache_bytes(decoder, b, load.batch, load.prompt + load.answer, decoder.layers)
    if loss.answer:
        saved += through_saved(decoder, load, model.vip.probes)
        cache += whole
        logits += words * (b + 16)  # as they are; in float32; log-softmax; gradients of both
    else:
        saved += glimpse_saved(decoder, load, model.probed, model.vip.probes)
    if loss.kl:
        saved += student_saved(decoder, load, model.depth, *_trains(cfg))
        cache += whole
        logits += words * (2 * b + 20)  # teacher and student; log-softmax of both; what the divergence makes
    columns = load.batch * (load.prompt + load.answer)
    return [
        _prompting(model, load, waiting),
        Peak("loss", saved, cache, logits, scratch_bytes(decoder, b, columns)),
    ]


def _stage2(cfg: PlanConfig, model: Model, load: Load) -> list[Peak]:
    shapes, decoder, b, options = model.shapes, model.shapes.decoder, load.itemsize, cfg.grpo
    rollouts = load.batch * options.num_generations
    kept = load.text + round(cfg.keep * load.visual)
    blocks = model.vip.blocks if model.vip else 0
    once = prompt_bytes(shapes, load, model.depth, blocks)
    waiting = once * cfg.trainer.accumulate
    found = [
        _prompting(model, load, waiting),
        Peak(
            "rollouts",
            0,
            waiting + cache_bytes(decoder, b, rollouts, kept + load.answer, decoder.layers + 1),
            rollouts * decoder.vocab * (b + 12),  # as they are; in float32; log-softmax; its exponential
            scratch_bytes(decoder, b, rollouts * kept),
        ),
        Peak(
            "validation",
            0,
            once + cache_bytes(decoder, b, load.batch, load.prompt + load.answer, decoder.layers),
            load.batch * decoder.vocab * b,
            scratch_bytes(decoder, b, load.batch * load.prompt),
        ),
    ]
    if model.vip and options.keep == "sampled" and {"glimpse", "vip"} & set(cfg.train):
        saved = vip_saved(model.vip, shapes, load.batch * load.visual)
        saved += glimpse_saved(decoder, load, model.probed, model.vip.probes)
        found.append(Peak("masks' loss", saved, waiting, 0, 0))
    if model.first is not None:
        rows = min(options.micro_batch, rollouts)
        prompts = min(load.batch, -(-rows // options.num_generations))
        lora, full = _trains(cfg)
        saved = policy_saved(decoder, load, model.depth, model.first, rows, prompts, kept, lora=lora, full=full)
        cache = waiting + cache_bytes(decoder, b, rows, kept + load.answer, decoder.layers)
        if model.first < model.depth:
            cache += cache_bytes(decoder, b, prompts, load.prompt, model.depth)
        # As they are; in float32; divided; log-softmax; its exponential; their product.
        logits = rows * load.answer * decoder.vocab * (b + 20) * (2 if options.beta else 1)
        columns = max(rows * (kept + load.answer), prompts * load.prompt * (model.first < model.depth))
        found.append(Peak("tokens' loss", saved, cache, logits, scratch_bytes(decoder, b, columns)))
    return found


def _prompting(model: Model, load: Load, waiting: float) -> Peak:
    visual, columns = load.batch * load.visual, load.batch * load.prompt
    scratch = tower_bytes(model.shapes.tower, load.itemsize, visual)
    scratch = max(scratch, scratch_bytes(model.shapes.decoder, load.itemsize, columns))
    return Peak("prompts", 0, waiting, 0, scratch)


def _trains(cfg: TrainConfig) -> tuple[LoraOptions | None, bool]:
    return cfg.lora if "lora" in cfg.train else None, "decoder" in cfg.train


# ---------------------------------------------------------------------------------------------- models without weights


def architecture(path: str) -> Any:
    """The Hugging Face config of a backbone: of a folder, of a download, or, where there is neither, of the published
    model whose name ``path`` contains.

    Raises:
        UserError: none of them.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if (folder / "config.json").is_file() or not folder.exists():
        try:
            return AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            if folder.exists():
                raise UserError(f"backbone.path={path}: {str(error).splitlines()[0]}") from None
    for name, shapes in cost.SHAPES.items():
        if name in folder.name.lower():
            return published(name, shapes)
    raise UserError(
        f"backbone.path={path}: no folder with config.json, not downloaded (`hf download {path} config.json`), and "
        f"none of {', '.join(cost.SHAPES)}"
    )


def published(name: str, shapes: cost.Shapes) -> Any:
    """The config of a published model ``name`` as far as sizes go."""
    from transformers import AutoConfig

    decoder, tower = shapes.decoder, shapes.tower
    text = {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab,
        "tie_word_embeddings": name in TIED,
    }
    vision = {"hidden_size": tower.width, "intermediate_size": tower.mlp, "patch_size": 14}
    if tower.merge > 1:
        kind = "qwen2_5_vl"
        vision |= {"depth": tower.layers, "num_heads": 16, "out_hidden_size": decoder.width}
        vision |= {"window_size": 14 * tower.merge * tower.window, "fullatt_block_indexes": list(tower.full)}
    else:
        kind = "llava"
        text["model_type"] = "llama"
        vision |= {"model_type": "clip_vision_model", "num_hidden_layers": tower.layers, "num_attention_heads": 16}
        vision |= {"image_size": 336}
    tied = name in TIED
    found = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    found.dtype = "bfloat16"
    return found


def skeleton(cfg: TrainConfig, architecture: Any) -> StageModule:
    """The module that would train, on the meta device: everything of it but numbers.

    Raises:
        UserError: a backbone that is not known, or options that do not fit it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from glimpseprune import lora, pruners
    from glimpseprune.training._stage import StageModule

    known = [lookup.find("glimpseprune.backbones", name) for name in lookup.names("glimpseprune.backbones")]
    kind = next((module for module in known if module.matches({"model_type": architecture.model_type})), None)
    if kind is None:
        raise UserError(f"backbone.path={cfg.backbone.path}: no backbone knows a '{architecture.model_type}' model")
    name = cfg.backbone.dtype
    dtype = (architecture.dtype or torch.float32) if name == "auto" else getattr(torch, name, None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"backbone.dtype={name}: give auto, float32, bfloat16 or float16")
    options = {key: value for key, value in cfg.pruner.options.items() if key != "init_token"}  # there is no tokenizer
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
        backbone = kind.Backbone(model)
        pruner = pruners.build(cfg.pruner.name, options, backbone)
        if cfg.lora is not None:
            lora.inject(backbone, cfg.lora, pruner.layers[0] if pruner.layers else 0)
        return StageModule(cfg, backbone, pruner)


def describe(stage: StageModule) -> Model:
    """A stage's module as numbers."""
    pruner, counts = stage.pruner, Counter()
    for parameter in stage.parameters():
        counts[parameter.requires_grad, parameter.element_size()] += parameter.numel()
    layers = enumerate(stage.backbone.text_model.layers)
    trained = [index for index, layer in layers if any(p.requires_grad for p in layer.parameters())]
    probed = max(getattr(pruner, "probe_layers", ()), default=-1) + 1
    shapes = cost.Shapes.from_config(stage.backbone.model.config)
    return Model(shapes, stage.depth, min(trained, default=None), cost.Vip.of(pruner), probed, dict(counts))


def visual_tokens(architecture: Any, options: BackboneOptions, image: str) -> int:
    """Visual tokens of an ``image`` of "width x height" pixels, resized as the backbone's processor does.

    Raises:
        UserError: not a size.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vision = architecture.vision_config
    try:
        width, height = map(int, image.lower().split("x"))
        if not hasattr(vision, "spatial_merge_size"):
            return (vision.image_size // vision.patch_size) ** 2
        side = vision.patch_size * vision.spatial_merge_size
        least, most = pixel_bounds(options)
        height, width = smart_resize(height, width, side, least, most)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"image={image}: give width x height in pixels, such as 1344x1344 ({error})") from None
    return (height // side) * (width // side)


def pixel_bounds(options: BackboneOptions) -> tuple[int, int]:
    """Least and most pixels of an image: of the options, of the checkpoint's processor, of the published one."""
    file = Path(options.path) / "preprocessor_config.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    size = saved.get("size") or {}
    least = options.min_pixels or saved.get("min_pixels") or size.get("shortest_edge") or PIXELS[0]
    most = options.max_pixels or saved.get("max_pixels") or size.get("longest_edge") or PIXELS[1]
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
    return cfg.trainer.nodes * (int(devices) if devices.isdigit() else 1) if cfg.gpus is None else cfg.gpus


def load_of(cfg: PlanConfig, architecture: Any, itemsize: int) -> Load:
    """What a step of ``cfg`` gives to one GPU, when the LVLM's weights have ``itemsize`` bytes per number."""
    answer = cfg.answer or (cfg.grpo.max_completion_length if cfg.stage == "grpo" else 32)
    half = cfg.trainer.precision.startswith(("16", "bf16"))
    visual = visual_tokens(architecture, cfg.backbone, cfg.image)
    return Load(cfg.data.batch_size, cfg.text, visual, answer, 2 if half else itemsize)


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
    best = next((row for row in rows if row.fits), None)
    if best is None:
        least = min(rows, key=lambda row: row.total)
        lower = smaller(cfg, model, load) or "backbone.max_pixels, or take more or larger GPUs"
        return f"does not fit: {least.strategy} needs least, {_gib(least.total)} GiB; lower {lower}"
    line = f"fits: trainer.strategy={best.strategy}, {_gib(best.total)} of {cfg.gpu_memory:g} GiB per GPU"
    if best.held.host:
        per_node = number_of_gpus(cfg) / cfg.trainer.nodes
        line += f", {_gib(best.held.host * per_node)} GiB of CPU memory per node"
    asked = next((row for row in rows if row.strategy == cfg.trainer.strategy), best)
    if not asked.fits:
        line += f"; trainer.strategy={asked.strategy}, as configured, does not"
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


def _gib(number: float) -> str:
    return f"{number / GIB:.1f}"


def _under(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan need not be told."""
    taken = inherited(given)
    return {**taken, "out": "-", "data": {"path": "-"} | taken.get("data", {})}


@config.entry(PlanConfig, _under)
def main(cfg: PlanConfig) -> None:
    for key in ("gpu_memory", "text"):
        if getattr(cfg, key) <= 0:
            raise UserError(f"{key}={getattr(cfg, key)}: it must be above 0")
    if not 0 <= cfg.keep <= 1:
        raise UserError(f"keep={cfg.keep}: give a fraction from 0 to 1")
    if number_of_gpus(cfg) < 1 or cfg.data.batch_size < 1:
        raise UserError("gpus (trainer.nodes, trainer.devices) and data.batch_size must be at least 1")
    for key in ("num_generations", "micro_batch", "max_completion_length"):
        if getattr(cfg.grpo, key) < 1:
            raise UserError(f"grpo.{key}={getattr(cfg.grpo, key)}: it must be at least 1")
    found = architecture(cfg.backbone.path)
    stage = skeleton(cfg, found)
    model = describe(stage)
    load = load_of(cfg, found, stage.backbone.lm_head.weight.element_size())
    rows = compare(cfg, model, load)
    show(cfg, model, load, rows)
    print(verdict(cfg, model, load, rows))
