"""CUDA graphs: calls whose launches take longer than their work, recorded once and replayed.

A graph repeats the same kernels on the same addresses, for one caller at a time. So what is recorded is a function of
buffers, has no shape that depends on numbers and never asks the device for one; what it reads is copied in before and
what it gives copied out. It lives with its backbone, is found again by the sizes it was made for and everything else
that it depends on, and :func:`fingerprint` says what that is. Without a GPU the same functions run as they are.

:class:`Block` is one for decoder layers on few columns: those above K, once the others are pruned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from glimpseprune import attention
from glimpseprune.sharded import is_split
from glimpseprune.types import Prefill

if TYPE_CHECKING:
    from glimpseprune.backbones import LVLM

T = TypeVar("T")
KEPT = 16
"""Graphs that a backbone holds on to."""
BYTES = 1 << 30
"""And what their buffers may come to."""
FEW = 512
"""Columns of a batch up to which launching the layers takes longer than running them."""
WAITED = "called a synchronizing"
"""What torch's warning of it says."""
STEP = 64
"""Columns are padded to a multiple of it."""


def record(backbone: LVLM, run: Callable[[], None], trial: Callable[[], None] | None = None) -> Callable[[], None]:
    """``run`` as a CUDA graph, ready to be replayed; ``trial`` is the same without consequences.

    What it computes on the way lies where other graphs of this backbone and stream compute theirs: replays follow each
    other, and results stay where nobody writes as long as their tensors are held.

    Raises:
        RuntimeError: something in it waits for the device.
    """
    current = torch.cuda.current_stream()
    if current not in backbone.pools:
        backbone.pools[current] = Pool()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.inference_mode(False), torch.no_grad(), uncached_autocast():
        with torch.cuda.stream(stream):
            (trial or run)()  # libraries take their workspaces
            with unwaited():
                (trial or run)()
        current.wait_stream(stream)
        with torch.cuda.graph(graph, backbone.pools[current].handle, capture_error_mode="thread_local"):
            run()
    return graph.replay


class Pool:
    """Memory that graphs have in common. torch gives it up with the last of them, and can then record no other in it:
    one that does next to nothing stays."""

    def __init__(self) -> None:
        self.handle, self.graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        self.spot = torch.zeros(1, device="cuda")
        with torch.cuda.graph(self.graph, self.handle, capture_error_mode="thread_local"):
            self.spot.zero_()


@contextmanager
def unwaited() -> Iterator[None]:
    """Refuse a block that waits for the device, while it can be refused: a recording that fails in the midst leaves
    torch's generators and allocator as if it still went on.

    Raises:
        RuntimeError: something waited; says which line of code.
    """
    usual = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(usual)
    for each in found:
        if WAITED in str(each.message):
            raise RuntimeError(f"{Path(each.filename).name}:{each.lineno} waits for the device")


def may(backbone: LVLM) -> bool:
    """Whether what this model does may be replayed: on one GPU that holds all its weights, and not while training."""
    weight = backbone.lm_head.weight
    return backbone.replays and weight.is_cuda and not is_split(weight) and not torch.is_grad_enabled()


def given_up(backbone: LVLM, what: str, error: RuntimeError) -> None:
    """Say that ``what`` could not be recorded, such as for a layer that asks the device for a number, and let be."""
    said = (str(error).splitlines() or [""])[0]
    warnings.warn(f"{what} runs launch by launch, it cannot be recorded as a CUDA graph: {said}", stacklevel=3)
    backbone.replays = False
    torch.cuda.synchronize()


def take(backbone: LVLM, sizes: tuple, make: Callable[[], T], key: tuple | None = None) -> T:
    """What ``make`` made for these sizes before, or makes now. Nobody else gets it until it is given :func:`back`:
    two calls at once, of two threads, have two. ``key``: its :func:`fingerprint`, where that is known."""
    key = (*sizes, *(key or fingerprint(backbone)))
    found = backbone.captured.pop(key, None)
    if found is None:
        with torch.inference_mode(False):  # its buffers are written to by every later call, in whatever mode
            found = make()
    found.key = key
    return found


def back(backbone: LVLM, thing: Any) -> None:
    """Keep what was taken for the next call; the least used ones are let go."""
    kept: dict[Any, Any] = backbone.captured
    kept[thing.key] = thing  # the last one is the latest
    room = BYTES
    for number, key in enumerate(list(kept)[::-1]):
        room -= kept[key].bytes
        if room < 0 or number >= KEPT:
            del kept[key]


def fingerprint(backbone: LVLM) -> tuple:
    """What a graph depends on beside its buffers: where the weights are, which adapters take part, autocast, stream."""
    modules = [backbone.text_model, backbone.lm_head]
    places = tuple(weight.data_ptr() for module in modules for weight in module.parameters())
    adapters = tuple(
        (part.disable_adapters, tuple(part.merged_adapters), tuple(part.active_adapters), part.training)
        for part in backbone.text_model.modules()
        if hasattr(part, "merged_adapters")
    )
    rounding = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return places, adapters, rounding, torch.cuda.current_stream()


def key(backbone: LVLM) -> tuple | None:
    """What :func:`rest` asks for, in time: it takes the host a millisecond or two."""
    return fingerprint(backbone) if may(backbone) else None


def uncached_autocast() -> AbstractContextManager:
    """Autocast as it is, but without its cache of rounded weights, which would not be there at a replay."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


class Block:
    """Decoder layers ``depth`` .. L - 1 on all columns [B, S] of a batch, S at most ``size``."""

    def __init__(self, backbone: LVLM, state: Prefill, size: int) -> None:
        batch, _, width = state.hidden.shape
        self.backbone, self.depth, self.size = backbone, state.depth, size
        self.hidden = state.hidden.new_zeros(batch, size, width)
        self.positions = state.positions.new_zeros(*state.positions.shape[:-1], size)
        self.mask = state.mask.new_zeros(batch, size)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.output = self.hidden
        self.replay: Callable[[], None] | None = None
        self.used = False

    @property
    def bytes(self) -> int:
        held = (self.hidden, self.output, *self.keys.values(), *self.values.values())
        return sum(x.numel() * x.element_size() for x in held)

    def __call__(self, state: Prefill) -> Prefill:
        """``state`` behind all layers; its cache has theirs."""
        start = self.size - state.mask.shape[1]
        for buffer, x in ((self.hidden, state.hidden), (self.mask, state.mask)):
            buffer[:, :start].zero_()
            buffer[:, start:].copy_(x)
        self.positions[..., :start].zero_()
        self.positions[..., start:].copy_(state.positions)
        self.used = True
        (self.replay or self._run)()
        for layer in self.keys:
            keys, values = (x[:, :, start:].clone() for x in (self.keys[layer], self.values[layer]))
            state.cache.update(keys, values, layer)
        return replace(state, hidden=self.output[:, start:].clone(), depth=self.backbone.num_layers)

    def _run(self) -> None:
        text, hidden = self.backbone.text_model, self.hidden
        rope = text.rotary_emb(hidden, self.positions)
        mask = attention.mask(self.backbone.attention, self.mask, self.size, hidden.dtype, full=False)
        for index in range(self.depth, self.backbone.num_layers):
            hidden = text.layers[index](
                hidden, attention_mask=mask, position_embeddings=rope, past_key_values=self, use_cache=True
            )
        self.output = hidden

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As of a cache: layers call it."""
        self.keys[layer], self.values[layer] = keys, values
        return keys, values


def rest(backbone: LVLM, state: Prefill, key: tuple | None = None) -> Prefill | None:
    """``state`` behind all layers, by a :class:`Block`; None where that does not pay, or is not possible."""
    batch, columns = state.mask.shape
    size = -(-columns // STEP) * STEP
    ahead = backbone.num_layers - state.depth
    if not may(backbone) or ahead < 2 or batch * size > FEW or state.hidden.shape[1] != columns or state.added:
        return None
    if backbone.attention in attention.FLASH:
        return None
    sizes = ("block", batch, size, state.depth, state.hidden.dtype, state.positions.ndim)
    block = take(backbone, sizes, lambda: Block(backbone, state, size), key)
    if block.used and block.replay is None:  # not the first time: recording takes as long as some ten runs
        try:
            block.replay = record(backbone, block._run)
        except RuntimeError as error:
            given_up(backbone, "the decoder above the pruned tokens", error)
            return None
    done = block(state)
    back(backbone, block)
    return done
