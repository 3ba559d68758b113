"""The tiny base's language: one token per word of the tags questions, one per digit."""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glimpseprune.data.sources import tags

PAD, END, VISION_START, IMAGE, VISION_END, VIDEO = SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{VISION_START}{IMAGE}{VISION_END}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}{% endfor %}"
)
"""The prompt is the image and the question; the answer follows at once and ends with ``<|im_end|>``."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the tags language; words carry their leading space, so decoding restores the text."""
    words = "number numbers colour on of the tag is left and yes no ?".split()
    spaced = [f" {w}" for w in (*words, *tags.NAMES, *map(str, range(10)))]
    vocabulary = [*SPECIAL, "<|unk|>", *spaced, *map(str, range(10)), "?"]
    engine = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<|unk|>"))
    engine.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d|\?| "), "isolated")
    engine.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    engine.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token=PAD,
        eos_token=END,
        unk_token="<|unk|>",
        padding_side="left",
        additional_special_tokens=[VISION_START, IMAGE, VISION_END, VIDEO],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


@cache
def token_ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)
