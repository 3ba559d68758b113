"""Metrics: known values, and the cases that each rule exists for."""

from __future__ import annotations

import pytest

from glimpseprune import lookup, metrics
from glimpseprune.config import UserError

FOUND = lookup.functions("glimpseprune.metrics", "prediction")


def test_found_by_name():
    assert {"exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "pope", "choice", "box_iou"} <= set(FOUND)
    assert not {"pope_scores", "iou", "chosen_letter", "vqa_normalise"} & set(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_every_metric_is_right_about_the_answer_itself_and_stays_within_bounds(name):
    answers = ["[0, 0, 2, 2]" if name == "box_iou" else "b"] * 10
    assert FOUND[name].__doc__ and FOUND[name](answers[0], answers) == 1
    for said in ("x y", "", "b b", "7", "no."):
        score = FOUND[name](said, answers)
        assert type(score) is float and 0 <= score <= 1


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("37", ["37"], 1),
        (" Red \n tag.", ["blue", "red tag"], 1),
        ("37 ", ["73"], 0),
        ("3 7", ["37"], 0),
        ("", ["a"], 0),
    ],
)
def test_exact_match(prediction, answers, score):
    assert metrics.exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("matches", "score"),
    # k of 10 agree: k times min(1, (k-1)/3), 10-k times min(1, k/3), over 10
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten(matches, score):
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    assert metrics.vqa_accuracy("The red.", answers) == pytest.approx(score)


def test_vqa_accuracy_needs_ten():
    with pytest.raises(UserError, match="ten human answers, got 3"):
        metrics.vqa_accuracy("red", ["red"] * 3)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red car.", "red car"),
        ("an apple a day", "apple day"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("TEN", "10"),
        ("3.5 miles.", "3.5 miles"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("hes", "he's"),
        ("o'clock oclock", "o'clock o'clock"),
        ("well its a shed", "well its shed"),  # not we'll, it's, she'd
        ("dog's", "dog's"),
        ("t-shirt", "t shirt"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("yes!", "yes"),
        ("(yes)", "yes"),
        ("1,000", "1000"),
        ("10:30", "10:30"),
        ("a\tb\nc", "b c"),
    ],
)
def test_vqa_normalise(text, normal):
    assert metrics.vqa_normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello World", ["hello  world"], 1.0),
        ("helo", ["hello"], 0.8),
        ("kitten", ["sitting"], 4 / 7),  # three edits of seven
        ("abcd", ["abxy"], 0.5),  # exactly at the threshold: kept
        ("abc", ["axy"], 0.0),  # one third: below
        ("paris", ["rome", "pari", "london"], 0.8),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction, answers, score):
    assert metrics.anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("-100", "100", 0),
        ("5%", "0.05", 1), ("5", "5%", 0), ("0", "0", 1), ("0.01", "0", 0), ("Blue", "blue", 1), ("blue", "red", 0),
        ("1e2", "100", 1), ("nan", "100", 0), ("100 dollars", "100", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction, answer, score):
    assert metrics.relaxed_accuracy(prediction, ["something else", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "yes"),
    [
        ("Yes", True), ("No", False), ("no, there is none", False), ("There is not a dog. Yes.", False),
        ("Yes. There is no cat.", True), ("I know it", True), ("nothing", True), ("NO", False),
    ],
)  # fmt: skip
def test_pope(prediction, yes):
    assert metrics.pope(prediction, ["yes"]) == yes and metrics.pope(prediction, ["no"]) == (not yes)


def test_pope_scores():
    scores = metrics.pope_scores(["yes", "yes", "no", "no", "yes"], ["yes", "no", "no", "yes", "yes"])
    assert scores == pytest.approx(
        {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.6}
    )
    assert metrics.pope_scores(["no"], ["no"])["f1"] == 0
    with pytest.raises(ValueError, match="zip"):
        metrics.pope_scores(["no"], ["no", "no"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("B. A dog", "B"), ("B) a dog", "B"),
        ("A: dog", "A"), ("The answer is C.", "C"), ("Answer: D", "D"), ("I think option (B) fits", "B"),
        ("Is it A or B? The answer is B", "B"), ("It must be D because", "D"), ("I would say C", "C"),
        # a letter inside a word, an article, a pronoun, two letters: no choice
        ("Banana", None), ("A dog", None), ("I see nothing", None), ("T-shirt", None), ("A or B", None),
        ("Bob's", None), ("There is no option I can see", None),
        ("The answer is Banana", None), ("the answer is a dog", None), ("", None), ("B.C.", None), ("42", None),
    ],
)  # fmt: skip
def test_chosen_letter(text, letter):
    assert metrics.chosen_letter(text) == letter
    assert metrics.choice(text, ["(B)"]) == (letter == "B")


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1), ((0, 0, 2, 2), (0, 0, 2, 1), 0.5), ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 1, 1), (2, 2, 3, 3), 0), ((1, 1, 1, 1), (1, 1, 1, 1), 0), ((2, 2, 0, 0), (0, 0, 2, 2), 0),
    ],
)  # fmt: skip
def test_iou(a, b, overlap):
    assert metrics.iou(a, b) == pytest.approx(overlap) == metrics.iou(b, a)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("[0, 0, 2, 2]", 1), ('{"bbox_2d": [0, 0, 2.0, 1]}', 1), ("0,0,2,0.9", 0), ("no box", 0), ("[1, 2, 3]", 0),
        ("first [0,0,2,2] then [7,7,8,8]", 1),
    ],
)  # fmt: skip
def test_box_iou(prediction, score):
    assert metrics.box_iou(prediction, ["[9, 9, 9, 9]", "[0, 0, 2, 2]"]) == score
