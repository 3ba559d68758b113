"""Tiny random models of both backbones, with working processors: what the tests run on. Nothing is downloaded."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from glimpseprune.backbones import LVLM, llava1_5, qwen2_5_vl

torch.set_num_threads(1)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
]
CHARACTERS = sorted(map(chr, range(32, 127))) + ["\n"]
VOCABULARY = 112
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL + CHARACTERS)}, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|endoftext|>", "<|im_end|>")],
        padding_side="left",
        chat_template=QWEN_TEMPLATE,
    )


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights far from their initial values, norms and biases too, so that nothing holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim < 2 else 1.0 if "embed" in name else 1.2 * parameter[0].numel() ** -0.5
        parameter.data.copy_(scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval().requires_grad_(False)


@cache
def tiny_qwen(attn: str = "sdpa", seed: int = 0) -> LVLM:
    """4 layers of width 32, 4 query and 2 key heads; vision tower of 3 blocks of width 24, windows of 4x4 tokens."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": SPECIAL.index("<|im_end|>"),
            "pad_token_id": SPECIAL.index("<|endoftext|>"),
            "tie_word_embeddings": False,
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
        image_token_id=SPECIAL.index("<|image_pad|>"),
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn
    images = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=48 * 28 * 28)
    processor = qwen2_5_vl.ImageProcessor(images, tokenizer(), None, chat_template=QWEN_TEMPLATE)
    return qwen2_5_vl.Backbone(randomise(Qwen2_5_VLForConditionalGeneration(config), seed), processor)


@cache
def tiny_llava(attn: str = "sdpa", seed: int = 0) -> LVLM:
    """4 layers of width 32, 4 heads; CLIP tower of 4 blocks of width 24; every image makes 5x5 tokens."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<|im_end|>"),
            pad_token_id=SPECIAL.index("<|endoftext|>"),
            tie_word_embeddings=False,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=70,
            patch_size=14,
        ),
        image_token_id=SPECIAL.index("<image>"),
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn
    size = {"height": 70, "width": 70}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 70}, crop_size=size),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return llava1_5.Backbone(randomise(LlavaForConditionalGeneration(config), seed), processor)


TINY = {"qwen2_5_vl": tiny_qwen, "llava1_5": tiny_llava}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PICTURES = [[picture(112, 168, 0)], [picture(140, 84, 1), picture(84, 84, 2)], [picture(196, 112, 3)]]
QUESTIONS = ["what is on the red tag?", "why?", "how many of them are there, and where?"]


def prompts(backbone: LVLM, count: int = 3) -> dict[str, torch.Tensor]:
    """A left-padded batch of different questions on images of different sizes, two images in the second row."""
    return backbone.prepare(QUESTIONS[:count], PICTURES[:count])


def prompt(backbone: LVLM, row: int = 0) -> dict[str, torch.Tensor]:
    """One row of :func:`prompts`, without padding."""
    return backbone.prepare(QUESTIONS[row : row + 1], PICTURES[row : row + 1])


@pytest.fixture(params=["eager", "sdpa"])
def attn(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(TINY))
def backbone(request: pytest.FixtureRequest, attn: str) -> LVLM:
    """Each backbone on each attention backend that runs on a CPU."""
    return TINY[request.param](attn)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint folder of a tiny Qwen2.5-VL, as ``from_pretrained`` wants it."""
    folder = tmp_path_factory.mktemp("tiny_qwen")
    backbone = tiny_qwen()
    backbone.model.save_pretrained(folder)
    backbone.processor.tokenizer.save_pretrained(folder)
    backbone.processor.image_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> list[str]:
    """Arguments of a training of stage 1 on a tiny base of its own and a few tags."""
    from glimpseprune import prepare
    from glimpseprune.tiny.config import PretrainConfig, TinyConfig
    from glimpseprune.tiny.module import PretrainModule

    folder = tmp_path_factory.mktemp("recipe")
    tiny = TinyConfig(layers=3, hidden=32, intermediate=32, vision_layers=4, vision_hidden=32)
    module = PretrainModule(PretrainConfig(model=tiny))
    module.save(str(folder / "base"))
    count = "{train: 48, val: 8, test: 8}"
    small = ["options.size=224", "options.min_tags=4", "options.max_tags=4"]
    prepare.main(["source=tags", f"out={folder / 'data'}", f"options.count={count}", *small])
    return [
        "conf/demo.yaml",
        f"backbone.path={folder / 'base'}",
        f"data.path={folder / 'data'}",
        "pruner.options.prune_layer=1",
        "pruner.options.probe_layers=[0,1]",
        "pruner.options.width=16",
        "pruner.options.cond_width=16",
        "data.batch_size=4",
        "data.val_samples=8",
        "data.workers=0",
        "trainer.log_every=1",
    ]
