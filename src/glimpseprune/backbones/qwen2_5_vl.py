"""Qwen2.5-VL: dynamic resolution, windowed vision tower, M-RoPE.

Images only: without torchvision transformers has no video processor, and its ``AutoProcessor`` fails for want of one;
:class:`ImageProcessor` does without. The image processor is the PIL one everywhere, so that pixels do not depend on
what is installed (torchvision's differ by up to 0.015). A visual token is a merge unit of 2x2 patches; tower states
are averaged over it (checked against HVision-NKU/GlimpsePrune@091a3d5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from glimpseprune.backbones._lvlm import LVLM, destination, require_attention, tapped
from glimpseprune.config import UserError
from glimpseprune.types import Grid
from glimpseprune.vip import window_ids
from glimpseprune.windows import batch_windows


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "qwen2_5_vl"


class ImageProcessor(Qwen2_5_VLProcessor):
    """transformers' processor without its video part."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


class Backbone(LVLM):
    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.tower = model.model.visual
        batch_windows(self.tower)
        config = model.config.vision_config
        self.merge: int = config.spatial_merge_size
        self.window = config.window_size // config.patch_size // self.merge

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        attn: str = "sdpa",
        device: str | torch.device = "cpu",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Backbone:
        require_attention(attn, device)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attn, device_map=destination(device)
        )
        return cls(model.to(device).eval().requires_grad_(False), load_processor(path, min_pixels, max_pixels))

    def image_grids(self, prompt: Mapping[str, Tensor]) -> list[Grid]:
        return [(h // self.merge, w // self.merge) for _, h, w in prompt["image_grid_thw"].tolist()]

    def choose_images(self, prompt: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        patches = prompt["pixel_values"].split(prompt["image_grid_thw"].prod(1).tolist())
        return {
            "pixel_values": torch.cat([patches[image] for image in images.tolist()]),
            "image_grid_thw": prompt["image_grid_thw"][images],
        }

    def see(self, prompt: Mapping[str, Tensor], layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        # The tower keeps its patches window by window: undo that.
        windows = window_ids(self.image_grids(prompt), self.window)
        raster = windows.argsort(stable=True).argsort().to(self.device)  # [N]

        def pool(state: Tensor) -> Tensor:
            return state.unflatten(0, (-1, self.merge**2)).mean(1)[raster]  # [N, C]

        with tapped(self.tower.blocks, layers, pool) as states:
            images = self.model.model.get_image_features(prompt["pixel_values"], prompt["image_grid_thw"])
        return torch.cat(tuple(images.pooler_output)), states  # [N, D]

    def positions(self, prompt: Mapping[str, Tensor], mask: Tensor, visual: Tensor) -> Tensor:
        return self.model.model.get_rope_index(
            prompt["input_ids"], visual.int(), image_grid_thw=prompt["image_grid_thw"], attention_mask=mask
        )[0]  # [3, B, S]


def load_processor(path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageProcessor:
    """Tokenizer, image processor and chat template of a checkpoint folder.

    Raises:
        UserError: one of them is not there.
    """
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        images = Qwen2VLImageProcessorPil.from_pretrained(path, **{k: v for k, v in bounds.items() if v is not None})
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer and image processor in '{path}': {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer in '{path}' has no chat template (chat_template.jinja)")
    return ImageProcessor(images, tokenizer, None, chat_template=tokenizer.chat_template)
