"""The engine of an evaluation: methods over batches, and tables of what they said.

Everything goes through *records*: what a method said to one sample in one draw, what that scored, and what it cost, as
the trace of its prefill says. A record is a line of predictions.jsonl. :class:`Evaluation` makes them, batch by batch;
:class:`Scores` makes rows of them, whatever process or earlier, interrupted evaluation they come from. Nothing is
printed or written here, and torch is imported only when something runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from operator import or_
from statistics import fmean, median
from typing import TYPE_CHECKING, Any
from zlib import crc32

from glimpseprune.config import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from glimpseprune.backbones import LVLM, Seen
    from glimpseprune.cost import Account, Measured
    from glimpseprune.results import Earlier
    from glimpseprune.types import Encoded, Inputs, Layout, Needs, Prefill, Rollout, Sample

Record = dict[str, Any]
"""A line of predictions.jsonl: method, key, kind, question, prediction, answers, score (of the first metric), metrics
(all, by name), cut (whether max_new_tokens ended the answer, which is scored as it stands), kept and visual (tokens
left, of so many), cuts (tokens left after each decision), mean_tokens, and as ratios to the unpruned model
prefill_flops, decoder_flops (decisions included) and kv."""
Timing = dict[str, Any]
"""A line of timings.jsonl: method, rows of a batch, seconds from its pixels to its first token, the encoding (which all
methods share) included, and on CUDA peak_bytes until its last token."""

COSTS = ("mean_tokens", "prefill_flops", "decoder_flops", "kv")


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
        metrics: by name; the first one is the accuracy.
        earlier: of an evaluation that was interrupted; what its records answer is not asked again.

    Attributes:
        panels: by method and key of the sample, what was kept of the first few samples.
    """

    def __init__(
        self, cfg: Any, methods: list[Method], metrics: Mapping[str, Callable], earlier: Earlier | None = None
    ) -> None:
        self.cfg, self.methods, self.metrics = cfg, methods, metrics
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
        timing = {"method": method.name, "seconds": encoding.seconds + first.seconds, "rows": len(encoded.mask)}
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

    def scores(self, texts: Sequence[str], samples: Sequence[Sample], metric: str | None = None) -> list[float]:
        """How right each answer to its sample is by a metric (default: the first), 0 to 1. A judge, who wants many at
        once, belongs here."""
        score = self.metrics[metric or next(iter(self.metrics))]
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
                "method": method.name,
                "key": sample.key,
                "kind": sample.kind,
                "question": sample.question,
                "prediction": texts[draw],
                "answers": list(sample.answers),
                "score": scores[first][draw],
                "metrics": {name: values[draw] for name, values in scores.items()},
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
        from glimpseprune.pictures import packed, panel

        there = self.panels[method.name]
        if method.listed and len(there) < self.cfg.pictures and sample.key not in there:
            lines = [sample.question, f"{text}   (answer: {sample.answers[0]})", f"kept {kept:.1%}"]
            there[sample.key] = made = panel(sample, rollout.keep_maps()[draw], lines)
            self.drawn.append({"method": method.name, "key": sample.key, "png": packed(made)})

    def new_panels(self) -> list[Record]:
        """The panels since the last time, for :meth:`.results.Folder.draw`."""
        drawn, self.drawn = self.drawn, []
        return drawn


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


# -------------------------------------------------------------------------------------------------------------- tables


class Scores:
    """Records and timings, and the rows of scores.json that they make.

    Args:
        metrics: their names; the first one is the accuracy.
        names: of the methods, in the order of the table.
        drawn: methods whose answers are drawn, k times per sample; they get ``pass_at_k``.
        bootstrap: resamplings behind the intervals; 0 leaves them out.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        drawn: Mapping[str, int],
        bootstrap: int = 0,
        seed: int = 0,
        names: Iterable[str] = (),
    ) -> None:
        self.metrics, self.drawn, self.bootstrap, self.seed = metrics, drawn, bootstrap, seed
        self.samples: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        self.timings: dict[str, list[Timing]] = defaultdict(list)
        self.spreads: dict[frozenset[str], Spread | None] = {}
        for name in names:
            self.samples[name]

    def add(self, records: Iterable[Record], timings: Iterable[Timing] = ()) -> None:
        for record in records:
            self.samples[record["method"]][record["key"]].append(record)
        for timing in timings:
            self.timings[timing["method"]].append(timing)

    def rows(self) -> list[dict[str, Any]]:
        """One row per method and kind of question, ``all`` first; none of a method that is :meth:`left_out`."""
        rows = []
        names = [name for name in self.samples if name not in self.left_out()]
        for kind, kinds in self.kinds().items():
            found = {name: self.of_kind(name, kinds) for name in names}
            rows += [self.row(name, kind, kinds, list(found[name].values()), found) for name in found if found[name]]
        return rows

    def left_out(self) -> dict[str, tuple[int, int]]:
        """Methods that were measured on half of the samples or less (the oracle, where few have boxes), whose rows
        would not be about the same data as the others': on how many, of how many."""
        counts = {name: len(by_key) for name, by_key in self.samples.items()}
        most = max(counts.values(), default=0)
        return {name: (count, most) for name, count in counts.items() if 2 * count <= most}

    def kinds(self) -> dict[str, list[str]]:
        """Each kind as the kinds that it is made of; ``all`` is all of them."""
        found = sorted({draws[0]["kind"] for by_key in self.samples.values() for draws in by_key.values()})
        return {"all": found} | {kind: [kind] for kind in found if kind != "all"}

    def of_kind(self, name: str, kinds: Sequence[str]) -> dict[str, list[Record]]:
        return {key: draws for key, draws in self.samples[name].items() if draws[0]["kind"] in kinds}

    def row(
        self, name: str, kind: str, kinds: list[str], samples: list[list[Record]], found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Of the ``samples`` of one method, each with its draws, beside those of all that were ``found``: it is
        compared with the unpruned model on the samples that it has, which with the oracle may be some of all."""
        score, spread = mean_score(samples), self.spread(name)
        same = [found["none"][key] for key in found[name] if key in found["none"]] if "none" in found else []
        base = mean_score(same) if same else None
        row: dict[str, Any] = {"method": name, "kind": kind, "accuracy": round(score, 4)}
        if spread is not None:
            row["accuracy_ci"] = spread.accuracy(name, kinds)
        row["relative"] = round(score / base, 4) if base else None
        row["difference"] = None if base is None else round(score - base, 4)
        if spread is not None and base is not None:
            row["difference_ci"] = spread.difference(name, "none", kinds)
        row["kept"] = round(over(samples, lambda record: record["kept"] / record["visual"]), 4)
        row["kept_tokens"] = round(over(samples, lambda record: record["kept"]), 2)
        for key in COSTS:
            row[key] = round(over(samples, lambda record, key=key: record[key]), 2 if key == "mean_tokens" else 4)
        row["cut"] = round(over(samples, lambda record: record.get("cut", False)), 4)
        row["n"] = len(samples)
        for metric in self.metrics[1:]:
            row[metric] = round(over(samples, lambda record, metric=metric: record["metrics"][metric]), 4)
        if name in self.drawn:
            best = fmean(max(record["score"] for record in draws) for draws in samples)
            row |= {"pass_at_k": round(best, 4), "k": self.drawn[name]}
        return row | (self.speed(name) if kind == "all" else {})

    def speed(self, name: str) -> dict[str, Any]:
        """Median over batches of the seconds to the first token, and the most memory, where it was measured."""
        timings = self.timings[name]
        peaks = [timing["peak_bytes"] for timing in timings if "peak_bytes" in timing]
        found = {"time_to_first_token": round(median(t["seconds"] for t in timings), 4)} if timings else {}
        return found | ({"peak_bytes": max(peaks)} if peaks else {})

    def spread(self, name: str) -> Spread | None:
        """The scores of all methods that answered the samples of this one, on resamplings of these; ask once all are
        there."""
        keys = frozenset(self.samples[name])
        if keys not in self.spreads:
            self.spreads[keys] = self.resampled(sorted(keys)) if self.bootstrap and keys else None
        return self.spreads[keys]

    def resampled(self, keys: Sequence[str]) -> Spread:
        import torch

        from glimpseprune.intervals import resampled

        names = [name for name, answered in self.samples.items() if all(key in answered for key in keys)]
        kinds = self.kinds()["all"]
        scores = [[fmean(r["score"] for r in self.samples[name][key]) for name in names] for key in keys]
        of = [kinds.index(self.samples[names[0]][key][0]["kind"]) for key in keys]
        sums = resampled(torch.tensor(scores, dtype=torch.float64), torch.tensor(of), self.bootstrap, self.seed)
        return Spread(names, kinds, sums)

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """:func:`over_needing_kinds`, with differences and intervals."""
        found = over_needing_kinds(rows)
        for name, scores in found["methods"].items() if found else ():
            scores["difference"] = round(scores["accuracy"] - found["methods"]["none"]["accuracy"], 4)
            if (spread := self.spread(name)) is not None:
                scores["accuracy_ci"] = spread.accuracy(name, found["kinds"])
                scores["difference_ci"] = spread.difference(name, "none", found["kinds"])
        return found


@dataclass
class Spread:
    """Sums of scores [R, K, M + 1] on R resamplings, of ``names`` over ``kinds``; see :mod:`.intervals`."""

    names: list[str]
    kinds: list[str]
    sums: Any

    def accuracy(self, name: str, kinds: Sequence[str]) -> list[float]:
        return self._interval(self._means(kinds)[:, self.names.index(name)])

    def difference(self, name: str, base: str, kinds: Sequence[str]) -> list[float]:
        """Of two methods on the same samples."""
        means = self._means(kinds)
        return self._interval(means[:, self.names.index(name)] - means[:, self.names.index(base)])

    def _means(self, kinds: Sequence[str]) -> Any:
        sums = self.sums[:, [self.kinds.index(kind) for kind in kinds]].sum(1)  # [R, M + 1]
        return sums[:, :-1] / sums[:, -1:]

    @staticmethod
    def _interval(drawn: Any) -> list[float]:
        from glimpseprune.intervals import interval

        return interval(drawn)


def over(samples: Iterable[Sequence[Record]], value: Callable[[Record], float]) -> float:
    """Mean over samples of the mean over their draws."""
    return fmean(fmean(map(value, draws)) for draws in samples)


def mean_score(samples: Iterable[Sequence[Record]]) -> float:
    return over(samples, lambda record: record["score"])


def over_needing_kinds(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Each method over the kinds whose accuracy without any visual token after K is below a third of the full one.

    The other kinds say nothing about pruning: the text had read their answer before. None where there is no such kind,
    or no ``none`` and ``zero`` to tell by.
    """
    by = {(row["method"], row["kind"]): row for row in rows if row["kind"] != "all"}
    kinds = [
        kind
        for method, kind in by
        if method == "none" and ("zero", kind) in by and 3 * by["zero", kind]["accuracy"] < by["none", kind]["accuracy"]
    ]
    if not kinds:
        return None
    means: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(method for method, _ in by):
        if any(by.get((method, kind), {}).get("n") != by["none", kind]["n"] for kind in kinds):
            continue  # the oracle, where some samples have no boxes: nothing to compare with the others
        chosen = [by[method, kind] for kind in kinds]
        total = sum(row["n"] for row in chosen)
        keys = [key for key in ("accuracy", "kept", *COSTS) if all(key in row for row in chosen)]
        means[method] = {key: sum(row[key] * row["n"] for row in chosen) / total for key in keys}
    for scores in means.values():
        scores["relative"] = scores["accuracy"] / means["none"]["accuracy"]
        scores.update({key: round(value, 4) for key, value in scores.items()})
    return {"kinds": kinds, "methods": means}
