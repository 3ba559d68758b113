"""LLaVA-1.5: CLIP tower of fixed resolution, every image the same grid, 1-D positions.

Tower states are those of the patches, without CLS, and are numbered as in ``hidden_states``: layer 1 is the output of
the first block (checked against HVision-NKU/GlimpsePrune@091a3d5; Qwen2.5-VL's first is 0). Left out:
``vision_feature_select_strategy="full"``, which would make CLS a visual token without a place in the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from glimpseprune.backbones._lvlm import LVLM, destination, require_attention, tapped
from glimpseprune.config import UserError
from glimpseprune.types import Grid


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava"


class Backbone(LVLM):
    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        config = model.config.vision_config
        self.side: int = config.image_size // config.patch_size
        if model.config.vision_feature_select_strategy != "default":
            raise UserError("only vision_feature_select_strategy=default (patches without CLS) is supported")

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
        if min_pixels is not None or max_pixels is not None:
            raise UserError("LLaVA-1.5 has one resolution: leave min_pixels and max_pixels unset")
        model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation=attn, device_map=destination(device)
        )
        try:
            processor = LlavaProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"no processor in '{path}': {str(error).splitlines()[0]}") from error
        return cls(model.to(device).eval().requires_grad_(False), processor)

    def image_grids(self, prompt: Mapping[str, Tensor]) -> list[Grid]:
        return [(self.side, self.side)] * len(prompt["pixel_values"])

    def choose_images(self, prompt: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": prompt["pixel_values"][images]}

    def see(self, prompt: Mapping[str, Tensor], layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        def pool(state: Tensor) -> Tensor:
            return state[:, 1:].flatten(0, 1)  # [N, C]

        with tapped(self.tower.encoder.layers, layers, pool, first=1) as states:
            images = self.model.model.get_image_features(prompt["pixel_values"].to(self.model.dtype))
        return torch.cat(tuple(images.pooler_output)), states  # [N, D]

    def positions(self, prompt: Mapping[str, Tensor], mask: Tensor, visual: Tensor) -> Tensor:
        return (mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
