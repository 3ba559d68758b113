"""Prefill of a mid-size random Qwen2.5-VL: unpruned, pruned to 5%, and the vision tower's windows looped or batched.

python benchmarks/prefill.py [side of the image in pixels, default 672]
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from pairs import compare
from PIL import Image

from glimpseprune import pruners
from glimpseprune.backbones.qwen2_5_vl import Backbone, ImageProcessor
from glimpseprune.cost import account, steps_of
from glimpseprune.decoder import prefill
from glimpseprune.tiny.config import TinyConfig
from glimpseprune.tiny.model import build, image_processor
from glimpseprune.tiny.tokenizer import tokenizer
from glimpseprune.types import Needs
from glimpseprune.windows import NAME


@torch.inference_mode()
def main(side: int = 672) -> None:
    shape = TinyConfig(layers=16, hidden=512, intermediate=1408, heads=8, vision_layers=8, vision_hidden=256)
    shape.vision_intermediate, shape.vision_full, shape.vision_heads = 704, [3, 7], 8
    model = build(shape, 0).eval()
    backbone = Backbone(
        model, ImageProcessor(image_processor(), tokenizer(), None, chat_template=tokenizer().chat_template)
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    prompt = backbone.prepare(["number on the red tag?"], [[image]])
    options = {"prune_layer": 7, "probe_layers": [7], "vision_layers": [7, 5, 3, 1], "width": 128, "cond_width": 128}
    none = pruners.build("none", {}, backbone)
    glimpse = pruners.build("glimpse", options | {"max_keep": 0.05}, backbone)
    encoded = backbone.encode(prompt, glimpse.needs)
    visual = encoded.counts[0]
    text = encoded.mask.shape[1] - visual
    kept = max(1, int(0.05 * visual))
    trace = prefill(backbone, encoded, glimpse).trace
    counted = account(backbone.shapes, text, encoded.layouts[0], steps_of(trace, 0))
    compare(
        f"decoder prefill, {visual} visual tokens, {kept} after layer 8 of 16 (FLOPs {counted.decoder_ratio:.3f})",
        {
            "none": lambda: prefill(backbone, encoded, none),
            "none (A/A)": lambda: prefill(backbone, encoded, none),
            "glimpse": lambda: prefill(backbone, encoded, glimpse),
        },
    )

    def tower(name: str) -> object:
        backbone.tower.config._attn_implementation = name
        return backbone.see(prompt, Needs())

    compare(
        f"vision tower, {visual * 4} patches, windows of 64",
        {"loop": lambda: tower("sdpa"), "loop (A/A)": lambda: tower("sdpa"), "batched": lambda: tower(NAME)},
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
