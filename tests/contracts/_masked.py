"""The oracle of the contract: what the driver computes, in one forward over all columns in which masks do the pruning.

Nothing is dropped, gathered or cached here. Every layer gets all columns of the prompt and all tokens behind it, a mask
that says which of them it may see, and positions of its own; states that a method merges are written at their columns.
:class:`Witness` takes down what a pruner really decided, over the columns of the unpruned prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glimpseprune.backbones import LVLM
from glimpseprune.decoder import View, approach, rows, start
from glimpseprune.rollout import prefilled
from glimpseprune.types import Decision, Encoded, Prefill, Stop


@dataclass
class Taken:
    """A decision, over the columns of the unpruned prompt."""

    stop: Stop
    left: Tensor  # [R, S] bool, text included
    merged: Tensor | None = None  # [R, S, D], states of the visual tokens that are left

    @classmethod
    def at(cls, stop: Stop, state: Prefill, keep: Tensor, size: int, merge: Tensor | None = None) -> Taken:
        """``keep`` [R, S'] at ``stop``, taken on ``state``, of a prompt of ``size`` columns."""
        keep = (keep | ~state.visual) & state.mask
        row, column = keep.nonzero(as_tuple=True)
        left = torch.zeros(len(keep), size, dtype=torch.bool, device=keep.device)
        left[row, state.source[row, column]] = True
        if merge is None:
            return cls(stop, left)
        row, column = (keep & state.visual).nonzero(as_tuple=True)
        merged = merge.new_zeros(len(keep), size, merge.shape[-1])
        merged[row, state.source[row, column]] = merge
        return cls(stop, left, merged)


class Witness:
    """A pruner whose decisions are written down; ``busy`` while it decides."""

    def __init__(self, pruner: Any) -> None:
        self.pruner, self.stops, self.needs = pruner, pruner.stops, pruner.needs
        self.taken: list[Taken] = []
        self.decisions: list[Decision] = []
        self.busy = False
        if hasattr(pruner, "look"):
            self.look = pruner.look

    def decide(self, view: View) -> Decision:
        self.busy = True
        decision = self.pruner.decide(view)
        self.busy = False
        size = view.encoded.mask.shape[1]
        self.taken.append(Taken.at(view.stop, view.state, decision.keep, size, decision.merge))
        self.decisions.append(decision)
        return decision


class Replay:
    """Takes the decisions of a :class:`Witness` again, at no cost."""

    def __init__(self, witness: Witness) -> None:
        self.stops, self.needs, self.decisions = witness.stops, type(witness.needs)(), list(witness.decisions)

    def decide(self, view: View) -> Decision:
        decision = self.decisions.pop(0)
        return Decision(decision.keep, decision.merge)


@torch.no_grad()
def rolled_out(backbone: LVLM, encoded: Encoded, pruner: Any, row: Tensor, keep: Tensor | None) -> list[Taken]:
    """The decisions of one rollout of prompt ``row`` [1]; the first one is ``keep`` [1, S], if that is given."""
    witness, state = Witness(pruner), approach(backbone, start(encoded), pruner)
    prefilled(backbone, encoded, witness, state, row, keep)
    if keep is None:
        return witness.taken
    stop = pruner.stops[0] if pruner.stops else Stop(0)
    return [Taken.at(stop, rows(state, row), keep, encoded.mask.shape[1]), *witness.taken]


@dataclass
class Masked:
    """What one forward over all columns saw and made."""

    hidden: Tensor  # [R, S + T, D]
    left: Tensor  # [R, S] columns of the prompt after the last decision
    seen: list[Tensor]  # per layer [R, S]: columns of the prompt that it ran
    held: list[Tensor]  # per layer [R, S]: those that its cache shows to the tokens behind
    positions: Tensor  # [R, S] or [3, R, S], after the last decision


def masked(backbone: LVLM, encoded: Encoded, row: Tensor, taken: Sequence[Taken], extra: Tensor) -> Masked:
    """Prompts ``row`` [R] of ``encoded`` with decisions ``taken`` on them, and behind them ``extra`` [R, T, D]."""
    layers, size, count = backbone.num_layers, encoded.mask.shape[1], extra.shape[1]
    total, device = size + count, extra.device
    now, positions = encoded.mask[row], encoded.positions[..., row, :]
    seen, numbered, waiting = [], [], list(taken)
    for layer in range(layers + 1):
        while waiting and waiting[0].stop.depth == layer:
            decision = waiting.pop(0)
            now = decision.left
            if decision.stop.renumber:
                positions = (now.cumsum(1) - 1).expand(positions.shape)
        seen.append(now)
        numbered.append(positions)
    assert not waiting
    held = []
    for layer in range(layers):
        above = [decision.left for decision in taken if decision.stop.depth > layer and decision.stop.prune_cache]
        held.append(above[-1] if above else seen[layer])

    hidden = torch.cat([encoded.embeds[row], extra], 1)  # [R, S + T, D]
    causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    behind = torch.ones(len(row), count, dtype=torch.bool, device=device)
    for layer in range(layers + 1):
        for decision in taken:
            if decision.stop.depth == layer and decision.merged is not None:
                where = (decision.left & encoded.visual[row])[..., None]
                hidden = torch.cat([torch.where(where, decision.merged, hidden[:, :size]), hidden[:, size:]], 1)
        if layer == layers:
            break
        shown = (torch.cat([columns, behind], 1)[:, None] for columns in (seen[layer], held[layer]))
        shown = torch.cat([x.expand(-1, n, -1) for x, n in zip(shown, (size, count))], 1)  # [R, S + T, S + T]
        visible = (shown & causal | torch.eye(total, dtype=torch.bool, device=device))[:, None]
        if backbone.attention == "eager":
            visible = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)
        last = numbered[layer].masked_fill(~seen[layer], -1).amax(-1, keepdim=True)  # [R, 1] or [3, R, 1]
        last = last.amax(0, keepdim=True).expand(3, -1, -1) if last.ndim == 3 else last
        follow = last + 1 + torch.arange(count, device=device)
        rope = backbone.text_model.rotary_emb(hidden, torch.cat([numbered[layer].clamp(min=0), follow], -1))
        hidden = backbone.text_model.layers[layer](hidden, attention_mask=visible, position_embeddings=rope)
        if layer in encoded.added:
            hidden = torch.cat([hidden[:, :size] + encoded.added[layer][row], hidden[:, size:]], 1)
    return Masked(hidden, seen[-1], seen[:-1], held, numbered[-1])
