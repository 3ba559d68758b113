"""Decoding, one token after another, on buffers of a fixed size: on a GPU one replayed graph, not a thousand launches.

An eager step of a 7B decoder launches some 1,300 kernels, which takes three times as long as they run. A CUDA graph
launches them all at once, but only on the same addresses: so keys and values of a pruned prompt are copied into buffers
with room for what is decoded, and everything that changes from step to step (where a token goes, what it sees, its
position) is a number on the device. What is captured stays with the backbone and serves every later call of that size.

Without a graph (on a CPU, or under ZeRO, which fetches weights in between) the same steps run on views of the buffers
that end with the last token. ``Steps(fixed=True)`` is the captured computation run eagerly: the graph's exact twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glimpseprune import replay
from glimpseprune.types import Frame, Prefill

if TYPE_CHECKING:
    from glimpseprune.backbones import LVLM

ROOM = 128
"""Tokens that there is room for at first, and columns by whose multiples the sizes of graphs go."""


class Span:
    """Layers whose caches hold the same columns: all, but for methods that leave the earlier layers' caches alone."""

    def __init__(self, layers: range, own: Frame | Prefill, width: int, room: int) -> None:
        """``width``: columns for the prompt; it is left-padded to them."""
        device, batch = own.mask.device, len(own.mask)
        self.layers, self.width = layers, width
        self.columns = torch.arange(width + room, device=device)
        self.mask = torch.ones(batch, width + room, dtype=torch.bool, device=device)  # of padding and prompt
        self.position = own.next_position.clone()  # [B] of the first token
        self.full = False


def spans_of(state: Prefill) -> Iterator[tuple[range, Frame | Prefill]]:
    """Layers, and whose columns they hold."""
    below = 0
    for frame in state.frames:
        if frame.stop > below:
            yield range(below, frame.stop), frame
        below = max(below, frame.stop)
    if state.depth > below:
        yield range(below, state.depth), state


class Steps:
    """Tokens behind the prompts of a prefilled batch: ``logits = steps(tokens)``.

    Args:
        state: prompts behind all layers; only their sizes count until :meth:`fill`.
        room: tokens that there is room for.
        fixed: compute what a graph would: all columns, whatever of them is taken.
    """

    def __init__(self, backbone: LVLM, state: Prefill, room: int = ROOM, fixed: bool = False) -> None:
        self.backbone, self.room, self.fixed = backbone, room, fixed
        device, batch = state.mask.device, len(state.mask)
        self.axes = state.positions.shape[:-2]  # (3,) of M-RoPE
        self.spans = [Span(layers, own, _width(own.mask.shape[1], fixed), room) for layers, own in spans_of(state)]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for span in self.spans:
            for layer in state.cache.layers[span.layers.start : span.layers.stop]:
                for buffers, like in ((self.keys, layer.keys), (self.values, layer.values)):
                    heads, width = like.shape[1], like.shape[-1]
                    buffers.append(like.new_zeros(batch, heads, span.width + room, width))
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # of tokens that have been run
        self.done = 0  # the same, on the host
        self.logits: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def fill(self, state: Prefill) -> None:
        """Begin behind these prompts, which are of the sizes that this was made for."""
        self.count.zero_()
        self.done = 0
        for span, (layers, own) in zip(self.spans, spans_of(state)):
            start = span.width - own.mask.shape[1]
            span.mask[:, :start] = False
            span.mask[:, start : span.width] = own.mask
            span.position.copy_(own.next_position)
            span.full = own is state and state.known is not None and state.known.full and start == 0
            for index in layers:
                layer = state.cache.layers[index]
                for buffer, x in ((self.keys[index], layer.keys), (self.values[index], layer.values)):
                    buffer[:, :, :start].zero_()  # what was there before may be no number
                    buffer[:, :, start : span.width].copy_(x)
                    buffer[:, :, span.width :].zero_()

    def lend(self, state: Prefill) -> None:
        """Have the cache of these prompts, which were filled in, lie here, so that it is held once."""
        for span, (layers, own) in zip(self.spans, spans_of(state)):
            part = slice(span.width - own.mask.shape[1], span.width)
            for index in layers:
                layer = state.cache.layers[index]
                layer.keys, layer.values = self.keys[index][:, :, part], self.values[index][:, :, part]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocabulary], float32, of what comes behind ``tokens`` [B]."""
        if self.done == self.room:
            self._grow()
        self.tokens.copy_(tokens)
        (self.replay or self._run)()
        self.done += 1
        logits = self.logits.float()
        return logits.clone() if logits is self.logits else logits  # the next step's are written to the same place

    def close(self) -> None:
        """There are no more tokens; what was recorded serves the next."""
        if self.replay is not None and self.bytes <= replay.BYTES:
            replay.back(self.backbone, self)

    def _run(self) -> None:
        backbone, text = self.backbone, self.backbone.text_model
        hidden = backbone.embed(self.tokens[:, None])  # [B, 1, D]
        for span in self.spans:
            position = (span.position + self.count)[:, None].expand(*self.axes, -1, 1)
            rope = text.rotary_emb(hidden, position)
            place, mask = self._seen(span)
            for index in span.layers:
                hidden = text.layers[index](
                    hidden,
                    attention_mask=mask,
                    position_embeddings=rope,
                    past_key_values=_Buffers(self, place),
                    use_cache=True,
                    step=True,
                )
        self.logits = backbone.logits(hidden[:, -1])
        self.count += 1

    def _seen(self, span: Span) -> tuple[Tensor | int, Tensor | None]:
        """Where the token goes, and what it may see, [B, 1, 1, columns]; None: all that there is."""
        if not self.fixed:
            size = span.width + self.done + 1
            return size - 1, None if span.full else span.mask[:, None, None, :size]
        place = span.width + self.count  # [1]
        return place, (span.mask & (span.columns <= place))[:, None, None]

    def _grow(self) -> None:
        """Twice the room; a graph is recorded anew, for the addresses are others."""
        room = self.room * 2
        for span in self.spans:
            more = span.mask.new_ones(len(span.mask), room - self.room)
            span.mask = torch.cat([span.mask, more], 1)
            span.columns = torch.arange(span.width + room, device=span.mask.device)
        for buffers in (self.keys, self.values):
            for index, x in enumerate(buffers):
                buffers[index] = torch.nn.functional.pad(x, (0, 0, 0, room - self.room))
        self.room = room
        if self.replay is not None:
            self.replay = None
            self.capture()

    def rows(self, index: Tensor) -> None:
        """Go on with the rows ``index`` [B'] alone; not with a graph."""
        for span in self.spans:
            span.mask, span.position = span.mask[index], span.position[index]
        self.keys, self.values = ([x[index] for x in buffers] for buffers in (self.keys, self.values))
        self.tokens = self.tokens[index]

    def capture(self) -> None:
        """Record the step; what the buffers hold changes at places that are free, and ``count`` is put back."""
        count = self.count.clone()

        def trial() -> None:
            self._run()
            self.count.copy_(count)

        self.replay = replay.record(self.backbone, self._run, trial)
        self.count.copy_(count)


class _Buffers:
    """What a layer takes for a cache."""

    def __init__(self, steps: Steps, place: Tensor | int) -> None:
        self.steps, self.place = steps, place

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held = self.steps.keys[layer], self.steps.values[layer]
        if isinstance(self.place, Tensor):
            for buffer, x in zip(held, (keys, values)):
                buffer.index_copy_(2, self.place, x.to(buffer.dtype))
            return held
        for buffer, x in zip(held, (keys, values)):
            buffer[:, :, self.place : self.place + 1] = x
        return tuple(buffer[:, :, : self.place + 1] for buffer in held)


def decoding(backbone: LVLM, state: Prefill, graphs: bool = True) -> Steps:
    """Steps behind prefilled prompts; recorded ones where that may be, unless ``graphs`` is False. To be :meth:`~Steps.
    close`d after the last."""
    if graphs and replay.may(backbone):
        spans = tuple((layers, _width(own.mask.shape[1], True)) for layers, own in spans_of(state))
        sizes = ("steps", len(state.mask), spans, state.cache.layers[0].keys.dtype, state.positions.ndim)
        steps = replay.take(backbone, sizes, lambda: Steps(backbone, state, fixed=True))
        steps.fill(state)
        try:
            if steps.replay is None:
                steps.capture()
        except RuntimeError as error:
            replay.given_up(backbone, "decoding", error)
        else:
            if steps.bytes > replay.BYTES:  # too large to be kept
                steps.lend(state)
            return steps
    steps = Steps(backbone, state)
    steps.fill(state)
    steps.lend(state)
    return steps


def _width(size: int, fixed: bool) -> int:
    return -(-size // ROOM) * ROOM if fixed else size


def draw(probabilities: Tensor) -> Tensor:
    """One of each row [B, vocabulary] by its probability, [B]: ``torch.multinomial``'s own numbers, without its wait
    for the device to say that they are probabilities."""
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)
