"""Documents: what is asked is what is drawn, where the boxes say."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from glimpseprune.config import UserError
from glimpseprune.data.sources import documents
from glimpseprune.data.sources.documents import KINDS, Options


def test_pages_do_not_depend_on_how_they_are_asked_for() -> None:
    options = Options(size=336, count={"train": 30, "val": 5})
    whole = list(documents.samples(options, "train"))
    parts = [each for a, b in ((0, 7), (7, 8), (8, 99)) for each in documents.samples(options, "train", a, b)]
    assert [(s.key, s.question, s.answers, s.boxes) for s in whole] == [
        (s.key, s.question, s.answers, s.boxes) for s in parts
    ]
    assert all(np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0])) for a, b in zip(whole, parts))
    assert len(whole) == 30 and {s.kind for s in whole} == set(KINDS)
    assert {s.scene for s in whole}.isdisjoint(s.scene for s in documents.samples(options, "val"))
    assert not list(documents.samples(options, "test"))


def test_questions_of_a_page_are_distinct_and_have_one_answer() -> None:
    for index, kind in enumerate(KINDS * 5):
        made = documents.page(np.random.default_rng(index), Options(), kind)
        questions = [text for text, *_ in made.asked]
        assert len(set(questions)) == len(questions) >= (6 if kind == "receipt" else 8)


def test_a_receipt_adds_up() -> None:
    *lines, (text, total, _) = documents.page(np.random.default_rng(3), Options(), "receipt").asked
    assert text == "total?"
    assert sum(round(float(price) * 100) for _, price, _ in lines) == round(float(total) * 100)


@pytest.mark.parametrize("tilt", [0.0, 10.0])
def test_boxes_hold_the_ink_and_next_to_nothing_else(tilt) -> None:
    """Without noise: rubbing out all boxes of a page leaves its title, rules and what is not asked about."""
    for index, kind in enumerate(KINDS):
        options = Options(tilt=tilt, noise=0.0)
        made = documents.page(np.random.default_rng(index), options, kind)
        dark = np.asarray(made.image).astype(int).sum(-1) < 330
        rest = dark.copy()
        for _, _, boxes in made.asked:
            for left, top, right, bottom in boxes:
                assert 0 <= left < right <= options.size and 0 <= top < bottom <= options.size
                rows, columns = slice(int(top), int(bottom) + 2), slice(int(left), int(right) + 2)
                assert dark[rows, columns].any()
                rest[rows, columns] = False
        assert rest.sum() < 0.45 * dark.sum()  # the title and rules


def test_the_kinds_that_are_asked_for_and_wrong_options(tmp_path) -> None:
    found = islice(documents.samples(Options(kinds=["table"]), "test"), 5)
    assert {s.kind for s in found} == {"table"}
    (tmp_path / "a.ttf").write_text("no font")
    for wrong, said in (
        ({"kinds": ["poem"]}, "receipt, form, table"),
        ({"count": {"all": 3}}, "train, val, test"),
        ({"fonts": [str(tmp_path / "a.ttf")]}, "no font file"),
        ({"fonts": ["/nowhere.ttf"]}, "no font file"),
    ):
        with pytest.raises(UserError, match=said):
            Options(**wrong)
