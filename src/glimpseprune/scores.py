"""Rows of scores.json, made of records, whatever process or earlier, interrupted evaluation they come from.

A score that is missing (a judge's verdict that could not be had) is left out of a mean and told as its ``coverage``,
and a method is compared with another one on the samples of which both have scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from glimpseprune.evaluation import Record, Timing
from glimpseprune.metrics import pope_parts, pope_ratios

COSTS = ("mean_tokens", "prefill_flops", "decoder_flops", "kv")
MASKS = ("mask_iou", "mask_recall", "mask_precision")
POPE = ("precision", "recall", "f1", "yes_ratio")
"""What rows have of the metric ``pope`` beside its mean."""
Draws = Sequence[Record]
"""The records of one method on one sample."""


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
        self.pope_sums: dict[str, Any] = {}
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
        for kind, kinds in self.kinds().items():
            found = {name: self.of_kind(name, kinds) for name in self.names()}
            rows += [self.row(name, kind, kinds, found) for name in found if found[name]]
        return rows

    def names(self) -> list[str]:
        """Of the methods that have rows."""
        return [name for name in self.samples if name not in self.left_out()]

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

    def of_kind(self, name: str, kinds: Sequence[str]) -> dict[str, Draws]:
        return {key: draws for key, draws in self.samples[name].items() if draws[0]["kind"] in kinds}

    def row(
        self, name: str, kind: str, kinds: Sequence[str], found: Mapping[str, Mapping[str, Draws]]
    ) -> dict[str, Any]:
        """Of one of the methods whose samples were ``found``: it is compared with the unpruned model on the samples of
        which both have scores, for the oracle may have some of all, and a judge may have been silent."""
        samples = list(found[name].values())
        both = set(scored(found[name])) & set(scored(found.get("none", {})))
        base = mean_score(found["none"][key] for key in both) if both else None
        row: dict[str, Any] = {"method": name, "kind": kind, "accuracy": rounded(mean_score(samples))}
        if (spread := self.spread(name)) is not None and row["accuracy"] is not None:
            row["accuracy_ci"] = spread.accuracy(name, kinds)
        same = mean_score(found[name][key] for key in both) if both else None
        row["relative"] = rounded(same / base) if base else None
        row["difference"] = None if base is None else rounded(same - base)
        if base is not None and (paired := self.spread(name, "none")) is not None:
            row["difference_ci"] = paired.difference(name, "none", kinds)
        row["kept"] = round(over(samples, lambda record: record["kept"] / record["visual"]), 4)
        row["kept_tokens"] = round(over(samples, lambda record: record["kept"]), 2)
        for key in COSTS:
            row[key] = round(over(samples, lambda record, key=key: record[key]), 2 if key == "mean_tokens" else 4)
        row["cut"] = round(over(samples, lambda record: record.get("cut", False)), 4)
        row["n"] = len(samples)
        row |= self.coverage(samples)
        for metric in self.metrics[1:]:
            row[metric] = rounded(over(samples, lambda record, metric=metric: record["metrics"][metric]))
        for key in MASKS:
            value = over(samples, lambda record, key=key: record.get("mask", {}).get(key))
            row |= {} if value is None else {key: round(value, 4)}
        if "pope" in self.metrics:
            row |= self.pope(name, kinds)
        if name in self.drawn:
            best = [max(known) for draws in samples if (known := scores_of(draws))]
            row |= {"pass_at_k": rounded(fmean(best) if best else None), "k": self.drawn[name]}
        return row | (self.speed(name) if kind == "all" else {})

    def coverage(self, samples: Sequence[Draws]) -> dict[str, float]:
        """The share of the answers that have a score, where a judge gives it."""
        if "judge" not in self.metrics:
            return {}
        return {"coverage": round(fmean(r["metrics"]["judge"] is not None for draws in samples for r in draws), 4)}

    def pope(self, name: str, kinds: Sequence[str]) -> dict[str, Any]:
        """What is a ratio of sums over answers, and no mean; F1 with its interval."""
        parts = [parts_of(draws) for draws in self.of_kind(name, kinds).values()]
        found = pope_ratios(*map(sum, zip(*parts)))
        row: dict[str, Any] = {key: round(found[key], 4) for key in POPE}
        if self.bootstrap:
            import torch

            from glimpseprune.intervals import interval

            all_kinds = self.kinds()["all"]
            sums = self.pope_resampled(name, all_kinds)[:, [all_kinds.index(kind) for kind in kinds]].sum(1)  # [R, 5]
            f1 = [pope_ratios(*drawn)["f1"] for drawn in sums.tolist()]
            row["f1_ci"] = interval(torch.tensor(f1, dtype=torch.float64))
        return row

    def pope_resampled(self, name: str, kinds: Sequence[str]) -> Any:
        """[R, K, 5] the sums of which :func:`.pope_ratios` is made, over ``kinds``."""
        if name not in self.pope_sums:
            import torch

            from glimpseprune.intervals import resampled

            samples = self.samples[name].values()
            parts = torch.tensor([parts_of(draws) for draws in samples], dtype=torch.float64)[:, :4]
            of = torch.tensor([kinds.index(draws[0]["kind"]) for draws in samples])
            sums = resampled(parts, of, self.bootstrap, self.seed)
            more = sums.new_zeros(len(sums), len(kinds) - sums.shape[1], 5)  # of kinds that this method has none of
            self.pope_sums[name] = torch.cat([sums, more], 1)
        return self.pope_sums[name]

    def speed(self, name: str) -> dict[str, Any]:
        """Median over batches of the seconds to the first token, and the most memory, where it was measured."""
        timings = self.timings[name]
        peaks = [timing["peak_bytes"] for timing in timings if "peak_bytes" in timing]
        found = {"time_to_first_token": round(median(t["seconds"] for t in timings), 4)} if timings else {}
        return found | ({"peak_bytes": max(peaks)} if peaks else {})

    # -------------------------------------------------------------------------------------------- averages of kinds

    def averages(self, rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """A row per method and group of kinds: the mean over these, each counting alike however many its questions are;
        none of a group of which a kind is missing."""
        by = {(row["method"], row["kind"]): row for row in rows}
        made = []
        for group, kinds in groups.items():
            for name in self.names():
                chosen = [by.get((name, kind), {}) for kind in kinds]
                if all(row.get("accuracy") is not None for row in chosen):
                    made.append(self.average(name, group, kinds, chosen))
        return made

    def average(
        self, name: str, group: str, kinds: Sequence[str], chosen: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Of the rows of these kinds; it is compared with the unpruned model's average."""
        score, base = self.macro(name, kinds), self.macro("none", kinds)
        row: dict[str, Any] = {"method": name, "kind": group, "accuracy": rounded(score)}
        if (spread := self.spread(name)) is not None:
            row["accuracy_ci"] = spread.average(name, kinds)
        row["relative"] = rounded(score / base) if base else None
        row["difference"] = None if base is None else rounded(score - base)
        keys = ("kept", "kept_tokens", *COSTS, "cut", "coverage", *self.metrics[1:])
        for key in (key for key in keys if all(each.get(key) is not None for each in chosen)):
            row[key] = rounded(fmean(each[key] for each in chosen))
        return row | {"n": sum(each["n"] for each in chosen)}

    def macro(self, name: str, kinds: Sequence[str]) -> float | None:
        """The mean of the accuracies of these kinds; None where one has none."""
        found = [mean_score(self.of_kind(name, [kind]).values()) for kind in kinds if name in self.samples]
        return None if None in found or not found else fmean(found)

    def lacking(self, groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Kinds of each group of which there are no samples."""
        there = self.kinds()
        found = {group: [kind for kind in kinds if kind not in there] for group, kinds in groups.items()}
        return {group: kinds for group, kinds in found.items() if kinds}

    # ---------------------------------------------------------------------------------------------------- intervals

    def spread(self, *names: str) -> Spread | None:
        """The scores of all methods that have some of the samples of these ones, on resamplings of those; ask once all
        are there."""
        keys = frozenset.intersection(*(frozenset(scored(self.samples[name])) for name in names))
        if keys not in self.spreads:
            self.spreads[keys] = self.resampled(sorted(keys)) if self.bootstrap and keys else None
        return self.spreads[keys]

    def resampled(self, keys: Sequence[str]) -> Spread:
        import torch

        from glimpseprune.intervals import resampled

        answered = {name: scored(by_key) for name, by_key in self.samples.items()}
        names = [name for name, known in answered.items() if all(key in known for key in keys)]
        kinds = self.kinds()["all"]
        scores = [[fmean(answered[name][key]) for name in names] for key in keys]
        of = [kinds.index(self.samples[names[0]][key][0]["kind"]) for key in keys]
        sums = resampled(torch.tensor(scores, dtype=torch.float64), torch.tensor(of), self.bootstrap, self.seed)
        return Spread(names, kinds[: sums.shape[1]], sums)

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """:func:`over_needing_kinds`, with differences and intervals."""
        found = over_needing_kinds(rows)
        for name, scores in found["methods"].items() if found else ():
            scores["difference"] = round(scores["accuracy"] - found["methods"]["none"]["accuracy"], 4)
            if (spread := self.spread(name)) is not None:
                scores["accuracy_ci"] = spread.accuracy(name, found["kinds"])
            if (paired := self.spread(name, "none")) is not None:
                scores["difference_ci"] = paired.difference(name, "none", found["kinds"])
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
        means = self._means(kinds)
        return self._interval(means[:, self.names.index(name)] - means[:, self.names.index(base)])

    def average(self, name: str, kinds: Sequence[str]) -> list[float]:
        """Of the mean over kinds of their means."""
        means = [self._means([kind])[:, self.names.index(name)] for kind in kinds]
        return self._interval(sum(means) / len(means))

    def _means(self, kinds: Sequence[str]) -> Any:
        sums = self.sums[:, [self.kinds.index(kind) for kind in kinds if kind in self.kinds]].sum(1)  # [R, M + 1]
        return sums[:, :-1] / sums[:, -1:]

    @staticmethod
    def _interval(drawn: Any) -> list[float]:
        from glimpseprune.intervals import interval

        return interval(drawn)


def scores_of(draws: Iterable[Record]) -> list[float]:
    return [record["score"] for record in draws if record["score"] is not None]


def scored(samples: Mapping[str, Draws]) -> dict[str, list[float]]:
    """The scores of each sample that has any."""
    return {key: known for key, draws in samples.items() if (known := scores_of(draws))}


def over(samples: Iterable[Draws], value: Callable[[Record], float | None]) -> float | None:
    """Mean over samples of the mean over their draws, without what is None; None where there is nothing else."""
    means = [fmean(known) for draws in samples if (known := [x for x in map(value, draws) if x is not None])]
    return fmean(means) if means else None


def mean_score(samples: Iterable[Draws]) -> float | None:
    return over(samples, lambda record: record["score"])


def parts_of(draws: Draws) -> list[float]:
    """What a sample adds to POPE's sums, mean over its draws."""
    return [fmean(column) for column in zip(*(pope_parts(r["prediction"], r["answers"][0]) for r in draws))]


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def over_needing_kinds(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Each method over the kinds whose accuracy without any visual token after K is below a third of the full one.

    The other kinds say nothing about pruning: the text had read their answer before. None where there is no such kind,
    or no ``none`` and ``zero`` to tell by.
    """
    by = {(row["method"], row["kind"]): row for row in rows if row["kind"] != "all" and row["accuracy"] is not None}
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
