"""Error bars: the bootstrap over samples (Efron 1979), by torchmetrics, paired over methods.

Samples are drawn anew with replacement, each with the scores of all methods, so that the difference of two methods on
the same samples is much surer than each of them. An interval is the middle 95% of what was drawn (percentile method);
where all samples score alike it has no width, which says that they are few and not that the score is sure. Left out:
the spread over trainings, which no resampling of test questions can show; ``src.compare`` puts seeds side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers import BootStrapper

LEVEL = 0.95


class Sums(Metric):
    """Sums of the scores of M methods, and the number of samples, over each of K kinds: [K, M + 1]."""

    full_state_update = False

    def __init__(self, kinds: int, methods: int) -> None:
        super().__init__(sync_on_compute=False)  # one process has all samples, and may be one of several
        self.add_state("sums", torch.zeros(kinds, methods + 1, dtype=torch.float64), "sum")

    def update(self, scores: Tensor, kinds: Tensor) -> None:
        """Scores [n, M] of samples of these ``kinds`` [n]."""
        rows = torch.cat([scores, torch.ones_like(scores[:, :1])], 1)  # [n, M + 1]
        self.sums.index_add_(0, kinds, rows)

    def compute(self) -> Tensor:
        return self.sums


def resampled(scores: Tensor, kinds: Tensor, times: int, seed: int = 0) -> Tensor:
    """:class:`Sums` of ``times`` resamplings of n samples.

    Args:
        scores: [n, M] in float64, of M methods on each sample.
        kinds: [n] long, numbers from 0.

    Returns:
        [times, K, M + 1]: sums per kind and method, number of samples last.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = Sums(int(kinds.max()) + 1, scores.shape[1])
        many = BootStrapper(base, times, mean=False, std=False, raw=True, sampling_strategy="multinomial")
        many.update(scores, kinds)
        return many.compute()["raw"]


def interval(drawn: Tensor) -> list[float]:
    """[low, high] of what was drawn, [times]; a resampling without any sample of the kind counts for nothing."""
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=drawn.dtype)
    return [round(value, 4) for value in drawn.nanquantile(ends).tolist()]
