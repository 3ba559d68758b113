"""What methods with the visual importance predictor share: its options, the rows of attention that it reads, the keep
logits that it makes of them, and the decision (docs/method.md §1.3 to §1.5). A method's own file says what looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glimpseprune import attention
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.cost import Vip, vip_flops
from glimpseprune.decoder import View
from glimpseprune.host import Columns, upload
from glimpseprune.pruners._columns import at_columns, depth_after, require_minimum
from glimpseprune.types import Decision, Needs, Stop
from glimpseprune.vip import VIP, window_ids


@dataclass
class GatedOptions:
    prune_layer: int = option(
        0, "prune after this decoder layer, 0-based; beyond the last: after it", least=0, most=1000
    )
    vision_layers: tuple[int, ...] = option(
        (-1,),
        "vision-tower layers that condition the predictor, one per block; negative ones count from the last",
        least=-1000,
        most=1000,
    )
    threshold: float = option(0.5, "keep a token if its probability is above this", least=0, most=1)
    max_keep: float | None = option(None, "keep at most this fraction of the visual tokens", least=0, most=1)
    min_keep: int = option(1, "keep at least so many visual tokens; wins over max_keep", least=0, most=10**6)
    width: int = option(256, "width F of the predictor", least=1, most=65536)
    cond_width: int = option(512, "width of the condition inside the predictor", least=1, most=65536)
    num_heads: int = option(4, "heads of the predictor", least=1, most=1024)
    windowed: bool = option(
        False, "the predictor attends within the vision tower's windows, not whole images", was="window"
    )
    deep_supervision: bool = option(False, "every block of the predictor has an output and a loss")
    logit_cap: float | None = option(
        None, "l -> cap tanh(l / cap), so that dropped tokens can come back", above=0, most=1e6
    )
    init_bias: float = option(0.0, "initial bias of the keep logits", least=-1e3, most=1e3)


class Gated(nn.Module):
    """A method that decides by the predictor's logits; ``probe(view)`` [N, probe layers x H] is what it has seen, and
    ``look_flops(view)`` [B] what seeing cost.

    Args:
        probe_layers: whose attention it sees, as :class:`Gaze` knows them.
    """

    vip: VIP

    def __init__(self, backbone: LVLM, options: GatedOptions, probe_layers: Sequence[int]) -> None:
        super().__init__()
        self.options = options
        self.stops: tuple[Stop, ...] = (Stop(depth_after(options.prune_layer, backbone.num_layers)),)
        self.probe_layers = tuple(probe_layers)
        named = "pruner.options.vision_layers"
        if not options.vision_layers:
            raise UserError(f"{named} needs at least one layer")
        self.vision_layers = tuple(backbone.tower_layer(layer, named) for layer in options.vision_layers)
        self.needs = Needs(states=self.vision_layers)
        if options.windowed and backbone.window is None:
            raise UserError("pruner.options.windowed=true: this backbone's vision tower has no windows")
        self.window = backbone.window if options.windowed else None

    def predictor(self, backbone: LVLM) -> VIP:
        """A new one, as the options say.

        Raises:
            UserError: its widths and heads do not fit together.
        """
        options = self.options
        try:
            return VIP(
                len(self.probe_layers) * backbone.num_heads,
                backbone.vision_width,
                len(self.vision_layers),
                width=options.width,
                cond_width=options.cond_width,
                num_heads=options.num_heads,
                deep_supervision=options.deep_supervision,
                init_bias=options.init_bias,
            )
        except ValueError as error:
            raise UserError(f"pruner.options: {error}") from error

    def decide(self, view: View) -> Decision:
        return Decision(at_columns(view, self.mask(self.logits(view), view.counts)), flops=self.flops(view))

    def mask(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        """The tokens that stay, bool [N], by their keep logits [N], for rows of ``counts`` tokens."""
        options = self.options
        return chosen(logits, counts, options.threshold, options.max_keep, options.min_keep)

    def flops(self, view: View) -> Tensor:
        """Per row [B]: the look, and the predictor on every image."""
        vip, shapes = Vip.of(self), view.backbone.shapes
        predictor = [vip_flops(vip, shapes, segments) for segments in self.segments(view)]
        looking = self.look_flops(view)
        return looking + upload(predictor, looking.device)

    def segments(self, view: View) -> list[list[int]]:
        """Per row: sizes of the segments of tokens within which the predictor attends."""
        if view.untouched and self.window is None:
            return [[rows * cols for rows, cols in row] for row in view.encoded.grids]
        ids = window_ids([grid for row in view.encoded.grids for grid in row], self.window)
        rows = ids[view.tokens.cpu()].split(view.counts)
        return [row.unique(return_counts=True)[1].tolist() for row in rows]

    def logits(self, view: View) -> Tensor:
        """Keep logits [N]; sigmoid of them is the probability to keep. Gradients reach what looks, and ``vip``."""
        return self.all_logits(view)[-1]

    def all_logits(self, view: View) -> Tensor:
        """Keep logits of every output of the predictor, the deciding one last: [1, N], or [blocks, N] under deep
        supervision. ``view.state`` holds the prompt, run at least to the last probe layer."""
        return self.predict(view, self.probe(view))

    def precision(self, view: View) -> AbstractContextManager:
        """The predictor multiplies in bfloat16 beside a language model of half precision on a GPU, where its own
        float32 would take longer than the layers that it spares; sums, RoPE and logits stay float32. Training has its
        own ``trainer.precision``."""
        hidden = view.state.hidden
        if self.training or not hidden.is_cuda or hidden.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)

    def predict(self, view: View, probe: Tensor) -> Tensor:
        """:meth:`all_logits`, of a ``probe`` [N, probe layers x H]."""
        states = [view.pick(view.encoded.states[layer]) for layer in self.vision_layers]
        grids = [grid for row in view.encoded.grids for grid in row]
        left = () if view.untouched else (view.tokens, view.rows)
        with self.precision(view):
            logits = self.vip(probe, states, grids, self.window, *left)
        logits = logits.float()  # [outputs, N]
        cap = self.options.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Gaze:
    """Notes what n positions see of the visual tokens, the mean over them: the probe of their layers' calls.

    Args:
        layers: whose calls count.
        looking: bool [B, n], on the host: which positions are no padding.
        visible: bool [B, n, S'], the keys of a call that each of them sees.
        behind: queries of a call that come behind them.
        kind: ``log_softmax`` (of the whole row) or ``logits``.
    """

    def __init__(
        self,
        view: View,
        layers: Sequence[int],
        looking: Tensor,
        visible: Tensor,
        behind: int = 0,
        kind: str = "log_softmax",
    ) -> None:
        self.view, self.layers, self.visible, self.behind, self.kind = view, tuple(layers), visible, behind, kind
        device = view.state.mask.device
        self.count, self.padded = looking.shape[1], not looking.all()
        self.numbers, self.looking = upload(looking.sum(1), device), upload(looking, device)  # [B], [B, n]
        self.seen: dict[int, Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        last = query.shape[2] - self.behind
        rows = attention.logits(query[:, :, last - self.count : last], key, scaling)  # [B, H, n, S']
        if self.kind == "log_softmax":
            rows = rows.masked_fill(~self.visible[:, None], torch.finfo(rows.dtype).min).log_softmax(-1)
        rows = rows[..., : self.view.state.mask.shape[1]]  # [B, H, n, S]
        if self.padded:
            rows = rows.masked_fill(~self.looking[:, None, :, None], -torch.inf)
        row = rows.logsumexp(2) - self.numbers.float().log()[:, None, None]  # [B, H, S]
        self.seen[layer] = self.view.of_visual(row.transpose(1, 2))  # [N, H]

    def found(self) -> Tensor:
        """[N, layers x H]"""
        return torch.cat([self.seen[layer] for layer in self.layers], -1)


def question(input_ids: Tensor, mask: Tensor, image_token: int) -> Tensor:
    """The tokens of each prompt's question, bool [B, S]: all that come behind its last image, the turn's end and the
    answer's beginning with them; images come first in a prompt. Never none: the last token, where an image is last."""
    images = (input_ids == image_token) & mask
    ahead = images.long().flip(1).cumsum(1).flip(1)  # [B, S] images' tokens here or later
    order = mask.long().cumsum(1)
    last = order == order[:, -1:]
    return mask & ((ahead == 0) | (last & images))


def best(keep_ratio: float, backbone: LVLM) -> dict[str, float]:
    """The options with which the tokens with the highest logits stay, whatever their probabilities."""
    return {"threshold": 0.0, "max_keep": keep_ratio}


def chosen(
    logits: Tensor, counts: Sequence[int], threshold: float = 0.5, max_keep: float | None = None, min_keep: int = 1
) -> Tensor:
    """Which visual tokens stay: bool [N] from keep logits [N] of rows with ``counts`` tokens (docs/method.md §1.5).

    A row's tokens are counted over all its images: probability above ``threshold``; if that is more than the fraction
    ``max_keep``, the top floor(max_keep V); if it is fewer than ``min_keep``, the top ``min_keep``.

    Raises:
        UserError: ``min_keep`` above the tokens of a row.
    """
    for count in counts:
        require_minimum(min_keep, count)
    rows, sizes = logits.detach().float(), torch.tensor(counts)
    columns = Columns.counted(counts)
    if not columns.full:  # rows of unequal length: padding has the least of all logits
        places = upload(columns.mask.flatten().nonzero()[:, 0], rows.device)
        rows = rows.new_full((columns.mask.numel(),), -torch.inf).index_copy(0, places, rows)
    rows = rows.view(columns.mask.shape)  # [B, V]
    keep = rows.sigmoid() > threshold
    number = keep.sum(1)  # [B]
    wanted = number
    if max_keep is not None:
        most, totals = (upload(x, rows.device) for x in ((max_keep * sizes.double()).long(), sizes.double()))
        wanted = torch.where(number / totals > max_keep, most, number)
    wanted = wanted.clamp(min=min_keep)[:, None]
    rank = rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # [B, V]
    keep = torch.where(wanted == number[:, None], keep, rank < wanted).flatten()
    return keep if columns.full else keep[places]
