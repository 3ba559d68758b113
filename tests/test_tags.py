"""The tags data: apart where it must be, drawn the same every time, and questions that are true of the picture."""

import itertools

import numpy as np
import pytest

from glimpseprune.config import UserError
from glimpseprune.data.sources import tags


def take(split: str = "test", count: int = 12, **options) -> list:
    options = tags.Options(count={"train": 4096, "val": 4096, "test": 4096}, **options)
    return list(itertools.islice(tags.samples(options, split), count))


def test_digits_and_photographs_of_the_splits_are_apart():
    seen = {split: {glyph.tobytes() for pool in tags._digits(split) for glyph in pool} for split in tags.splits}
    for a, b in itertools.combinations(tags.splits, 2):
        assert not seen[a] & seen[b]
        rows, columns = zip(*(tags._PHOTO_SPLITS[split] for split in (a, b)))
        apart = [max(s.start for s in axis) >= min(s.stop for s in axis) + 6 for axis in (rows, columns)]
        assert any(apart)
    assert all(len(pool) >= 10 for split in tags.splits for pool in tags._digits(split))


def test_the_same_options_draw_the_same_samples():
    first, again = take(), take()
    assert [s.question for s in first] == [s.question for s in again]
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, again))
    assert [s.question for s in take(seed=1)] != [s.question for s in first]


def test_a_slice_is_the_slice_of_the_whole():
    options = tags.Options(count={"test": 10})
    whole, part = list(tags.samples(options, "test")), list(tags.samples(options, "test", 4, 8))
    assert [s.key for s in part] == [s.key for s in whole[4:8]] and len(whole) == 10
    assert all(a.question == b.question and a.images[0] == b.images[0] for a, b in zip(part, whole[4:8]))


def test_questions_are_true_of_the_scene():
    rng = np.random.default_rng(3)
    view = tags.scene(rng, 336, 12, "test")
    number = {tags.NAMES[c]: f"{t}{u}" for c, (t, u) in zip(view.colours, view.digits)}
    left = {tags.NAMES[c]: box[0] for c, box in zip(view.colours, view.boxes)}
    for q in tags.ask(rng, view, "number", 12):
        assert q.answer == number[q.text.split()[3]]
    for q in tags.ask(rng, view, "pair", 20):
        words = q.text.rstrip("?").split()
        assert q.answer == f"{number[words[2]]} {number[words[4]]}"
    for q in tags.ask(rng, view, "colour", 12):
        assert number[q.answer] == q.text.rstrip("?").split()[-1]
    for q in tags.ask(rng, view, "relation", 20):
        words = q.text.rstrip("?").split()
        assert q.answer == ("yes" if left[words[1]] < left[words[4]] else "no")


def test_boxes_lie_on_their_tags():
    for sample in take(kinds=["number"]):
        colour = tags.COLOURS[sample.question.split()[3]]
        (x0, y0, x1, y1) = map(int, sample.boxes[0][0])
        frame = np.asarray(sample.images[0], int)[y0 + 1, x0 + 1 : x1 - 1].mean(0)
        assert np.abs(frame - colour).max() < 60


def test_samples_of_one_image_share_a_scene():
    samples = take(count=8, questions=4, kinds=list(tags.KINDS))
    assert len({s.scene for s in samples}) == 2 and len({s.key for s in samples}) == 8
    assert {s.kind for s in samples[:4]} == set(tags.KINDS)


def test_a_budget_of_five_percent_cannot_hold_a_token_of_each_tag():
    options = tags.Options()
    assert options.min_tags > 0.05 * (options.size // 28) ** 2


def test_size_grows_to_1344():
    sample = take(count=1, size=1344)[0]
    assert sample.images[0].size == (1344, 1344)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"size": 330}, "options.size"),
        ({"min_tags": 9, "max_tags": 8}, "min_tags"),
        ({"size": 112, "min_tags": 8}, "room"),
        ({"kinds": ["shape"]}, "shape"),
    ],
)
def test_impossible_options_are_named(wrong, named):
    with pytest.raises(UserError, match=named):
        take(**wrong)
    with pytest.raises(UserError, match="options.count.trian: the splits are train, val, test"):
        tags.Options(count={"trian": 3})
