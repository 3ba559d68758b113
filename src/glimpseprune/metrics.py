"""Task metrics: ``metric(prediction, answers) -> float`` in 0..1, one function each, found by name.

``answers`` are the accepted ones. ``lookup.function("glimpseprune.metrics", name, "prediction")`` finds a metric, which
is any public function here whose first argument is ``prediction``; a score over a data set is the mean. What is no
mean (POPE's F1) has its own function over lists. Free-form answers are for a judge (``judge.py``), not for this file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from glimpseprune.config import UserError


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if equal to an answer, up to case, spaces and a final period."""
    return float(_plain(prediction) in map(_plain, answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3) among nine of the ten human answers, mean over which one is left out.

    Text is normalised by :func:`vqa_normalise` on both sides (the official script leaves unanimous answers as they
    are). Source: Antol et al. 2015; visualqa.org/evaluation, GT-Vision-Lab/VQA@07aecec.

    Raises:
        UserError: not ten answers.
    """
    if len(answers) != 10:
        raise UserError(f"vqa_accuracy needs ten human answers, got {len(answers)}: use metric exact_match")
    said = vqa_normalise(prediction)
    matches = [vqa_normalise(answer) == said for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / 10


def anls(prediction: str, answers: Sequence[str]) -> float:
    """1 - edit distance / longer length, for the nearest answer; 0 if that is below .5.

    Up to case and spaces. Source: Biten et al. 2019; at exactly .5 as the DocVQA evaluation does, which keeps it.
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        meant = " ".join(answer.lower().split())
        best = max(best, 1 - _edit_distance(said, meant) / max(len(said), len(meant), 1))
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if within 5% of a numeric answer, or equal to another up to case. "5%" is the number .05.

    Source: Masry et al. 2022 (ChartQA), section 5.1. An answer of 0 must be met exactly.
    """

    def matches(answer: str) -> bool:
        said, meant = _number(prediction), _number(answer)
        if said is None or meant is None:
            return prediction.strip().lower() == answer.strip().lower()
        return abs(said - meant) <= 0.05 * abs(meant)

    return float(any(map(matches, answers)))


def pope(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first sentence says what the label ("yes" or "no") says; see :func:`pope_scores`."""
    return float(_says_yes(prediction) == _says_yes(answers[0]))


def choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction chooses the letter of an answer ("B"); a letter inside a word is not a choice."""
    letter = chosen_letter(prediction)
    return float(letter is not None and letter in (answer.strip("() .").upper() for answer in answers))


def box_iou(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first box in the prediction overlaps a box of the answers by an IoU of at least .5.

    A box is four numbers x0, y0, x1, y1 between commas, such as "[10, 20, 30, 40]", all in the same units.
    """
    box, targets = _box(prediction), [_box(answer) for answer in answers]
    return float(box is not None and any(target is not None and iou(box, target) >= 0.5 for target in targets))


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """accuracy, precision, recall, f1 (of "yes") and yes_ratio over a data set. Source: Li et al. 2023 (POPE)."""
    pairs = [(_says_yes(said), _says_yes(label)) for said, label in zip(predictions, labels, strict=True)]
    hits, yes, true = (sum(map(f, pairs)) for f in (all, lambda pair: pair[0], lambda pair: pair[1]))
    return {
        "accuracy": sum(said == label for said, label in pairs) / max(len(pairs), 1),
        "precision": hits / max(yes, 1),
        "recall": hits / max(true, 1),
        "f1": 2 * hits / max(yes + true, 1),
        "yes_ratio": yes / max(len(pairs), 1),
    }


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1; 0 where both are empty."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union > 0 else 0.0


def chosen_letter(text: str) -> str | None:
    """The letter of a multiple choice that ``text`` decides for, or None.

    In this order: nothing but a letter ("b", "(B)."); a letter that leads ("B. a dog", "B: a dog"); the last letter
    after "answer", "option" or "choice" ("the answer is B"); the only capital that stands alone, where "A dog" and
    "I see" are words and not choices.
    """
    text = text.strip().strip("*").strip()
    if found := re.fullmatch(r"\(?([A-Za-z])\)?[.:,]?", text) or re.match(r"\(?([A-Z])(?:\)|[.:])(?!\w)", text):
        return found[1].upper()
    if cued := re.findall(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\**\(?(?!I\s+[a-z])([A-Z])(?![\w'’-])", text):
        return cued[-1]
    alone = re.findall(r"(?<![\w'’-])([AI](?![\w'’-])(?!\s+(?!or\b|and\b)[a-z])|[B-HJ-Z](?![\w'’-]))", text)
    return alone[0] if len(set(alone)) == 1 else None


def vqa_normalise(text: str) -> str:
    """The text normalisation of VQA accuracy: lower case; no articles, no periods but decimal points; number words
    as digits; apostrophes put back in contractions; other punctuation but ' and : removed or made a space."""
    text = " ".join(text.split())
    # Where a mark touches a space, or a number has a thousands separator, it is removed; else it separated words.
    thousands = re.search(r"\d,\d", text)
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in ("a", "an", "the"))


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
# Stems per ending. Those that would be other words without the apostrophe (well, shed, its) are not in it.
_CONTRACTIONS = {
    (stem + ending).replace("'", ""): stem + ending
    for ending, stems in {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could i might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you y'all",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "'m": "i",
        "n't've": "could had might should would",
        "'d've": "he i it she somebody someone something there they we who you y'all",
        "": "ma'am o'clock 'twas y'all",
    }.items()
    for stem in stems.split()
}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*", text)
    return float(found[1]) / (100 if found[2] else 1) if found else None


def _says_yes(text: str) -> bool:
    """POPE's rule: yes unless the first sentence has the word "no" or "not"."""
    return not {"no", "not"} & set(text.partition(".")[0].replace(",", "").lower().split())


def _box(text: str) -> tuple[float, ...] | None:
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    found = re.search(",".join([number] * 4), text)
    return tuple(map(float, found.groups())) if found else None
