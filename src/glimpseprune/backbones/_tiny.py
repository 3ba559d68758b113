"""What tiny random models share, on which the contract tests run: a tokenizer, weights, and no download."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

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
"""Some more than there are tokens."""


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
        additional_special_tokens=[token for token in SPECIAL if token not in ("<|endoftext|>", "<|im_end|>")],
        padding_side="left",
        chat_template=template(),
    )


def template(image: str = "<|vision_start|><|image_pad|><|vision_end|>") -> str:
    """A chat template of the Qwen kind, in which an image is written as ``image``."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""A chat template of the LLaVA kind."""


def id_of(token: str) -> int:
    return SPECIAL.index(token)


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": id_of("<|im_end|>"),
    "pad_token_id": id_of("<|endoftext|>"),
    "tie_word_embeddings": False,
}
"""Sizes of a decoder, under the names of its config."""
CLIP = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": 14,
}
"""A tower of 5x5 patches."""
QWEN_TOKENS = {f"{name}_token_id": id_of(f"<|{name}|>") for name in ("vision_start", "vision_end")} | {
    f"{name}_token_id": id_of(f"<|{name}_pad|>") for name in ("image", "video")
}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights far from their initial values, norms and biases too, so that nothing holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim < 2 else 1.0 if "embed" in name else 1.2 * parameter[0].numel() ** -0.5
        parameter.data.copy_(scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval().requires_grad_(False)
