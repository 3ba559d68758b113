"""Large batches in waves: prompts are prefilled and pruned a few at a time, and decoded all together.

What fills a GPU is prompts that are not pruned yet: at the shapes of a 7B model one of 5,000 visual tokens holds half a
gigabyte while it is prefilled, and 17 MiB behind its decision. Prefill is no faster for more than some ten thousand
columns at once, and decoding is faster for each row more; so few are prefilled at once, and many are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from glimpseprune.decoder import Pruner, fork, prefill, see
from glimpseprune.host import Columns
from glimpseprune.types import Cut, Encoded, Frame, Prefill

if TYPE_CHECKING:
    from glimpseprune.backbones import LVLM

COLUMNS = 1 << 14
"""Columns that are prefilled at once, padding among them, but at least one prompt."""
T = TypeVar("T", Frame, Prefill)


def prefilled(
    backbone: LVLM, pruner: Pruner, prompt: Mapping[str, Any], targets: list[Tensor] | None = None
) -> tuple[Encoded, Prefill]:
    """:func:`.decoder.see` and :func:`.decoder.prefill`, wave by wave where the batch is large.

    Of a batch of several waves nothing is left but what decoding asks for: ``embeds`` [B, S, 0] and nothing of the
    tower in the encoded prompts, hidden states of the last column in the state.
    """
    count, size = prompt["input_ids"].shape
    waves = -(-count // max(1, COLUMNS // size))
    if waves == 1:
        encoded = see(backbone, pruner, prompt, targets)
        return encoded, prefill(backbone, encoded, pruner)
    seen, states = [], []
    for rows in torch.arange(count).tensor_split(waves):
        own = None if targets is None else [targets[row] for row in rows.tolist()]
        encoded = see(backbone, pruner, trimmed(backbone.choose(prompt, rows)), own)
        state = prefill(backbone, encoded, pruner)
        seen.append(replace(encoded, embeds=encoded.embeds[..., :0], states={}, keys={}, attention={}, added={}))
        states.append(replace(state, hidden=state.hidden[:, -1:].clone(), added={}, probes={}))
        del encoded, state  # before the next wave comes
    wide = max(each.mask.shape[1] for each in seen)
    return encoded_together(seen, wide), together(states, [wide - each.mask.shape[1] for each in seen])


def trimmed(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Without the columns that are padding in every row."""
    mask = prompt["attention_mask"]
    taken = mask.bool().any(0).nonzero()[:, 0].tolist()
    own = slice(taken[0], taken[-1] + 1)
    return {name: x[:, own] if isinstance(x, Tensor) and x.shape == mask.shape else x for name, x in prompt.items()}


def encoded_together(parts: Sequence[Encoded], wide: int) -> Encoded:
    """The rows of all, left-padded to ``wide`` columns. A row is padded with what it begins with, as some logits
    processors look at prompts."""

    def padded(name: str) -> Tensor:
        return torch.cat([_pad(getattr(part, name), wide) for part in parts], -2)

    ids = [
        torch.cat([part.input_ids[:, :1].expand(-1, wide - part.mask.shape[1]), part.input_ids], 1) for part in parts
    ]
    embeds = [F.pad(part.embeds, (0, 0, wide - part.mask.shape[1], 0)) for part in parts]
    known = [
        Columns(_pad(k.mask, wide), _pad(k.visual, wide), _pad(k.ids, wide)) for k in (part.known for part in parts)
    ]
    return Encoded(
        input_ids=torch.cat(ids),
        embeds=torch.cat(embeds),
        positions=padded("positions"),
        mask=padded("mask"),
        visual=padded("visual"),
        layouts=[row for part in parts for row in part.layouts],
        targets=None if parts[0].targets is None else [row for part in parts for row in part.targets],
        flops=[number for part in parts for number in part.flops],
        known=Columns(*(torch.cat([getattr(k, name) for k in known]) for name in ("mask", "visual", "ids"))),
    )


def together(parts: Sequence[Prefill], offsets: Sequence[int]) -> Prefill:
    """The rows of all, which wait behind the same layers with hidden states of as many columns, in one batch; their
    caches are taken from them.

    Args:
        offsets: by how much the columns of each part's unpruned prompts lie further right among those of all.
    """
    first = parts[0]
    before = torch.tensor([0] + [len(part.mask) for part in parts[:-1]]).cumsum(0).tolist()
    knowing = all(part.known is not None for part in parts)
    wide = max(part.mask.shape[1] for part in parts)
    return replace(
        first,
        **_columns(parts, offsets),
        hidden=torch.cat([part.hidden for part in parts]),
        visual=torch.cat([_pad(part.visual, wide) for part in parts]),
        row=torch.cat([part.row + rows for part, rows in zip(parts, before)]),
        cache=_caches([part.cache for part in parts]),
        trace=tuple(
            Cut(cuts[0].stop, torch.cat([cut.kept for cut in cuts]), torch.cat([cut.flops for cut in cuts]))
            for cuts in zip(*(part.trace for part in parts), strict=True)
        ),
        frames=tuple(
            Frame(frames[0].stop, **_columns(frames, offsets))
            for frames in zip(*(part.frames for part in parts), strict=True)
        ),
        known=Columns(torch.cat([_pad(part.known.mask, wide) for part in parts])) if knowing else None,
        whole=False,
        ridden=None,
    )


def _columns(parts: Sequence[T], offsets: Sequence[int]) -> dict[str, Tensor]:
    """What frames and states say of their columns."""
    wide = max(part.mask.shape[1] for part in parts)
    return {
        "positions": torch.cat([_pad(part.positions, wide) for part in parts], -2),
        "mask": torch.cat([_pad(part.mask, wide) for part in parts]),
        "source": torch.cat([_pad(part.source + offset, wide) for part, offset in zip(parts, offsets)]),
        "next_position": torch.cat([part.next_position for part in parts]),
    }


def _caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One of all rows, layer by layer, so that no more than a layer is held twice."""
    joined = fork(caches[0])
    for target, *layers in zip(joined.layers, *(cache.layers for cache in caches), strict=True):
        wide = max(layer.keys.shape[2] for layer in layers)
        for name in ("keys", "values"):
            own = [getattr(layer, name) for layer in layers]
            setattr(target, name, torch.cat([F.pad(x, (0, 0, wide - x.shape[2], 0)) for x in own]))
        for layer in layers:
            layer.keys = layer.values = None
    return joined


def _pad(x: Tensor, wide: int) -> Tensor:
    """[..., S] -> [..., wide], zero on the left."""
    return F.pad(x, (wide - x.shape[-1], 0))
