"""The engine of an evaluation: methods over batches.

Everything goes through *records*: what a method said to one sample in one draw, what that scored, and what it cost, as
the trace of its prefill says. A record is a line of predictions.jsonl. :class:`Evaluation` makes them, batch by batch;
:mod:`.scores` makes rows of them. Nothing is printed or written here, and torch is imported only when something runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from operator import or_
from statistics import fmean
from typing import TYPE_CHECKING, Any
from zlib import crc32

from glimpseprune.config import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from glimpseprune.backbones import LVLM, Seen
    from glimpseprune.cost import Account, Measured
    from glimpseprune.results import Earlier
    from glimpseprune.types import Encoded, Inputs, Layout, Needs, Prefill, Rollout, Sample

Record = dict[str, Any]
"""A line of predictions.jsonl: task (where there are any), method, key, kind, question, prediction, answers, score (of
the first metric; null where a judge gave none), metrics (all, by name), mask (IoU, recall and precision of what was
kept and the evidence, where the sample has boxes), cut (whether max_new_tokens ended the answer, which is scored as it
stands), kept and visual (tokens left, of so many), cuts (tokens left after each decision), mean_tokens, and as ratios
to the unpruned model prefill_flops, decoder_flops (decisions included) and kv."""
Timing = dict[str, Any]
"""A line of timings.jsonl: method, rows of a batch, seconds from its pixels to its first token, the encoding (which all
methods share) included, and on CUDA peak_bytes until its last token."""


@dataclass
class Method:
    """A row of the table: a pruner on a language model, which is ``backbone`` within ``context``."""

    name: str
    pruner: Any
    backbone: LVLM
    module: str
    """The file of pruners/ that it comes from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    context: Callable[[], AbstractContextManager] = nullcontext
    listed: bool = False
    """Asked for by name, and not for comparison: it answers k times, and may be drawn from its gate."""
    budgeted: bool = False
    """Not a control: a budget is its business."""
    follows: str | None = None
    """The method that says how many tokens to keep, sample by sample and stop by stop."""


def build(module: str, options: Any, backbone: LVLM) -> Any:
    """The pruner of a file of pruners/ on ``backbone``; raises as ``pruners.build``, see :func:`naming`."""
    from glimpseprune import pruners

    with naming(module):
        return pruners.build(module, options, backbone).to(backbone.device).eval()


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Errors about options name them as this command does, which has several methods."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("pruner.options.", f"options.{module}.")) from None


# ------------------------------------------------------------------------------------------------------------- batches


class Evaluation:
    """Methods over a stream of batches; all that share a backbone see the same encoded batch.

    Args:
        cfg: an ``EvaluateConfig``.
        methods: in the order in which they run; those on one backbone next to each other, and a method before those
            that follow it.
        metrics: by name; the first one is the accuracy. None in place of a judge, who is asked later.
        earlier: of an evaluation that was interrupted; what its records answer is not asked again.
        task: its name, which records then have.

    Attributes:
        panels: by method and key of the sample, what was kept of the first few samples.
    """

    def __init__(
        self,
        cfg: Any,
        methods: list[Method],
        metrics: Mapping[str, Callable | None],
        earlier: Earlier | None = None,
        task: str = "",
    ) -> None:
        self.cfg, self.methods, self.metrics = cfg, methods, metrics
        self.named = {"task": task} if task else {}
        self.done: dict[tuple[str, str], list[Record]] = defaultdict(list)
        self.timings: list[Timing] = []
        self.sights = Sights()
        self.panels: dict[str, dict[str, Image]] = defaultdict(dict)
        self.drawn: list[Record] = []
        if earlier is not None:
            self.remember(earlier.records)
            from glimpseprune.pictures import unpacked

            for line in earlier.panels:
                self.panels[line["method"]][line["key"]] = unpacked(line["png"])

    def batch(self, inputs: Inputs) -> tuple[list[Record], list[Timing]]:
        """Answer one batch by every method; what is new."""
        import torch

        keys = [sample.key for sample in inputs.samples if not sample.stands_in]
        new: list[Record] = []
        for _, group in groupby(self.methods, key=lambda method: id(method.backbone)):
            methods = [
                method
                for method in group
                if any((method.name, s.key) not in self.done for s in inputs.samples if self.measures(method, s))
            ]
            with torch.inference_mode():
                for method, encoded, encoding in self.encodings(methods, inputs):
                    self.follow(method, inputs.samples)
                    torch.manual_seed(crc32(repr((self.cfg.seed, method.name, keys)).encode()))
                    rollout = self.answer(method, encoded, encoding)
                    made = self.records(method, inputs, encoded, rollout)
                    made = [record for record in made if (method.name, record["key"]) not in self.done]
                    self.remember(made)
                    new += made
        timings, self.timings = self.timings, []
        return new, timings

    def measures(self, method: Method, sample: Sample) -> bool:
        """Whether a method has a record of this sample: it is no stand-in, and has boxes where the method, or the one
        that it follows, goes by them."""
        if sample.stands_in or (sample.boxes is None and getattr(method.pruner, "wants_boxes", False)):
            return False
        return all(self.measures(other, sample) for other in self.methods if other.name == method.follows)

    def remember(self, records: Iterable[Record]) -> None:
        for record in records:
            self.done[record["method"], record["key"]].append(record)

    def encodings(self, methods: list[Method], inputs: Inputs) -> Iterator[tuple[Method, Encoded, Measured]]:
        """Each method with the batch as it sees it: one encoding for all, but for those that look before the tower."""
        from glimpseprune.cost import measure
        from glimpseprune.decoder import see

        shared: tuple[Encoded, Measured] | None = None
        for method in methods:
            backbone = method.backbone
            if hasattr(method.pruner, "look"):
                with method.context(), measure(backbone.device) as measured:
                    encoded = see(backbone, method.pruner, inputs.prompt, inputs.targets)
                yield method, encoded, measured
                continue
            if shared is None:
                needs = reduce(or_, (m.pruner.needs for m in methods if not hasattr(m.pruner, "look")))
                shared = self.sights.encode(backbone, inputs, needs)
            yield method, *shared

    def follow(self, method: Method, samples: Sequence[Sample]) -> None:
        """Tell a control how many tokens to keep of each sample: as many as the method it follows, on average over its
        draws. Of samples that are not scored: none."""
        if method.follows is None:
            return
        import torch

        from glimpseprune.types import Cut, Stop

        stops = method.pruner.stops
        kept = []
        for sample in samples:
            draws = [] if sample.stands_in else [record["cuts"] for record in self.done[method.follows, sample.key]]
            kept.append([round(fmean(cuts)) for cuts in zip(*draws)] or [0] * len(stops))
        none = torch.zeros(len(samples), dtype=torch.long)
        trace = [Cut(Stop(0), none, none), *(Cut(s, torch.tensor(k), none) for s, k in zip(stops, zip(*kept)))]
        method.pruner.mimic(stops, trace)

    def answer(self, method: Method, encoded: Encoded, encoding: Measured) -> Rollout:
        """Prefill and decode a batch; the rows of one prompt are next to each other, k of them for a listed method."""
        from glimpseprune.cost import measure
        from glimpseprune.decoder import prefill
        from glimpseprune.generate import continue_from

        cfg, backbone = self.cfg, method.backbone
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": cfg.max_new_tokens}
        if method.listed and cfg.temperature:
            options |= {"do_sample": True, "temperature": cfg.temperature, "top_k": 0, "top_p": 1.0}
        if method.listed and cfg.sample_keep:
            with method.context():
                return continue_from(backbone, encoded, self.draw(method, encoded), **options)
        options["num_return_sequences"] = cfg.samples if method.listed else 1
        with method.context(), measure(backbone.device) as whole:
            with measure(backbone.device) as first:
                state = prefill(backbone, encoded, method.pruner)
                backbone.logits(state.hidden[:, -1]).argmax(-1)
            rollout = continue_from(backbone, encoded, state, **options)
        timing = {
            **self.named,
            "method": method.name,
            "seconds": encoding.seconds + first.seconds,
            "rows": len(encoded.mask),
        }
        if whole.peak_bytes is not None:
            timing["peak_bytes"] = max(encoding.peak_bytes, whole.peak_bytes)
        self.timings.append(timing)
        return rollout

    def draw(self, method: Method, encoded: Encoded) -> Prefill:
        """Every prompt k times, each with a keep mask of its own, which is drawn from the gate: [B k, S]."""
        import torch

        from glimpseprune.decoder import View, advance, approach, cut, start
        from glimpseprune.rollout import sample_keep

        backbone, pruner = method.backbone, method.pruner
        state = approach(backbone, start(encoded), pruner, encoded)
        index = torch.arange(len(encoded.mask), device=backbone.device).repeat_interleave(self.cfg.samples)  # [B k]
        view = View(state, encoded, backbone, pruner.stops[0])
        keep, _ = sample_keep(state, pruner.logits(view), index)
        flops = pruner.decide(view).flops  # what deciding costs, which a drawn mask does not make cheaper
        flops = torch.as_tensor(flops, device=index.device)[index] if len(flops) else ()  # [B k]
        return advance(backbone, encoded, cut(state, keep, pruner.stops[0], index=index, flops=flops), pruner)

    def scores(
        self, texts: Sequence[str], samples: Sequence[Sample], metric: str | None = None
    ) -> list[float] | list[None]:
        """How right each answer to its sample is by a metric (default: the first), 0 to 1; None where a judge, who
        wants many at once, will say."""
        score = self.metrics[metric or next(iter(self.metrics))]
        if score is None:
            return [None] * len(texts)
        return [float(score(text, sample.answers)) for text, sample in zip(texts, samples)]

    def records(self, method: Method, inputs: Inputs, encoded: Encoded, rollout: Rollout) -> Iterator[Record]:
        """What a method said and cost, for each sample that counts and each draw; pictures on the way."""
        samples = inputs.samples
        times = len(rollout.tokens) // len(samples)
        texts = method.backbone.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
        asked = [sample for sample in samples for _ in range(times)]
        first, *others = self.metrics
        scores = {first: self.scores(texts, asked)} | {name: self.scores(texts, asked, name) for name in others}
        looks = hasattr(method.pruner, "look")
        layouts = method.backbone.layouts(inputs.prompt) if looks else encoded.layouts
        for draw, sample in enumerate(asked):
            if not self.measures(method, sample):
                continue
            row = draw // times
            account = read(method.backbone, encoded, row, rollout.prefill, draw, layouts[row])
            visual = sum(layout.count for layout in layouts[row])
            yield {
                **self.named,
                "method": method.name,
                "key": sample.key,
                "kind": sample.kind,
                "question": sample.question,
                "prediction": texts[draw],
                "answers": list(sample.answers),
                "score": scores[first][draw],
                "metrics": {name: values[draw] for name, values in scores.items()},
                **({} if looks or sample.boxes is None else {"mask": mask_of(rollout.keep[draw], inputs.targets[row])}),
                "cut": not rollout.ended[draw],
                "kept": account.kept,
                "visual": visual,
                "cuts": [int(cut.kept[draw]) for cut in rollout.prefill.trace[1:]],
                "mean_tokens": account.mean_tokens,
                "prefill_flops": account.ratio,
                "decoder_flops": account.decoder_ratio,
                "kv": account.kv_ratio,
            }
            if draw % times == 0:
                self.picture(method, sample, rollout, draw, texts[draw], account.kept / visual)

    def picture(self, method: Method, sample: Sample, rollout: Rollout, draw: int, text: str, kept: float) -> None:
        """What a listed method kept, of the first few samples."""
        there = self.panels[method.name]
        if method.listed and len(there) < self.cfg.pictures and sample.key not in there:
            from glimpseprune.pictures import packed, panel

            lines = [sample.question, f"{text}   (answer: {sample.answers[0]})", f"kept {kept:.1%}"]
            there[sample.key] = made = panel(sample, rollout.keep_maps()[draw], lines)
            self.drawn.append({**self.named, "method": method.name, "key": sample.key, "png": packed(made)})

    def new_panels(self) -> list[Record]:
        """The panels since the last time, for :meth:`.results.Folder.draw`."""
        drawn, self.drawn = self.drawn, []
        return drawn


def mask_of(keep: Tensor, target: Tensor) -> dict[str, float]:
    """How what was kept, bool [V], lies to the evidence."""
    from glimpseprune.tallies import mask_scores

    return {name: round(value, 4) for name, value in mask_scores(keep.cpu(), target.cpu()).items()}


class Sights:
    """What the tower made of the pictures that a batch ended with: samples of one scene are neighbours, so the next
    batch may begin with the same ones. Kept in the memory of the CPU, where it is in nobody's way, at most ``limit``
    bytes; what nobody asked about for the longest time goes first."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.held: dict[Any, tuple[Seen, float]] = {}

    def encode(self, backbone: LVLM, inputs: Inputs, needs: Needs) -> tuple[Encoded, Measured]:
        """As ``backbone.encode``, and what it takes; the seconds of what is held are those that it took once."""
        import torch

        from glimpseprune.backbones import Seen
        from glimpseprune.cost import measure
        from glimpseprune.images import fingerprint

        index = backbone.picture_index(inputs.prompt)  # of each image
        images = [image for sample in inputs.samples for image in sample.images]
        keys = {number: (id(backbone), needs, fingerprint(image)) for number, image in zip(index, images, strict=True)}
        known = {number: self.held.pop(key) for number, key in keys.items() if key in self.held}
        new = [number for number in sorted(keys) if number not in known]
        with measure(backbone.device) as measured:
            parts = [seen.to(backbone.device) for seen, _ in known.values()]
            if new:
                chosen = backbone.choose_pictures(inputs.prompt, torch.tensor(new)) if known else inputs.prompt
                parts.append(backbone.see(chosen, needs))
            order = [*known, *new]
            seen = Seen.join(parts).pick([order.index(number) for number in sorted(keys)])
            encoded = backbone.encode({**inputs.prompt, "seen": seen}, needs, inputs.targets)
        tokens = sum(seen.layouts[number].count for number in new)
        last = set(index[len(index) - len(inputs.samples[-1].images) :])
        for number in last - set(known):
            seconds = measured.seconds * seen.layouts[number].count / tokens
            known[number] = seen[number].to("cpu"), seconds
        measured.seconds += sum(seconds for number, (_, seconds) in known.items() if number not in new)
        self.held |= {keys[number]: sight for number, sight in known.items()}
        while sum(sight.nbytes for sight, _ in self.held.values()) > self.limit:
            del self.held[next(iter(self.held))]
        return encoded, measured


def read(backbone: LVLM, encoded: Encoded, row: int, state: Prefill, draw: int, layouts: Sequence[Layout]) -> Account:
    """What row ``draw`` of a prefill cost, which is row ``row`` of the batch; ``layouts`` of its images as they are
    without a look before the tower, which may have changed them."""
    from glimpseprune import cost

    text = int(encoded.mask[row].sum()) - encoded.counts[row]
    steps = cost.steps_of(state.trace, draw)
    return cost.account(backbone.shapes, text, layouts, steps, looked=encoded.layouts[row])
