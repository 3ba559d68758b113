"""What a vision tower makes of pictures: made once, and laid into as many prompts as ask about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glimpseprune.types import Layout

_KINDS = ("states", "keys", "attention", "added")


@dataclass(eq=False)
class Seen:
    """Some pictures as the decoder gets them; ``len`` of it are there, ``seen[1]`` is the second of them."""

    layouts: list[Layout]
    """Of each picture."""
    sizes: dict[str, Tensor]
    """Per picture, what the processor says of it beside its pixels; on the CPU."""
    tokens: Tensor  # [n, D], one for every place of the layouts, in order
    states: dict[int, Tensor] = field(default_factory=dict)  # as in Encoded, [N, ...]; 0 for tokens that are no cell
    keys: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)
    """Decoder layer -> [n, D], added to its output at the places of the tokens."""

    def __post_init__(self) -> None:
        self.sizes = {name: x.cpu() for name, x in self.sizes.items()}

    def __len__(self) -> int:
        return len(self.layouts)

    def __getitem__(self, picture: int) -> Seen:
        return self.pick([range(len(self))[picture]])

    def __repr__(self) -> str:
        counts = ", ".join(str(layout.count) for layout in self.layouts)
        return f"Seen({len(self)} pictures of {counts} tokens)"

    @property
    def nbytes(self) -> int:
        """Of all tensors on the device."""
        held = [self.tokens, *(x for kind in _KINDS for x in getattr(self, kind).values())]
        return sum(x.nbytes for x in held)

    def pick(self, pictures: Sequence[int]) -> Seen:
        """These pictures in this order, repeats allowed; a copy, unless they are all there are."""
        if list(pictures) == list(range(len(self))):
            return self
        places, counts = [layout.places for layout in self.layouts], [layout.count for layout in self.layouts]

        def chosen(x: Tensor, sizes: list[int]) -> Tensor:
            parts = x.split(sizes)
            return torch.cat([parts[picture] for picture in pictures])

        return Seen(
            [self.layouts[picture] for picture in pictures],
            {name: x[list(pictures)] for name, x in self.sizes.items()},
            chosen(self.tokens, places),
            **{
                kind: {
                    layer: chosen(x, places if kind == "added" else counts) for layer, x in getattr(self, kind).items()
                }
                for kind in _KINDS
            },
        )

    @staticmethod
    def join(several: Sequence[Seen]) -> Seen:
        """The pictures of all, one after the other; of the tower's layers those that all have."""
        if len(several) == 1:
            return several[0]
        first = several[0]
        return Seen(
            [layout for each in several for layout in each.layouts],
            {name: torch.cat([each.sizes[name] for each in several]) for name in first.sizes},
            torch.cat([each.tokens for each in several]),
            **{
                kind: {
                    layer: torch.cat([getattr(each, kind)[layer] for each in several])
                    for layer in getattr(first, kind)
                    if all(layer in getattr(each, kind) for each in several)
                }
                for kind in _KINDS
            },
        )

    def to(self, device: torch.device | str) -> Seen:
        """On another device."""
        moved = {kind: {layer: x.to(device) for layer, x in getattr(self, kind).items()} for kind in _KINDS}
        return Seen(self.layouts, self.sizes, self.tokens.to(device), **moved)
