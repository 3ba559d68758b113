"""GlimpsePrune: one learned glimpse token looks at the frozen prompt, a predictor turns its gaze into a keep mask.

docs/method.md §1.2 to §1.5, checked against HVision-NKU/GlimpsePrune@091a3d5. The glimpse is exactly one decode step on
a fork of the prompt's cache, so nothing else ever sees it and there is nothing to crop. Ours is the choice of what
looks (``sight``, docs/method.md §1.9): the published single position, or one for every token of the question, with the
same weights. Left out of the published code: several glimpse tokens that are the same for every question, glimpse
embeddings for some layers only, and its alternative predictors (no published checkpoint uses them; importing one says
so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, option
from glimpseprune.cost import layer_flops, row_flops
from glimpseprune.decoder import View, append, branch, run_layers
from glimpseprune.host import Columns, upload
from glimpseprune.pruners._gated import Gated, GatedOptions, Gaze, best, question
from glimpseprune.sharded import whole
from glimpseprune.types import Ride

PROBES = ("logits", "log_softmax")
SIGHTS = ("one", "question")
PUBLISHED = {
    "reduce_layer": "prune_layer",
    "selected_layers": "probe_layers",
    "selected_visual_layers": "vision_layers",
    "reduce_threshold": "threshold",
    "max_remain_ratio": "max_keep",
    "min_remain_num": "min_keep",
    "attn_fuse_size": "width",
    "visual_cond_size": "cond_width",
    "attn_fuse_num_heads": "num_heads",
    "le_dropout_prob": "dropout",
    "use_attention_logits": "probe",
    "attn_fuse_global": "windowed",
    "deep_supervision": "deep_supervision",
}
"""Keys of a published config.json -> our options (``probe`` is a choice and ``windowed`` the opposite)."""


@dataclass
class Options(GatedOptions):
    probe_layers: tuple[int, ...] = option(
        (0,), "decoder layers whose glimpse logits are seen, <= prune_layer", least=0, most=1000
    )
    dropout: float = option(0.1, "dropout on the glimpse vectors in training", least=0, below=1)
    sight: str = option("one", "what looks: one position, as published, or question: one for each of its tokens")
    probe: str = option("logits", "what the predictor sees of a row of attention: logits (raw) or log_softmax")
    init_token: str | None = option(None, "the glimpse starts as a copy of this token of the vocabulary; null: random")

    def __post_init__(self) -> None:
        for name, choices in (("probe", PROBES), ("sight", SIGHTS)):
            if (given := getattr(self, name)) not in choices:
                raise UserError(f"pruner.options.{name}='{given}': choices are {', '.join(choices)}")
        if self.sight == "question" and self.init_token is not None:
            raise UserError(
                "pruner.options.init_token: with sight=question the glimpse starts as the question; leave it out"
            )


class Projection(nn.Linear):
    """W x + b, and for tokens t beside them W x + b + W t; in one call, around which ZeRO-3 puts a split W together."""

    def forward(self, embeddings: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[L, 1, D], or with ``tokens`` [B, T, D] [L, B, T, D]."""
        raw = super().forward(embeddings)
        return raw if tokens is None else raw[:, None] + F.linear(tokens, self.weight)


class Glimpse(nn.Module):
    """The glimpse's vectors, one per decoder layer: e_i = norm(W E_i + b), or of a token x of the question
    e_i(x) = norm(W (E_i + x / rms(x)) + b)."""

    def __init__(self, layers: int, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(layers, 1, width) * 0.02)
        self.proj = Projection(width, width)
        self.norm = nn.RMSNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        """[L, 1, D]; for ``tokens`` [B, T, D], embeddings of the question's, [L, B, T, D]."""
        if tokens is not None:
            tokens = F.rms_norm(tokens.float(), tokens.shape[-1:]).to(self.embeddings.dtype)
        return self.dropout(self.norm(self.proj(self.embeddings, tokens).to(self.embeddings.dtype)))

    @torch.no_grad()
    def imitate(self, embedding: Tensor) -> None:
        """Start as a token with this input ``embedding`` [D]: e_i = embedding for all i.

        A copy of the prompt's last token looks where that token looks, which is where the answer is about to be read.
        """
        scale = embedding.pow(2).mean().sqrt()
        self.repeat(scale)
        self.embeddings.copy_((embedding / scale).expand_as(self.embeddings))

    @torch.no_grad()
    def repeat(self, scale: Tensor) -> None:
        """Start as copies of the question's tokens, whose embeddings have this root mean square."""
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        nn.init.zeros_(self.embeddings)
        self.norm.weight.fill_(scale)


class Pruner(Gated):
    def __init__(self, backbone: LVLM, options: Options) -> None:
        super().__init__(backbone, options, options.probe_layers)
        _check(options, backbone)
        self.glimpse = Glimpse(backbone.num_layers, backbone.hidden_size, backbone.norm_eps, options.dropout)
        if options.init_token is not None:
            self.glimpse.imitate(token_embedding(backbone, options.init_token))
        if options.sight == "question":
            table = whole(backbone.text_model.embed_tokens.weight)
            self.glimpse.repeat(torch.linalg.vector_norm(table, dtype=torch.float32) / table.numel() ** 0.5)
        self.vip = self.predictor(backbone)

    def look_flops(self, view: View) -> Tensor:
        """Per row [B]: the glimpse through the probed layers, and its logits once more."""
        decoder, probed = view.backbone.shapes.decoder, max(self.probe_layers) + 1
        columns = view.state.mask.sum(1)  # [B]
        looks = self.looks(view.encoded.input_ids, view.encoded.mask, view.backbone)[view.state.row]  # [B]
        glimpse = probed * layer_flops(decoder, looks, columns)
        glimpse += row_flops(decoder, columns + looks, len(set(self.probe_layers)) * looks)
        if self.options.sight == "question":
            glimpse += 2 * decoder.width**2 * looks  # W on its tokens
        return glimpse

    def ride(self, view: View) -> Ride | None:
        """The glimpse, to go along with the prompt; None in training, where its gradient does not need the prompt's."""
        if self.training:
            return None
        vectors, looking = self._vectors(view)
        gaze = self._gaze(view, looking)
        return Ride(vectors, looking, gaze, self.probe_layers, gaze.found)

    def probe(self, view: View) -> Tensor:
        """What the glimpse sees of each visual token: [N, probe layers x H], layer-major."""
        rider, found = view.state.ridden or (None, None)
        if rider is self:
            return found
        return self._run(view, max(self.probe_layers) + 1)[0]

    def with_answer(self, view: View, answer_ids: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The glimpse and, behind it, the answer, in one pass: what the published recipe's answer loss is taken from.

        The glimpse's own output predicts the first answer token, and the answer sees the glimpse. The prompt below is
        neither run again nor differentiated: none of its columns sees the glimpse.

        Args:
            view: a state that holds the whole prompt, unpruned, run through all L layers.
            answer_ids, answer_mask: [B, T], right-padded.

        Returns:
            Keep logits as :meth:`all_logits`, and next-token logits [B, T, vocabulary] for ``answer_ids``.
        """
        probe, hidden = self._run(view, view.backbone.num_layers, answer_ids, answer_mask)
        return self.predict(view, probe), view.backbone.logits(hidden[:, -1 - answer_ids.shape[1] : -1])

    def looks(self, input_ids: Tensor, mask: Tensor, backbone: LVLM) -> Tensor:
        """How many positions look at each prompt [B, S], [B]."""
        if self.options.sight == "one":
            return torch.ones_like(input_ids[:, 0])
        return question(input_ids, mask, backbone.image_token_id).sum(1)

    def _vectors(self, view: View) -> tuple[Tensor, Tensor]:
        """Those of the positions that look, [L, B, n, D], and, on the host, which of them are no (left) padding, bool
        [B, n]."""
        state, encoded = view.state, view.encoded
        if self.options.sight == "one":
            alone = torch.ones(len(state.mask), 1, dtype=torch.bool)
            return self.glimpse()[:, None].expand(-1, len(alone), -1, -1).to(state.hidden.dtype), alone
        rows = slice(None) if state.whole else state.row.cpu()
        asked = question(encoded.known.ids, encoded.known.mask, view.backbone.image_token_id)[rows]  # [B, S]
        known = Columns.counted(asked.sum(1).tolist())
        # The last n columns of a stable sort by whether they are asked: these, behind padding.
        order = asked.long().argsort(dim=1, stable=True)[:, -known.mask.shape[1] :]  # [B, n]
        order = upload(order, state.hidden.device)
        embeds = encoded.embeds if state.whole else encoded.embeds[state.row]
        tokens = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))  # [B, n, D]
        tokens = tokens.masked_fill(~upload(known.mask, tokens.device)[..., None], 0)
        return self.glimpse(tokens).to(state.hidden.dtype), known.mask

    def _run(
        self, view: View, stop: int, answer_ids: Tensor | None = None, answer_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append the glimpse, and an answer, on a fork, to depth ``stop``. Its probe and the last hidden states."""
        vectors, looking = self._vectors(view)
        embeds, mask = vectors[0], looking
        if answer_ids is not None:
            embeds = torch.cat([embeds, view.backbone.embed(answer_ids)], 1)  # [B, n + T, D]
            mask = torch.cat([upload(looking, answer_mask.device), answer_mask], 1)  # [B, n + T]
        gaze = self._gaze(view, looking, answer_mask)
        state = append(branch(view.state), embeds, mask)
        state = run_layers(view.backbone, state, stop, probe=gaze, probed=self.probe_layers, inject=vectors)
        return gaze.found(), state.hidden

    def _gaze(self, view: View, looking: Tensor, answer_mask: Tensor | None = None) -> Gaze:
        """Of the positions ``looking`` bool [B, n] behind the prompt, and columns of an answer [B, T] behind them."""
        mask, count = view.state.mask, looking.shape[1]
        seen = upload(looking, mask.device)
        seen = seen if answer_mask is None else torch.cat([seen, answer_mask], 1)
        answer = seen.shape[1] - count
        # As published over the whole key row: an answer behind the glimpse counts in the sum, though the glimpse does
        # not attend to it. Only what is of the glimpse itself is seen in its order.
        later = torch.ones(count, count, dtype=torch.bool, device=mask.device).triu(1)
        later = F.pad(later, (mask.shape[1], answer))  # [n, S + n + T]
        visible = torch.cat([mask, seen], 1)[:, None] & ~later  # [B, n, S + n + T]
        return Gaze(view, self.probe_layers, looking, visible, answer, self.options.probe)


to_budget = best


def token_embedding(backbone: LVLM, token: str) -> Tensor:
    """Input embedding [D] of a token of the vocabulary.

    Raises:
        UserError: there is no such token.
    """
    number = token_id(backbone.processor, token)
    return whole(backbone.text_model.embed_tokens.weight)[number].float()


def token_id(processor: Any, token: str) -> int:
    """Of a token of the vocabulary; raises as :func:`token_embedding`."""
    vocabulary = processor.tokenizer.get_vocab() if processor is not None else {}
    if token not in vocabulary:
        raise UserError(f"pruner.options.init_token={token!r} is not a token of this backbone's vocabulary")
    return vocabulary[token]


def state_from_published(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The content of a published ``new_modules_gp.pt`` under the names of our state dict.

    Raises:
        UserError: a part is missing.
    """
    parts = {"attn_fuser": "vip", "le_proj": "glimpse.proj", "le_norm": "glimpse.norm"}
    if missing := {*parts, "learnable_embeddings"} - set(state):
        raise UserError(f"not published weights of GlimpsePrune: no '{sorted(missing)[0]}' in them")
    renamed = {f"{ours}.{name}": value for part, ours in parts.items() for name, value in state[part].items()}
    return renamed | {"glimpse.embeddings": state["learnable_embeddings"]}


def options_from_published(config: Mapping[str, Any]) -> Options:
    """Options that reproduce a published checkpoint, from its config.json.

    Raises:
        UserError: a setting that this implementation does not have, or a key that is missing.
    """
    fixed = {
        "attn_fuse_type": "AttnFuserV1",
        "attn_fuse_hidden_act": "silu",
        "le_length": 1,
        "le_norm_type": "rmsnorm",
        "le_layers": list(range(config.get("num_hidden_layers", 0))),
        "ori_attn_supervision": False,
        "use_ref_masks": False,
        "use_zero_masks": False,
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(f"published config: {key}={config[key]} is not supported, only {value}")
    config = {"attn_fuse_global": True, **config}  # LLaVA's tower has no windows, and its configs not this key
    if missing := [key for key in PUBLISHED if key not in config]:
        raise UserError(f"not a published config of GlimpsePrune: it has no {', '.join(missing)}")
    options = {ours: config[theirs] for theirs, ours in PUBLISHED.items()}
    options["windowed"] = not options["windowed"]
    options["probe"] = "logits" if options["probe"] else "log_softmax"
    options |= {key: tuple(options[key]) for key in ("probe_layers", "vision_layers")}
    return Options(**options)


def _check(options: Options, backbone: LVLM) -> None:
    """Raise UserError where the options do not fit together or not the backbone."""
    where = "pruner.options."
    if not options.probe_layers:
        raise UserError(f"{where}probe_layers needs at least one layer")
    last = min(options.prune_layer, backbone.num_layers - 1)
    if wrong := [layer for layer in options.probe_layers if not 0 <= layer <= last]:
        raise UserError(f"{where}probe_layers={wrong}: the glimpse runs through layers 0 to {last} (prune_layer)")
