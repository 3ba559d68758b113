"""What every backbone shares: from a processor's output to decoder inputs, and from hidden states to logits.

A subclass owns every fact about its model: how a checkpoint is loaded, which tensors a prompt has, how the visual
tokens of an image lie, how the vision tower is run and looked into, which positions tokens get, what is added inside
the decoder, matrix shapes, published sizes, and a tiny random model for the tests. Everything downstream sees
:class:`glimpseprune.types.Encoded` and :class:`glimpseprune.cost.Shapes` only.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from glimpseprune import attention, cost, weights
from glimpseprune.backbones._seen import Seen
from glimpseprune.backbones._tower import without_tf32
from glimpseprune.config import UserError
from glimpseprune.host import Columns, upload
from glimpseprune.legible import surrogate
from glimpseprune.types import Encoded, Grid, Layout, Needs

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")
COLLECTED = ("states", "keys", "attention")
"""Kinds of :class:`.types.Needs` that a tower meets."""
NO_PROCESSOR = "this backbone has no processor: load it from a folder with tokenizer and image processor"
INDEX, SEEN = ALONGSIDE = ("image_index", "seen")
"""What a prompt may have beside its tensors: which of its pictures each of its images is, where two are the same; and
what the tower made of them, in the place of their pixels."""


class LVLM(ABC):
    """A vision-language model as the library sees it.

    ``model``: the Hugging Face model; ``text_model``: its decoder (``layers``, ``norm``, ``rotary_emb``); ``lm_head``;
    ``processor``; ``image_token_id``; ``vision_width`` C; ``num_heads`` H; ``hidden_size`` D; ``num_layers`` L;
    ``norm_eps``; ``attention``: the attention backend.
    """

    window: int | None = None
    """Side of the vision tower's attention windows in visual tokens; None where it has none."""
    vision_layers: range
    """Numbers of the tower's layers."""
    feature_layer: int
    """The one whose output becomes the visual tokens."""
    projector: nn.Module | None = None
    """From the feature layer's state of one visual token [..., C] to the decoder's input; None where more goes in."""
    prompt_keys: tuple[str, ...]
    """Tensors that the processor returns."""
    image_keys: tuple[str, ...]
    """Those of them that a prompt with images has: the pixels, and what else there is to know of each image."""
    model_class: type[PreTrainedModel]
    """transformers' class of ``model``."""

    replays = True
    """Whether decoding on a GPU may be a captured CUDA graph; set to False where one could not be."""

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model, self.processor = model, processor
        self.captured: dict[Any, Any] = {}  # graphs of its decoder, and where they compute: see replay.py
        self.pools: dict[Any, Any] = {}
        self.text_model, self.lm_head = model.model.language_model, model.lm_head
        config = self.text_model.config
        # Mistral has no layer_types, and a window of 4096 unless its config says null.
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if kinds or getattr(config, "sliding_window", None):
            raise UserError(
                "this checkpoint uses sliding-window attention: set sliding_window=null (use_sliding_window=false) in "
                "the text_config of its config.json, which changes nothing for prompts within the window"
            )
        self.attention = attention.instrument(self.text_model)
        self.image_token_id: int = model.config.image_token_id
        self.num_heads: int = config.num_attention_heads
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.norm_eps: float = config.rms_norm_eps
        self.vision_width: int = self.shapes.tower.width
        self.restored: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was recorded reads the weights of this one."""
        return vars(self) | {"captured": {}, "pools": {}}

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
    ) -> LVLM:
        """A frozen model in eval mode, and its processor. Pixel bounds are per image (None: the checkpoint's own).

        Raises:
            UserError: unknown dtype or attention backend, or flash-attn not installed; no processor there; files that
                are damaged; tensors that are in no file, have no place in the model, or another shape, NaN or Inf.
        """
        dtype = dtype_of(dtype)
        attn = attention_of(attn, device, dtype, path)
        try:
            processor = cls.load_processor(path, min_pixels, max_pixels)
        except UserError:
            raise
        except Exception as error:  # a tokenizer raises what it likes
            raise UserError(f"no processor in '{path}': {type(error).__name__}: {error}".splitlines()[0]) from error
        if not processor.chat_template:
            raise UserError(f"the tokenizer in '{path}' has no chat template (chat_template.jinja)")
        weights.require_files(path)
        try:
            with silent("transformers.modeling_utils"):  # its report of what is refused below
                model, info = cls.model_class.from_pretrained(
                    path,
                    dtype=dtype,
                    attn_implementation=attn,
                    device_map=destination(device),
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"'{path}' cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        require_complete(info, path)
        weights.require_good(model.named_parameters(), str(path))
        return cls(model.to(device).eval().requires_grad_(False), processor)

    @classmethod
    @abstractmethod
    def load_processor(cls, path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
        """Tokenizer, image processor and chat template of a checkpoint folder.

        Raises:
            UserError: one of them is not there, or this model has no pixel bounds.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, attn: str = "sdpa", seed: int = 0) -> LVLM:
        """A random model of the smallest sensible size with a working processor, without any download: what the tests
        run on. Its decoder has the sizes in ``_tiny.DECODER``, its tower the layers 1 and 2 and less than nine."""

    @staticmethod
    @abstractmethod
    def describe(config: PreTrainedConfig) -> cost.Shapes:
        """The matrices of a model with this config."""

    @staticmethod
    @abstractmethod
    def layout_of(
        config: PreTrainedConfig, size: tuple[int, int], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Layout:
        """That of an image of ``size`` = (width, height) pixels, as the processor would resize it; pixel bounds
        default to the published processor's. Raises ValueError for an image that the processor refuses."""

    @abstractmethod
    def image_layouts(self, pictures: Mapping[str, Tensor]) -> list[Layout]:
        """Of each picture, in order; of ``image_keys`` all but the pixels are on the CPU, here and below."""

    @abstractmethod
    def choose_images(self, pictures: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """What the processor made of the pictures with these numbers, repeats allowed."""

    @abstractmethod
    def run_tower(self, pictures: Mapping[str, Tensor], needs: Needs) -> Seen:
        """Run the vision tower, and collect what is needed of it. Nothing may be read back from the device."""

    @abstractmethod
    def positions(self, prompt: Mapping[str, Tensor], mask: Tensor, places: Tensor) -> Tensor:
        """Position ids, [B, S] or [3, B, S]; anything at padding. ``places`` [B, S]: columns of visual tokens. All is
        on the CPU; of ``image_keys`` there is no pixel, and what there is is said of each image anew."""

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @cached_property
    def shapes(self) -> cost.Shapes:
        """The model's matrices, for the cost model."""
        return self.describe(self.model.config)

    def visual_tokens(self, size: tuple[int, int], min_pixels: int | None = None, max_pixels: int | None = None) -> int:
        """How many an image of ``size`` = (width, height) pixels makes; arguments as of :meth:`layout_of`."""
        return self.layout_of(self.model.config, size, min_pixels, max_pixels).count

    def tower_layer(self, layer: int, key: str = "vision_layers") -> int:
        """The number of a layer of the tower; a negative one counts from the last.

        Raises:
            UserError: there is no such layer; ``key`` says what option asked for it.
        """
        known = self.vision_layers
        if layer not in known and not -len(known) <= layer < 0:
            raise UserError(f"{key}: vision layer {layer} does not exist: there are {known[0]} to {known[-1]}")
        return known[layer] if layer < 0 else layer

    def changed(self) -> dict[str, Tensor]:
        """Weights of the model that are not its checkpoint's: those restored from a run, and those that train."""
        named = self.model.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad or name in self.restored}

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., D]."""
        return self.text_model.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the last decoder layer [..., D] -> [..., vocabulary]."""
        return self.lm_head(self.text_model.norm(hidden))

    def encode(
        self,
        prompt: Mapping[str, Any],
        needs: Needs = Needs(),  # noqa: B008 (frozen)
        targets: list[Tensor] | None = None,
    ) -> Encoded:
        """Run the vision tower once on every picture and lay its tokens into the embedded prompt. Nothing is read back
        from the device but what of the prompt lies there, pixels excepted.

        Args:
            prompt: what :meth:`prepare` or the processor returns; without an attention mask no column is padding.
            needs: what of the tower is wanted (nothing else is kept).
            targets: handed through, see :class:`Encoded`.

        Raises:
            UserError: a prompt without an image, images whose number of tokens is not that of the prompt, or a tensor
                that is missing; no such layer of the tower, or one that was not collected when its pictures were seen.
        """
        prompt, device = self._hosted(prompt), self.device
        layouts, index = self.layouts(prompt), self.picture_index(prompt)
        ids, mask, places = self._columns(prompt)
        sizes = prompt[SEEN].sizes if SEEN in prompt else {name: prompt[name] for name in self.image_keys[1:]}
        positions = self.positions(prompt | {name: x[index] for name, x in sizes.items()}, mask, places)
        visual = places
        if any(part.newline_stays for row in layouts for layout in row for part in layout.parts):
            free = [free for row in layouts for layout in row for part in layout.parts for free in part.free]
            visual = places.masked_scatter(places, torch.tensor(free))
        known = Columns(mask, visual, ids)
        text, columns = ids.masked_fill(places, 0), places.flatten().nonzero()[:, 0]  # [B, S], [n]
        ids, text, mask, visual, columns, positions = (
            upload(x, device) for x in (ids, text, mask, visual, columns, positions)
        )
        seen = prompt[SEEN].to(device) if SEEN in prompt else self.see(prompt, needs)
        seen = seen.pick(index)

        def lay(tokens: Tensor, into: Tensor) -> Tensor:
            return into.flatten(0, 1).index_copy(0, columns, tokens.to(into.dtype)).view(into.shape)  # [B, S, D]

        embeds = lay(seen.tokens, self.embed(text))
        return Encoded(
            input_ids=ids,
            embeds=embeds,
            positions=positions,
            mask=mask,
            visual=visual,
            layouts=layouts,
            **{kind: self._collected(seen, kind, getattr(needs, kind)) for kind in COLLECTED},
            added={layer: lay(tokens, torch.zeros_like(embeds)) for layer, tokens in seen.added.items()},
            targets=targets,
            known=known,
        )

    def _collected(self, seen: Seen, kind: str, layers: Sequence[int]) -> dict[int, Tensor]:
        """What was kept of these layers of the tower, under the numbers by which they are asked for."""
        there, numbers = getattr(seen, kind), {layer: self.tower_layer(layer) for layer in layers}
        if missing := [number for number in numbers.values() if number not in there]:
            raise UserError(f"seen: {kind} of the tower's layer {missing[0]} were not kept, see the pictures again")
        return {layer: there[number] for layer, number in numbers.items()}

    def see(self, pictures: Mapping[str, Any], needs: Needs = Needs()) -> Seen:  # noqa: B008 (frozen)
        """What the vision tower makes of pictures, to be laid into any number of prompts: :meth:`prepare` takes it in
        the place of images.

        Args:
            pictures: what :meth:`pictures` returns, or a prompt with images.
            needs: what of the tower the methods will want that are to decide.

        Raises:
            UserError: no such layer of the tower, or a tensor that is missing.
        """
        self._require(pictures)
        layers = {kind: tuple(dict.fromkeys(map(self.tower_layer, getattr(needs, kind)))) for kind in COLLECTED}
        with without_tf32():
            return self.run_tower(self._hosted(pictures), Needs(**layers))

    def choose(self, prompt: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """The prompts ``rows`` [B'] of a batch, in that order, with their images and as much padding as there was."""
        prompt = self._hosted(prompt)
        layouts = self.layouts(prompt)
        numbers = torch.arange(sum(map(len, layouts))).split([len(row) for row in layouts])
        index = torch.tensor(self.picture_index(prompt))[torch.cat([numbers[row] for row in rows.tolist()])]
        shape = prompt["input_ids"].shape
        texts = {name: x[rows.to(x.device)] for name, x in prompt.items() if isinstance(x, Tensor) and x.shape == shape}
        pictures, place = index.unique(return_inverse=True)
        if len(pictures) == len(index):
            return texts | self.choose_pictures(prompt, index)
        return texts | self.choose_pictures(prompt, pictures) | {INDEX: place}

    def choose_pictures(self, prompt: Mapping[str, Any], pictures: Tensor) -> dict[str, Any]:
        """What the prompt has of the pictures with these numbers."""
        prompt = self._hosted(prompt)
        return {SEEN: prompt[SEEN].pick(pictures.tolist())} if SEEN in prompt else self.choose_images(prompt, pictures)

    def unshared(self, prompt: Mapping[str, Any]) -> Mapping[str, Any]:
        """The prompt with the pixels of each image, repeated where two are the same: what processors make, and what a
        method gets that looks before the tower.

        Raises:
            UserError: its pictures have been seen already.
        """
        if SEEN in prompt:
            raise UserError("this method looks at pictures before the tower does: give it images, not what was seen")
        if INDEX not in prompt:
            return prompt
        rest = {name: x for name, x in prompt.items() if name != INDEX}
        return rest | self.choose_images(self._hosted(prompt), torch.tensor(self.picture_index(prompt)))

    def layouts(self, prompt: Mapping[str, Any]) -> list[list[Layout]]:
        """Per row, per image: how the visual tokens lie, without running the model. Raises as ``encode``."""
        prompt = self._hosted(prompt)
        counts = self._columns(prompt)[2].sum(1).tolist()
        images = iter(self._image_layouts(prompt))
        result: list[list[Layout]] = []
        for row, count in enumerate(counts):
            found: list[Layout] = []
            total = 0
            while total < count and (layout := next(images, None)) is not None:
                found.append(layout)
                total += layout.places
            if not found:
                raise UserError(f"prompt {row} has no image: every prompt needs at least one")
            if total != count:
                raise UserError(f"prompt {row} has {count} image tokens, its images make {total}")
            result.append(found)
        if left := len(list(images)):
            raise UserError(f"{left} more images than the prompts have places for")
        return result

    def _image_layouts(self, prompt: Mapping[str, Any]) -> list[Layout]:
        """Of each image of the prompts, in order."""
        if SEEN in prompt:
            pictures = prompt[SEEN].layouts
        elif any(name in prompt for name in self.image_keys):
            self._require(prompt)
            pictures = self.image_layouts(prompt)
        else:
            return []
        if INDEX not in prompt:
            return pictures
        index = prompt[INDEX].tolist()
        if odd := [number for number in index if not 0 <= number < len(pictures)]:
            raise UserError(f"{INDEX}: there is no picture {odd[0]} among {len(pictures)}")
        return [pictures[number] for number in index]

    def picture_index(self, prompt: Mapping[str, Any]) -> list[int]:
        """Which picture each image of the prompts is: the same number where two are the same."""
        return prompt[INDEX].tolist() if INDEX in prompt else list(range(len(self._image_layouts(prompt))))

    def _require(self, prompt: Mapping[str, Any]) -> None:
        if missing := [name for name in self.image_keys if name not in prompt]:
            raise UserError(f"the prompt has no {', '.join(missing)}: give all that the processor returns")

    def _hosted(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """The prompt with all that on the CPU that says where tokens lie, and with nothing that is no part of it."""
        needed = {"input_ids", "attention_mask", INDEX, *self.image_keys[1:]}
        held = {name: x for name, x in prompt.items() if isinstance(x, Tensor | Seen)}
        return {name: x.cpu() if name in needed else x for name, x in held.items()}

    def grids(self, prompt: Mapping[str, Tensor]) -> list[list[Grid]]:
        """Per row, of each part of its images: rows and columns of its visual tokens. Raises as :meth:`layouts`."""
        return [[grid for layout in row for grid in layout.grids] for row in self.layouts(prompt)]

    def prepare(self, questions: Any, images: Any, system: str | None = None) -> dict[str, Tensor]:
        """Chat template, tokenizer and image processor: one prompt per question, its images first, left-padded.
        Of images that are the same one is processed, and ``image_index`` says which picture each of them is.

        Ids are made here and not by the processor, which looks for image tokens in the finished text, where those that
        a question quotes are the same: what a question or a system prompt says is text, never a special token.

        Args:
            questions: a text, or one per prompt.
            images: of one question, an image or a list of them; of several, a list of these. An image is a PIL image, a
                path, an array or a tensor (:mod:`._asked`), or all of them are pictures that were seen (:meth:`see`);
                one such may be given for all questions.
            system: system prompt of all of them.

        Raises:
            UserError: a question without an image, numbers that do not match, what is no text or no image, an image
                that the processor refuses; or a checkpoint folder without tokenizer and image processor.
        """
        from glimpseprune.backbones import _asked  # here, for a prompt of tensors asks for no Pillow
        from glimpseprune.images import distinct

        if self.processor is None:
            raise UserError(NO_PROCESSOR)
        if system is not None and not isinstance(system, str):
            raise UserError(f"system: give a text, not {type(system).__name__}")
        questions, images = _asked.rows(questions, images)
        for name, text in (("system prompt", system or ""), *(("question", question) for question in questions)):
            if half := surrogate(text):
                raise UserError(f"a {name} holds {half}, half of a surrogate pair")
        flat = [image for row in images for image in row]
        if any(isinstance(image, Seen) for image in flat):
            given = list({id(seen): seen for seen in flat}.values())
            first = dict(zip(map(id, given), accumulate(map(len, given), initial=0)))
            index = [first[id(seen)] + picture for seen in flat for picture in range(len(seen))]
            pictures: dict[str, Any] = {SEEN: Seen.join(given)}
            counts = [sum(map(len, row)) for row in images]
        else:
            different, index = distinct(flat)
            pictures, counts = self._processed(different), list(map(len, images))
        if len(set(index)) < len(index):
            pictures[INDEX] = torch.tensor(index)
        places = iter([layout.places for layout in self._image_layouts(pictures)])
        rows = []
        for ids, count in zip(self._token_ids(questions, counts, system), counts):
            if ids.count(self.image_token_id) != count:
                raise UserError(f"the chat template makes {ids.count(self.image_token_id)} of {count} images")
            rows.append([i for i in ids for _ in range(next(places) if i == self.image_token_id else 1)])
        texts = self.processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        prompt = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"], **pictures}
        if "mm_token_type_ids" in self.prompt_keys:
            prompt["mm_token_type_ids"] = (prompt["input_ids"] == self.image_token_id).long()
        return prompt

    def pictures(self, images: Any) -> dict[str, Tensor]:
        """What the processor makes of an image, or of a list of them: what :meth:`see` takes, and prompts have of them.
        Raises as :meth:`prepare`."""
        from glimpseprune.backbones import _asked
        from glimpseprune.images import shown

        _, (row,) = _asked.rows("?", images)
        return self._processed([shown(picture).convert("RGB") for picture in row])

    def _processed(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        if self.processor is None:
            raise UserError(NO_PROCESSOR)
        try:
            return dict(self.processor.image_processor(images=list(pictures), return_tensors="pt"))
        except ValueError as error:  # such as an image that is too narrow
            sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures[:4])
            said = (str(error).splitlines() or ["it raises a ValueError"])[0]
            many = ", ..." * (len(pictures) > 4)
            raise UserError(f"the processor refuses images of {sizes}{many}: {said}") from error

    def _token_ids(self, questions: Sequence[str], pictures: Sequence[int], system: str | None) -> list[list[int]]:
        """Of each question in the chat template, with one image token per picture."""
        specials = self._specials
        texts = [self._templated(question, count, system) for question, count in zip(questions, pictures)]
        rows = self.processor.tokenizer(texts)["input_ids"]
        for row, (question, count) in enumerate(zip(questions, pictures)):
            if specials.search(question) or specials.search(system or ""):
                rows[row] = self._quoting(question, count, system)
        return rows

    def _templated(self, question: str, pictures: int, system: str | None) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        """Any special token of the tokenizer, as a group."""
        tokens = {token.content for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special}
        known = sorted(filter(None, tokens), key=len, reverse=True)  # of two that begin alike, the longer one
        return re.compile(f"({'|'.join(map(re.escape, known)) or '(?!)'})")

    def _quoting(self, question: str, pictures: int, system: str | None) -> list[int]:
        """As :meth:`_token_ids`, of texts that hold special tokens: only those of the template are what they look like.
        What lies between these is tokenized as one, like the tokenizer itself does it."""
        tokenizer, bare = self.processor.tokenizer, {"add_special_tokens": False}
        marks = {"\0question\0": question, "\0system\0": system or ""}
        while any(mark in text for mark in marks for text in (question, system or "")):
            marks = {f"\0{mark}": text for mark, text in marks.items()}
        template = self._templated(*list(marks)[:1], pictures, None if system is None else list(marks)[1])
        start = tokenizer("a")["input_ids"]
        ids, text = start[: len(start) - len(tokenizer("a", **bare)["input_ids"])], ""
        for place, piece in enumerate(self._specials.split(template)):
            if place % 2:
                ids = [*ids, *self._as_text(text), tokenizer.convert_tokens_to_ids(piece)]
                text = ""
                continue
            text += re.sub("|".join(map(re.escape, marks)), lambda found: marks[found[0]], piece)
        return [*ids, *self._as_text(text)]

    def _as_text(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    def _columns(self, prompt: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and places of visual tokens, each [B, S]."""
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return ids, mask, (ids == self.image_token_id) & mask


def decoder_shape(text: PreTrainedConfig) -> cost.Decoder:
    """Grouped-query attention and SwiGLU, under the names that all configs of transformers have for them."""
    return cost.Decoder(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
    )


def destination(device: str | torch.device) -> dict[str, Any] | None:
    """``device_map`` of a model that is read from its files straight to ``device``, never as a whole into the memory of
    the CPU; None where DeepSpeed ZeRO-3 splits it between processes instead."""
    return None if is_deepspeed_zero3_enabled() else {"": device}


def dtype_of(name: str | torch.dtype) -> str:
    """``auto``, or a type of weights as torch calls it.

    Raises:
        UserError: there is no such type.
    """
    found = str(name).removeprefix("torch.")
    if found not in DTYPES:
        raise UserError(f"backbone.dtype={found}: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return found


@contextmanager
def silent(name: str) -> Iterator[None]:
    """While it lasts, the logger ``name`` says nothing but errors. Its level stays, by which transformers decides what
    else to check."""
    logger = logging.getLogger(name)

    def grave(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(grave)
    try:
        yield
    finally:
        logger.removeFilter(grave)


def require_complete(info: Mapping[str, Any], path: str | Path) -> None:
    """Raise UserError where a model and its files do not hold the same tensors. transformers, whose loading ``info``
    says so, would leave what is missing random, and only warn."""
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the checkpoint in '{path}' lacks {len(missing)} tensors, such as {missing[0]}")
    if wrong := sorted(info["mismatched_keys"], key=lambda found: found[0]):
        name, there, wanted = wrong[0]
        raise UserError(
            f"the checkpoint in '{path}': tensor '{name}' is {list(there)}, but its config.json says {list(wanted)}"
        )
    if more := sorted(name for name in info["unexpected_keys"] if not name.endswith(weights.DERIVED)):
        raise UserError(
            f"the checkpoint in '{path}' has {len(more)} tensors that the model of its config.json does not, such as "
            f"{more[0]}"
        )


PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
NEEDS = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}
"""Compute capability of the GPU."""


def attention_of(name: str, device: str | torch.device, dtype: str, path: str | Path) -> str:
    """The attention backend that ``name`` means on ``device``. ``auto`` is the latest of flash-attn's that is installed
    and can run there, and else sdpa: torch's own kernels on a GPU are FlashAttention-2's and cuDNN's, and prompts run
    without masks, which is all that these ask for.

    Raises:
        UserError: there is none of this name, or it cannot run there.
    """
    require_attention(name, device)
    if name != "auto":
        return name
    device = torch.device(device)
    if device.type != "cuda" or dtype == "float32" or (dtype == "auto" and _saved_dtype(path) == "float32"):
        return "sdpa"
    able = torch.cuda.get_device_capability(device)
    there = [flash for flash in attention.FLASH if find_spec(PACKAGES[flash]) is not None and able >= NEEDS[flash]]
    return there[-1] if there else "sdpa"


def _saved_dtype(path: str | Path) -> str:
    said = PreTrainedConfig.get_config_dict(path)[0]
    return str(said.get("dtype") or said.get("torch_dtype") or "float32").removeprefix("torch.")


def require_attention(name: str, device: str | torch.device) -> None:
    """Raise UserError before anything is loaded if the attention backend ``name`` cannot run on ``device``."""
    choices = ("auto", *attention.IMPLEMENTATIONS)
    if name not in choices:
        raise UserError(f"unknown attention backend '{name}': choices are {', '.join(choices)}")
    if name in attention.FLASH:
        if find_spec(PACKAGES[name]) is None:
            raise UserError(f"{name} needs the package flash-attn (pip install flash-attn), or choose sdpa")
        if torch.device(device).type != "cuda":
            raise UserError(f"{name} needs a CUDA device, not '{device}'; choose sdpa")
