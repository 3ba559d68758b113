"""Cosines between tokens, a few rows at a time: no matrix of tokens x tokens is ever held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

HELD = 1 << 20
"""Cosines that are held at a time."""


def directions(x: Tensor) -> Tensor:
    """[n, d] -> [n, d] of length 1, float32; a zero stays zero."""
    return F.normalize(x.float(), dim=-1)


def cosines(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Between directions [n, d] and [m, d]: the rows of [n, m] in order, some [r, m] at a time; float32 even under
    autocast."""
    for part in x.split(max(1, HELD // max(1, len(y)))):
        with torch.autocast(x.device.type, enabled=False):
            rows = part @ y.T  # [r, m]
        yield rows
