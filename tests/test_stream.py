"""The stream of batches: dealt once, in step, in a new order each epoch, resumed exactly, and whole despite damage."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from glimpseprune.config import UserError
from glimpseprune.data.shards import write
from glimpseprune.data.stream import PADDING, Deal, ShardDataset, ShardLoader
from test_shards import headers, make, patch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*LeafSpec")


@pytest.fixture(autouse=True)
def time_limit():
    """Processes that wait for each other fail a test rather than hang it."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("the test hangs")))
    signal.alarm(300)
    yield
    signal.alarm(0)


def write_whole(folder):
    """Splits train (50 samples in shards of 8) and val (11 in shards of 4)."""
    write(map(make, range(50)), folder, split="train", shard_size=8)
    write(map(make, range(100, 111)), folder, split="val", shard_size=4)
    return folder


def write_damaged(tmp_path):
    """40 samples in shards of 8, of which numbers 10 (bad header), 30 (bad image) and 39 (cut off) are lost."""
    write(map(make, range(40)), tmp_path, split="train", shard_size=8)
    second, fourth, fifth = (tmp_path / f"train-00000{i}.tar" for i in (1, 3, 4))
    patch(second, headers(second)["made-0010.json"].offset + 100, b"damage")
    patch(fourth, headers(fourth)["made-0030.0.png"].offset_data, b"not a PNG")
    with open(fifth, "r+b") as stream:
        stream.truncate(headers(fifth)["made-0039.0.png"].offset_data + 10)
    return tmp_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_whole(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def damaged(tmp_path):
    return write_damaged(tmp_path)


def keys(samples) -> list[str]:
    """In place of a collator, as a batch."""
    return [sample.key for sample in samples]


def marked(samples) -> list[tuple[str, str]]:
    return [(sample.key, sample.stands_in) for sample in samples]


def train_loader(folder, batch_size=4, collate=keys, **kwargs) -> ShardLoader:
    return ShardLoader(ShardDataset(folder, "train"), collate, batch_size, shuffle=True, shuffle_shards=2, **kwargs)


def take(loader, steps: int) -> list:
    return list(itertools.islice(loader, steps))


def flat(batches) -> list:
    return [item for batch in batches for item in batch]


# ------------------------------------------------------------------------------------------------------ who gets what


@pytest.mark.parametrize("counts", [[64], [1] * 40, [8, 8, 8, 3], [5, 1, 30, 2, 2, 7, 19]], ids=sum)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_epoch_is_dealt_once_and_in_step(counts, world, batch_size):
    total, seen = sum(counts), []
    for epoch in range(3):
        deals = [Deal(counts, batch_size, True, seed=5, rank=r, world=world, epoch=epoch) for r in range(world)]
        batches = [list(deal) for deal in deals]
        assert {len(b) for b in batches} == {len(deals[0])}  # as many steps on every rank
        assert all(len(batch) == batch_size for rank in batches for batch in rank)
        dealt = [index for rank in batches for batch in rank for index in batch]
        assert len(dealt) == len(set(dealt))
        assert set(dealt) <= set(range(total))
        assert total - len(dealt) < world * batch_size
        seen.append(tuple(dealt))
    assert len(set(seen)) == (3 if total >= world * batch_size else 1)


def test_order_is_local_and_depends_on_seed_and_epoch_alone():
    counts = [10] * 12
    deal = Deal(counts, 4, True, seed=1, shuffle_shards=3)
    order = deal.order()
    assert sorted(order) == list(range(120))
    windows = [set(part // 10) for part in order.reshape(4, 30)]
    assert all(len(window) == 3 for window in windows)  # three shards at a time, and not again
    assert len(set.union(*windows)) == 12
    assert any(a > b for a, b in itertools.pairwise(order[:30] // 10))  # mixed within
    assert (deal.order() == order).all()
    assert (Deal(counts, 7, True, seed=1, shuffle_shards=3, rank=1, world=2).order() == order).all()
    assert (Deal(counts, 4, True, seed=2, shuffle_shards=3).order() != order).any()
    assert (Deal(counts, 4, True, seed=1, shuffle_shards=3, epoch=1).order() != order).any()


def test_questions_on_one_image_stay_together():
    counts = [7, 6, 9, 5]  # a shard may begin and end within a block
    deal = Deal(counts, 4, True, seed=1, shuffle_shards=2, together=3)
    order, starts = deal.order(), np.cumsum([0, *counts])
    assert sorted(order) == list(range(sum(counts)))
    shard = np.searchsorted(starts, order, side="right") - 1
    block = list(zip(shard.tolist(), (order // 3).tolist()))
    runs = [key for place, key in enumerate(block) if place == 0 or block[place - 1] != key]
    assert len(runs) == len(set(runs)), "a block was torn"
    assert runs != sorted(runs)
    assert (Deal(counts, 5, True, seed=1, shuffle_shards=2, rank=1, world=2, together=3).order() == order).all()
    assert (Deal(counts, 4, True, seed=1, shuffle_shards=2, together=3, epoch=1).order() != order).any()
    batches = [index for batch in deal for index in batch]
    later = Deal(counts, 4, True, seed=1, shuffle_shards=2, together=3, consumed=8)
    assert [index for batch in later for index in batch] == batches[8:]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (5, 0)])
def test_evaluation_is_complete_and_in_order(folder, world, workers):
    dataset = ShardDataset(folder, "val")
    ranks = [ShardLoader(dataset, marked, 3, workers=workers, rank=r, world=world) for r in range(world)]
    for _ in range(2):  # a second pass begins at the beginning
        batches = [list(loader) for loader in ranks]
        assert {len(b) for b in batches} == {len(ranks[0])} == {-(-11 // (3 * world))}
        in_turn = flat(flat(zip(*batches)))
        assert [key for key, stands_in in in_turn if not stands_in] == [make(i).key for i in range(100, 111)]
        assert {stands_in for _, stands_in in in_turn} <= {"", PADDING}
    assert not ranks[-1].damaged
    take(ranks[0], 1)
    assert len(list(ranks[0])) == len(ranks[0])  # even after one that was left


# ----------------------------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("workers", [1, 2, 9])  # there are 7 shards
def test_workers_change_nothing(folder, workers):
    alone, many = train_loader(folder), train_loader(folder, workers=workers)
    for _ in range(3):
        expected = list(alone)
        assert list(many) == expected
        assert len(expected) == len(alone) == 12
    assert not multiprocessing.active_children() or many._loader is not None
    many.close()


def test_epochs_differ_and_hold_each_sample_once(folder):
    loader = train_loader(folder)
    epochs = [flat(loader) for _ in range(4)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert {make(i).key for i in range(50)} == set().union(*epochs)  # what one epoch drops, another brings


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [0, 1, 5, 11, 12, 13, 24, 30])
def test_resumes_exactly_with_any_number_of_workers(folder, steps, workers):
    def stream(loader):
        while True:
            yield from loader

    expected = take(stream(train_loader(folder)), steps + 15)
    first = train_loader(folder, workers=workers)
    assert take(stream(first), steps) == expected[:steps]
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed"] == (steps - state["epoch"] * 12) * 4
    resumed = train_loader(folder, workers=2 - workers)
    for loader in (resumed, first):  # another, and the same one set back
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert take(stream(loader), 15) == expected[steps:]


def test_state_is_that_of_the_batch_at_hand_not_of_those_fetched_ahead(folder):
    loader = train_loader(folder, workers=3)
    for step, _ in enumerate(loader, 1):
        assert loader.state_dict()["consumed"] == 4 * step


def test_state_is_equal_on_all_ranks_and_goes_over_to_other_ranks_and_batch_sizes(folder):
    ranks = [train_loader(folder, rank=r, world=2) for r in range(2)]
    before = flat(flat(take(loader, 3) for loader in ranks))
    states = [loader.state_dict() for loader in ranks]
    assert states[0] == states[1]
    for world, batch_size in ((1, 4), (3, 4), (2, 5)):
        resumed = [train_loader(folder, batch_size, rank=r, world=world) for r in range(world)]
        for loader in resumed:
            loader.load_state_dict(states[0])
        batches = [list(loader) for loader in resumed]
        assert {len(b) for b in batches} == {26 // (world * batch_size)}
        after = flat(flat(batches))
        assert len(set(before + after)) == 24 + len(after)  # still no sample twice
        assert resumed[0].state_dict()["epoch"] == 0
        next(iter(resumed[0]))
        assert resumed[0].state_dict()["epoch"] == 1


def test_resuming_on_other_data_is_refused(folder, damaged):
    state = train_loader(folder).state_dict()
    with pytest.raises(UserError, match="cannot resume: the data of the checkpoint had samples 50, .* now has 40"):
        train_loader(damaged).load_state_dict(state)
    with pytest.raises(UserError, match="had seed 0, .* now has 7"):
        train_loader(folder, seed=7).load_state_dict(state)


def test_an_iterator_that_is_left_is_a_finished_epoch(folder):
    alone = train_loader(folder)
    loader = train_loader(folder, workers=2)
    for steps in (1, 4, 12, 7):
        iter(loader)  # Lightning makes iterators that it never uses: they are no epochs
        assert take(loader, steps) == list(alone)[:steps]
    for _ in range(5):  # processes are not left behind, nor waited for
        take(loader, 1)
    assert loader.state_dict()["epoch"] == 8
    del loader
    assert not multiprocessing.active_children()


def test_too_few_samples_for_a_step(folder):
    with pytest.raises(UserError, match=r"\(train\) has 50 samples: too few for one step of batch_size 26 on 2 ranks"):
        train_loader(folder, 26, world=2)
    with pytest.raises(UserError, match="batch_size is 0"):
        train_loader(folder, 0)


def test_drawing_batches_leaves_the_global_random_numbers_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(train_loader(folder))
    take(train_loader(folder, workers=1), 2)
    assert torch.equal(torch.rand(2), expected)


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_replaced_counted_and_reported_once(damaged, workers):
    loader = train_loader(damaged, collate=marked, workers=workers)
    with pytest.warns(UserWarning, match="damaged sample") as caught:
        epochs = [flat(loader) for _ in range(3)]
    places = {
        "train-000001.tar[2] (made-0010)": "member 'json' is missing",
        "train-000003.tar[6] (made-0030)": "the checksum of member '0.png' is another",
        "train-000004.tar[7]": "only 7 of 8 samples are left in this shard",
    }
    assert loader.damaged == Counter({f"{place}: {why}": 3 for place, why in places.items()})
    assert sorted(str(warning.message).partition(": ")[2] for warning in caught) == sorted(loader.damaged)
    for epoch in epochs:
        assert len(epoch) == 40  # whole batches, equal counts
        own = [key for key, stands_in in epoch if not stands_in]
        assert sorted(own) == [make(i).key for i in range(40) if i not in (10, 30, 39)]
        assert {stands_in for _, stands_in in epoch} - {""} == set(loader.damaged)
        assert all(key in own for key, _ in epoch)


def test_evaluation_knows_what_was_replaced(damaged):
    loader = ShardLoader(ShardDataset(damaged, "train"), marked, 16)
    with pytest.warns(UserWarning):
        batches = list(loader)
    assert [len(batch) for batch in batches] == [16, 16, 8]
    assert [i for i, (_, stands_in) in enumerate(flat(batches)) if stands_in] == [10, 30, 39]
    assert loader.damaged.total() == 3


def test_much_damage_is_counted_in_full_but_reported_in_brief(tmp_path):
    write(map(make, range(60)), tmp_path, split="train", shard_size=30)
    with open(tmp_path / "train-000001.tar", "r+b") as stream:
        stream.truncate(0)
    loader = train_loader(tmp_path, collate=marked)
    with pytest.warns(UserWarning) as caught:
        assert len(flat(loader)) == 60
    assert loader.damaged.total() == len(loader.damaged) == 30
    assert len(caught) == 21
    assert "further damage is only counted" in str(caught[-1].message)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_intact_is_an_error_in_one_line(tmp_path, workers):
    write(map(make, range(8)), tmp_path, split="train")
    with open(tmp_path / "train-000000.tar", "r+b") as stream:
        stream.truncate(0)
    with pytest.raises(UserError) as error:
        list(train_loader(tmp_path, workers=workers))
    assert "\n" not in str(error.value)
    assert "only 0 of 8 samples are left in this shard, and so are 100 others of split 'train'" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_collator_refuses_is_an_error_in_one_line(folder, workers):
    def refuse(samples):
        raise UserError("sample 'x': a prompt without an image")

    with pytest.raises(UserError) as error:
        list(train_loader(folder, collate=refuse, workers=workers))
    assert str(error.value) == "sample 'x': a prompt without an image"
    assert not multiprocessing.active_children()  # though the error still holds the frames that held them


def test_a_process_ends_though_its_loader_is_open(folder):
    """Workers ignore the SIGTERM with which torch and multiprocessing would end them."""
    code = (
        "from glimpseprune.data.stream import *; loader = ShardLoader(ShardDataset({!r}, {!r}), list, 2, workers=1)\n"
    )
    code = code.format(str(folder), "train") + "batches = [*loader]; print(len(batches) == len(loader))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
