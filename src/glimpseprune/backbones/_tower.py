"""Looking into a vision tower while it runs: states of blocks, keys of their attention, the attention tokens receive.

States are taken by forward hooks for as long as a context lasts; transformers could return all hidden states or none,
and at 7B all of them are 1.6 GB for a 5,000-token image. Queries and keys are seen as in the decoder (attention.py): an
attention function of another name, which hands them to ``watch=``, an argument that towers pass through; a backbone
whose tower drops it must see to it that it arrives. The function is in place only for calls that need it. Attention is
computed once more from them, in chunks of queries: no matrix of tokens x tokens is ever held.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glimpseprune import windows

CHUNK = 1 << 24
"""Numbers of attention that are held at a time."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """While it lasts, convolutions in float32 are computed in float32, on any GPU.

    torch leaves matrix products in float32 unless it is told otherwise, but lets cuDNN round the inputs of convolutions
    to TF32 (10 bits), or not, by the kernel that it chooses for a size of batch. A tower's patches are embedded by a
    convolution; what a float32 model says of an image would then depend on the images beside it, in the third digit.
    Half precision is no concern of this, nor are matrix products: who lets them be TF32 has asked for it. That this
    was why rows of LLaVA differed on a GPU is read off the code; it has not been seen on one yet.
    """
    convolutions = torch.backends.cudnn.conv
    own = convolutions.fp32_precision
    if own != "tf32":
        yield
        return
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = own


@contextmanager
def tapped(
    blocks: nn.ModuleList, layers: Sequence[int], pool: Callable[[Tensor], Tensor], first: int = 0
) -> Iterator[dict[int, Tensor]]:
    """Collect ``pool(output)`` of the blocks ``layers`` while the context lasts, and of no others; the number of the
    first block is ``first``."""
    states: dict[int, Tensor] = {}

    def tap(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            states[layer] = pool(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [blocks[layer - first].register_forward_hook(tap(layer)) for layer in set(layers)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class Watch:
    """Sees queries and keys of some attention modules of a tower; called with [b, H, T, d] once or, where a tower
    loops over its windows, once per window.

    Args:
        keys, attention: layer -> the module whose keys, or whose attention, is wanted.
        from_class_token: attention is that of the first token's query, not the mean over all queries of a segment.
    """

    def __init__(
        self, keys: Mapping[int, nn.Module], attention: Mapping[int, nn.Module], from_class_token: bool = False
    ) -> None:
        self.wanted = {id(module): ("keys", layer) for layer, module in keys.items()}
        self.received = {id(module): layer for layer, module in attention.items()}
        self.from_class_token = from_class_token
        self.seen: dict[tuple[str, int], list[Tensor]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, scaling: float, segments: windows.Segments | None
    ) -> None:
        if id(module) in self.wanted:
            self.seen.setdefault(self.wanted[id(module)], []).append(key.transpose(1, 2))  # [b, T, H, d]
        if id(module) in self.received:
            place = ("attention", self.received[id(module)])
            if self.from_class_token:
                mean = received(query[:, :, :1], key, scaling)
            elif segments is None:
                mean = received(query, key, scaling)
            else:
                mean = torch.empty(query.shape[2], device=query.device)
                for size, rows in segments.sizes:
                    parts = (x[0][:, rows].unflatten(1, (-1, size)).transpose(0, 1) for x in (query, key))
                    mean[rows] = received(*parts, scaling).flatten()  # all segments of a size at once
                mean = mean[None]
            self.seen.setdefault(place, []).append(mean)  # [b, T]

    def collected(self, what: str, pool: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
        """layer -> ``pool`` of its ``what`` ("keys" [b, T, H, d] or "attention" [b, T])."""
        return {layer: pool(torch.cat(parts, 1)) for (kind, layer), parts in self.seen.items() if kind == what}


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each key [b, H, T, d] receives from the queries [b, H, Q, d], mean over these and over heads:
    [b, T], float32 even under autocast. Sums to 1 over T."""
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    key = key.float().transpose(-1, -2)
    rows = max(1, CHUNK // (key.shape[0] * key.shape[1] * key.shape[3]))
    with torch.autocast(query.device.type, enabled=False):
        for part in query.split(rows, 2):
            total += (part.float() @ key * scaling).softmax(-1).mean(1).sum(1)
    return total / query.shape[2]


@contextmanager
def watched(tower: nn.Module, watch: Watch) -> Iterator[dict[str, Watch]]:
    """While it lasts, ``tower`` hands queries and keys to ``watch=``; yields that argument, {} where nothing is
    wanted. Numbers are those of the tower's own attention (flash attention's: of SDPA, windows batched)."""
    if not (watch.wanted or watch.received):
        yield {}
        return
    config, own = tower.config, tower.config._attn_implementation
    config._attn_implementation = PREFIX + (own if own in WATCHABLE else windows.NAME)
    try:
        yield {"watch": watch}
    finally:
        config._attn_implementation = own


PREFIX = "watched_"
WATCHABLE = ("eager", "sdpa", windows.NAME)


def _watching(name: str) -> Callable:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        watch: Watch | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        lengths, segments = kwargs.get("cu_seq_lens_q"), kwargs.get("segments")
        if watch is not None:
            if segments is None and lengths is not None:
                segments = windows.Segments.of(lengths.diff().tolist(), query.device)
            watch(module, query, key, kwargs["scaling"], segments)
        if name == "eager":  # each model file has its own
            attend = sys.modules[type(module).__module__].eager_attention_forward
        else:  # a tower without segments has no windows to be batched
            attend = ALL_ATTENTION_FUNCTIONS["sdpa" if lengths is None else name]
        return attend(module, query, key, value, attention_mask, **kwargs)

    return forward


for _name in WATCHABLE:
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + _name, _watching(_name))
