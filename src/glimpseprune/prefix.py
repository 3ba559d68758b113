"""Prompts of a batch that begin alike run through the decoder once as far as they do: many questions on one picture.

Images come first in a prompt and attention is causal, so up to the last visual token nothing depends on the question.
:func:`run` takes whole prompts some layers on, as :func:`.decoder.run_layers` does, and leaves what that leaves; but of
rows that begin alike the beginning is run in one of them, and the rest of each behind it.

Left out: prompts whose images a look before the tower has chosen, which know their question.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from glimpseprune.decoder import fork, rows, run_layers
from glimpseprune.host import Columns, upload
from glimpseprune.types import Layout, Prefill

if TYPE_CHECKING:
    from glimpseprune.backbones import Backbone


@dataclass(frozen=True)
class Alike:
    """Which rows of a batch begin alike, and how far; all of it on the host."""

    first: Tensor  # [U] a row of each beginning
    group: Tensor  # [B] the beginning of each row
    end: Tensor  # [B] the column behind the last visual token


def pictures(prompt: Mapping[str, Tensor], layouts: Sequence[Sequence[Layout]]) -> list[Hashable] | None:
    """Which pictures each row shows, by their numbers among those of the batch; None where no two images are the
    same."""
    index = prompt.get("image_index")
    if index is None:
        return None
    return [tuple(row.tolist()) for row in index.cpu().split([len(row) for row in layouts])]


def alike(known: Columns | None, images: Sequence[Hashable] | None) -> Alike | None:
    """Rows of whole prompts with the same ``images``, and the same tokens up to the last of these; None where no two
    begin alike, or the host does not know."""
    if images is None or known is None or known.visual is None or known.ids is None:
        return None
    columns = torch.arange(1, known.mask.shape[1] + 1)
    end = (known.visual * columns).amax(1)  # [B]
    found: dict[Hashable, int] = {}
    group, first = [], []
    for row, image in enumerate(images):
        own = known.mask[row] & (columns <= end[row])
        key = image, known.ids[row, own].numpy().tobytes()
        if key not in found:
            found[key] = len(first)
            first.append(row)
        group.append(found[key])
    return Alike(torch.tensor(first), torch.tensor(group), end) if len(first) < len(group) else None


def run(backbone: Backbone, state: Prefill, stop: int, shared: Alike | None, *, probes: Sequence[int] = ()) -> Prefill:
    """:func:`.decoder.run_layers` of whole prompts, at any depth, up to ``stop``; padding may hold other numbers. The
    cache of ``state`` stays as it is."""
    if shared is None or stop <= state.depth:
        return run_layers(backbone, replace(state, cache=fork(state.cache)), stop, probes=probes)
    device, size = state.mask.device, state.mask.shape[1]
    end, first, group = (upload(x, device) for x in (shared.end, shared.first, shared.group))
    start = run_layers(backbone, _beginnings(state, shared), stop)
    width, tail = start.mask.shape[1], size - int(shared.end.min())
    rest = torch.arange(size - tail, size) >= shared.end[:, None]  # [B, Q] columns behind the beginning
    known = Columns(torch.cat([start.known.mask[shared.group], rest], 1))
    last = rows(start, group)
    last = replace(
        last,
        hidden=state.hidden[:, -tail:],
        positions=torch.cat([last.positions, state.positions[..., -tail:]], -1),
        mask=upload(known.mask, device),
        visual=torch.cat([last.visual, torch.zeros_like(state.visual[:, -tail:])], 1),
        source=torch.cat([last.source, state.source[:, -tail:]], 1),
        added={layer: features[:, -tail:] for layer, features in state.added.items()},
        known=known,
        depth=state.depth,
    )
    last = run_layers(backbone, last, stop, probes=probes)
    # Back to the columns of the prompt: behind as much padding as each row had.
    place = torch.arange(size, device=device).expand(len(end), -1)
    place = torch.where(place < end[:, None], place + width - end[:, None], place + width + tail - size).clamp(min=0)
    hidden = torch.cat([start.hidden[group], last.hidden], 1)
    cache = fork(state.cache)
    for layer in range(state.depth, stop):
        held = last.cache.layers[layer]
        where = place[:, None, :, None].expand(-1, held.keys.shape[1], -1, held.keys.shape[3])
        cache.update(held.keys.gather(2, where), held.values.gather(2, where), layer)
    return replace(
        state,
        hidden=hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1])),
        depth=stop,
        added={layer: features for layer, features in state.added.items() if layer >= stop},
        probes=state.probes
        | {
            layer: seen.gather(1, place[..., None].expand(-1, -1, seen.shape[-1]))
            for layer, seen in last.probes.items()
        },
        cache=cache,
    )


def _beginnings(state: Prefill, shared: Alike) -> Prefill:
    """The columns of each beginning, left-padded, on a cache of their own."""
    end = shared.end[shared.first]  # [U]
    known = state.known
    lengths = (known.mask & (torch.arange(known.mask.shape[1]) < shared.end[:, None])).sum(1)[shared.first]
    width = int(lengths.max())
    columns = (end - width)[:, None] + torch.arange(width)  # [U, P]
    there = columns >= (end - lengths)[:, None]
    columns = columns.clamp(min=0)
    row, order = (upload(x, state.mask.device) for x in (shared.first[:, None], columns))
    chosen = shared.first[:, None]
    known = Columns(there, known.visual[chosen, columns] & there, known.ids[chosen, columns])
    return replace(
        state,
        hidden=state.hidden[row, order],
        positions=state.positions[..., row, order],
        mask=upload(there, state.mask.device),
        visual=upload(known.visual, state.mask.device),
        source=state.source[row, order],
        row=state.row[row[:, 0]],
        next_position=state.next_position[row[:, 0]],
        added={layer: features[row, order] for layer, features in state.added.items()},
        trace=(),
        probes={},
        frames=(),
        known=known,
        whole=False,
        ridden=None,
        cache=DynamicCache(),
    )
