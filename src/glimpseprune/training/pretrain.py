"""Train a tiny Qwen2.5-VL from scratch on the tags data: the base model that ships with the project.

Everything that the model itself sees at inference is standard (its own tokenizer, the real image processor, the
unmodified Hugging Face modules); what is special is the supervision that makes two million parameters learn to read
and bind within minutes on a CPU, all of it discarded afterwards:

- every question about an image is packed behind one shared image prefix (block-diagonal mask, positions restarted),
  so that each question sees exactly what it would see alone;
- auxiliary heads: colour and digits of the tag under a visual token, read from the vision tower; row, column, colour
  and number of the tag at the input of decoder layer ``aux_layer``; columns of the two tags of a ``relation`` question;
- Muon for the matrices of the blocks, AdamW for the rest; a dense 224-px start, then few tags, then 8 to 12;
- **key dropout** over the last fifth: with some probability the question rows above the pruning layer, and the answer
  rows everywhere, see only the evidence boxes. This favours pruning and is declared wherever the base is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import lightning as L
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor

from glimpseprune.config import option
from glimpseprune.data.sources import tags
from glimpseprune.windows import batch_windows

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # pixels under one visual token
PAD, END, VISION_START, IMAGE, VISION_END, VIDEO = SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{VISION_START}{IMAGE}{VISION_END}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}{% endfor %}"
)
"""The prompt is the image and the question; the answer follows at once and ends with ``<|im_end|>``."""

MEAN, STD = 0.5, 0.25  # of pixels in 0..1, every channel


@dataclass
class Stage:
    size: int = option(336, "image side in pixels")
    min_tags: int = option(8, "fewest tags per image")
    max_tags: int = option(12, "most tags per image")
    batch: int = option(16, "images per step")
    steps: int = option(500, "optimiser steps")
    dense: bool = option(False, "vision tower only: crowded scenes, no questions")


@dataclass
class TinyConfig:
    """Shape of the tiny Qwen2.5-VL."""

    layers: int = option(6, "decoder layers")
    hidden: int = option(128, "decoder width")
    intermediate: int = option(384, "decoder SwiGLU width")
    heads: int = option(4, "decoder attention heads")
    kv_heads: int = option(2, "decoder key/value heads")
    rope_theta: float = option(100.0, "M-RoPE base; large bases make neighbouring columns indistinguishable")
    vision_layers: int = option(4, "vision-tower blocks")
    vision_hidden: int = option(96, "vision-tower width")
    vision_intermediate: int = option(256, "vision-tower SwiGLU width")
    vision_heads: int = option(4, "vision-tower heads")
    vision_full: list[int] = field(
        default_factory=lambda: [3], metadata={"help": "vision blocks with full attention; the others use windows"}
    )


@dataclass
class PretrainConfig:
    seed: int = option(0, "seed of weights and scenes")
    out: str = option("runs/pretrain", "run folder; the model is saved in <out>/model")
    model: TinyConfig = field(default_factory=TinyConfig)
    stages: list[Stage] = field(
        default_factory=lambda: [
            Stage(size=224, min_tags=10, max_tags=10, steps=130, dense=True),
            Stage(size=224, min_tags=4, max_tags=5, steps=300),
            Stage(size=336, min_tags=8, max_tags=12, batch=12, steps=500),
        ],
        metadata={"help": "curriculum, one entry per stage"},
    )
    lr: float = option(2e-3, "AdamW learning rate")
    muon_lr: float = option(0.02, "Muon learning rate")
    weight_decay: float = option(0.02, "of both optimisers")
    warmup: int = option(50, "steps of linear warm-up")
    decay: float = option(0.25, "last fraction of the steps, over which the rates fall linearly to zero")
    aux: float = option(1.0, "weight of the vision-tower heads")
    bind: float = option(0.3, "weight of the decoder heads")
    aux_layer: int = option(2, "decoder layer whose input the binding heads read")
    prune_layer: int = option(2, "key dropout hides visual keys from question rows in layers above this one")
    key_dropout: float = option(0.4, "probability per image")
    key_dropout_from: float = option(0.8, "fraction of the steps after which key dropout starts")
    ring: int = option(1, "most rings of visual tokens kept around an evidence box in key dropout")
    val_every: int = option(100, "steps between validations")
    val_images: int = option(64, "validation images")
    workers: int = option(1, "processes that draw scenes")
    precision: str = option("32-true", "Lightning precision; bf16-mixed where the CPU or GPU computes in bf16")
    accelerator: str = option("auto", "Lightning accelerator")
    resume: str | None = option(None, "checkpoint to continue from, e.g. <out>/checkpoints/last.ckpt")


# ------------------------------------------------------------------------------------------- tokenizer and processor


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the tags language; words carry their leading space, so decoding restores the text."""
    words = "number numbers colour on of the tag is left and yes no ?".split()
    spaced = [f" {w}" for w in (*words, *tags.NAMES, *map(str, range(10)))]
    vocabulary = [*SPECIAL, "<|unk|>", *spaced, *map(str, range(10)), "?"]
    engine = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<|unk|>"))
    engine.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d|\?| "), "isolated")
    engine.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    engine.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token=PAD,
        eos_token=END,
        unk_token="<|unk|>",
        padding_side="left",
        additional_special_tokens=[VISION_START, IMAGE, VISION_END, VIDEO],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def image_processor() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        min_pixels=4 * CELL**2,
        max_pixels=tags.MAX_SIZE**2,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )


def build(config: TinyConfig, seed: int) -> nn.Module:
    """A randomly initialised Qwen2.5-VL of the given shape."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tok = tokenizer()
    ids = {name: tok.convert_tokens_to_ids(name) for name in SPECIAL}
    half = config.hidden // config.heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    text = dict(
        vocab_size=-(-len(tok) // 16) * 16,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        initializer_range=0.04,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta, mrope_section=section),
        bos_token_id=None,
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )
    vision = dict(
        depth=config.vision_layers,
        hidden_size=config.vision_hidden,
        intermediate_size=config.vision_intermediate,
        num_heads=config.vision_heads,
        out_hidden_size=config.hidden,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        window_size=112,
        fullatt_block_indexes=list(config.vision_full),
        initializer_range=0.04,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids[IMAGE],
            video_token_id=ids[VIDEO],
            vision_start_token_id=ids[VISION_START],
            vision_end_token_id=ids[VISION_END],
            tie_word_embeddings=True,
        )
    )


def patchify(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B * patches, 3 * 2 * 14 * 14], as the image processor lays patches out (tested equal)."""
    count, height, width, _ = images.shape
    rows, cols = height // CELL, width // CELL
    pixels = (images.float() / 255 - MEAN) / STD
    blocks = pixels.view(count, rows, MERGE, PATCH, cols, MERGE, PATCH, 3)
    blocks = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).unsqueeze(6)  # [B, rows, cols, 2, 2, 3, 1, 14, 14]
    return blocks.expand(*blocks.shape[:6], 2, PATCH, PATCH).reshape(count * rows * cols * MERGE**2, -1)


# --------------------------------------------------------------------------------------------------- packed batches


POINTING = {
    "number": ((3, 0), (5, 0), (6, 0)),
    "pair": ((2, 0), (4, 1), (5, 0), (6, 0), (7, 1), (8, 1)),
    "colour": ((4, 0), (5, 0)),
    "relation": ((1, 0), (4, 1)),
}
"""Tokens of a question and its answer that must know where a tag is, and which of its tags: the words that name it, and
the tokens from which the answer about it is read."""


def layout(count: int) -> list[tuple[str, int]]:
    """How many questions of each kind are asked about an image with ``count`` tags."""
    return [("number", count), ("colour", count), ("relation", count // 2), ("pair", count // 2)]


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


def draw(rng: np.random.Generator, stage: Stage, split: str) -> dict[str, Tensor]:
    """One batch of scenes that share their number of tags, with packed questions and all auxiliary labels."""
    count = int(rng.integers(stage.min_tags, stage.max_tags + 1))
    scenes = [tags.scene(rng, stage.size, count, split, crowd=stage.dense) for _ in range(stage.batch)]
    grid = stage.size // CELL
    edge = np.arange(grid) * CELL
    digit_at = np.full((stage.batch, 2, grid * grid), 10)
    cover = np.zeros((stage.batch, count, grid * grid), np.float32)
    for i, view in enumerate(scenes):
        box = view.boxes
        wide = np.clip(np.minimum(box[:, 2:3], edge + CELL) - np.maximum(box[:, 0:1], edge), 0, None)
        high = np.clip(np.minimum(box[:, 3:4], edge + CELL) - np.maximum(box[:, 1:2], edge), 0, None)
        cover[i] = (high[:, :, None] * wide[:, None, :] / CELL**2).reshape(count, -1)
        for place in range(2):
            there = view.centres[:, place, 0] >= 0
            cell = view.centres[there, place] // CELL
            digit_at[i, place, cell[:, 1] * grid + cell[:, 0]] = view.digits[there, place]
    batch = {
        "images": torch.from_numpy(np.stack([view.image for view in scenes])),
        "cover": torch.from_numpy(cover),  # [B, n, V] fraction of each visual token that a tag covers
        "colours": torch.from_numpy(np.stack([view.colours for view in scenes])).long(),  # [B, n]
        "digits": torch.from_numpy(np.stack([view.digits for view in scenes])).long(),  # [B, n, 2]
        "digit_at": torch.from_numpy(digit_at),  # [B, 2, V] digit whose centre lies in the token, 10 = none
    }
    if stage.dense:
        return batch
    ids, labels, evidence, places = [], [], [], []
    for i, view in enumerate(scenes):
        asked = [q for kind, number in layout(count) for q in tags.ask(rng, view, kind, number)]
        text, answer = [_ids(q.text) for q in asked], [_ids(q.answer) for q in asked]
        ids.append([t for q, a in zip(text, answer) for t in (*q, *a)])
        end = tokenizer().eos_token_id
        labels.append([t for q, a in zip(text, answer) for t in (*[-100] * (len(q) - 1), *a, end)])
        evidence.append(np.stack([cover[i][list(q.tags)].max(0) > 0 for q in asked]))
        centre = (view.boxes[:, :2] + view.boxes[:, 2:]) // 2 // CELL
        places.append([centre[q.tags[which]] for q in asked for _, which in POINTING[q.kind]])
    start = np.cumsum([0, *(len(q) + len(a) for q, a in zip(text, answer))])
    words = [int(start[i]) + word for i, q in enumerate(asked) for word, _ in POINTING[q.kind]]
    return batch | {
        "ids": torch.tensor(ids),  # [B, P'] packed questions and answers
        "labels": torch.tensor(labels),  # [B, P'] next token, -100 where nothing is predicted
        "evidence": torch.from_numpy(np.stack(evidence)),  # [B, questions, V] bool
        "words": torch.tensor(words),  # [M] packed rows that must know where a tag is
        "places": torch.from_numpy(np.array(places)).long(),  # [B, M, 2] column and row of that tag
        "lengths": torch.tensor([[len(q), len(a)] for q, a in zip(text, answer)]),  # [questions, 2]
        "kinds": torch.tensor([tags.KINDS.index(q.kind) for q in asked]),  # [questions]
    }


class Curriculum(IterableDataset):
    """The batches of all stages in order; the batch of a step depends on (seed, step) alone, not on the workers."""

    def __init__(self, stages: list[Stage], seed: int, split: str, first: int = 0):
        self.plan = [stage for stage in stages for _ in range(stage.steps)]
        self.seed, self.split, self.first = seed, split, first

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + offset, len(self.plan), stride):
            rng = np.random.default_rng([self.seed, tags.splits.index(self.split), step])
            yield draw(rng, self.plan[step], self.split)


def dilate(mask: Tensor, rings: int) -> Tensor:
    """Grow a bool mask over a square token grid, [..., V], by a number of rings."""
    if not rings:
        return mask
    side = int(mask.shape[-1] ** 0.5)
    grown = F.max_pool2d(mask.float().reshape(-1, 1, side, side), 2 * rings + 1, 1, rings)
    return grown.reshape(mask.shape) > 0


def packed_masks(batch: dict[str, Tensor], rings: list[int | None], drop_all: bool = False) -> tuple[Tensor, Tensor]:
    """Attention masks of the packed sequence, bool [B, 1, S, S]: up to the pruning layer, and above it.

    ``rings[i]`` None leaves image i alone; a number hides the visual keys outside the evidence, dilated by so many
    rings, from question rows above the pruning layer and from answer rows in all layers; visual rows above it see
    their own tag. (The prefix is shared by all questions, so this is the closest approximation of real pruning.)
    """
    visual = batch["evidence"].shape[-1]
    prefix = visual + 2
    lengths = batch["lengths"].sum(1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # question of each packed row
    is_answer = torch.cat([torch.arange(int(q + a)) >= q for q, a in batch["lengths"]])
    size = prefix + len(owner)
    group = torch.cat([torch.full((prefix,), -1), owner])
    causal = torch.ones(size, size, dtype=torch.bool).tril() & ((group[None] < 0) | (group[None] == group[:, None]))
    if all(ring is None for ring in rings):
        return causal[None, None], causal[None, None]
    low = causal.repeat(len(rings), 1, 1)
    high = low.clone()
    eye = torch.eye(visual, dtype=torch.bool)
    answer_rows = prefix + is_answer.nonzero()[:, 0]
    for i, ring in enumerate(rings):
        if ring is None:
            continue
        seen = torch.zeros_like(batch["evidence"][i]) if drop_all else dilate(batch["evidence"][i], ring)
        high[i, prefix:, 1 : 1 + visual] &= seen[owner]
        low[i, answer_rows, 1 : 1 + visual] &= seen[owner[is_answer]]
        tag = dilate(batch["cover"][i] > 0, ring).float()
        high[i, 1 : 1 + visual, 1 : 1 + visual] &= (tag.T @ tag > 0) | eye
        high[i, 1 + visual, 1 : 1 + visual] = False
    return low[:, None], high[:, None]


# --------------------------------------------------------------------------------------------------------- training


class PretrainModule(L.LightningModule):
    """The tiny LVLM, its discarded heads, and the two optimisers."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.model = build(config.model, config.seed)
        batch_windows(self.model.model.visual)
        width, colours = config.model.hidden, len(tags.NAMES)
        most = max(stage.size for stage in config.stages) // CELL
        self.vision_heads = nn.ModuleDict(
            {"colour": nn.Linear(width, colours + 1), "tens": nn.Linear(width, 11), "units": nn.Linear(width, 11)}
        )
        sizes = {"column": most, "row": most, "colour": colours, "tens": 10, "units": 10}
        sizes |= {"named_column": most, "named_row": most}
        self.bind_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        tok = tokenizer()
        weight = torch.ones(self.model.config.text_config.vocab_size)
        weight[tok.eos_token_id] = 0.2
        weight[[_ids(name)[0] for name in tags.NAMES]] = 2.0
        weight[[_ids(name)[0] for name in ("yes", "no")]] = 3.0
        self.register_buffer("token_weight", weight, persistent=False)
        self.total = sum(stage.steps for stage in config.stages)
        self.step = 0
        self.curve: list[dict[str, float]] = []

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["pretrain"] = {"step": self.step, "curve": self.curve}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.step, self.curve = checkpoint["pretrain"]["step"], checkpoint["pretrain"]["curve"]

    def configure_optimizers(self):
        matrices, rest = [], []
        for name, parameter in self.named_parameters():
            inside = any(part in name for part in (".layers.", ".blocks.", ".merger."))
            (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
        c = self.config
        adamw = torch.optim.AdamW(rest, lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay)
        muon = torch.optim.Muon(matrices, lr=c.muon_lr, weight_decay=c.weight_decay, adjust_lr_fn="original")
        self._matrices, self._rest = matrices, rest
        return [adamw, muon]

    def _sequence(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, D] and M-RoPE positions [3, 1, S] of image prefix + packed questions."""
        tok, count = tokenizer(), len(batch["images"])
        start, image, end = (tok.convert_tokens_to_ids(name) for name in (VISION_START, IMAGE, VISION_END))
        visual = features.shape[1]
        prefix = torch.tensor([[start, *[image] * visual, end]], device=features.device)
        side = batch["images"].shape[1] // PATCH
        positions, _ = self.model.model.get_rope_index(
            prefix, (prefix == image).int(), image_grid_thw=torch.tensor([[1, side, side]], device=features.device)
        )
        restart = torch.cat([torch.arange(int(n)) for n in batch["lengths"].sum(1)]).to(features.device)
        packed = (positions.max() + 1 + restart).expand(3, 1, -1)
        ids = torch.cat([prefix.expand(count, -1), batch["ids"]], 1)
        embeds = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, :1], features.to(embeds.dtype), embeds[:, 1 + visual :]], 1)
        return embeds, torch.cat([positions, packed], -1)

    def _decode(self, hidden: Tensor, positions: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Final hidden states and the input of each decoder layer."""
        text = self.model.model.language_model
        rotary, seen = text.rotary_emb(hidden, positions), {}
        for index, layer in enumerate(text.layers):
            seen[index] = hidden
            mask = low if index <= self.config.prune_layer else high
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return text.norm(hidden), seen

    def _vision(self, batch: dict[str, Tensor]) -> Tensor:
        count, side = len(batch["images"]), batch["images"].shape[1] // PATCH
        grid = torch.tensor([[1, side, side]] * count, device=self.device)
        features = self.model.model.visual(patchify(batch["images"]), grid_thw=grid).pooler_output
        return features.view(count, -1, features.shape[-1])  # [B, V, D]

    def _vision_loss(self, batch: dict[str, Tensor], features: Tensor) -> Tensor:
        best, index = batch["cover"].max(1)
        on = best >= 0.12
        colour = torch.where(on, batch["colours"].gather(1, index), len(tags.NAMES))
        clear = (~((best > 0.02) & (best < 0.12))).float()
        loss = features.new_zeros((), dtype=torch.float32)
        labels = {"colour": colour, "tens": batch["digit_at"][:, 0], "units": batch["digit_at"][:, 1]}
        for name, label in labels.items():
            scores = self.vision_heads[name](features).float()
            each = F.cross_entropy(scores.flatten(0, 1), label.flatten(), reduction="none").view_as(clear)
            there = (label != scores.shape[-1] - 1).float() * clear
            absent = clear - there
            loss = loss + (each * there).sum() / there.sum().clamp(min=1)
            loss = loss + 0.5 * (each * absent).sum() / absent.sum().clamp(min=1)
        return loss

    def _bind_loss(self, batch: dict[str, Tensor], seen: dict[int, Tensor]) -> Tensor:
        visual, heads = batch["cover"].shape[-1], self.bind_heads
        grid = int(visual**0.5)
        tokens = seen[self.config.aux_layer][:, 1 : 1 + visual]
        place = torch.arange(visual, device=tokens.device).expand(len(tokens), -1)

        def error(name: str, hidden: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(heads[name](hidden).float().flatten(0, -2), label.flatten())

        loss = error("column", tokens, place % grid) + error("row", tokens, place // grid)
        best, index = batch["cover"].max(1)
        on = best >= 0.25
        loss = loss + error("colour", tokens[on], batch["colours"].gather(1, index)[on])
        for which, name in enumerate(("tens", "units")):
            loss = loss + error(name, tokens[on], batch["digits"][..., which].gather(1, index)[on])
        later = seen[min(self.config.aux_layer + 2, len(seen) - 1)][:, 2 + visual + batch["words"]]
        for which, name in enumerate(("named_column", "named_row")):
            loss = loss + 3 * error(name, later, batch["places"][..., which])
        return loss

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        config, step = self.config, self.step
        progress = step / self.total
        scale = min(1.0, (step + 1) / config.warmup, (1 - progress) / config.decay)
        optimizers = self.optimizers()
        for optimizer, rate in zip(optimizers, (config.lr, config.muon_lr)):
            optimizer.param_groups[0]["lr"] = rate * scale
        features = self._vision(batch)
        losses = {"vision": config.aux * self._vision_loss(batch, features)}
        if "ids" in batch:
            rings: list[int | None] = [None] * len(features)
            if progress >= config.key_dropout_from:
                rng = np.random.default_rng([config.seed, 7, step])
                rings = [
                    int(rng.integers(0, config.ring + 1)) if rng.random() < config.key_dropout else None for _ in rings
                ]
            embeds, positions = self._sequence(batch, features)
            hidden, seen = self._decode(embeds, positions, *(m.to(self.device) for m in packed_masks(batch, rings)))
            logits = self.model.lm_head(hidden[:, 2 + features.shape[1] :]).float().flatten(0, 1)
            labels = batch["labels"].flatten()
            each = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
            weight = self.token_weight[labels.clamp(min=0)] * (labels >= 0)
            losses["answer"] = (each * weight).sum() / weight.sum()
            losses["bind"] = config.bind * self._bind_loss(batch, seen)
        self.manual_backward(sum(losses.values()))
        norm = nn.utils.clip_grad_norm_([*self._matrices, *self._rest], 1.0)
        optimizers[0].step()
        optimizers[1].optimizer.step()  # not through Lightning, which would count the step twice
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, prog_bar=True)
        self.log_dict({"train/grad_norm": norm, "train/lr": config.lr * scale})

    def on_validation_epoch_start(self) -> None:
        self._hits: dict[str, list[Tensor]] = {}

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Exact match per kind: unpruned, with the evidence only (oracle), and with no visual token (zero)."""
        features = self._vision(batch)
        embeds, positions = self._sequence(batch, features)
        lengths = batch["lengths"].sum(1)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=self.device), lengths)
        arms = {"none": (None, False), "oracle": (0, False), "zero": (0, True)}
        for arm, (ring, drop_all) in arms.items():
            masks = packed_masks(batch, [ring] * len(features), drop_all)
            hidden, _ = self._decode(embeds, positions, *(m.to(self.device) for m in masks))
            guess = self.model.lm_head(hidden[:, 2 + features.shape[1] :]).argmax(-1)
            wrong = ((guess != batch["labels"]) & (batch["labels"] >= 0)).long()
            hit = torch.zeros(len(guess), len(lengths), dtype=torch.long, device=self.device)
            hit = hit.index_add(1, owner, wrong) == 0  # [B, questions]
            for code, kind in enumerate(tags.KINDS):
                self._hits.setdefault(f"{arm}/{kind}", []).append(hit[:, batch["kinds"] == code].flatten())

    def on_validation_epoch_end(self) -> None:
        scores = {f"val/{name}": torch.cat(hits).float().mean() for name, hits in self._hits.items()}
        for arm in ("none", "oracle", "zero"):
            every = torch.cat([torch.cat(hits) for name, hits in self._hits.items() if name.startswith(arm + "/")])
            scores[f"val/{arm}"] = every.float().mean()
        self.log_dict(scores)
        if not self.trainer.sanity_checking:
            self.curve.append({"step": self.step} | {name: round(float(value), 4) for name, value in scores.items()})

    def train_dataloader(self) -> DataLoader:
        return self._loader(Curriculum(self.config.stages, self.config.seed, "train", self.step))

    def val_dataloader(self) -> DataLoader:
        last = self.config.stages[-1]
        stage = Stage(last.size, last.min_tags, last.max_tags, 8, max(1, self.config.val_images // 8))
        return self._loader(Curriculum([stage], 1, "val"))

    def _loader(self, dataset: Curriculum) -> DataLoader:
        return DataLoader(dataset, batch_size=None, num_workers=self.config.workers, persistent_workers=False)

    def save(self, folder: str) -> None:
        """Write a normal Hugging Face folder: bfloat16 weights, configuration, tokenizer, image processor."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        image_processor().save_pretrained(folder)
