"""Encodings out of random numbers, as large as a test wants them, and watches on the tensors that are made."""

from __future__ import annotations

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glimpseprune.backbones import LVLM
from glimpseprune.decoder import View, start
from glimpseprune.types import Encoded, Layout


def made_up(backbone: LVLM, rows: list[list[Layout]], layers: tuple[int, ...] = (), seed: int = 0) -> Encoded:
    """Left-padded rows of two text tokens, the images' tokens and three more of text; ``layers`` of the tower, with 0
    for what is no cell."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    counts = [sum(layout.count for layout in row) for row in rows]
    size = max(counts) + 5
    column = torch.arange(size)
    ahead = size - 5 - torch.tensor(counts)[:, None]  # [B, 1] padding
    mask = column >= ahead
    visual = (column >= ahead + 2) & (column < size - 3)
    cell = torch.tensor([cell for row in rows for layout in row for part in layout.parts for cell in part.cells])
    total, tower = sum(counts), backbone.shapes.tower
    return Encoded(
        input_ids=torch.zeros(mask.shape, dtype=torch.long),
        embeds=noise(*mask.shape, backbone.hidden_size),
        positions=(mask.cumsum(1) - 1).clamp(min=0),
        mask=mask,
        visual=visual,
        layouts=rows,
        states={layer: noise(total, tower.width) * cell[:, None] for layer in layers},
        keys={layer: noise(total, 2, tower.width // 2) * cell[:, None, None] for layer in layers},
        attention={layer: noise(total).exp() * cell for layer in layers},
    )


def view_of(backbone: LVLM, encoded: Encoded, pruner) -> View:
    return View(start(encoded), encoded, backbone, pruner.stops[0])


class Largest(TorchDispatchMode):
    """``numel`` of the largest tensor that an operation returns while this lasts."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return result


class Live(TorchDispatchMode):
    """``peak``: most bytes on a module's device that were held at a time while this lasts, its weights not counted."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        own = [*module.parameters(), *module.buffers()]
        self.device, self.own = own[0].device, {x.untyped_storage()._cdata for x in own}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device == self.device:
                storage = x.untyped_storage()
                if storage._cdata not in self.own:
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result
