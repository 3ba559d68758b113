"""Decoding from a pruned cache, with all that transformers' ``generate`` offers for greedy decoding and sampling.

The prompt is prefilled and pruned here; configuration, logits processors and stopping criteria are prepared by the
model's own ``generate``, which then calls our loop (its public hook ``custom_generate``). Every row decodes at its own
position. Left out: beam search and assisted decoding, which would have to reorder or roll back the pruned cache.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from glimpseprune import host
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError
from glimpseprune.decoder import Pruner, prefill, rows, see
from glimpseprune.steps import decoding, draw
from glimpseprune.types import Encoded, Prefill, Rollout
from glimpseprune.waves import prefilled


@torch.no_grad()
def generate(
    backbone: LVLM,
    pruner: Pruner,
    prompt: Mapping[str, Tensor],
    *,
    targets: list[Tensor] | None = None,
    generation_config: GenerationConfig | None = None,
    synced: bool = False,
    **kwargs: Any,
) -> Rollout:
    """Answer a batch of prompts on their pruned caches.

    Args:
        prompt: what ``backbone.prepare`` or the processor returns.
        targets: box targets per row, for pruners that want them.
        synced: other processes hold parts of the weights, so all go on until the last of them has finished.
        generation_config, kwargs: as for transformers' ``generate``: ``max_new_tokens``, ``do_sample``,
            ``temperature``, ``num_return_sequences`` (they share one prefill), ``stop_strings`` (with ``tokenizer``,
            default: the processor's), ``streamer``, ``logits_processor``, ``stopping_criteria``, ``output_logits``,
            ``output_scores`` ...

    Returns:
        A rollout, rows of one prompt next to each other; ``extra`` holds ``logits`` and ``scores`` [B, T, vocabulary]
        if asked for. Rows that have ended are padded on the right.

    Raises:
        UserError: as ``backbone.encode`` and the pruner; or a decoding mode other than greedy and sampling.
    """
    if synced:  # whose modules must be called equally often
        encoded = see(backbone, pruner, prompt, targets)
        state = prefill(backbone, encoded, pruner)
    else:
        encoded, state = prefilled(backbone, pruner, prompt, targets)
    return continue_from(backbone, encoded, state, generation_config, synced, **kwargs)


@torch.no_grad()
def continue_from(
    backbone: LVLM,
    encoded: Encoded,
    state: Prefill,
    generation_config: GenerationConfig | None = None,
    synced: bool = False,
    **kwargs: Any,
) -> Rollout:
    """:func:`generate` for prompts that have been prefilled; what ``state``'s cache holds is left as it is. Its rows
    may be others than those of ``encoded``, :attr:`Prefill.row` says which."""
    kwargs, streamer = dict(kwargs), kwargs.get("streamer")
    tokenizer = kwargs.pop("tokenizer", None) or getattr(backbone.processor, "tokenizer", None)
    strings = kwargs.pop("stop_strings", None) or getattr(generation_config, "stop_strings", None)
    if strings:
        # transformers loses the tokenizer on its way to a custom loop, so these criteria are made here.
        if tokenizer is None:
            raise UserError("stop_strings needs a tokenizer: pass tokenizer=, or a backbone with a processor")
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or ())
        kwargs["stopping_criteria"] = criteria + [StopStringCriteria(tokenizer, strings)]
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.stop_strings = None
    extra: dict[str, list[Tensor]] = {}
    ended = torch.zeros(0, dtype=torch.bool)

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **_) -> tuple[Prefill, Tensor]:
        nonlocal ended
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UserError(f"{mode.value} is not supported on a pruned cache: use greedy decoding or sampling")
        eos, pad = generation_config.eos_token_id, generation_config.pad_token_id
        if pad is None and eos is not None:
            pad = eos if isinstance(eos, int) else eos[0]
        # Rows of one prompt are neighbours, as transformers expands them.
        index = torch.arange(len(input_ids), device=backbone.device) // (len(input_ids) // len(state.mask))
        first = state if len(index) == len(state.mask) else rows(state, index)
        running = torch.ones(len(index), dtype=torch.bool, device=backbone.device)
        ended = ~running
        # Where others may go on, whose answers may be longer, only they say when it ends.
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria) and not synced]
        last = min(limits, default=math.inf)
        size, length, alive = input_ids.shape[1], 0, True
        logits, steps = backbone.logits(first.hidden[:, -1]).float(), None  # [B, vocabulary]
        news: deque[News] = deque()
        while alive:
            scores = logits_processor(input_ids, logits)
            for name, value in (("logits", logits), ("scores", scores)):
                if getattr(generation_config, f"output_{name}"):
                    extra.setdefault(name, []).append(value)
            tokens = draw(scores.softmax(-1)) if generation_config.do_sample else scores.argmax(-1)  # [B]
            if pad is not None:
                tokens = tokens.masked_fill(~running, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            live = running
            for criterion in stopping_criteria:
                stops = live & criterion(input_ids, None)
                running = running & ~stops
                if not isinstance(criterion, (MaxLengthCriteria, MaxTimeCriteria)):
                    ended = ended | stops
            news.append(News(live, running, tokens, synced))
            full = input_ids.shape[1] >= last
            while alive and news and (full or len(news) > news[0].delay):
                was_alive, alive, told = news.popleft().read()
                length += was_alive
                if streamer is not None:
                    streamer.put(told)
            if alive and not full:
                steps = decoding(backbone, first, graphs=not synced) if steps is None else steps
                logits = steps(tokens)
            alive = alive and not full
        if steps is not None:
            steps.close()
        if streamer is not None:
            streamer.end()
        for values in extra.values():
            del values[length:]
        return first, input_ids[:, size : size + length]

    mask = encoded.mask[state.row].long()
    first, tokens = backbone.model.generate(
        encoded.input_ids[state.row],
        attention_mask=mask,
        position_ids=mask.cumsum(1),  # of no use to our loop; keeps the model from deriving its own
        generation_config=generation_config,
        custom_generate=loop,
        **kwargs,
    )
    times = len(tokens) // len(mask)
    return Rollout(
        tokens=tokens,
        keep=[row for row in kept(encoded, state) for _ in range(times)],
        layouts=[encoded.layouts[row] for row in state.row.tolist() for _ in range(times)],
        prefill=state if times == 1 else first,
        extra={name: torch.stack(values, 1) for name, values in extra.items()},
        ended=ended,
    )


class News:
    """How a step went, on its way to the host: whether rows were and are running, and the tokens.

    On a GPU the host hears of it two steps later, and does not wait in between: what has been decoded of rows that had
    all ended by then is thrown away. ``synced``: whether any row of any process is running, which all hear at once.
    """

    def __init__(self, live: Tensor, running: Tensor, tokens: Tensor, synced: bool) -> None:
        goes_on = running.any()
        synced = synced and dist.is_initialized()
        if synced:
            goes_on = goes_on.long()
            dist.all_reduce(goes_on, dist.ReduceOp.MAX)
        self.delay = 2 if tokens.is_cuda and not synced else 0
        self.flags = host.download(torch.stack([live.any(), goes_on.bool()]))
        self.tokens = host.download(tokens)

    def read(self) -> tuple[bool, bool, Tensor]:
        before, after = self.flags().tolist()
        return before, after, self.tokens()


def kept(encoded: Encoded, state: Prefill) -> list[Tensor]:
    """Per row of ``state`` bool [V]: the visual tokens of the prompt that are left."""
    visual = encoded.visual[state.row]
    columns = torch.zeros_like(visual)
    row, column = state.visual.nonzero(as_tuple=True)
    columns[row, state.source[row, column]] = True
    return [columns[row][own] for row, own in enumerate(visual)]
