"""Early: a private look. After K layers T layers of the method's own, which begin as copies of the base's next, run
on a fork of the hidden states; what all tokens of the question attend to in them is what the predictor reads.

docs/method.md §1.10. After TwigVLM++ (arXiv 2503.14075 v3), where the question's last token looks through three such
layers, a head scores, and a fixed number of tokens stays: here every token of the question looks, and predictor,
threshold and budgets are those of ``glimpse``. Of the last private layer queries and keys are all that is needed, so it
holds and computes nothing else (unless an answer is to come out of it, ``complete``): one private layer costs a
fraction of a layer. Private weights are trained and saved in float32, whatever the base's; beside a base of half
precision they multiply in its precision. Left out: TwigVLM++'s drafting of answers by the private layers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from glimpseprune import attention, sharded
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.cost import layer_flops, query_key_flops, row_flops
from glimpseprune.decoder import View, append, branch, run_layers
from glimpseprune.host import Columns
from glimpseprune.pruners._columns import depth_after
from glimpseprune.pruners._gated import Gated, GatedOptions, Gaze, best, question
from glimpseprune.types import Decision, Stop


@dataclass
class Options(GatedOptions):
    prune_layer: int = option(
        0, "prune after this decoder layer, 0-based; -1: before the first (K = prune_layer + 1)", least=-1, most=1000
    )
    private_layers: int = option(
        1, "private layers T, which begin as copies of the decoder's K to K + T - 1", least=1, most=1000
    )
    complete: bool = option(
        False, "the last private layer is whole, so that an answer comes out of it (loss.answer, loss.answer_kl)"
    )
    last_layer: int | None = option(
        None,
        "after this decoder layer no visual token is left; earlier layers' K/V stay; null: some stay",
        least=0,
        most=1000,
    )


class Pruner(Gated):
    def __init__(self, backbone: LVLM, options: Options) -> None:
        depth, count = depth_after(options.prune_layer, backbone.num_layers), options.private_layers
        if count > (most := backbone.num_layers - depth):
            raise UserError(
                f"pruner.options.private_layers={count}: behind layer prune_layer={options.prune_layer} there are "
                f"{most} of this decoder's {backbone.num_layers} layers to copy"
            )
        super().__init__(backbone, options, range(depth, depth + count))
        if options.last_layer is not None:
            if not options.prune_layer < options.last_layer < backbone.num_layers - 1:
                raise UserError(
                    f"pruner.options.last_layer={options.last_layer}: give one behind prune_layer="
                    f"{options.prune_layer} and before the decoder's last, {backbone.num_layers - 1}"
                )
            self.stops += (Stop(options.last_layer + 1, prune_cache=False),)
        self.private = nn.ModuleList(copied(backbone.text_model.layers[layer]) for layer in self.probe_layers)
        if not options.complete:
            strip(self.private[-1])
        self.vip = self.predictor(backbone)

    def decide(self, view: View) -> Decision:
        if view.stop == self.stops[0]:
            return super().decide(view)
        return Decision(torch.zeros_like(view.state.visual))

    def look_flops(self, view: View) -> Tensor:
        """Per row [B]: the private layers on all columns, queries and keys of the last one, and the rows of the
        question's tokens once more."""
        decoder, columns = view.backbone.shapes.decoder, view.state.mask.sum(1)  # [B]
        looks, count = self.looks(view.encoded.input_ids, view.encoded.mask, view.backbone), len(self.private)
        whole = (count - 1) * layer_flops(decoder, columns)
        return whole + query_key_flops(decoder, columns) + row_flops(decoder, columns, count * looks[view.state.row])

    def looks(self, input_ids: Tensor, mask: Tensor, backbone: LVLM) -> Tensor:
        """How many tokens look at each prompt [B, S], [B]."""
        return question(input_ids, mask, backbone.image_token_id).sum(1)

    def probe(self, view: View) -> Tensor:
        """What the question's tokens see of each visual token, log of their mean attention: [N, T x H],
        layer-major."""
        gaze, last = self._gaze(view), self.probe_layers[-1]

        def see(layer: int, *given: Tensor | float) -> None:
            gaze(layer, *given)
            if layer == last:
                raise attention.Enough

        with suppress(attention.Enough), self.casting(view):
            run_layers(view.backbone, branch(view.state), last + 1, probe=see, layers=self._layers())
        return gaze.found()

    def with_answer(self, view: View, answer_ids: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The look and, in the same pass, an answer out of the private layers, as if they were the decoder's last.

        Args:
            view: at the first stop.
            answer_ids, answer_mask: [B, T], right-padded.

        Returns:
            Keep logits as :meth:`all_logits`, and next-token logits [B, T, vocabulary] for ``answer_ids``.

        Raises:
            UserError: the last private layer is not whole.
        """
        if not self.options.complete:
            raise UserError(
                "loss.answer and loss.answer_kl need an answer out of the private layers: pruner.options.complete=true"
            )
        backbone, state, length = view.backbone, branch(view.state), answer_ids.shape[1]
        if length > 1:
            with torch.no_grad():  # nothing below K trains
                tokens = append(state, backbone.embed(answer_ids[:, :-1]), answer_mask[:, :-1])
                tokens = run_layers(backbone, tokens, state.depth)
            state = replace(tokens, hidden=torch.cat([state.hidden, tokens.hidden], 1))  # [B, S + T - 1, D]
        gaze = self._gaze(view, answer_mask[:, :-1])
        with self.casting(view):
            state = run_layers(backbone, state, self.probe_layers[-1] + 1, probe=gaze, layers=self._layers())
        return self.predict(view, gaze.found()), backbone.logits(state.hidden[:, -length:].to(view.state.hidden.dtype))

    def casting(self, view: View) -> AbstractContextManager:
        """Private weights multiply in the precision of the hidden states, where they have another."""
        hidden = view.state.hidden
        if next(self.private.parameters()).dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
            return nullcontext()
        return torch.autocast(hidden.device.type, hidden.dtype)

    def _layers(self) -> dict[int, nn.Module]:
        return dict(zip(self.probe_layers, self.private))

    def _gaze(self, view: View, behind: Tensor | None = None) -> Gaze:
        """Of the question's tokens, which are a prompt's last columns; ``behind`` bool [B, T'] come behind them."""
        state, encoded = view.state, view.encoded
        rows = slice(None) if state.whole else state.row.cpu()
        asked = question(encoded.known.ids, encoded.known.mask, view.backbone.image_token_id)[rows]
        looking = Columns.counted(asked.sum(1).tolist()).mask  # [B, n], on the host
        mask = state.mask if behind is None else torch.cat([state.mask, behind], 1)  # [B, S + T']
        size, count = state.mask.shape[1], looking.shape[1]
        columns = torch.arange(mask.shape[1], device=mask.device)
        order = columns <= columns[size - count : size, None]  # [n, S + T'] causal
        visible = mask[:, None] & order  # [B, n, S + T']
        return Gaze(view, self.probe_layers, looking, visible, mask.shape[1] - size)


to_budget = best


def copied(layer: nn.Module) -> nn.Module:
    """A decoder layer of the same kind and with the same numbers, in float32; adapters on it stay behind."""
    attn = layer.self_attn
    made = type(layer)(attn.config, attn.layer_idx)
    there = {name.replace("base_layer.", ""): x for name, x in layer.named_parameters()}
    for name, mine in made.named_parameters():
        if not mine.is_meta:
            sharded.fill(mine, sharded.whole(there[name]))
    return made


def strip(layer: nn.Module) -> None:
    """Leave of a decoder layer what its queries and keys need."""
    attn = layer.self_attn
    width = attn.head_dim * attn.config.num_key_value_heads
    attn.v_proj, attn.o_proj, layer.post_attention_layernorm, layer.mlp = Nothing(width), None, None, None


class Nothing(nn.Module):
    """In the place of the values of a layer that ends with its queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)
