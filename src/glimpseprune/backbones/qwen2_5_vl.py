"""Qwen2.5-VL: dynamic resolution, windowed vision tower, M-RoPE.

Images only: without torchvision transformers has no video processor, and its ``AutoProcessor`` fails for want of one;
:class:`ImageProcessor` does without. The image processor is the PIL one everywhere, so that pixels do not depend on
what is installed (torchvision's differ by up to 0.015). A visual token is a merge unit of 2x2 patches; tower states
are averaged over it (checked against HVision-NKU/GlimpsePrune@091a3d5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from glimpseprune import cost
from glimpseprune.backbones._aligned import Aligned
from glimpseprune.backbones._blocks import by_rows, chunk_of, is_free, pieces, walk
from glimpseprune.backbones._lvlm import LVLM, decoder_shape
from glimpseprune.backbones._seen import Seen
from glimpseprune.backbones._tower import Watch, watched
from glimpseprune.config import UserError
from glimpseprune.host import upload
from glimpseprune.types import Layout, Needs
from glimpseprune.windows import batch_windows

MODEL_TYPE = "qwen2_5_vl"
_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
          "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
PUBLISHED = {
    "qwen2.5-vl-3b": {
        "text_config": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
                        "tie_word_embeddings": True},
        "vision_config": _TOWER | {"out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "qwen2.5-vl-7b": {
        "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        "vision_config": _TOWER | {"out_hidden_size": 3584},
    },
}  # fmt: skip
"""Sizes of published models: what is in the config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct."""


class WithoutVideo:
    """Lets a processor of transformers do without its video part."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


class ImageProcessor(WithoutVideo, Qwen2_5_VLProcessor):
    """transformers' processor without its video part."""


class Backbone(LVLM):
    image_keys = ("pixel_values", "image_grid_thw")
    prompt_keys = ("input_ids", "attention_mask", "mm_token_type_ids", *image_keys)
    model_class, processor_class = Qwen2_5_VLForConditionalGeneration, ImageProcessor
    deep: Sequence[int] = ()
    """Blocks whose output is merged on its own, for the decoder's first layers."""
    pixels = (4 * 28 * 28, 16384 * 28 * 28)
    """Least and most pixels of an image, in the published preprocessor_config.json."""

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = model.model.visual
        batch_windows(self.tower)
        shape = self.shapes.tower
        self.merge, self.window = shape.merge, shape.window or None
        self.vision_layers, self.feature_layer = range(shape.layers), shape.layers - 1

    @classmethod
    def load_processor(
        cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> WithoutVideo:
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
            images = Qwen2VLImageProcessorPil.from_pretrained(
                path, **{k: v for k, v in bounds.items() if v is not None}
            )
            # A tokenizer does not read chat_template.json, where older folders have it.
            template = tokenizer.chat_template or cls.processor_class.get_processor_dict(path)[0].get("chat_template")
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer and image processor in '{path}': {str(error).splitlines()[0]}") from error
        return cls.processor_class(images, tokenizer, None, chat_template=template)

    @classmethod
    def tiny(cls, attn: str = "sdpa", seed: int = 0) -> Backbone:
        """4 layers of width 32, 4 query and 2 key heads; tower of 3 blocks of width 24, windows of 4x4 tokens."""
        from glimpseprune.backbones import _tiny

        config = Qwen2_5_VLConfig(
            text_config=_tiny.DECODER
            | {
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 3,
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "window_size": 112,
            },
            **_tiny.QWEN_TOKENS,
            eos_token_id=_tiny.id_of("<|im_end|>"),
            pad_token_id=_tiny.id_of("<|endoftext|>"),
            tie_word_embeddings=False,
        )
        config._attn_implementation = attn
        images = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=48 * 28 * 28)
        processor = ImageProcessor(images, _tiny.tokenizer(), None, chat_template=_tiny.template())
        return cls(_tiny.randomise(Qwen2_5_VLForConditionalGeneration(config), seed), processor)

    @staticmethod
    def describe(config: PreTrainedConfig) -> cost.Shapes:
        vision, merge = config.vision_config, config.vision_config.spatial_merge_size
        tower = cost.Tower(
            layers=vision.depth,
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            gated=True,
            merge=merge,
            window=vision.window_size // merge // vision.patch_size,
            full=tuple(vision.fullatt_block_indexes),
        )
        decoder, merged = decoder_shape(config.text_config), merge**2 * tower.width
        return cost.Shapes(decoder, tower, ((merged, merged), (merged, decoder.width)))

    @classmethod
    def layout_of(
        cls,
        config: PreTrainedConfig,
        size: tuple[int, int],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Layout:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # which asks for Pillow

        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        height, width = smart_resize(size[1], size[0], side, min_pixels or cls.pixels[0], max_pixels or cls.pixels[1])
        return Layout.of((height // side, width // side))

    def image_layouts(self, pictures: Mapping[str, Tensor]) -> list[Layout]:
        return [Layout.of((h // self.merge, w // self.merge)) for _, h, w in pictures["image_grid_thw"].tolist()]

    def choose_images(self, pictures: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        patches = pictures["pixel_values"].split(pictures["image_grid_thw"].prod(1).tolist())
        return {
            "pixel_values": torch.cat([patches[image] for image in images.tolist()]),
            "image_grid_thw": pictures["image_grid_thw"][images],
        }

    def run_tower(self, pictures: Mapping[str, Tensor], needs: Needs) -> Seen:
        if self.aligns(pictures):
            with self.aligned.widened():
                return self.run_blocks(pictures, needs)
        if self.device.type == "cpu":
            self.aligned.forget()
        return self.run_blocks(pictures, needs)

    def aligns(self, pictures: Mapping[str, Tensor]) -> bool:
        """Whether the tower's MLPs run wider than they are: on a GPU, where their own width is a slow one."""
        free = is_free(self.tower, given=(pictures["pixel_values"],))
        return self.device.type == "cuda" and free and self.aligned.is_needed

    @cached_property
    def aligned(self) -> Aligned:
        mlps = [block.mlp for block in self.tower.blocks if hasattr(block.mlp, "gate_proj")]
        outs = {p: 0 for mlp in mlps for linear in (mlp.gate_proj, mlp.up_proj) for p in linear.parameters()}
        return Aligned(outs | {mlp.down_proj.weight: 1 for mlp in mlps})

    def run_blocks(self, pictures: Mapping[str, Tensor], needs: Needs) -> Seen:
        tower, unit, sizes = self.tower, self.merge**2, pictures["image_grid_thw"]
        chunk = chunk_of(tower, given=(pictures["pixel_values"],))
        order, windows = self.windows(sizes)
        # The tower keeps its patches window by window, each unit's together.
        inward = None if order is None else upload(order, self.device)
        outward = None if order is None else upload(order.argsort(), self.device)

        def by_unit(x: Tensor, index: Tensor | None) -> Tensor:
            return x if index is None else x.unflatten(0, (-1, unit))[index].flatten(0, 1)

        def pool(state: Tensor) -> Tensor:
            pooled = state.unflatten(0, (-1, unit)).mean(1)
            return pooled if outward is None else pooled[outward]  # [N, ...]

        def merge(merger: nn.Module, state: Tensor) -> Tensor:
            units = state.unflatten(0, (-1, unit))
            tokens = by_rows(lambda rows: merger(units[rows].flatten(0, 1)), len(units), max(1, chunk // unit))
            return tokens if outward is None else tokens[outward]  # [N, D]

        places = by_unit(get_vision_position_ids(sizes, self.merge), order)  # [P, 2]
        hidden = by_unit(self.embedded(pictures, chunk), inward)  # [P, C]
        rope = tower.rotary_pos_emb(hidden, upload(places, self.device))
        wanted = needs.keys, needs.attention
        watch = Watch(*({layer: tower.blocks[layer].attn for layer in layers} for layers in wanted))
        states: dict[int, Tensor] = {}
        added: dict[int, Tensor] = {}
        with watched(tower, watch) as watching:
            whole = pieces(get_vision_cu_seqlens(sizes).diff().tolist(), chunk, tower)
            parts = pieces(windows, chunk, tower)
            layers = [parts if self.is_windowed(layer) else whole for layer in self.vision_layers]
            for layer, state in walk(tower, hidden, rope, layers, chunk, **watching):
                if layer in needs.states:
                    states[layer] = pool(state)
                if layer in self.deep:
                    added[self.deep.index(layer)] = merge(tower.deepstack_merger_list[self.deep.index(layer)], state)
        collected = (watch.collected(what, lambda x: pool(x[0])) for what in ("keys", "attention"))
        layouts = self.image_layouts(pictures)
        return Seen(layouts, {"image_grid_thw": sizes}, merge(tower.merger, state), states, *collected, added)

    def is_windowed(self, layer: int) -> bool:
        return self.window is not None and layer not in self.shapes.tower.full

    def windows(self, sizes: Tensor) -> tuple[Tensor | None, list[int]]:
        """The units of all images in the order in which the tower keeps them, and the patches of each window."""
        config = self.tower.config
        order, ends = get_vision_window_index(sizes, self.merge, config.window_size, config.patch_size)
        return order, ends.diff().tolist()

    def embedded(self, pictures: Mapping[str, Tensor], chunk: int) -> Tensor:
        """What goes into the first block: patches in raster order, each unit's together, [P, C]."""
        pixels, tower = pictures["pixel_values"], self.tower

        def embed(rows: slice) -> Tensor:
            return tower.patch_embed(pixels[rows].to(self.device, tower.dtype, non_blocking=True))

        return by_rows(embed, len(pixels), chunk)

    def positions(self, prompt: Mapping[str, Tensor], mask: Tensor, places: Tensor) -> Tensor:
        return self.model.model.get_rope_index(
            prompt["input_ids"], places.int(), image_grid_thw=prompt["image_grid_thw"], attention_mask=mask
        )[0]  # [3, B, S]
