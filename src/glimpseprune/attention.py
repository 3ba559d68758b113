"""Probed attention: see post-RoPE q and k of any layer, and weigh keys by a gate, on any attention backend.

transformers looks attention up by name and decoder layers pass extra keyword arguments through to it. So a wrapper
per backend is registered as ``probed_<backend>``, attention and mask alike; a call without ``probe`` and ``gate`` is
the backend's own. No hooks, no state on modules. Gated calls always run on SDPA, whose masks can express them, and
hold no attention matrix of their own but, backward, a few rows at a time. Left out: sliding windows (no supported
checkpoint uses them; backbones refuse them) and flex attention (no backward on the CPU).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH = ("flash_attention_2", "flash_attention_3")
IMPLEMENTATIONS = ("eager", "sdpa", *FLASH)
_PREFIX = "probed_"
_MOST = 1 << 24
"""Numbers in a matrix of attention that the gradient of a gate may hold at a time."""

Probe = Callable[[int, Tensor, Tensor, float], None]
"""Called with layer index, query [B, H, Q, d] and key [B, H_kv, S, d], both after RoPE, and the scale of q . k."""


class Enough(Exception):
    """Raised by a probe that has seen what it came for: the call that it is in ends there."""


@dataclass
class Away:
    """Columns that a gate drops and that are not run, as the unpruned model has them (docs/method.md §2.5)."""

    which: Tensor  # [B, S] bool
    cache: DynamicCache  # of the unpruned prompt, whose columns these are, at least as deep as the layers that run


@dataclass
class Gate:
    """How far each key may be seen (docs/method.md §2.3); needs no gradient at inference.

    ``stc``: forward is exact hard pruning (weight > 0.5); backward is d out / d weight_j = a_full_j (v_j - out), the
    true derivative of renormalised attention times Z_kept / Z_full <= 1, hence bounded.
    ``value``: out = sum_j a_full_j weight_j v_j: probabilities are scaled and not renormalised.
    """

    weight: Tensor  # [B, S] in [0, 1]; text columns weigh 1, columns beyond S (appended tokens) too
    estimator: str = "stc"
    columns: Tensor | None = None
    """[B, S']: which of these S columns run, where not all do (``stc`` only)."""
    away: Away | None = None
    """The others, where the gradient is to know of them."""


def instrument(text_model: nn.Module) -> str:
    """Switch a text model to the probed variant of the backend it was loaded with; returns the backend's name."""
    name = text_model.config._attn_implementation.removeprefix(_PREFIX)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention backend '{name}' is not one of {', '.join(IMPLEMENTATIONS)}")
    text_model.config._attn_implementation = _PREFIX + name
    return name


def mask(
    implementation: str, columns: Tensor, queries: int, dtype: torch.dtype, full: bool | None = None
) -> Tensor | None:
    """The causal mask for the last ``queries`` of ``columns`` [B, S] bool (False is padding), in a backend's own form.
    ``full``: whether there is no padding, where that is known.

    Every query sees itself, padding too, so that no row of a softmax is empty. None where the backend needs no mask.
    sdpa: bool [B, 1, Q, S]; eager: the same, additive in ``dtype``; flash attention: ``columns`` itself.
    """
    full = bool(columns.all()) if full is None else full
    if implementation in FLASH:
        return None if full else columns
    size = columns.shape[1]
    if full and implementation == "sdpa" and queries in (1, size):
        return None
    index = torch.arange(size, device=columns.device)  # [S]
    own = index[size - queries :, None]  # [Q, 1]
    visible = ((index <= own) & columns[:, None] | (index == own))[:, None]  # [B, 1, Q, S]
    if implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Raw q . k, scaled, in float32 even under autocast: query [B, H, Q, d], key [B, H_kv, S, d] -> [B, H, Q, S]."""
    with torch.autocast(query.device.type, enabled=False):
        groups = query.float().unflatten(1, (key.shape[1], -1))  # [B, H_kv, H / H_kv, Q, d]
        return (groups @ key.float()[:, :, None].transpose(-1, -2)).flatten(1, 2) * scaling  # [B, H, Q, S]


def last_row(seen: dict[int, Tensor], columns: Tensor) -> Probe:
    """A probe that puts the log of the last query's attention to ``columns`` [B, S] bool into ``seen``: layer ->
    [B, S, H], float32."""

    def see(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        row = logits(query[:, :, -1:], key, scaling)[:, :, 0]  # [B, H, S]
        row = row.masked_fill(~columns[:, None], torch.finfo(row.dtype).min)
        seen[layer] = row.log_softmax(-1).transpose(1, 2)  # [B, S, H]

    return see


def single(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """Attention of one token per row, [B, 1, H, d]: query [B, H, 1, d], key and value [B, H_kv, S, d], ``visible``
    bool [B, 1, 1, S]. Query heads that share a key head are its queries, so that no key is repeated for them."""
    groups = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # [B, H_kv, H / H_kv, d]
    groups = groups.to(value.dtype)  # RoPE leaves float32 under autocast
    out = F.scaled_dot_product_attention(groups, key.to(value.dtype), value, visible, scale=scaling)
    return out.flatten(1, 2)[:, None]


def gated(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, gate: Gate, scaling: float, layer: int = 0
) -> Tensor:
    """Attention whose keys are weighed by ``gate``; ``visible`` is :func:`mask`'s bool form. Returns [B, H, Q, d]."""
    queries, size = query.shape[2], key.shape[2]
    weight = gate.weight if gate.columns is None else gate.weight.gather(1, gate.columns)
    weight = F.pad(weight, (0, size - weight.shape[1]), value=1.0)  # [B, S]
    if gate.estimator == "value":
        return _attend(query, key, value * weight[:, None, :, None].to(value.dtype), visible, scaling)
    if gate.estimator != "stc":
        raise ValueError(f"unknown gate estimator '{gate.estimator}': choices are stc, value")
    index = torch.arange(size, device=query.device)
    own = index == index[size - queries :, None]  # [Q, S]
    allowed = index <= index[size - queries :, None] if visible is None else visible
    hard = _attend(query, key, value, allowed & (weight > 0.5)[:, None, None] | own, scaling)  # [B, H, Q, d]
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return hard
    return _Credited.apply(hard, weight, gate.weight, gate, query, key, value, visible, scaling, layer)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    if visible is not None and query.is_cuda:  # fused kernels of CUDA that take a mask know no groups
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    causal, grouped = visible is None and query.shape[2] > 1, key.shape[1] < query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, visible, scale=scaling, is_causal=causal, enable_gqa=grouped
    )


class _Credited(torch.autograd.Function):
    """``hard`` [B, H, Q, d] as it is, and backward the gradient of ``weight`` that ``stc`` states: of the columns that
    run [B, S'], and of those that are ``away`` [B, S]. Forward it costs nothing and holds nothing that attention itself
    does not."""

    @staticmethod
    def forward(
        ctx: Any,
        hard: Tensor,
        weight: Tensor,
        everywhere: Tensor,
        gate: Gate,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        scaling: float,
        layer: int,
    ) -> Tensor:
        ctx.save_for_backward(hard, weight, query, key, value, visible)
        ctx.gate, ctx.scaling, ctx.layer = gate, scaling, layer
        return hard.view_as(hard)

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(upstream.device.type, enabled=False):
            own, away = _credit(upstream, *ctx.saved_tensors, ctx.gate, ctx.scaling, ctx.layer)
        return upstream, own, away, *[None] * 7


def _credit(
    upstream: Tensor,
    out: Tensor,
    weight: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    gate: Gate,
    scaling: float,
    layer: int,
) -> tuple[Tensor, Tensor | None]:
    """sum over heads and queries of a_full_j ``upstream`` . (v_j - ``out``), for each column.

    Only queries that are kept themselves are asked: nothing reads what a dropped column says, so nothing comes back.
    """
    batch, heads, queries, width = query.shape
    size, groups = key.shape[2], key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    if size - queries >= (gate.weight if gate.columns is None else gate.columns).shape[1]:  # all behind the prompt
        order = torch.arange(queries, device=key.device).expand(batch, -1)  # [B, M]
    else:
        live = weight[:, size - queries :] > 0.5  # [B, Q]
        order = (~live).long().argsort(dim=1, stable=True)[:, : int(live.sum(1).max())]
    index, row = torch.arange(size, device=key.device), torch.arange(batch, device=key.device)[:, None]
    key, value, others = key.to(wide), value.to(wide), 0
    if gate.away is not None:
        which, held = gate.away.which, gate.away.cache.layers[layer]  # [B, S]
        others = which.shape[1]
        key, value = (
            torch.cat([own, all[:, :, :others].to(wide)], 2) for own, all in ((key, held.keys), (value, held.values))
        )  # [B, H_kv, S' + S, d] each
        place = F.pad(gate.columns, (0, size - gate.columns.shape[1]), value=others)  # [B, S'], appended ones behind
        everywhere = torch.arange(others, device=key.device)
    total = torch.zeros(batch, size + others, dtype=wide, device=key.device)
    for own in order.split(max(1, _MOST // (batch * heads * (size + others))), dim=1):  # [B, m]
        where = own[:, None, :, None].expand(-1, heads, -1, width)
        q, u, o = (x.gather(2, where).to(wide).unflatten(1, (groups, -1)) for x in (query, upstream, out))
        if visible is None:
            seen = index <= (size - queries + own)[..., None]  # [B, m, S']
        else:
            seen = visible.expand(batch, 1, -1, -1)[row, 0, own]
        if others:
            before = everywhere < place.gather(1, size - queries + own)[..., None]  # [B, m, S]
            seen = torch.cat([seen, before & which[:, None]], -1)
        full = (_rows(q, key) * scaling).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        total += (full * (_rows(u, value) - (u * o).sum(-1, keepdim=True))).sum((1, 2, 3))
    own, away = total.to(weight.dtype).split([size, others], dim=1)
    return own, away if others else None


def _rows(x: Tensor, y: Tensor) -> Tensor:
    """[B, H_kv, G, m, d] . [B, H_kv, S, d] -> [B, H_kv, G, m, S]."""
    return (x.flatten(2, 3) @ y.transpose(-1, -2)).unflatten(2, x.shape[2:4])


def _probed(name: str) -> Callable:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        probe: Probe | None = None,
        gate: Gate | None = None,
        lengths: Sequence[int] | None = None,
        step: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if probe is not None:
            probe(module.layer_idx, query, key, kwargs["scaling"])
        if lengths is not None:  # rows that lie end to end
            rows = zip(*(x.split(list(lengths), 2) for x in (query, key, value)))
            attend = _backend(name, module)
            return torch.cat([attend(module, *row, None, **kwargs)[0] for row in rows], 1), None
        if step:
            return single(query, key, value, attention_mask, kwargs["scaling"]), None
        if gate is not None:
            out = gated(query, key, value, attention_mask, gate, kwargs["scaling"], module.layer_idx)  # [B, H, Q, d]
            return out.transpose(1, 2).contiguous(), None
        return _backend(name, module)(module, query, key, value, attention_mask, **kwargs)

    return forward


def _backend(name: str, module: nn.Module) -> Callable:
    if name == "eager":  # each model file has its own, and hands it to the registry as the default
        return sys.modules[type(module).__module__].eager_attention_forward
    return partial(_flash, name) if name in FLASH else ALL_ATTENTION_FUNCTIONS[name]


def _flash(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    # transformers' own wrapper would look for a kernel under the name of *our* backend. RoPE leaves q and k in float32
    # under autocast; the kernel takes half precision only.
    output = _flash_attention_forward(
        *(x.transpose(1, 2).to(value.dtype) for x in (query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=True,
        dropout=kwargs.get("dropout", 0.0),
        softmax_scale=kwargs["scaling"],
        attn_implementation=name,
    )
    return output, None


for _name in IMPLEMENTATIONS:
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + _name, _probed(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
