"""What the host knows of a batch, so that it need not wait for the device to tell.

A GPU works through a queue. Whoever asks it for a number (``.tolist()``, ``int(x.sum())``, ``x[mask]``) waits until the
queue is empty, and the device then waits for the next launch. How a prompt's columns lie is decided on the host before
anything is launched, and is kept here; a prefill asks the device but once, for how many tokens a pruner keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Columns:
    """Of a batch, on the host."""

    mask: Tensor  # [B, S] bool, False on padding
    visual: Tensor | None = None  # [B, S] bool; None once a pruner has chosen among them
    ids: Tensor | None = None  # [B, S] of the tokens; None behind the prompt

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Columns):
            return NotImplemented
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    __hash__ = None

    @classmethod
    def counted(cls, counts: Sequence[int]) -> Columns:
        """Rows of ``counts`` columns, left-padded to the longest."""
        size = max(counts)
        places = torch.arange(size, 0, -1)
        return cls(places <= torch.tensor(counts)[:, None])

    @cached_property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool(self.mask.all())

    @cached_property
    def counts(self) -> list[int]:
        """Columns of each row that are no padding."""
        return self.mask.sum(1).tolist()

    def followed(self, count: int, mask: Tensor | None = None) -> Columns | None:
        """With ``count`` more columns of text behind each row, or those of ``mask``; None where only the device knows
        which these are."""
        if mask is not None and mask.device.type != "cpu":
            return None
        behind = torch.ones(len(self.mask), count, dtype=torch.bool) if mask is None else mask
        visual = None if self.visual is None else F.pad(self.visual, (0, count))
        return Columns(torch.cat([self.mask, behind], 1), visual)


def upload(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers that the host holds, on ``device``, behind whatever the device is still at: a copy that is
    asked for in the ordinary way waits for all of it."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def download(x: Tensor) -> Callable[[], Tensor]:
    """``x`` on its way to the host, behind what the device is still at; call it for the tensor, once it is needed."""
    if not x.is_cuda:
        return lambda: x
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return there

    return wait
