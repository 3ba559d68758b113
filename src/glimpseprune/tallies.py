"""Scores over a data set, added up by torchmetrics over batches of any size and over processes.

A mean of means is wrong where the last batch is short or a rank has more; so every state here is a sum over samples
with a count, which torchmetrics adds over processes. Samples that only pad a batch must not be passed. For intervals
see :mod:`.intervals`, which resamples the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from glimpseprune import lookup
from glimpseprune.metrics import pope_parts, pope_ratios


class Score(MeanMetric):
    """The mean of a metric of metrics.py; an answer without a score (NaN, of a judge) is left out.

    Raises:
        UserError: there is no such metric.
    """

    def __init__(self, metric: str, **kwargs: Any) -> None:
        super().__init__(nan_strategy="ignore", **kwargs)
        self.function = lookup.function("glimpseprune.metrics", metric, "prediction")
        self.set_dtype(torch.float64)

    def update(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
        """Of n predictions, each with the accepted answers."""
        scores = [self.function(said, meant) for said, meant in zip(predictions, answers, strict=True)]
        super().update(torch.tensor(scores, dtype=torch.float64))


class Pope(Metric):
    """accuracy, precision, recall, f1 and yes_ratio of yes and no: ratios of sums, which no mean of batches is."""

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), "sum")

    def update(self, predictions: Sequence[str], labels: Sequence[str]) -> None:
        parts = [pope_parts(said, label) for said, label in zip(predictions, labels, strict=True)]
        if parts:
            self.sums += torch.tensor(parts, dtype=torch.float64, device=self.sums.device).sum(0)  # [5]

    def compute(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor(value, dtype=torch.float64) for name, value in pope_ratios(*self.sums.tolist()).items()
        }


class Masks(Metric):
    """How keep masks lie to the evidence: means over samples of keep ratio, mask IoU, recall and precision."""

    full_state_update = False
    NAMES = ("keep_ratio", "mask_iou", "mask_recall", "mask_precision")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(self.NAMES), dtype=torch.float64), "sum")
        self.add_state("counts", torch.zeros(len(self.NAMES), dtype=torch.float64), "sum")

    def update(self, keep: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
        """Of n samples, each bool [V]: what was kept, and the evidence; None where there are no boxes."""
        for kept, target in zip(keep, targets, strict=True):
            for place, name in enumerate(self.NAMES):
                if name == "keep_ratio" or target is not None:
                    value = kept.float().mean().item() if name == "keep_ratio" else mask_scores(kept, target)[name]
                    self.sums[place] += value
                    self.counts[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """NaN where no sample has boxes."""
        return {name: total / count for name, total, count in zip(self.NAMES, self.sums, self.counts)}


def mask_scores(keep: Tensor, target: Tensor) -> dict[str, float]:
    """IoU of two bool masks [V], the share of the target that is kept, and of what is kept the share that is target;
    0 where there is nothing to divide by."""
    both, kept, wanted = (int(mask.sum()) for mask in (keep & target, keep, target))
    return {
        "mask_iou": both / max(kept + wanted - both, 1),
        "mask_recall": both / max(wanted, 1),
        "mask_precision": both / max(kept, 1),
    }
