"""What lmms-eval asks of a model, in the terms of this package: its arguments, one turn of a chat, how to decode.

Nothing of lmms-eval is imported. Left out, and refused by name: conversations of several turns, prompts without an
image, video and audio. A pruner decides once, behind the whole prompt, about the tokens of its images, which the
backbones put first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from glimpseprune import config, lookup, notation
from glimpseprune.config import UserError, option
from glimpseprune.options import PIXELS, Attention, Dtype


@dataclass
class Arguments:
    """``--model_args``, beside the options of the pruning method."""

    ckpt: str | None = option(None, "run folder, published folder or hub id")
    pruner: str | None = option(None, "another pruning method than the checkpoint's; without a checkpoint: none")
    backbone: str | None = option(
        None, "another folder or hub id than the checkpoint names; enough without a checkpoint"
    )
    dtype: Dtype | None = option(None, "of its weights; auto: as stored")
    attention: Attention | None = option(None, "attention backend")
    min_pixels: int | None = option(None, "least pixels per image after resizing", least=1, most=PIXELS)
    max_pixels: int | None = option(None, "most pixels per image after resizing", least=1, most=PIXELS)
    system: str | None = option(None, "system prompt where the task has none (default: the chat template's)")
    images_first: bool = option(False, "images that a task puts between texts are moved before them, not refused")
    max_new_tokens: int = option(128, "tokens per answer where the task does not say", least=1, most=32768)
    batch_size: int = option(1, "prompts per batch and process; lmms-eval's --batch_size", least=1, most=65536)
    device: str = option("auto", "auto, cpu, cuda", form=(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu or cuda"))


NAMES = tuple(item.name for item in fields(Arguments))


def arguments(given: Mapping[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    """What lmms-eval has made of ``--model_args``, and what of it is for the pruning method.

    Raises:
        UserError: a value that one of the first cannot have, or nothing that says which model.
    """
    values = {name: _read(name, value) for name, value in given.items() if name != "max_batch_size"}  # never ours
    own = {name: value for name, value in values.items() if name in NAMES}
    if isinstance(own.get("batch_size"), str):
        raise UserError(f"batch_size={own['batch_size']}: give a number, for none is searched here")
    made = config.merge_options(Arguments, own, "model_args")
    if made.ckpt is None and made.backbone is None:
        raise UserError("model_args: give ckpt=<run folder or published pruner>, or backbone=<folder or hub id>")
    return made, {name: value for name, value in values.items() if name not in NAMES}


def require_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise UserError where ``options`` has what is neither an option of the pruning ``method`` nor one of
    :class:`Arguments`, or a value that it cannot have."""
    schema = lookup.find("glimpseprune.pruners", method).Options
    known = [*NAMES, *(item.name for item in fields(schema))]
    for name in options:
        lookup.choose(name, known, f"model_args and the options of {method}")
    config.merge_options(schema, options, "model_args")


def _read(name: str, value: Any) -> Any:
    """A value as lmms-eval hands it on: no null, no lists, negative numbers as floats, ``--batch_size`` as a text."""
    if isinstance(value, float) and value.is_integer() or (isinstance(value, str) and value.isdecimal()):
        return int(value)
    if not isinstance(value, str):
        return value
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    if value == "null":
        return None
    if not value.startswith(("[", "{")):
        return value
    try:
        return notation.parse(value)
    except notation.Unreadable as error:
        raise UserError(f"model_args: {name}: {error}") from None


# ----------------------------------------------------------------------------------------------------------- one turn


@dataclass(frozen=True)
class Turn:
    """A question on images, which come before it."""

    question: str
    images: list[Any]
    system: str | None = None


def turn(messages: Sequence[Mapping[str, Any]], where: str, images_first: bool = False) -> Turn:
    """What a conversation of lmms-eval asks.

    Args:
        messages: of a ``role`` and a ``content``, which is a text or a list of parts (``type``: text or image).
        where: begins what errors say.
        images_first: images between texts are moved to the front.

    Raises:
        UserError: several turns, a part that is neither text nor image, an image behind a text, or no image.
    """
    roles = [message["role"] for message in messages]
    system, asked = roles[:1] == ["system"], roles[roles[:1] == ["system"] :]
    if asked != ["user"]:
        raise UserError(
            f"{where}: its messages are of {', '.join(roles) or 'nobody'}: one turn of the user is answered here, a "
            "conversation of several turns is not supported"
        )
    parts = _parts(messages[-1]["content"])
    if odd := [part["type"] for part in parts if part["type"] not in ("text", "image")]:
        raise UserError(f"{where}: its prompt has {odd[0]}: text and images are supported")
    kinds = [part["type"] for part in parts if part["type"] == "image" or part["text"].strip()]
    if kinds != sorted(kinds) and not images_first:  # "image" comes before "text"
        raise UserError(
            f"{where}: an image stands behind a text, and the backbones here have images first: give "
            "images_first=true to move it there"
        )
    images = [part.get("url", part.get("image")) for part in parts if part["type"] == "image"]
    if not images:
        raise UserError(f"{where}: its prompt has no image, and what is pruned here are the tokens of images")
    texts = [_text(message) for message in messages]
    return Turn(texts[-1], images, texts[0] if system else None)


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(message: Mapping[str, Any]) -> str:
    """As chat templates join parts."""
    return "".join(part["text"] for part in _parts(message["content"]) if part["type"] == "text")


# ----------------------------------------------------------------------------------------------------------- decoding

DELIMITER = "\n\n"
"""lmms-eval stops at this where a task says nothing, and the models that it brings take no notice."""


@dataclass(frozen=True)
class Decoding:
    """``arguments`` of ``generate``; an answer is cut before the first of ``stops``, once it is there; ``left_out``:
    names without a meaning here."""

    arguments: dict[str, Any]
    stops: tuple[str, ...]
    left_out: tuple[str, ...]

    def cut(self, text: str) -> str:
        return text[: min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)]


def decoding(given: Mapping[str, Any], known: Iterable[str], where: str, max_new_tokens: int = 128) -> Decoding:
    """What a task's ``generation_kwargs`` ask for; greedy unless they have a temperature or ``do_sample``.

    Args:
        known: names that ``generate`` takes.
        max_new_tokens: where they do not say.

    Raises:
        UserError: beams, several answers to one prompt, or an ``until`` that is no text or list of texts.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    for name in ("num_beams", "num_return_sequences"):
        if asked.pop(name, 1) != 1:
            raise UserError(f"{where}: {name}={given[name]}: one answer is decoded, greedily or by sampling")
    until = asked.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise UserError(f"{where}: until={until!r}: give a text or a list of texts")
    longest = asked.pop("max_gen_toks", max_new_tokens)
    made = {"max_new_tokens": int(asked.pop("max_new_tokens", longest))}
    temperature = float(asked.pop("temperature", 1.0 if asked.get("do_sample") else 0.0))
    made["do_sample"] = temperature > 0 and bool(asked.pop("do_sample", True))
    if made["do_sample"]:
        made["temperature"] = temperature
    asked.pop("do_sample", None)
    chances = {name: asked.pop(name) for name in ("top_p", "top_k") if name in asked}
    made |= chances if made["do_sample"] else {}
    known = set(known)
    made |= {name: value for name, value in asked.items() if name in known}
    stops = tuple(stop for stop in dict.fromkeys(until) if stop and stop != DELIMITER)
    return Decoding(made, stops, tuple(sorted(set(asked) - known)))
