"""The tiny base itself: a Qwen2.5-VL of a given shape, its image processor, and that processor's patches in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from glimpseprune.data.sources import tags
from glimpseprune.tiny.config import TinyConfig
from glimpseprune.tiny.tokenizer import END, IMAGE, PAD, SPECIAL, VIDEO, VISION_END, VISION_START, tokenizer

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # pixels under one visual token
MEAN, STD = 0.5, 0.25  # of pixels in 0..1, every channel


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
