"""LLaVA-1.5: CLIP tower of fixed resolution, every image the same grid, 1-D positions.

Tower states are those of the patches, without CLS, and are numbered as in ``hidden_states``: layer 1 is the output of
the first block (checked against HVision-NKU/GlimpsePrune@091a3d5; Qwen2.5-VL's first is 0). Left out:
``vision_feature_select_strategy="full"``, which would make CLS a visual token without a place in the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from glimpseprune import cost
from glimpseprune.backbones._blocks import chunk_of
from glimpseprune.backbones._lvlm import LVLM, decoder_shape
from glimpseprune.backbones._seen import Seen
from glimpseprune.backbones._tower import Watch, tapped, watched
from glimpseprune.config import UserError
from glimpseprune.types import Layout, Needs

MODEL_TYPE = "llava"
_TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
          "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
PUBLISHED = {
    "llava-1.5-7b": {
        "text_config": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32064,
                        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        "vision_config": _TOWER,
    },
    "llava-1.5-13b": {
        "text_config": {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "vocab_size": 32064,
                        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
        "vision_config": _TOWER,
    },
}  # fmt: skip
"""Sizes of published models: what is in the config.json of llava-hf/llava-1.5-{7b,13b}-hf."""


class Backbone(LVLM):
    image_keys: tuple[str, ...] = ("pixel_values",)
    prompt_keys = ("input_ids", "attention_mask", *image_keys)
    model_class, processor_class = LlavaForConditionalGeneration, LlavaProcessor

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        config, tower = model.config, model.model.vision_tower
        if config.vision_config.model_type != "clip_vision_model":
            raise UserError(f"a vision tower of type {config.vision_config.model_type}: only CLIP is supported")
        if config.vision_feature_select_strategy != "default":
            raise UserError("only vision_feature_select_strategy=default (patches without CLS) is supported")
        if not isinstance(config.vision_feature_layer, int):
            raise UserError(f"vision_feature_layer={config.vision_feature_layer}: only one layer is supported")
        self.tower = getattr(tower, "vision_model", tower)
        layers = config.vision_config.num_hidden_layers
        self.vision_layers = range(1, layers + 1)
        self.feature_layer = range(layers + 1)[config.vision_feature_layer]

    @classmethod
    def load_processor(cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
        if min_pixels is not None or max_pixels is not None:
            raise UserError("LLaVA's resolutions are fixed: leave min_pixels and max_pixels unset")
        try:
            processor = cls.processor_class.from_pretrained(path)
            config = cls.model_class.config_class.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"no processor in '{path}': {str(error).splitlines()[0]}") from error
        # Older folders say nothing of these, or null.
        processor.patch_size, processor.num_additional_image_tokens = config.vision_config.patch_size, 1
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        return processor

    @classmethod
    def tiny(cls, attn: str = "sdpa", seed: int = 0) -> Backbone:
        """4 layers of width 32, 4 heads; CLIP tower of 4 blocks of width 24; every image makes 5x5 tokens."""
        from glimpseprune.backbones import _tiny

        config = LlavaConfig(
            text_config=LlamaConfig(**_tiny.DECODER),
            vision_config=CLIPVisionConfig(**_tiny.CLIP),
            image_token_id=_tiny.id_of("<image>"),
            tie_word_embeddings=False,
        )
        config._attn_implementation = attn
        processor = LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70}),
            _tiny.tokenizer(),
            patch_size=14,
            vision_feature_select_strategy="default",
            chat_template=_tiny.VICUNA,
            image_token="<image>",
            num_additional_image_tokens=1,
        )
        return cls(_tiny.randomise(LlavaForConditionalGeneration(config), seed), processor)

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @staticmethod
    def describe(config: PreTrainedConfig) -> cost.Shapes:
        vision, decoder = config.vision_config, decoder_shape(config.text_config)
        tower = cost.Tower(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            patch=vision.num_channels * vision.patch_size**2,
            extra=1,
        )
        return cost.Shapes(decoder, tower, ((tower.width, decoder.width), (decoder.width, decoder.width)))

    @staticmethod
    def layout_of(
        config: PreTrainedConfig, size: tuple[int, int], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Layout:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return Layout.of((side, side))

    def image_layouts(self, pictures: Mapping[str, Tensor]) -> list[Layout]:
        return [self.layout_of(self.model.config, (1, 1))] * len(pictures["pixel_values"])

    def choose_images(self, pictures: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        return {name: pictures[name][images] for name in self.image_keys}

    def pooling(self, pictures: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """From what the tower has of all its tokens [tiles, 1 + patches, ...] to visual tokens [N, ...]."""
        return lambda state: state[:, 1:].flatten(0, 1)

    def run_tower(self, pictures: Mapping[str, Tensor], needs: Needs) -> Seen:
        chunk = chunk_of(self.tower, self.projector, given=(pictures["pixel_values"],))
        groups: list[list[int]] = [[]]
        size = 0
        for number, layout in enumerate(self.image_layouts(pictures)):
            own = sum(rows * cols + 1 for rows, cols in layout.encoded)
            if size + own > chunk and groups[-1]:
                groups.append([])
                size = 0
            groups[-1].append(number)
            size += own
        if len(groups) == 1:
            return self.run_at_once(pictures, needs)
        parts = (self.choose_images(pictures, torch.tensor(group)) for group in groups)
        return Seen.join([self.run_at_once(part, needs) for part in parts])

    def run_at_once(self, pictures: Mapping[str, Tensor], needs: Needs) -> Seen:
        layers, pool = self.tower.encoder.layers, self.pooling(pictures)
        given = {name: pictures[name] for name in self.image_keys}
        given["pixel_values"] = given["pixel_values"].to(self.device, self.model.dtype, non_blocking=True)
        modules = [{layer: layers[layer - 1].self_attn for layer in wanted} for wanted in (needs.keys, needs.attention)]
        watch = Watch(*modules, from_class_token=True)
        with tapped(layers, needs.states, pool, first=1) as states, watched(self.tower, watch) as watching:
            images = self.model.model.get_image_features(**given, **watching)
        collected = (watch.collected(what, pool) for what in ("keys", "attention"))
        sizes = {name: pictures[name] for name in self.image_keys[1:]}
        return Seen(self.image_layouts(pictures), sizes, torch.cat(tuple(images.pooler_output)), states, *collected)

    def positions(self, prompt: Mapping[str, Tensor], mask: Tensor, places: Tensor) -> Tensor:
        return (mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
