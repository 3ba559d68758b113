"""Scores added up over batches and processes: as over all samples at once, whatever the batches are."""

from __future__ import annotations

import multiprocessing
import random
import socket

import pytest
import torch
import torch.distributed as dist
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryPrecision, BinaryRecall

from glimpseprune import metrics
from glimpseprune.config import UserError
from glimpseprune.tallies import Masks, Pope, Score, mask_scores

SIZES = (5, 5, 1)
"""Of batches, the last one not full."""


def answers(seed: int = 0) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    said = [draw.choice(("yes", "no", "Yes.", "no, there is none", "")) for _ in range(sum(SIZES))]
    return said, [draw.choice(("yes", "no")) for _ in said]


def batches(*columns):
    start = 0
    for size in SIZES:
        yield tuple(column[start : start + size] for column in columns)
        start += size


def test_a_mean_is_one_over_samples_and_not_over_batches():
    said, meant = ["kitten"] * 10 + ["x"], [["sitting"]] * 10 + [["x"]]
    score = Score("anls")
    for batch in batches(said, meant):
        score.update(*batch)
    assert float(score.compute()) == pytest.approx((10 * 4 / 7 + 1) / 11)
    with pytest.raises(UserError, match="did you mean 'anls'"):
        Score("anlz")


def test_a_missing_score_is_left_out(monkeypatch):
    score = Score("anls")
    score.function = lambda said, meant: float("nan") if said == "?" else 1.0
    score.update(["a", "?", "b"], [["a"]] * 3)
    assert float(score.compute()) == 1


def test_pope_is_made_of_sums():
    said, meant = answers()
    pope = Pope()
    for batch in batches(said, meant):
        pope.update(*batch)
    assert {name: float(value) for name, value in pope.compute().items()} == metrics.pope_scores(said, meant)


def test_pope_beside_torchmetrics():
    """Which knows no silence."""
    said, meant = (["yes" if text in ("yes", "Yes.") else "no" for text in column] for column in answers(3))
    own = metrics.pope_scores(said, meant)
    pair = [torch.tensor([text == "yes" for text in column]).long() for column in (said, meant)]
    others = {"accuracy": BinaryAccuracy, "precision": BinaryPrecision, "recall": BinaryRecall, "f1": BinaryF1Score}
    for name, other in others.items():
        assert own[name] == pytest.approx(float(other()(*pair)))
    assert own["yes_ratio"] == pytest.approx(float(pair[0].float().mean()))


@pytest.mark.parametrize(
    ("keep", "target", "iou", "recall", "precision"),
    [
        ("1100", "1100", 1, 1, 1),
        ("1100", "0110", 1 / 3, 1 / 2, 1 / 2),
        ("1111", "0100", 1 / 4, 1, 1 / 4),
        ("0000", "0100", 0, 0, 0),
        ("1000", "0000", 0, 0, 0),
        ("0000", "0000", 0, 0, 0),
    ],
)
def test_masks(keep, target, iou, recall, precision):
    found = mask_scores(*(torch.tensor([bit == "1" for bit in bits]) for bits in (keep, target)))
    assert found == pytest.approx({"mask_iou": iou, "mask_recall": recall, "mask_precision": precision})


def test_samples_without_boxes_have_a_keep_ratio_alone():
    masks = Masks()
    keep, target = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])
    masks.update([keep, ~keep], [target, None])
    found = {name: float(value) for name, value in masks.compute().items()}
    assert found == {"keep_ratio": 0.5, "mask_iou": 0.5, "mask_recall": 0.5, "mask_precision": 1.0}
    assert torch.isnan(Masks().compute()["mask_iou"])


def test_uneven_processes_agree_with_one():
    """Two of them, one of which has most of the samples."""
    said, meant = answers(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        mine = slice(0, 8) if rank == 0 else slice(8, None)
        pope, score = Pope(), Score("pope")
        pope.update(said[mine], meant[mine])
        score.update(said[mine], [[label] for label in meant[mine]])
        found.put(({name: float(x) for name, x in pope.compute().items()}, float(score.compute())))
        dist.barrier()
        dist.destroy_process_group()

    both = [context.Process(target=work, args=(rank,), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    whole = metrics.pope_scores(said, meant)
    for _ in both:
        scores, mean = found.get(timeout=60)
        assert scores == pytest.approx(whole) and mean == pytest.approx(whole["accuracy"])
    for process in both:
        process.join(60)
