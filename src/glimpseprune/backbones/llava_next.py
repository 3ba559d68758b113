"""LLaVA-NeXT (LLaVA-1.6): LLaVA-1.5's tower on tiles of the image; an image is two grids, one with newlines.

First the whole image, squashed to a square: ``side`` x ``side`` tokens. Then the image in the resolution, out of
``image_grid_pinpoints``, that suits it best: scaled to fit, padded, cut into tiles which the tower encodes one by one,
put together again, rid of the padding, each row ended by a learned newline. The newlines are visual tokens that may go
but are no cell of the picture; what is asked of the tower is 0 for them. Geometry and order were checked, number by
number, against ``pack_image_features`` of transformers 5.17 and 5.23. Left out as in LLaVA-1.5:
``vision_feature_select_strategy="full"`` and several feature layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedConfig,
)
from transformers.image_processing_utils import select_best_resolution

from glimpseprune.backbones import llava1_5
from glimpseprune.config import UserError
from glimpseprune.host import upload
from glimpseprune.types import Layout, Part

MODEL_TYPE = "llava_next"

_TOWER = llava1_5.PUBLISHED["llava-1.5-7b"]["vision_config"]
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # height, width
PUBLISHED = {
    "llava-v1.6-vicuna-7b": llava1_5.PUBLISHED["llava-1.5-7b"] | {"image_grid_pinpoints": _PINPOINTS},
    "llava-v1.6-vicuna-13b": llava1_5.PUBLISHED["llava-1.5-13b"] | {"image_grid_pinpoints": _PINPOINTS},
    "llava-v1.6-mistral-7b": {
        "text_config": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32064,
                        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                        "sliding_window": None},
        "vision_config": _TOWER,
        "image_grid_pinpoints": _PINPOINTS,
    },
}  # fmt: skip
"""Sizes of published models: what is in the config.json of llava-hf/llava-v1.6-{vicuna-7b,vicuna-13b,mistral-7b}-hf."""


class Backbone(llava1_5.Backbone):
    image_keys = ("pixel_values", "image_sizes")
    prompt_keys = ("input_ids", "attention_mask", *image_keys)
    model_class, processor_class = LlavaNextForConditionalGeneration, LlavaNextProcessor

    @classmethod
    def load_processor(cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
        processor = super().load_processor(path, min_pixels, max_pixels)
        # The PIL one everywhere, so that pixels do not depend on what is installed.
        processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(path)
        given = LlavaNextConfig.from_pretrained(path).image_grid_pinpoints
        if (own := processor.image_processor.image_grid_pinpoints) != given:
            raise UserError(f"image_grid_pinpoints in '{path}': {own} of the image processor, {given} of the model")
        return processor

    @classmethod
    def tiny(cls, attn: str = "sdpa", seed: int = 0) -> Backbone:
        """4 layers of width 32, 4 heads; CLIP tower of 4 blocks of width 24; tiles of 5x5 tokens, one to four of them
        beside the whole image."""
        from glimpseprune.backbones import _tiny

        side, pinpoints = _tiny.CLIP["image_size"], [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]]
        config = LlavaNextConfig(
            text_config=LlamaConfig(**_tiny.DECODER),
            vision_config=CLIPVisionConfig(**_tiny.CLIP),
            image_token_index=_tiny.id_of("<image>"),
            image_grid_pinpoints=pinpoints,
            tie_word_embeddings=False,
        )
        config._attn_implementation = attn
        processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
            ),
            _tiny.tokenizer(),
            patch_size=_tiny.CLIP["patch_size"],
            vision_feature_select_strategy="default",
            chat_template=_tiny.VICUNA,
            image_token="<image>",
            num_additional_image_tokens=1,
        )
        return cls(_tiny.randomise(LlavaNextForConditionalGeneration(config), seed), processor)

    @staticmethod
    def layout_of(
        config: PreTrainedConfig, size: tuple[int, int], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Layout:
        tiles, vision = tiling(config, size), config.vision_config
        side = vision.image_size // vision.patch_size
        parts = (Part(side, side),)
        if tiles.rows:  # nothing is left of a flat sliver; of an upright one, nothing but newlines
            box = shown(tiles, size, vision) if tiles.cols else Part.box
            parts += (Part(tiles.rows, tiles.cols, box, newline=True),)
        return Layout(parts, ((side, side),) * (1 + tiles.down * tiles.across))

    def image_layouts(self, pictures: Mapping[str, Tensor]) -> list[Layout]:
        sizes = pictures["image_sizes"].tolist()
        return [self.layout_of(self.model.config, (width, height)) for height, width in sizes]

    def pooling(self, pictures: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        vision, found, start = self.model.config.vision_config, [], 0
        side = vision.image_size // vision.patch_size
        for height, width in pictures["image_sizes"].tolist():
            tiles = tiling(self.model.config, (width, height))
            row = torch.arange(tiles.top, tiles.top + tiles.rows)[:, None]
            col = torch.arange(tiles.left, tiles.left + tiles.cols)
            tile = 1 + row // side * tiles.across + col // side
            patch = start + tile * side**2 + row % side * side + col % side  # [rows, cols]
            newline = torch.full((tiles.rows, 1), -1)
            found += [start + torch.arange(side**2), torch.cat([patch, newline], 1).flatten()]
            start += (1 + tiles.down * tiles.across) * side**2
        # [N] patch behind each visual token, over all tiles; -1: none
        places = upload(torch.cat(found), self.device)
        patches = super().pooling(pictures)

        def pool(state: Tensor) -> Tensor:
            picked = patches(state)[places.clamp(min=0)]  # [N, ...]
            return picked * (places >= 0).view(-1, *[1] * (picked.ndim - 1))

        return pool


class Tiling(NamedTuple):
    """How an image is cut into ``down`` x ``across`` tiles, and which cells of their common grid are left when rows or
    columns of padding are cut away: ``rows`` x ``cols`` from row ``top`` and column ``left`` on."""

    down: int
    across: int
    top: int
    left: int
    rows: int
    cols: int


def tiling(config: PreTrainedConfig, size: tuple[int, int]) -> Tiling:
    """Of an image of ``size`` = (width, height) pixels."""
    (width, height), vision = size, config.vision_config
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    down, across = (edge // vision.image_size for edge in best)
    side = vision.image_size // vision.patch_size
    rows, cols, top, left = down * side, across * side, 0, 0
    if width / height > cols / rows:
        top = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        left = (cols - int(round(width * (rows / height), 7))) // 2
    return Tiling(down, across, top, left, rows - 2 * top, cols - 2 * left)


def shown(tiles: Tiling, size: tuple[int, int], vision: PreTrainedConfig) -> tuple[float, float, float, float]:
    """What the cells that are left show, as fractions of the image. Up to half a cell of it may be missing, or of
    padding left, on every side."""
    edges = tiles.across * vision.image_size, tiles.down * vision.image_size
    scale = min(edge / length for edge, length in zip(edges, size))
    spans = []
    for edge, length, first, count in zip(edges, size, (tiles.left, tiles.top), (tiles.cols, tiles.rows)):
        scaled = min(ceil(length * scale), edge)
        padding = (edge - scaled) // 2
        spans.append([(cell * vision.patch_size - padding) / scaled for cell in (first, first + count)])
    (left, right), (top, bottom) = spans
    return left, top, right, bottom
