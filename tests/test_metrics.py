"""Metrics: known values, and the cases that each rule exists for."""

from __future__ import annotations

import time
import unicodedata

import pytest

from glimpseprune import lookup, metrics
from glimpseprune.config import UserError

FOUND = lookup.functions("glimpseprune.metrics", "prediction")


def test_found_by_name():
    assert {"exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "pope", "choice", "box_iou"} <= set(FOUND)
    assert not {"pope_scores", "iou", "chosen_letter", "unify", "vqa_normalise"} & set(FOUND)


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
        ("27 .", ["27"], 1), ("27\n.", ["27"], 1), ("yes", ["yes ."], 1), ("etc", ["etc..."], 1), (".5", ["5"], 0),
        ("1,234,567", ["1234567"], 1), ("1000", ["1'000"], 1), ("1,000.50", ["1000.5"], 0),
        ("1,000.5", ["1000.5"], 1),
        ("1,00", ["100"], 0), ("1,2", ["12"], 0), ("x1,000", ["x1000"], 0), ("0,123,4567", ["01234567"], 0),
        ("STRASSE", ["Straße"], 1),
    ],
)  # fmt: skip
def test_exact_match(prediction, answers, score):
    assert metrics.exact_match(prediction, answers) == score


@pytest.mark.parametrize("name", sorted(FOUND.keys() - {"anls"}))
@pytest.mark.parametrize("said", ["", " \n", ".", "。", "...", "?", "\u200b", " . "])
def test_nothing_said_equals_nothing(name, said):
    for answer in ("", "A", "yes", "no", "0", "the", "an"):
        assert FOUND[name](said, [answer] * 10) == 0


def spelled(text):
    """The same text in other forms of Unicode."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    return {unicodedata.normalize("NFD", text), wide, f"\u200b{text}\ufeff", text.replace(" ", "\xa0"), text}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("exact_match", "Café 27"), ("exact_match", "-5"), ("anls", "Größe 12"), ("relaxed_accuracy", "-12.5%"),
        ("relaxed_accuracy", "Éire"), ("vqa_accuracy", "crème brûlée"), ("vqa_accuracy", "don't know"), ("pope", "no"),
        ("choice", "(B)"), ("box_iou", "[0, 0, 20, 20]"), ("exact_match", "がぎぐ"),
    ],
)  # fmt: skip
def test_one_text_in_all_its_forms(name, answer):
    for one in spelled(answer):
        for other in spelled(answer):
            assert FOUND[name](one, [other] * 10) == 1, (one, other)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("\u22125", "-5"), ("5\u201310", "5-10"), ("猫。", "猫."), ("don’t", "don't"), ("“red”", '"red"'),
        ("٣٫٥", "3.5"),
        ("5²", "5²"), ("3½", "3½"), ("\u202f", " "), ("10\u202f000", "10,000"), ("10\u202f00", "10 00"), ("ﾊﾞｽ", "バス"),
        ("ｎｏ．", "no."), ("so\u00adft", "soft"), ("ﬁn", "fin"), ("…", "..."), ("Ⓑ", "B"),
    ],
)  # fmt: skip
def test_unify(text, same):
    assert metrics.unify(text) == same == metrics.unify(same)


@pytest.mark.parametrize(
    ("name", "said", "answer", "score"),
    [
        ("exact_match", "猫。", "猫", 1), ("exact_match", "5²", "52", 0), ("relaxed_accuracy", "\u2212105", "-100", 1),
        ("relaxed_accuracy", "1\u202f040", "1000", 1), ("relaxed_accuracy", "１０４％", "100%", 1),
        ("pope", "No。Yes", "no", 1), ("vqa_accuracy", "猫。", "猫", 1), ("vqa_accuracy", "don’t", "dont", 1),
        ("anls", "cafe\u0301", "cafe", 0.75),
    ],
)  # fmt: skip
def test_forms_within_a_text(name, said, answer, score):
    assert FOUND[name](said, [answer] * 10) == score


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
        ("A", "a"),
        ("the a", "the a"),
        ("?", ""),  # of articles alone
        ("-5", "5"),
        ("2/3", "2 3"),
        ("red,blue 1,000", "redblue 1000"),
        ("3..5.", "3.5"),
        ("u.s.a.", "usa"),
        ("somebodyd've yall", "somebody'd've y'all"),
        ("one-two", "1 2"),
        ("the end.of", "endof"),
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
        ("1e2", "100", 1), ("nan", "100", 0), ("100 dollars", "100", 0), ("1,040", "1000", 1), ("1040", "1,000.0", 1),
        ("1,04", "104", 0), ("yes.", "yes", 0), ("5 %", "5%", 1), ("27.", "27", 1), ("", "", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction, answer, score):
    assert metrics.relaxed_accuracy(prediction, ["something else", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "yes"),
    [
        ("Yes", True), ("No", False), ("no, there is none", False), ("There is not a dog. Yes.", False),
        ("Yes. There is no cat.", True), ("I know it", True), ("nothing", True), ("NO", False),
        ("Yes, it is not red. No.", False), ("cannot", True),
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
    silent = metrics.pope_scores(["", "."], ["yes", "no"])
    assert silent["accuracy"] == silent["yes_ratio"] == silent["recall"] == 0
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
        ("Answer: A dog", None), ("choose a dog", None), ("Y el perro", None), ("E il cane", None), ("Bébé", None),
        ("A la izquierda", None), ("X-ray of B", "B"), ("A is correct", "A"), ("I am", None), ("The answer is I", "I"),
        # small letters, behind a cue
        ("The answer is b.", "B"), ("Answer: b", "B"), ("b) a dog", "B"), ("option b is right", "B"),
        ("Answer: a", "A"), ("My final answer is: (e)", "E"), ("I choose option a.", "A"),
        # other languages and forms
        ("答案是B", "B"), ("答案：B", "B"), ("答案应该是B。", "B"), ("选B。", "B"), ("B、猫", "B"),
        ("Ｂ", "B"), ("Ⓑ", "B"), ("【B】", "B"),
        ("정답은 B입니다", "B"), ("Bです", "B"), ("答えはBです。", "B"), ("La respuesta correcta es la C.", "C"),
        ("Antwort: D", "D"), ("Die richtige Antwort ist D.", "D"), ("réponse B", "B"), ("Ответ: B", "B"),
        ("الإجابة: C", "C"), ("Antwort:\n\nAntwort: C", "C"),
        # markup, thinking
        ("$\\boxed{B}$", "B"), ("A and B. \\boxed{\\text{C}}", "C"), ("**Answer:** B", "B"), ("The answer is 'B'", "B"),
        ("<think>maybe A, answer: A</think>\nB", "B"), ("<think>A or B?</think><answer>C</answer>", "C"),
        # of two the last, or none
        ("The answer is A. Wait, the answer is B.", "B"), ("Answer: A\nAnswer: C", "C"), ("The answer is A or B", None),
        ("A, B", None), ("The answer is both A and B.", None), ("Neither A nor B", None), ("It is A, B, or C", None),
        ("A. dog\nB. cat", None), ("A. dog\nB. cat\nThe answer is B", "B"), ("A或B", None),
        # turned down
        ("The answer is not A", None), ("The answer is not A but B", "B"), ("A is wrong, B is right", "B"),
        ("B, because A does not fit", "B"), ("I'd go with B rather than A", "B"), ("答案不是A，而是B", "B"), 
        ("A不对，选C", "C"), ("Answer: B because A is a distractor", "B"),
        ("The answer is B, not option A", "B"), ("Option A is wrong; it must be B", "B"), ("A isn't right. C", "C"),
        ("The answer is B. Note that A is a common distractor.", "B"), ("B. Note that option A shows a cat", "B"),
    ],
)  # fmt: skip
def test_chosen_letter(text, letter):
    assert metrics.chosen_letter(text) == letter
    for answer in ("(B)", "b", "B. a dog", "B) dog", "Ｂ"):
        assert metrics.choice(text, [answer]) == (letter == "B")


def test_a_reference_is_a_letter_or_begins_with_one():
    assert metrics.choice("C", ["Vitamin C"]) == metrics.choice("A", ["A dog"]) == metrics.choice("B", [""]) == 0


@pytest.mark.parametrize(
    "part", ["A ", "answer ", "A, ", "A or ", "not ", "A is ", " ", "<answer>", "1,000", "[", "答"]
)
def test_metrics_in_linear_time(part):
    start = time.process_time()
    for name in FOUND.keys() - {"anls"}:
        FOUND[name]("A" + part * 3000, ["1, 2, 3, 4"] * 10)
    assert time.process_time() - start < 2


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
