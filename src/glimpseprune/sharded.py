"""Weights that DeepSpeed ZeRO splits between processes, as if they were whole.

Everywhere else a weight is a tensor; where a training may be one of several processes that hold parts of it for each
other, these functions stand between. For weights that nobody splits they do the obvious, without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def is_split(parameter: Tensor) -> bool:
    """Whether ZeRO-3 split it: each process holds a part, and the tensor itself looks empty."""
    return hasattr(parameter, "ds_id")


def shape(parameter: Tensor) -> torch.Size:
    """Of all of it."""
    return parameter.ds_shape if is_split(parameter) else parameter.shape


def own(parameter: Tensor) -> Tensor:
    """What of it this process holds."""
    return parameter.ds_tensor if is_split(parameter) else parameter


def whole(parameter: Tensor) -> Tensor:
    """All of a tensor, in full precision if it trains; all processes must ask for it at once."""
    if parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach()
    if not is_split(parameter):
        return parameter.detach()
    from deepspeed import zero

    with zero.GatheredParameters(parameter):
        return parameter.detach().clone()


def gathered(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """:func:`whole` of each, one after the other, in the memory of the CPU of a process where they are ``wanted``;
    the others end with nothing. All processes must call it."""
    found = {}
    for name, tensor in tensors.items():
        each = whole(tensor)
        if wanted:
            found[name] = each.cpu()
    return found


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy ``value``, the same on all processes, into what each of them holds; all must do it at once."""
    if not is_split(parameter):
        parameter.copy_(value)
        return
    from deepspeed import zero

    with zero.GatheredParameters(parameter, modifier_rank=0):
        parameter.copy_(value)
