"""What is measured: a random Qwen2.5-VL, unmodified and ours on the same weights, prompts, and what the machine can do.

Three sizes: ``7b`` (for a GPU), ``mid`` (for a CPU) and ``tiny`` (a dry run of all that a GPU would run). Weights are
random: no figure depends on what they say, since every pruner keeps the fraction that it is told to keep.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.clock import elapsed, free
from glimpseprune import cost, decoder, pruners
from glimpseprune.backbones import qwen2_5_vl
from glimpseprune.generate import generate
from glimpseprune.pruners import glimpse, none
from glimpseprune.types import Encoded, Grid, Prefill

HUGGING_FACE = "Hugging Face"
RAGGED = (0.031, 0.10, 0.061, 0.05, 0.087, 0.04, 0.075, 0.056)
"""Fractions of the visual tokens that the rows of a batch keep, in turn."""
MIB = 2**20
SECONDS = {True: 0.5, False: 2.0}
"""That each rate is measured for, on a GPU or not."""


@dataclass(frozen=True)
class Size:
    """A model and the prompts that it gets."""

    text: dict[str, Any]
    vision: dict[str, Any]
    sections: tuple[int, int, int]
    """Of M-RoPE, half a head wide in all."""
    depths: tuple[int, int]
    """K of the two prunings, 2/3 and 1/3 of the layers."""
    states: tuple[int, ...]
    """Tower layers that the predictor sees."""
    grid: Grid
    """Visual tokens of the single prompt."""
    trained: tuple[Grid, ...]
    """Of those that are trained on."""
    small: tuple[Grid, ...]
    """Of the rows of a batch, in turn."""
    predictor: dict[str, int] = field(default_factory=dict)
    before: int = 15
    after: int = 43
    """Text tokens before and behind the image."""
    keep: float = 203.5 / 5016


PUBLISHED = qwen2_5_vl.PUBLISHED["qwen2.5-vl-7b"]
SIZES = {
    "7b": Size(
        text=PUBLISHED["text_config"],
        vision=PUBLISHED["vision_config"],
        sections=(16, 24, 24),
        depths=(19, 9),
        states=(31, 23, 15, 7),
        grid=(66, 76),
        trained=((66, 76), (40, 50)),
        small=((32, 32), (28, 36), (30, 34), (31, 31), (26, 40), (36, 28), (33, 30), (29, 35)),
    ),
    "mid": Size(
        text={"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 8192},
        vision={"depth": 8, "hidden_size": 256, "intermediate_size": 684, "num_heads": 8, "patch_size": 14,
                "window_size": 112, "fullatt_block_indexes": [3, 7], "out_hidden_size": 512},
        sections=(8, 12, 12),
        depths=(11, 5),
        states=(7, 5, 3, 1),
        grid=(24, 24),
        trained=((24, 24), (14, 16)),
        small=((10, 12), (9, 14), (12, 12), (8, 10), (11, 11), (14, 9), (13, 10), (7, 16)),
        predictor={"width": 128, "cond_width": 128},
    ),
    "tiny": Size(
        text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512},
        vision={"depth": 4, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "patch_size": 14,
                "window_size": 112, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32},
        sections=(1, 1, 2),
        depths=(4, 2),
        states=(3, 2, 1, 0),
        grid=(9, 10),
        trained=((9, 10), (4, 6)),
        small=((3, 4), (4, 4), (2, 6), (5, 3), (4, 5), (3, 3), (6, 2), (4, 3)),
        predictor={"width": 16, "cond_width": 16, "num_heads": 2},
        before=4,
        after=8,
    ),
}  # fmt: skip


def thin(size: Size) -> Size:
    """As many layers and columns, and next to no width: what is counted of it is what the whole would count."""
    text = size.text | {"hidden_size": 56, "intermediate_size": 64, "num_attention_heads": 7, "num_key_value_heads": 1}
    vision = size.vision | {"hidden_size": 32, "intermediate_size": 60, "num_heads": 2, "out_hidden_size": 56}
    predictor = {"width": 16, "cond_width": 16, "num_heads": 2}
    return replace(size, text=text | {"vocab_size": 512}, vision=vision, sections=(1, 1, 2), predictor=predictor)


class Prompt(dict[str, Tensor]):
    """As a processor returns it, pixels on the device already; ``placed``: all of it, which Hugging Face's asks for."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__({**tensors, "pixel_values": tensors["pixel_values"].to(device)})
        self.placed = {name: x.to(device, copy=name != "pixel_values") for name, x in self.items()}


class Ragged(glimpse.Pruner):
    """Keeps another fraction of each row: what a batch is like in use."""

    def mask(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        kept = []
        for number, row in enumerate(logits.detach().split(list(counts))):
            best = row.topk(max(1, int(RAGGED[number % len(RAGGED)] * len(row)))).indices
            kept.append(torch.zeros_like(row, dtype=torch.bool).index_fill(0, best, True))
        return torch.cat(kept)


@dataclass(frozen=True)
class Side:
    """One way to answer: a pruner on our backbone, or, without one, Hugging Face's model as it is."""

    name: str
    world: World
    pruner: nn.Module | None = None
    replays: bool = True
    """What may be a captured CUDA graph on a GPU is one."""

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> tuple[Tensor, Any]:
        """From pixels to the logits of the last position; and what decoding goes on from."""
        if self.pruner is None:
            self.world.twin.model.rope_deltas = None
            out = self.world.twin(**prompt.placed, use_cache=True, logits_to_keep=1)
            return out.logits, out.past_key_values
        backbone = self.backbone
        encoded = decoder.see(backbone, self.pruner, prompt)
        state = decoder.prefill(backbone, encoded, self.pruner)
        return backbone.logits(state.hidden[:, -1:]), (state.cache, state.mask, state.positions)

    def generate(self, prompt: Prompt, tokens: int) -> Tensor:
        """So many new tokens, greedily; none of them ends an answer."""
        if self.pruner is None:
            self.world.twin.model.rope_deltas = None
            found = self.world.twin.generate(**prompt.placed, max_new_tokens=tokens, do_sample=False)
            return found[:, prompt["input_ids"].shape[1] :]
        return generate(self.backbone, self.pruner, prompt, max_new_tokens=tokens, do_sample=False).tokens

    def held(self, prompt: Prompt) -> list[Tensor | nn.Module]:
        """What is on the device before it runs."""
        if self.pruner is None:
            return [*prompt.placed.values(), self.world.twin]
        return [prompt["pixel_values"], self.world.model, self.pruner]

    @property
    def backbone(self) -> qwen2_5_vl.Backbone:
        """Ours, as this side wants it. One whose graphs could not be recorded is not asked for them again."""
        world = self.world
        world.recordable = world.recordable and not (world.replaying and not world.backbone.replays)
        world.replaying = world.backbone.replays = self.replays and world.recordable
        return world.backbone

    @torch.no_grad()
    def tower(self, prompt: Prompt) -> Tensor:
        """Pixels to visual tokens, with what the pruner wants of the tower."""
        if self.pruner is None:
            pixels, sizes = prompt.placed["pixel_values"], prompt.placed["image_grid_thw"]
            return torch.cat(tuple(self.world.twin.model.get_image_features(pixels, sizes).pooler_output))
        return self.backbone.see(prompt, self.pruner.needs).tokens


class World:
    """A model on a device, its sides and its prompts."""

    def __init__(self, size: str | Size, device: torch.device, dtype: torch.dtype) -> None:
        """``size``: one of ``SIZES`` by name, or another."""
        self.size_name = size if isinstance(size, str) else ""
        self.size: Size = SIZES[size] if isinstance(size, str) else size
        self.device, self.dtype = device, dtype
        self.model = build(self.size, device, dtype)
        self.twin = twin(self.model)
        self.backbone = qwen2_5_vl.Backbone(self.model)
        self.layers = self.backbone.num_layers
        self.recordable, self.replaying = True, False
        self.made: dict[type, list[Side]] = {}
        self.known: dict[str, Bounds] = {}
        self.none = self.place(pruners.build("none", none.Options(), self.backbone))

    def again(self) -> qwen2_5_vl.Backbone:
        """Another backbone on the same weights, for what puts adapters into its own."""
        return qwen2_5_vl.Backbone(twin(self.twin))

    def forget(self) -> None:
        """Let recorded graphs and their buffers go."""
        self.backbone.captured.clear()
        free()

    def place(self, pruner: nn.Module) -> nn.Module:
        return pruner.to(self.device).eval()

    def pruner(self, depth: int, kind: type[nn.Module] = glimpse.Pruner, **more: Any) -> nn.Module:
        """One with random weights that decides after ``depth`` layers and keeps what it is told to."""
        torch.manual_seed(depth)
        said = {"prune_layer": depth - 1, "probe_layers": (depth - 1,), "vision_layers": self.size.states}
        said |= {"threshold": 0.0, "max_keep": self.size.keep, **self.size.predictor, **more}
        with torch.device(self.device):
            return self.place(kind(self.backbone, glimpse.Options(**said)))

    def sides(self, kind: type[nn.Module] = glimpse.Pruner) -> list[Side]:
        """Hugging Face's, unpruned, and pruned at both depths."""
        if kind not in self.made:
            pruned = [Side(f"K = {depth}", self, self.pruner(depth, kind)) for depth in self.size.depths]
            self.made[kind] = [Side(HUGGING_FACE, self), Side("none", self, self.none), *pruned]
        return self.made[kind]

    @cached_property
    def prompt(self) -> Prompt:
        return self.prompts([self.size.grid])

    def batch(self, rows: int) -> Prompt:
        """Prompts of unequal lengths."""
        return self.prompts([self.size.small[row % len(self.size.small)] for row in range(rows)])

    def prompts(self, grids: Sequence[Grid]) -> Prompt:
        """One image of ``grids`` visual tokens each, between random words, left-padded: what a processor returns."""
        random, config, before = torch.Generator().manual_seed(0), self.model.config, self.size.before
        rows = []
        for number, (high, wide) in enumerate(grids):
            behind = self.size.after + number * 5 % 13 * (len(grids) > 1)
            words = torch.randint(5, config.vision_end_token_id, (before + behind,), generator=random)
            words[before - 1], words[before] = config.vision_start_token_id, config.vision_end_token_id
            image = torch.full((high * wide,), config.image_token_id)
            rows.append(torch.cat([words[:before], image, words[before:]]))
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), config.text_config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(rows):
            ids[row, longest - len(own) :], mask[row, longest - len(own) :] = own, 1
        patches = sum(4 * high * wide for high, wide in grids)
        prompt = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": torch.randn(patches, self.backbone.shapes.tower.patch, generator=random).to(self.dtype),
            "image_grid_thw": torch.tensor([[1, 2 * high, 2 * wide] for high, wide in grids]),
        }
        return Prompt(prompt, self.device)

    def questions(self, count: int) -> Prompt:
        """So many on one image; Hugging Face's takes it as often."""
        prompt = self.prompts([self.size.trained[-1]] * count)
        image = prompt["pixel_values"][: len(prompt["pixel_values"]) // count]
        once = {"pixel_values": image, "image_grid_thw": prompt["image_grid_thw"][:1]}
        asked = Prompt({**prompt, **once, "image_index": torch.zeros(count, dtype=torch.long)}, self.device)
        asked.placed = prompt.placed | {"pixel_values": image.repeat(count, 1)}
        return asked

    def rows_of(self, prompt: Prompt) -> list[Prompt]:
        """Each prompt of a batch alone, without padding."""
        alone = []
        for row in range(len(prompt["input_ids"])):
            own = self.backbone.choose(prompt, torch.tensor([row]))
            left = own["attention_mask"][0].bool()
            own = {name: x[:, left] if x.shape == own["attention_mask"].shape else x for name, x in own.items()}
            alone.append(Prompt(own, self.device))
        return alone

    # ------------------------------------------------------------------------------------------------------- bounds

    @cached_property
    def rates(self) -> Rates:
        return Rates.measured(self.device, self.dtype)

    @torch.no_grad()
    def ran(self, side: Side, prompt: Prompt) -> tuple[Encoded, Prefill]:
        """What a side did with a prompt, to be counted; Hugging Face's is what the unpruned one did."""
        pruner = side.pruner or self.none
        encoded = decoder.see(self.backbone, pruner, prompt)
        return encoded, decoder.prefill(self.backbone, encoded, pruner)

    def bounds(self, side: Side, prompt: Prompt) -> Bounds:
        if prompt is not self.prompt:
            pictures = len(prompt["image_grid_thw"]) if side.pruner else len(prompt.placed["image_grid_thw"])
            return Bounds.of(self, *self.ran(side, prompt), pictures)
        if side.name not in self.known:
            self.known[side.name] = Bounds.of(self, *self.ran(side, prompt))
        return self.known[side.name]


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do at best."""

    flops: float
    """Per second, of a matrix product in the model's dtype."""
    bytes: float
    """Per second, read and written by a copy."""

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Rates:
        side = 8192 if device.type == "cuda" else 1024
        shapes = [(side, side, side), (side, 3584, side)] if device.type == "cuda" else [(side,) * 3, (side, 512, side)]
        best = 0.0
        for rows, inner, cols in shapes:
            a, b = (
                torch.randn(rows, inner, device=device, dtype=dtype),
                torch.randn(inner, cols, device=device, dtype=dtype),
            )
            best = max(best, 2 * rows * inner * cols / _fastest(lambda a=a, b=b: a @ b, device))
        source = torch.ones((2**30 if device.type == "cuda" else 2**25), device=device, dtype=dtype)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        return cls(best, moved / _fastest(lambda: target.copy_(source), device))

    def ms(self, flops: float, size: float) -> float:
        """At least so long for so many FLOPs and bytes."""
        return max(flops / self.flops, size / self.bytes) * 1e3


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, the least of several."""
    run()
    ends = time.monotonic() + SECONDS[device.type == "cuda"]
    took = [elapsed(run, device)[0] for _ in range(3)]
    while time.monotonic() < ends:
        took.append(elapsed(run, device)[0])
    return max(min(took), 1e-6) / 1e3


@dataclass(frozen=True)
class Bounds:
    """Least milliseconds of a batch by part, read from what was done to it. Masked halves of attention are not counted,
    and weights are read once."""

    tower: float
    below: float
    glimpse: float
    vip: float
    above: float
    head: float
    token: float
    """Of one more token of every row."""
    cache: int
    """Bytes of K/V after prefill."""

    @property
    def decoder(self) -> float:
        return self.below + self.glimpse + self.vip + self.above + self.head

    @property
    def prefill(self) -> float:
        return self.tower + self.decoder

    def part(self, name: str) -> float | None:
        """By the name of a part of a prefill; None where none is known."""
        return {"encode": self.tower, "below K": self.below, "glimpse": self.glimpse, "vip": self.vip,
                "above K": self.above, "head": self.head}.get(name)  # fmt: skip

    def generate(self, tokens: int) -> float:
        return self.prefill + (tokens - 1) * self.token

    @classmethod
    def of(cls, world: World, encoded: Encoded, state: Prefill, pictures: int | None = None) -> Bounds:
        """``pictures``: that the tower sees, of one size where they are fewer than images."""
        shapes, rates, layers = world.backbone.shapes, world.rates, world.layers
        texts = (encoded.mask.sum(1) - encoded.visual.sum(1)).tolist()
        item = encoded.embeds.element_size()
        below = above = tower = decisions = vip = token = 0.0
        cache, images = 0, sum(map(len, encoded.layouts))
        for row, text in enumerate(texts):
            steps, layouts = cost.steps_of(state.trace, row), encoded.layouts[row]
            spans = cost.spans(layers, steps)
            flops = cost.prefill_flops(shapes, text, layouts, spans, causal=True)
            tower += flops.tower + flops.projector
            full = [span for span in spans[:1]] if len(spans) > 1 else []
            part = sum(n * cost.layer_flops(shapes.decoder, text + seen, causal=True) for n, seen in full)
            below, above = below + part, above + flops.decoder - part
            decisions += sum(step.flops for step in steps)
            held = [(n, text + left) for n, left in cost.cached(layers, steps)]
            token += cost.decode_flops(shapes, held)
            cache += cost.kv_bytes(shapes, held, item)
            if len(steps) > 1:
                vip += cost.vip_flops(
                    _vip(world), shapes, [rows * cols for layout in layouts for rows, cols in layout.grids]
                )
        depth = state.trace[1].stop.depth if len(state.trace) > 1 else 0
        weights = [_size(layer) for layer in world.backbone.text_model.layers]
        head = 2 * shapes.decoder.width * shapes.decoder.vocab * len(texts)
        return cls(
            tower=rates.ms(tower * (pictures or images) / images, _size(world.backbone.tower)),
            below=rates.ms(below, sum(weights[:depth])),
            glimpse=rates.ms(decisions - vip, sum(weights[:depth]) if depth else 0),
            vip=rates.ms(vip, 0),
            above=rates.ms(above, sum(weights[depth:])),
            head=rates.ms(head, _size(world.backbone.lm_head)),
            token=rates.ms(token, sum(weights) + _size(world.backbone.lm_head) + cache),
            cache=cache,
        )


def _vip(world: World) -> cost.Vip:
    options = glimpse.Options(**world.size.predictor)
    return cost.Vip(options.width, options.cond_width, len(world.size.states))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# ----------------------------------------------------------------------------------------------------------- the models


def build(
    size: Size, device: torch.device, dtype: torch.dtype, ids: Mapping[str, int | None] | None = None
) -> nn.Module:
    """A random Qwen2.5-VL, made where it stays, frozen. ``ids``: of its special tokens, where a tokenizer has others
    than the last ones of the vocabulary."""
    last = size.text["vocab_size"] - 1
    ids = ids or {
        "image": last,
        "video": last - 1,
        "vision_start": last - 2,
        "vision_end": last - 3,
        "pad": 0,
        "end": None,
    }
    special = {f"{name}_token_id": ids[name] for name in ("image", "video", "vision_start", "vision_end")}
    text = size.text | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(size.sections)},
        "bos_token_id": None,
        "eos_token_id": ids["end"],
        "pad_token_id": ids["pad"],
        "max_position_embeddings": 128000,
        "tie_word_embeddings": False,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=dict(size.vision), **special, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids["end"], ids["pad"]
    return model.eval().requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """Another model of Hugging Face's with the very weights of ``model``, of which ours may change what it likes: its
    config, its attention, a layer's weights for others."""
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    for own, other in zip(made.modules(), model.modules()):
        own._parameters.update(other._parameters)
        own._buffers.update(other._buffers)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()
