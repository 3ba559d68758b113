"""The order of an epoch: mixtures by weight, buckets by length, each exact and a function of the seed alone."""

from collections import Counter

import numpy as np
import pytest

from glimpseprune.data.order import bucketed, mixed, padded, shares, shuffled
from glimpseprune.data.stream import Deal

FOLDERS = [[10, 10, 7], [5, 5], [40, 40, 20]]
STARTS = np.cumsum([0, *map(sum, FOLDERS)])


def origin(order) -> Counter:
    return Counter((np.searchsorted(STARTS, order, side="right") - 1).tolist())


def test_shares_add_up():
    assert shares(10, [1, 1]) == [5, 5]
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [0.5, 2, 0]) == [1, 6, 0]
    assert sum(shares(1001, [3, 1, 4, 1, 5])) == 1001


def test_one_folder_is_shuffled_as_ever():
    """An order that runs of before have begun with."""
    assert (
        shuffled([3, 2, 4], (1, 0), 2).tolist() == Deal([3, 2, 4], 2, True, seed=1, shuffle_shards=2).order().tolist()
    )
    assert shuffled([3, 2, 4], (0, 0), 16).tolist() == [0, 2, 3, 7, 5, 8, 1, 6, 4]
    assert shuffled([3, 2, 4], (1, 3), 2, 2).tolist() == [5, 6, 7, 8, 0, 1, 2, 4, 3]


def test_a_mixture_has_shares_by_weight_and_each_folder_its_own_epochs():
    weights = [1, 1, 2]
    given = [mixed(FOLDERS, weights, 3, epoch, 2) for epoch in range(8)]
    total = STARTS[-1]
    for order in given:
        assert len(order) == total
        assert [origin(order)[number] for number in range(3)] == shares(total, weights)
    for number, (begin, end) in enumerate(zip(STARTS, STARTS[1:])):
        own = np.concatenate([order[(order >= begin) & (order < end)] for order in given])
        size = end - begin
        for turn in range(len(own) // size):  # every sample once, before any comes again
            assert sorted(own[turn * size : (turn + 1) * size]) == list(range(begin, end)), number
    assert (mixed(FOLDERS, weights, 3, 5, 2) == given[5]).all()
    assert (mixed(FOLDERS, weights, 4, 5, 2) != given[5]).any()


def test_a_mixture_is_spread_over_the_epoch():
    order = mixed([[1000], [1000]], [1, 3], 0, 0, 16)
    for part in np.split(order, 20):
        assert abs((part < 1000).sum() - 25) <= 4


def test_a_mixture_leaves_out_and_keeps_together():
    keep = np.ones(STARTS[-1], dtype=bool)
    keep[[0, 5, 30, 31, 90]] = False
    order = mixed(FOLDERS, [1, 1, 1], 0, 0, 2, keep=keep)
    assert len(order) == keep.sum()
    assert keep[order].all()
    gone = np.ones(STARTS[-1], dtype=bool)
    gone[STARTS[1] : STARTS[2]] = False  # a whole folder
    assert origin(mixed(FOLDERS, [1, 9, 1], 0, 0, 2, keep=gone)).keys() == {0, 2}
    together = mixed([[12, 12], [9, 9]], [1, 1], 0, 1, 2, together=3)
    blocks = [(index < 24, (index if index < 24 else index - 24) // 3) for index in together.tolist()]
    assert sum(a == b for a, b in zip(blocks, blocks[1:])) >= 2 * len(blocks) // 3 - 2


@pytest.mark.parametrize("count", [96, 100, 3])
def test_buckets_hold_like_lengths_and_lose_nothing(count):
    random = np.random.default_rng(0)
    lengths = random.choice([64, 144, 256, 576], count)
    order = random.permutation(count)
    made = bucketed(order, lengths, 48, 8, (0, 0))
    assert sorted(made) == list(range(count))
    for start in range(0, count - count % 48, 48):
        assert set(made[start : start + 48]) == set(order[start : start + 48])  # no further than a buffer
    assert (made[count - count % 8 :] == order[count - count % 8 :]).all()  # the long ones are not always those dropped
    assert padded(made, lengths, 8) <= padded(order, lengths, 8)
    assert (bucketed(order, lengths, 48, 8, (0, 0)) == made).all()


def test_steps_of_a_buffer_are_shuffled():
    lengths = np.arange(4096)
    made = bucketed(np.random.default_rng(0).permutation(4096), lengths, 1024, 8, (0, 0))
    firsts = made.reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.15


def test_padding():
    lengths = np.array([1, 3, 2, 2])
    assert padded(np.array([0, 1, 2, 3]), lengths, 2) == pytest.approx(1 - 8 / 10)
    assert padded(np.array([0, 1, 2, 3]), lengths, 4) == pytest.approx(1 - 8 / 12)
    assert padded(np.array([0]), lengths, 4) == 0


# ------------------------------------------------------------------------------------------------------- dealt to ranks


def deals(world: int, batch_size: int, **kwargs) -> list[Deal]:
    counts = [count for folder in FOLDERS for count in folder]
    lengths = np.random.default_rng(1).integers(1, 5, sum(counts)) * 100
    keep = np.arange(sum(counts)) % 9 > 0
    options = {"mix": [(3, 1.0), (2, 2.0), (3, 0.5)], "keep": keep, "lengths": lengths, "bucket": 30} | kwargs
    return [
        Deal(counts, batch_size, True, seed=7, shuffle_shards=2, rank=rank, world=world, **options)
        for rank in range(world)
    ]


@pytest.mark.parametrize("mix", [(), [(3, 1.0), (2, 2.0), (3, 0.5)]])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 3), (3, 5)])
def test_ranks_take_equal_steps_and_resume_exactly(world, batch_size, mix):
    for epoch in range(3):
        whole = [list(deal) for deal in deals(world, batch_size, mix=mix, epoch=epoch)]
        assert {len(batches) for batches in whole} == {len(deals(world, batch_size, mix=mix)[0])}
        assert all(len(batch) == batch_size for batches in whole for batch in batches)
        dealt = [index for step in zip(*whole) for batch in step for index in batch]
        assert all(index % 9 for index in dealt)
        if not mix:
            assert len(dealt) == len(set(dealt))
        for steps in (1, 4):
            consumed = steps * world * batch_size
            later = [list(deal) for deal in deals(world, batch_size, mix=mix, epoch=epoch, consumed=consumed)]
            assert later == [batches[steps:] for batches in whole]


def test_a_step_is_of_like_lengths_on_all_ranks():
    ranks = deals(2, 4, mix=(), bucket=10**6)
    lengths = ranks[0].lengths
    steps = [[index for batch in step for index in batch] for step in zip(*map(list, ranks))]
    spread = [len(set(lengths[step].tolist())) for step in steps]
    assert sum(n == 1 for n in spread) >= len(spread) - 4  # one step for each change of length


def test_a_bucketed_run_goes_on_with_other_ranks_and_loses_nothing():
    before = deals(2, 4, mix=())
    first = [index for step in list(zip(*map(list, before)))[:5] for batch in step for index in batch]
    after = deals(3, 2, mix=(), consumed=40, step=8)
    rest = [index for step in zip(*map(list, after)) for batch in step for index in batch]
    assert len(set(first + rest)) == len(first) + len(rest)
    assert before[0].total - len(first) - len(rest) < 6
