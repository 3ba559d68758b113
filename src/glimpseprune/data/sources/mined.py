"""Mined: those questions of another folder of shards that a model still gets wrong, to reinforce it on.

A question that is always answered right, or never, teaches nothing: every rollout of its group earns the same. Ask the
questions a few times, then choose by the share of right answers::

    python -m src.evaluate ckpt=runs/x data.split=train controls=[] samples=4 temperature=1 sample_keep=true out=asked
    python -m src.prepare source=mined out=data/mined options.root=data/all options.predictions=asked/predictions.jsonl

``train`` is chosen; other splits are taken over whole, so that scores can still be compared.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glimpseprune.config import SEEDS, UserError, option
from glimpseprune.data.shards import MANIFEST, Damage, Shards
from glimpseprune.types import Sample

splits = ("train", "val", "test")


@dataclass
class Options:
    root: str = option(help="folder of shards that was asked")
    predictions: str = option(help="predictions.jsonl of python -m src.evaluate on its split train")
    method: str | None = option(None, "method of the predictions to go by; null: the only one that is there")
    above: float = option(
        -1.0, "share of right answers must be above this; 0 leaves out what was never right", least=-1, most=1
    )
    below: float = option(1.0, "and below this", least=0, most=2)
    others: float = option(0.0, "of the questions outside of these bounds, this share is taken, too", least=0, most=1)
    seed: int = option(0, "of the choice of those", least=0, most=SEEDS)


def samples(options: Options, split: str) -> Iterator[Sample | Damage]:
    """The samples of a split, in the order of the folder; the damage in place of damaged ones.

    Raises:
        UserError: there is no such folder, split or file, or the file says nothing of a question.
    """
    shards = Shards(options.root, split)
    chosen = _chosen(options) if split == "train" else None
    return _read(shards, chosen)


def inputs(options: Options) -> list[Path]:
    return [Path(options.root) / MANIFEST, Path(options.predictions)]


def license(options: Options) -> str | None:
    """That of the folder that was asked, as its manifest has it."""
    try:
        splits = json.loads((Path(options.root) / MANIFEST).read_text(encoding="utf-8"))["splits"].values()
        return ", ".join(dict.fromkeys(entry["license"] for entry in splits if entry.get("license"))) or None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def _read(shards: Shards, chosen: set[str] | None) -> Iterator[Sample | Damage]:
    for index in range(len(shards)):
        try:
            sample = shards.read(index)
        except Damage as damage:
            yield damage
            continue
        if chosen is None or sample.key in chosen:
            yield sample


def _chosen(options: Options) -> set[str]:
    shares = _shares(Path(options.predictions), options.method)
    rng = np.random.default_rng(options.seed)
    lucky = dict(zip(sorted(shares), rng.random(len(shares)) < options.others))
    return {key for key, share in shares.items() if options.above < share < options.below or lucky[key]}


def _shares(file: Path, method: str | None) -> dict[str, float]:
    """Key of a question -> share of its answers that were right."""
    scores: dict[str, list[float]] = defaultdict(list)
    methods = set()
    try:
        for line in file.read_text(encoding="utf-8").split("\n"):  # a text may hold what else ends a line
            if not line:
                continue
            said = json.loads(line)
            methods.add(said["method"])
            if method in (None, said["method"]):
                scores[said["key"]].append(float(said["score"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"options.predictions={file}: not what python -m src.evaluate writes ({error!r})") from None
    if not scores or method is None and len(methods) > 1:
        raise UserError(f"options.predictions={file} is about {', '.join(sorted(methods))}: give one as options.method")
    return {key: sum(each) / len(each) for key, each in scores.items()}
