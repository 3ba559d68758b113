"""What every backbone shares: from a processor's output to decoder inputs, and from hidden states to logits.

A subclass says how its checkpoint is loaded, how many visual tokens an image makes, how the vision tower is run and
which positions tokens get. Everything downstream sees :class:`glimpseprune.types.Encoded` only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from glimpseprune import attention
from glimpseprune.config import UserError
from glimpseprune.types import Encoded, Grid


class LVLM(ABC):
    """A vision-language model as the library sees it.

    ``model``: the Hugging Face model; ``text_model``: its decoder (``layers``, ``norm``, ``rotary_emb``); ``lm_head``;
    ``processor``; ``image_token_id``; ``vision_width`` C; ``num_heads`` H; ``hidden_size`` D; ``num_layers`` L;
    ``norm_eps``; ``attention``: the attention backend; ``window``: side of the vision tower's attention windows in
    visual tokens, None where it has none.
    """

    window: int | None = None

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model, self.processor = model, processor
        self.text_model, self.lm_head = model.model.language_model, model.lm_head
        config = self.text_model.config
        if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise UserError("this checkpoint uses sliding-window attention: set use_sliding_window=false")
        self.attention = attention.instrument(self.text_model)
        self.image_token_id: int = model.config.image_token_id
        self.num_heads: int = config.num_attention_heads
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.norm_eps: float = config.rms_norm_eps
        self.vision_width: int = model.config.vision_config.hidden_size
        self.restored: set[str] = set()

    @classmethod
    @abstractmethod
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
            UserError: unknown attention backend, or flash-attn not installed.
        """

    @abstractmethod
    def image_grids(self, prompt: Mapping[str, Tensor]) -> list[Grid]:
        """Visual tokens of each image in the prompt, in order."""

    @abstractmethod
    def choose_images(self, prompt: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """What the processor made of the images with these numbers."""

    @abstractmethod
    def see(self, prompt: Mapping[str, Tensor], layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Visual tokens [N, D], and the states of the tower's ``layers``, each pooled to [N, C]."""

    @abstractmethod
    def positions(self, prompt: Mapping[str, Tensor], mask: Tensor, visual: Tensor) -> Tensor:
        """Position ids, [B, S] or [3, B, S]; anything at padding."""

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

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
        prompt: Mapping[str, Tensor],
        vision_layers: Sequence[int] = (),
        targets: list[Tensor] | None = None,
    ) -> Encoded:
        """Run the vision tower once and lay its tokens into the embedded prompt.

        Args:
            prompt: what the processor returns; without an attention mask no column is padding.
            vision_layers: layers of the tower whose pooled states are wanted (no others are kept).
            targets: handed through, see :class:`Encoded`.

        Raises:
            UserError: a prompt without an image, or images whose number of tokens is not that of the prompt.
        """
        prompt = {key: value.to(self.device) for key, value in prompt.items() if isinstance(value, Tensor)}
        grids = self.grids(prompt)
        ids, mask, visual = self._columns(prompt)
        tokens, states = self.see(prompt, vision_layers)
        embeds = self.embed(ids.masked_fill(visual, 0))  # [B, S, D]
        embeds = embeds.masked_scatter(visual[..., None], tokens.to(embeds.dtype))
        return Encoded(ids, embeds, self.positions(prompt, mask, visual), mask, visual, grids, states, targets)

    def choose(self, prompt: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """The prompts ``rows`` [B'] of a batch, in that order, with their images and as much padding as there was."""
        numbers = torch.arange(sum(map(len, grids := self.grids(prompt)))).split([len(row) for row in grids])
        images = torch.cat([numbers[row] for row in rows.tolist()])
        texts = {name: x[rows.to(x.device)] for name, x in prompt.items() if len(x) == len(grids) and x.ndim == 2}
        return texts | self.choose_images(prompt, images)

    def grids(self, prompt: Mapping[str, Tensor]) -> list[list[Grid]]:
        """Per row, per image: rows and columns of visual tokens, without running the model. Raises as ``encode``."""
        counts = self._columns(prompt)[2].sum(1).tolist()
        images = iter(self.image_grids(prompt) if "pixel_values" in prompt else ())
        result: list[list[Grid]] = []
        for row, count in enumerate(counts):
            found: list[Grid] = []
            total = 0
            while total < count and (grid := next(images, None)) is not None:
                found.append(grid)
                total += grid[0] * grid[1]
            if not found:
                raise UserError(f"prompt {row} has no image: every prompt needs at least one")
            if total != count:
                raise UserError(f"prompt {row} has {count} image tokens, its images make {total}")
            result.append(found)
        if left := len(list(images)):
            raise UserError(f"{left} more images than the prompts have places for")
        return result

    def prepare(
        self, questions: Sequence[str], images: Sequence[Sequence[Any]], system: str | None = None
    ) -> dict[str, Tensor]:
        """Chat template and processor: one prompt per question, its images (PIL) first, left-padded.

        Raises:
            UserError: a question without an image, or a checkpoint folder without tokenizer and image processor.
        """
        if self.processor is None:
            raise UserError("this backbone has no processor: load it from a folder with tokenizer and image processor")
        texts = []
        for row, (question, pictures) in enumerate(zip(questions, images, strict=True)):
            if not pictures:
                raise UserError(f"prompt {row} has no image: every prompt needs at least one")
            content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        flat = [picture.convert("RGB") for pictures in images for picture in pictures]
        return dict(self.processor(text=texts, images=flat, padding=True, padding_side="left", return_tensors="pt"))

    def _columns(self, prompt: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and visual columns, each [B, S]."""
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return ids, mask, (ids == self.image_token_id) & mask


@contextmanager
def tapped(
    blocks: nn.ModuleList, layers: Sequence[int], pool: Callable[[Tensor], Tensor], first: int = 0
) -> Iterator[dict[int, Tensor]]:
    """Collect ``pool(output)`` of the blocks ``layers`` while the context lasts, and of no others; the number of the
    first block is ``first``.

    transformers can return all hidden states or none; at 7B all of them are 1.6 GB for a 5,000-token image.
    """
    if wrong := [layer for layer in layers if not first <= layer < first + len(blocks)]:
        raise UserError(f"vision layers {wrong} do not exist: there are {first} to {first + len(blocks) - 1}")
    states: dict[int, Tensor] = {}

    def tap(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            states[layer] = pool(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [blocks[layer - first].register_forward_hook(tap(layer)) for layer in set(layers)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def destination(device: str | torch.device) -> dict[str, Any] | None:
    """``device_map`` of a model that is read from its files straight to ``device``, never as a whole into the memory of
    the CPU; None where DeepSpeed ZeRO-3 splits it between processes instead."""
    return None if is_deepspeed_zero3_enabled() else {"": device}


def require_attention(name: str, device: str | torch.device) -> None:
    """Raise UserError before anything is loaded if the attention backend ``name`` cannot run on ``device``."""
    if name not in attention.IMPLEMENTATIONS:
        raise UserError(f"unknown attention backend '{name}': choices are {', '.join(attention.IMPLEMENTATIONS)}")
    if name == "flash_attention_2":
        if find_spec("flash_attn") is None:
            raise UserError("flash_attention_2 needs the package flash-attn (pip install flash-attn), or choose sdpa")
        if torch.device(device).type != "cuda":
            raise UserError(f"flash_attention_2 needs a CUDA device, not '{device}'; choose sdpa")
