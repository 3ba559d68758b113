"""Bytes per GPU of a training, from shapes: what stays, what is saved for the backward pass, caches, logits.

The arithmetic follows the SDPA backend and the largest moment of a step: every prompt of the batch is as long as the
longest, and is padded as soon as there are two. Not counted: what the allocator loses, NCCL, kernels' own workspaces.
Left out: activation checkpointing, CPU offload of anything but ZeRO-3, training of the vision tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from glimpseprune import cost, lookup, windows
from glimpseprune.config import UserError
from glimpseprune.options import LoraOptions, TrainConfig

BUCKET = 50_000_000
"""Numbers that ZeRO reduces or gathers at once: ``reduce_bucket_size``, ``allgather_bucket_size``, conf/deepspeed."""
LIVE = 1_000_000_000
"""Gathered parameters that ZeRO-3 holds on to: ``stage3_max_live_parameters``, conf/deepspeed."""


@dataclass(frozen=True)
class Load:
    """What one GPU is given: ``batch`` prompts of ``text`` + ``visual`` tokens, answers of ``answer`` tokens."""

    batch: int
    text: int
    visual: int
    answer: int
    itemsize: int
    """Bytes of a number inside the LVLM."""
    keep: float = 0.1
    """Share of the visual tokens that a rollout keeps (stage 2)."""

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
    gate: str | None = None,
    lora: LoraOptions | None = None,
    full: bool = False,
) -> float:
    """Bytes per column that one decoder layer saves when its input has a gradient.

    Frozen linear layers save nothing, so what is left are: float32 inputs of both norms; gate, its SiLU and up of the
    MLP; q, k, v (repeated to all heads) and output of attention. ``gate``: its estimator; gated attention
    (attention.py) repeats neither keys nor values, and ``value`` has these twice. ``lora``: float32 inputs of the
    adapted layers, and what is between A and B. ``full``: inputs of all linear layers and of the norms' weights.
    """
    width, heads, mlp = decoder.width, decoder.heads * decoder.head_width, decoder.mlp
    held = 2 * heads if gate is None else _keys(decoder, gate)
    total = 8 * width + (3 * mlp + 2 * heads + held) * itemsize
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


def _keys(decoder: cost.Decoder, gate: str) -> int:
    """Numbers of a column's keys and values in gated attention."""
    return (3 if gate == "value" else 2) * decoder.kv_heads * decoder.head_width


def mask_saved(itemsize: int, rows: int, queries: int, keys: int) -> float:
    """Bytes of a layer's attention mask: SDPA makes each boolean one a sum in the numbers' own precision."""
    return itemsize * rows * queries * keys


def cache_bytes(decoder: cost.Decoder, itemsize: int, rows: int, columns: float, layers: int) -> float:
    """Keys and values of ``rows`` x ``columns`` in ``layers`` decoder layers."""
    return 2 * decoder.kv_heads * decoder.head_width * itemsize * rows * columns * layers


def scratch_bytes(decoder: cost.Decoder, itemsize: int, columns: int) -> float:
    """What a decoder layer holds while it runs on ``columns`` of all rows, forward or backward, and then drops."""
    heads = decoder.heads * (decoder.head_width + 8)
    return columns * ((4 * decoder.mlp + 4 * heads) * itemsize + 12 * decoder.width)


def tower_bytes(tower: cost.Tower, itemsize: int, visual: int) -> float:
    """What the vision tower holds while it runs, without gradient, on all ``visual`` tokens of a batch: states, and
    what a layer makes of a chunk; or of half a chunk, with queries, keys and values of all (:mod:`.backbones._blocks`).
    Where ZeRO-3 splits it, all is one chunk."""
    patches = visual * tower.merge**2
    made = windows.even(patches, windows.CHUNK) * (4 * tower.mlp + 8 * tower.width)
    if patches > windows.CHUNK:
        made = max(made, 3 * tower.width * patches + made / 2)
    return (patches * tower.width + made) * itemsize


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


def glimpse_saved(decoder: cost.Decoder, load: Load, layers: int, probes: int, asks: bool = False) -> float:
    """A glimpse through ``layers`` layers. It is one column, but its keys and values join a copy of the cache, and the
    logits of ``probes`` layers are taken from float32 keys of all heads. One that ``asks`` with the question's tokens
    is as many columns, at most those of the text, which save what they are and their rows of attention."""
    looks = load.text if asks else 1
    columns = load.prompt + looks
    probed = 4 * decoder.heads * decoder.head_width * load.prompt * probes
    if asks:
        probed += looks * layers * layer_saved(decoder, load.itemsize) + rows_saved(decoder, looks, columns, probes)
    return cache_bytes(decoder, load.itemsize, load.batch, columns, layers) + load.batch * probed


def private_saved(decoder: cost.Decoder, load: Load, layers: int, answers: bool = False) -> float:
    """The whole prompt through ``layers`` decoder layers that train, of the last one queries and keys alone; or, where
    ``answers`` come out of it, all of it, with them behind the prompt. And rows of attention, at most of all text. In
    half precision weights are float32 all the same: they, and what linear layers share, are cast for each."""
    itemsize, columns = load.itemsize, load.prompt + (load.answer - 1 if answers else 0)
    width, heads, half = decoder.width, decoder.heads * decoder.head_width, load.itemsize < 4
    keys = decoder.kv_heads * decoder.head_width
    column = layer_saved(decoder, itemsize, full=True) + half * 3 * width * itemsize
    whole = columns * column + load.padded * mask_saved(itemsize, 1, columns, columns)
    last = whole if answers else columns * (8 * width + (width + heads + keys) * itemsize)
    casts = (
        half
        * itemsize
        * width
        * (layers * (heads + keys) + (layers - (not answers)) * (heads + keys + 3 * decoder.mlp))
    )
    rows = rows_saved(decoder, load.text, columns, layers)
    return load.batch * ((layers - 1) * whole + last + rows) + casts


def rows_saved(decoder: cost.Decoder, looks: int, columns: int, probes: int) -> float:
    """Rows of attention of so many positions, in float32: their log-softmax, and what the sum over positions keeps."""
    return 8 * decoder.heads * looks * columns * probes


def through_saved(decoder: cost.Decoder, load: Load, probes: int, asks: bool = False) -> float:
    """Glimpse and answer through all layers on the whole prompt's cache, for the answer loss (pruners/glimpse.py)."""
    itemsize, looks = load.itemsize, load.text if asks else 1
    queries = load.answer + looks
    columns = load.prompt + queries
    keys = 2 * decoder.heads * decoder.head_width * itemsize * columns
    row = queries * layer_saved(decoder, itemsize) + keys + mask_saved(itemsize, 1, queries, columns)
    probed = 4 * decoder.heads * decoder.head_width * columns * probes
    probed += rows_saved(decoder, looks, columns, probes) if asks else 0
    return load.batch * (decoder.layers * row + probed)


def vip_saved(vip: cost.Vip, shapes: cost.Shapes, tokens: int, itemsize: int = 4) -> float:
    """The predictor on ``tokens`` visual tokens. Per block: the tower's state; 15 times the width (norms, value, MLP);
    5 times the width of q and k, condition included: their input, q, k, v and the output."""
    wide = vip.width + vip.cond_width
    block = 15 * vip.width + 5 * wide + shapes.tower.width
    return tokens * itemsize * (vip.blocks * block + 2 * vip.width + vip.probes * shapes.decoder.heads)


def student_saved(
    decoder: cost.Decoder,
    load: Load,
    depth: int,
    lora: LoraOptions | None,
    full: bool,
    gate: str = "stc",
    prompt: float | None = None,
    checkpointing: bool = False,
) -> float:
    """Stage 1: the gated pass. In layers < ``depth`` the answer's tokens alone run, with a copy of the prompt's keys
    and values; from there on ``prompt`` columns of the prompt (default: all) do, too. With ``checkpointing`` layers
    hold their inputs, and one of them the rest."""
    itemsize, queries = load.itemsize, load.answer - 1
    columns = (load.prompt if prompt is None else prompt) + queries
    per_column = layer_saved(decoder, itemsize, gate=gate, lora=lora, full=full)
    keys = _keys(decoder, gate) * itemsize * (load.prompt + queries)
    below = queries * per_column + keys + mask_saved(itemsize, 1, queries, load.prompt + queries) if queries else 0
    masked = gate == "stc" or load.padded
    above = columns * per_column + masked * mask_saved(itemsize, 1, columns, columns)
    if checkpointing:
        ran = (depth * queries + (decoder.layers - depth) * columns) * decoder.width * itemsize
        return load.batch * (ran + max(below, above))
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
    steps: Sequence[tuple[int, bool]] = ()
    """Where the pruner decides: decoder layers that have run, and whether the cache is pruned, too."""
    asks: bool = False
    """Whether the glimpse is as many columns as the question has tokens."""
    private: int = 0
    """Layers of the method's own, through which the prompt goes where there is no glimpse."""

    def look_saved(self, load: Load, answers: bool = False) -> float:
        """Of what looks, for the backward pass; with an answer behind it."""
        decoder, probes = self.shapes.decoder, self.vip.probes
        if self.private:
            return private_saved(decoder, load, self.private, answers)
        if answers:
            return through_saved(decoder, load, probes, self.asks)
        return glimpse_saved(decoder, load, self.probed, probes, self.asks)

    def held_columns(self, load: Load) -> float:
        """Columns of a rollout's prompt that a decoder layer caches, mean over layers: ``load.keep`` of the visual
        tokens, wherever the pruner lets go of the others."""
        steps = [cost.Step(0, load.visual)]
        steps += [cost.Step(depth, round(load.keep * load.visual), prune_cache=pruned) for depth, pruned in self.steps]
        return load.text + cost.mean_visual_tokens(cost.cached(self.shapes.decoder.layers, steps))


def moments(cfg: TrainConfig, model: Model, load: Load) -> list[Peak]:
    """When a training step holds much; which moment is the worst depends on the recipe.

    Raises:
        UserError: a stage that is not one of training's two, or one that this pruner has nothing to train in; or the
            vision tower trains, whose activations are not known here.
    """
    if "vision" in cfg.train:
        raise UserError("train: the activations of a vision tower that trains are not planned for; leave vision out")
    find = {"glimpse": _stage1, "grpo": _stage2}
    return find[lookup.choose(cfg.stage, find, "the stages that can be planned")](cfg, model, load)


def _stage1(cfg: TrainConfig, model: Model, load: Load) -> list[Peak]:
    if model.vip is None:
        raise UserError(f"stage=glimpse trains the pruner 'glimpse' or 'early', not '{cfg.pruner.name}'")
    shapes, decoder, b, loss = model.shapes, model.shapes.decoder, load.itemsize, cfg.loss
    words = load.batch * load.answer * decoder.vocab
    waiting = prompt_bytes(shapes, load, model.depth, model.vip.blocks)
    saved, cache, logits = vip_saved(model.vip, shapes, load.batch * load.visual), waiting, 0
    whole = cache_bytes(decoder, b, load.batch, load.prompt + load.answer, decoder.layers)
    through = bool(loss.answer or loss.answer_kl)
    saved += model.look_saved(load, through)
    if through:
        cache += whole
        logits += words * (b + 16)  # as they are; in float32; log-softmax; gradients of both
    scratch = scratch_bytes(decoder, b, load.batch * (load.prompt + load.answer))
    found = [_prompting(model, load, waiting)]
    if not loss.kl:
        return [*found, Peak("loss", saved, cache, logits, scratch)]
    cache += whole
    logits += words * (2 * b + 20)  # teacher and student; log-softmax of both; what the divergence makes
    student = partial(student_saved, decoder, load, model.depth, *_trains(cfg), checkpointing=cfg.trainer.checkpointing)
    few = load.prompt
    if loss.dropped is not None and not loss.exact:
        few = min(few, load.text + loss.target * load.visual + loss.dropped)
    found.append(Peak("loss", saved + student("stc", few), cache, logits, scratch))
    if loss.value_until:
        found.append(Peak("loss of the first steps", saved + student("value"), cache, logits, scratch))
    return found


def _stage2(cfg: TrainConfig, model: Model, load: Load) -> list[Peak]:
    shapes, decoder, b, options = model.shapes, model.shapes.decoder, load.itemsize, cfg.grpo
    rollouts = load.batch * options.num_generations
    kept, held = load.text + round(load.keep * load.visual), model.held_columns(load)
    blocks = model.vip.blocks if model.vip else 0
    once = prompt_bytes(shapes, load, model.depth, blocks)
    waiting = once * cfg.trainer.accumulate
    found = [
        _prompting(model, load, waiting),
        Peak(
            "rollouts",
            0,
            waiting + cache_bytes(decoder, b, rollouts, held + load.answer, decoder.layers + 1),
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
    if model.vip and options.masks == "sampled" and {"glimpse", "private", "vip"} & set(cfg.train):
        saved = vip_saved(model.vip, shapes, load.batch * load.visual)
        saved += model.look_saved(load)
        found.append(Peak("masks' loss", saved, waiting, 0, 0))
    if model.first is not None:
        rows = min(options.micro_batch, rollouts)
        prompts = min(load.batch, -(-rows // options.num_generations))
        lora, full = _trains(cfg)
        saved = policy_saved(decoder, load, model.depth, model.first, rows, prompts, kept, lora=lora, full=full)
        cache = waiting + cache_bytes(decoder, b, rows, held + load.answer, decoder.layers)
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
