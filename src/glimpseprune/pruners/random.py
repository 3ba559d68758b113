"""Control: keep a random choice of the visual tokens; with ``keep=0, min_keep=0`` the zero-token control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.decoder import View
from glimpseprune.pruners._rows import at_columns, prune_depth, require_minimum


@dataclass
class Options:
    prune_layer: int = option(0, "prune after this decoder layer, 0-based")
    keep: float = option(0.1, "fraction of the visual tokens to keep, 0 to 1")
    min_keep: int = option(1, "keep at least so many; with keep=0 and min_keep=0 no visual token stays")
    seed: int = option(0, "the choice follows from this and the prompt's token ids, whatever else is in the batch")


class Pruner(nn.Module):
    """``counts``, if set, overrides ``keep`` for the next batches: visual tokens to keep, one number per row."""

    vision_layers: tuple[int, ...] = ()
    renumber, prune_cache = False, True

    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__()
        if not 0 <= options.keep <= 1:
            raise UserError(f"pruner.options.keep={options.keep}: give a fraction from 0 to 1")
        self.options = options
        self.layers = prune_depth(options.prune_layer, backbone.num_layers)
        self.counts: Sequence[int] | None = None

    def keep(self, view: View) -> Tensor:
        decided = []
        for row, total in enumerate(view.encoded.counts):
            ids = view.encoded.input_ids[row][view.encoded.mask[row]]
            generator = torch.Generator().manual_seed(self.options.seed + crc32(ids.cpu().numpy().tobytes()))
            if self.counts is not None:
                number = self.counts[row]
            else:
                require_minimum(self.options.min_keep, total)
                number = max(int(self.options.keep * total), self.options.min_keep)
            decided.append(torch.randperm(total, generator=generator) < number)  # [V]
        return at_columns(view, decided)
