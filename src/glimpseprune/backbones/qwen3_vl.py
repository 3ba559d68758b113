"""Qwen3-VL: Qwen2.5-VL's prompts, positions and merge units; a tower without windows, whose features come in deep.

Deepstack: the output of some blocks of the tower, each through a merger of its own, is added to the output of the
decoder's first layers in the columns of the visual tokens (``Encoded.added``). ``deepstack_visual_indexes`` are numbers
of blocks; the first of these features belongs to decoder layer 0, the second to layer 1 and so on. That rotary
frequencies of t, h and w are interleaved is the text model's own business. Left out as there: video; and the sizes with
experts (``qwen3_vl_moe``), whose layers :class:`glimpseprune.cost.Decoder` does not describe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import (
    PreTrainedConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from glimpseprune import cost
from glimpseprune.backbones import qwen2_5_vl
from glimpseprune.backbones._blocks import by_rows
from glimpseprune.backbones._lvlm import decoder_shape
from glimpseprune.host import upload

MODEL_TYPE = "qwen3_vl"

_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
_DECODER = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
PUBLISHED = {
    "qwen3-vl-4b": {
        "text_config": _DECODER | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                                   "num_attention_heads": 32, "tie_word_embeddings": True},
        "vision_config": _SMALL | {"out_hidden_size": 2560},
        "tie_word_embeddings": True,
    },
    "qwen3-vl-8b": {
        "text_config": _DECODER | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                                   "num_attention_heads": 32},
        "vision_config": _LARGE | {"out_hidden_size": 4096},
    },
    "qwen3-vl-32b": {
        "text_config": _DECODER | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                                   "num_attention_heads": 64},
        "vision_config": _LARGE | {"out_hidden_size": 5120},
    },
}  # fmt: skip
"""Sizes of published models: what is in the config.json of Qwen/Qwen3-VL-{4B,8B,32B}-Instruct, read from copies in
repositories of models derived from them. The 2B's was not seen whole, and is left out."""


class ImageProcessor(qwen2_5_vl.WithoutVideo, Qwen3VLProcessor):
    """transformers' processor without its video part."""


class Backbone(qwen2_5_vl.Backbone):
    model_class, processor_class = Qwen3VLForConditionalGeneration, ImageProcessor
    pixels = (64 * 32 * 32, 16384 * 32 * 32)

    @property
    def deep(self) -> Sequence[int]:
        return self.tower.deepstack_visual_indexes

    @classmethod
    def tiny(cls, attn: str = "sdpa", seed: int = 0) -> Backbone:
        """4 layers of width 32, 4 query and 2 key heads of width 16; tower of 4 blocks of width 24, three of which go
        into the decoder's first layers."""
        from glimpseprune.backbones import _tiny

        config = Qwen3VLConfig(
            text_config=_tiny.DECODER
            | {
                "num_key_value_heads": 2,
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 4,
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0, 1, 3],
            },
            **_tiny.QWEN_TOKENS,
            tie_word_embeddings=False,
        )
        config._attn_implementation = attn
        halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=4 * 32 * 32, max_pixels=48 * 32 * 32, **halves)
        processor = ImageProcessor(images, _tiny.tokenizer(), None, chat_template=_tiny.template())
        return cls(_tiny.randomise(Qwen3VLForConditionalGeneration(config), seed), processor)

    @staticmethod
    def describe(config: PreTrainedConfig) -> cost.Shapes:
        vision, decoder = config.vision_config, decoder_shape(config.text_config)
        tower = cost.Tower(
            layers=vision.depth,
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size,
        )
        merged = tower.merge**2 * tower.width
        merger = ((merged, merged), (merged, decoder.width))
        return cost.Shapes(decoder, tower, merger * (1 + len(vision.deepstack_visual_indexes)))

    def windows(self, sizes: Tensor) -> tuple[Tensor | None, list[int]]:
        return None, []

    def embedded(self, pictures: Mapping[str, Tensor], chunk: int) -> Tensor:
        tower = self.tower
        taps = get_vision_interpolation_indices_and_weights(
            pictures["image_grid_thw"],
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self.merge,
        )
        index, weight = (upload(x, self.device) for x in taps)  # [P, 4] neighbours in the learned grid

        hidden = super().embedded(pictures, chunk)

        def placed(rows: slice) -> Tensor:
            return hidden[rows] + (tower.pos_embed(index[rows]) * weight[rows, :, None]).sum(1).to(hidden.dtype)

        return by_rows(placed, len(index), chunk)
