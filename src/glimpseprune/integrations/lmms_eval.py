"""lmms-eval's tasks on pruned models: every backbone, every method, by one adapter.

``lmms-eval --model glimpseprune --model_args ckpt=runs/demo,max_keep=.1 --tasks pope --batch_size 8 --log_samples``

``model_args`` are :class:`._asked.Arguments` and the options of the pruning method. What each answer cost is in the
samples log, under ``token_counts``, by the names of predictions.jsonl. Sharing between processes, resuming and caching
are lmms-eval's; an answer out of its cache has no costs, for it keeps texts only. Left out, and refused by name:
log-likelihoods, several turns, beams. See docs/lmms-eval.md; written for lmms-eval 0.7.3.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from rich.progress import track

from glimpseprune import checkpoint, lookup
from glimpseprune.config import UserError
from glimpseprune.decoder import prefill, see
from glimpseprune.evaluation import read
from glimpseprune.generate import continue_from
from glimpseprune.integrations._asked import Arguments, Decoding, Turn, arguments, decoding, require_options, turn
from glimpseprune.options import BackboneOptions


@dataclass
class Costs(TokenCounts):
    """Tokens and FLOPs of one answer. ``input_tokens`` are those of the unpruned prompt; the others are those of a
    line of predictions.jsonl, FLOPs as ratios to the unpruned model's."""

    visual: int = 0
    kept: int = 0
    mean_tokens: float = 0.0
    decoder_flops: float = 0.0
    prefill_flops: float = 0.0
    kv: float = 0.0
    cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For the samples log."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Request(NamedTuple):
    """``args`` of an instance for a chat model."""

    context: str
    doc_to_messages: Any
    generation: dict[str, Any]
    doc_id: int
    task: str
    split: str


class GlimpsePrune(lmms):
    """A chat model of lmms-eval.

    Raises:
        UserError: as :func:`._asked.arguments` and ``checkpoint.load``; or a method that goes by boxes, of which tasks
            have none.
    """

    is_simple = False

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        self.arguments, options = arguments(model_args)
        self.model = load(self.arguments, options)
        self.said: set[tuple[str, ...]] = set()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def batch_size(self) -> int:
        return self.arguments.batch_size

    def clean(self) -> None:
        """Give its memory back: lmms-eval has all answers, and may start a judge in its place."""
        self.model = None
        super().clean()

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise UserError(f"{requests[0].task_name}: it asks for log-likelihoods; a task that generates is needed here")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise UserError(f"{requests[0].task_name}: it has several rounds; a conversation of one turn is needed here")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; those that decode alike are batched together.

        Raises:
            UserError: as :func:`._asked.turn` and :func:`._asked.decoding`, for the first document of each task before
                anything is answered; or a picture that the processor refuses.
        """
        asked = [Request(*request.args) for request in requests]
        if not asked:  # of more processes than documents
            return []
        for request in {request.task: request for request in reversed(asked)}.values():
            self.turn(request)
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(asked):
            alike[json.dumps(request.generation, sort_keys=True, default=str)].append(place)
        todo = list(self.batches(asked, alike.values()))
        made: dict[int, GenerationResult] = {}
        began = time.perf_counter()
        for places, how in track(todo, description="answering", disable=self.rank != 0):
            turns = [self.turn(asked[place]) for place in places]
            try:
                made |= zip(places, self.answers(turns, how))
            except UserError as error:  # of a picture that the processor refuses, such as one of a line
                which = ", ".join(f"{asked[place].task} {asked[place].doc_id}" for place in places)
                raise UserError(f"among documents {which}: {error}") from None
        self.log([made[place].token_counts for place in made], time.perf_counter() - began)
        return [made[place] for place in range(len(asked))]

    def batches(self, asked: Sequence[Request], alike: Any) -> Iterator[tuple[list[int], Decoding]]:
        """Places of requests, and how to decode them."""
        for places in alike:
            first = asked[places[0]]
            how = decoding(first.generation, checkpoint.GENERATION, first.task, self.arguments.max_new_tokens)
            if how.left_out and (first.task, *how.left_out) not in self.said:
                self.said.add((first.task, *how.left_out))
                logger.warning(f"{first.task}: generation_kwargs without a meaning here: {', '.join(how.left_out)}")
            for at in range(0, len(places), self.batch_size):
                yield places[at : at + self.batch_size], how

    def turn(self, request: Request) -> Turn:
        messages = request.doc_to_messages(self.task_dict[request.task][request.split][request.doc_id])
        found = turn(messages, f"{request.task}, document {request.doc_id}", self.arguments.images_first)
        return replace(found, system=self.arguments.system) if found.system is None else found

    def answers(self, turns: Sequence[Turn], how: Decoding) -> list[GenerationResult]:
        """Of a batch; prompts with different system prompts one after the other."""
        made: dict[int, GenerationResult] = {}
        for system in dict.fromkeys(each.system for each in turns):
            places = [place for place, each in enumerate(turns) if each.system == system]
            made |= zip(places, self.batch([turns[place] for place in places], system, how))
        return [made[place] for place in range(len(turns))]

    @torch.inference_mode()
    def batch(self, turns: Sequence[Turn], system: str | None, how: Decoding) -> list[GenerationResult]:
        backbone, pruner = self.model.backbone, self.model.pruner
        tokenizer = backbone.processor.tokenizer
        prompt = self.model.prepare([turn.question for turn in turns], [turn.images for turn in turns], system)
        encoded = see(backbone, pruner, prompt)
        state = prefill(backbone, encoded, pruner)
        rollout = continue_from(backbone, encoded, state, **how.arguments)
        layouts = backbone.layouts(prompt) if hasattr(pruner, "look") else encoded.layouts
        made = []
        for row, text in enumerate(tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)):
            account = read(backbone, encoded, row, rollout.prefill, row, layouts[row])
            costs = Costs(
                input_tokens=int(prompt["attention_mask"][row].sum()),
                output_tokens=said(rollout.tokens[row].tolist(), backbone.model.generation_config, tokenizer),
                visual=sum(layout.count for layout in layouts[row]),
                kept=account.kept,
                mean_tokens=account.mean_tokens,
                decoder_flops=account.decoder_ratio,
                prefill_flops=account.ratio,
                kv=account.kv_ratio,
                cut=not rollout.ended[row] and how.cut(text) == text,
            )
            made.append(GenerationResult(how.cut(text), costs))
        return made

    def log(self, costs: Sequence[Costs], seconds: float) -> None:
        """For ``throughput`` in lmms-eval's results: means over the answers of this process."""
        tokens = sum(each.output_tokens for each in costs)
        means = {
            "kept": fmean(each.kept / each.visual for each in costs),
            **{name: fmean(getattr(each, name) for each in costs) for name in ("decoder_flops", "prefill_flops", "kv")},
        }
        log_metrics(seconds, tokens, tokens / seconds, means)


def load(given: Arguments, options: dict[str, Any]) -> checkpoint.GlimpsePrune:
    """The model that ``given`` names, its method with these ``options``; what is wrong is said before it is loaded."""
    saved = None if given.ckpt is None else checkpoint.read_config(given.ckpt)
    method = given.pruner or ("none" if saved is None else saved.pruner.name)
    require_options(method, options)
    if getattr(lookup.find("glimpseprune.pruners", method).Pruner, "wants_boxes", False):
        raise UserError(f"pruner={method}: it goes by boxes, of which the tasks of lmms-eval have none")
    chosen = {name: getattr(given, name) for name in ("dtype", "attention", "min_pixels", "max_pixels")}
    chosen |= {"path": given.backbone}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    own = saved is not None and method == saved.pruner.name
    return checkpoint.load(
        given.ckpt,
        backbone=BackboneOptions(**chosen) if saved is None else replace(saved.backbone, **chosen),
        pruner=None if own else method,
        device=device_of(given.device),
        **options,
    )


def device_of(name: str) -> str:
    """Of several processes each one has a GPU."""
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def said(tokens: Sequence[int], generation: Any, tokenizer: Any) -> int:
    """How many ``tokens`` an answer has before its end."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ends |= set(generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id])
    return next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
