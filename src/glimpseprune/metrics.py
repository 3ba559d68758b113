"""Task metrics: ``metric(prediction, answers) -> float`` in 0..1, one function each, found by name.

``answers`` are the accepted ones. ``lookup.function("glimpseprune.metrics", name, "prediction")`` finds a metric, which
is any public function here whose first argument is ``prediction``; a score over a data set is the mean. What is no
mean (POPE's F1) is a ratio of sums over answers; ``tallies.py`` adds up either over batches and processes. Free-form
answers are for a judge (``judge.py``), not for this file.

Every metric reads its texts through :func:`unify`, so that one text has one form; beyond that each follows its official
script, and says where it does not. A prediction that says nothing equals no answer (:func:`anls` alone, as its script
does, lets nothing equal nothing). An answer that was cut is scored as it stands, in training, validation and evaluation
alike: whether it was cut is told beside the score (docs/evaluation.md §3.1).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from glimpseprune.config import UserError


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if equal to an answer, up to case, spaces, thousands separators and a final period."""
    said = _plain(prediction)
    return float(bool(said) and said in map(_plain, answers))


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
    matches = [bool(said) and vqa_normalise(answer) == said for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / 10


def anls(prediction: str, answers: Sequence[str]) -> float:
    """1 - edit distance / longer length, for the nearest answer; 0 if that is below .5.

    Up to case and spaces. Source: Biten et al. 2019; at exactly .5 as the DocVQA evaluation does, which keeps it.
    """
    said = _fold(prediction)
    best = 0.0
    for answer in map(_fold, answers):
        best = max(best, 1 - _edit_distance(said, answer) / max(len(said), len(answer), 1))
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if within 5% of a numeric answer, or equal to another up to case. "5%" is the number .05.

    Source: Masry et al. 2022 (ChartQA), section 5.1. An answer of 0 must be met exactly. "1,000" is a number here; the
    scripts around, which ask Python's float, take it for a word.
    """

    def matches(answer: str) -> bool:
        said, meant = _number(prediction), _number(answer)
        if said is None or meant is None:
            return _fold(prediction) == _fold(answer) != ""
        return abs(said - meant) <= 0.05 * abs(meant)

    return float(any(map(matches, answers)))


def pope(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first sentence says what the label ("yes" or "no") says; see :func:`pope_scores`."""
    return float(_says_yes(prediction) is _says_yes(answers[0]) is not None)


def choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction chooses the letter of an answer ("B", "(B)", "B. a dog"); see :func:`chosen_letter`."""
    letter = chosen_letter(prediction)
    return float(letter is not None and letter in (_first_letter(_unmarked(answer)) for answer in answers))


def box_iou(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first box in the prediction overlaps a box of the answers by an IoU of at least .5.

    A box is four numbers x0, y0, x1, y1 between commas, such as "[10, 20, 30, 40]", all in the same units.
    """
    box, targets = _box(prediction), [_box(answer) for answer in answers]
    return float(box is not None and any(target is not None and iou(box, target) >= 0.5 for target in targets))


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """accuracy, precision, recall, f1 (of "yes") and yes_ratio over a data set. Source: Li et al. 2023 (POPE); a
    prediction without a word is neither yes nor no, where the official script says yes."""
    parts = [pope_parts(said, label) for said, label in zip(predictions, labels, strict=True)]
    return pope_ratios(*(sum(column) for column in zip(*parts))) if parts else pope_ratios(0, 0, 0, 0, 0)


def pope_parts(answer: str, label: str) -> tuple[float, ...]:
    """What one answer adds to the sums that :func:`pope_ratios` is made of."""
    said, meant = _says_yes(answer), _says_yes(label)
    return tuple(map(float, (said is meant is not None, bool(said and meant), bool(said), bool(meant), 1)))


def pope_ratios(right: float, hits: float, yes: float, true: float, count: float) -> dict[str, float]:
    """Of ``count`` answers ``right`` ones, "yes" that was said where it was ``true`` (``hits``), said at all."""
    return {
        "accuracy": right / max(count, 1),
        "precision": hits / max(yes, 1),
        "recall": hits / max(true, 1),
        "f1": 2 * hits / max(yes + true, 1),
        "yes_ratio": yes / max(count, 1),
    }


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1; 0 where both are empty."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union > 0 else 0.0


def chosen_letter(text: str) -> str | None:
    """The letter of a multiple choice that ``text`` decides for, or None.

    What stands before ``</think>`` or outside of ``<answer>`` is not read; nor are a list of the options that the text
    repeats, letters that it turns down ("not A", "A is wrong") and several in one breath ("A or B"). Of what is left,
    in this order: nothing but a letter ("b", "(B)."); the last letter behind a word for answering or choosing, in one
    of some twenty languages ("the answer is b", "答案是B"); a letter that leads ("B. a dog"); the last behind "option";
    the only capital of A to J that stands alone, where "A dog" and "I see" are words and not choices.
    """
    text = _unmarked(text)
    if len(set(re.findall(_LISTED, text))) > 1:
        text = re.sub(_LISTED + r".*", "", text)
    for turned_down in (_NOT_IT, _IT_IS_NOT, _SEVERAL):
        text = turned_down.sub(" ", text)
    if whole := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return whole[1].upper()
    if said := _ANSWERED.findall(text):
        return "".join(said[-1]).upper()
    if first := _first_letter(text):
        return first
    if said := _OPTION.findall(text):
        return "".join(said[-1]).upper()
    alone = set(re.findall(_CAPITAL, text)) & set("ABCDEFGHIJ")
    return alone.pop() if len(alone) == 1 else None


def unify(text: str) -> str:
    """One form for texts that read the same: composed letters, plain width, ASCII digits and marks for the minus signs,
    full stops, commas, quotes and brackets of all scripts, nothing invisible.

    That is Unicode's NFKC, but superscripts and fractions stay what they are (5² is not 52).
    """
    if text.isascii():
        return text
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text)  # thousands set apart by a narrow space
    forms = (_form(character) for character in unicodedata.normalize("NFC", text))
    return unicodedata.normalize("NFC", "".join(forms)).translate(_MARKS_OF_OTHERS)


def vqa_normalise(text: str) -> str:
    """The text normalisation of VQA accuracy: lower case; no articles, no periods but decimal points; number words
    as digits; apostrophes put back in contractions; other punctuation but ' and : removed or made a space. A text of
    articles alone ("A", the name of something) keeps them, where the official script leaves nothing."""
    text = " ".join(unify(text).split())
    # Where a mark touches a space, or a number has a thousands separator, it is removed; else it separated words.
    thousands = re.search(r"\d,\d", text)
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


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


_MARKS_OF_OTHERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")  # hyphens, the dash of a range, the minus sign
    | dict.fromkeys("。۔।", ".")
    | dict.fromkeys("、،٬", ",")
    | {"٫": ".", "؟": "?", "٪": "%"}
    | dict.fromkeys("‘’‚‛ʼ", "'")
    | dict.fromkeys("“”„«»", '"')
    | {"【": "[", "】": "]", "「": '"', "」": '"'}
)


def _form(character: str) -> str:
    """Of one character in :func:`unify`."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "Cf" or character in "\ufe0e\ufe0f":
        return ""
    kept = unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<fraction>"))
    return character if kept else unicodedata.normalize("NFKC", character)


def _fold(text: str) -> str:
    return " ".join(unify(text).casefold().split())


def _plain(text: str) -> str:
    return _ungrouped(_fold(text)).rstrip(" .")


def _ungrouped(text: str) -> str:
    """Numbers without their thousands separators: 1,234,567 and 1'234'567."""
    grouped = r"(?<![\w.,'])\d{1,3}(?:(?:,\d{3})+|(?:'\d{3})+)(?!\w|[,']\d)"
    return re.sub(grouped, lambda found: re.sub("[,']", "", found[0]), text)


# ------------------------------------------------------------------------------------------------- letters of a choice

_EDGE = r"A-Za-z0-9À-ɏ'-"  # beside a letter, these make a word of it; the characters of Asian scripts do not
# A capital on its own. "A dog" and "I see" (and E, O of other languages) are words, but "A is right" is not.
_LONE = rf"(?<![{_EDGE}])%s(?![{_EDGE}])"
_CAPITAL = _LONE % (
    r"(?!A\s+(?!(?:is|was|or|and|but|because|since|as|for|with|which|seems|looks|fits|matches)\b)[a-zà-ɏ])"
    r"(?![EIO]\s+(?!(?:is|or|because)\b)[a-zà-ɏ])([A-Z])"
)
# A small letter counts only behind a cue, and where it ends what is said or could not be a word of any language.
_SMALL = _LONE % r"(?:([a-z])(?=\s*(?:[.,;:!?)]|$))|([b-df-hj-np-tvxz])(?=\s))"
# Up to three words between a cue and its letter, which is behind "is" a letter even where it could be an article.
_CUED = (
    r"[\s:=,(\"-]{0,5}(?:[^\W\d_A-Z]{1,12}[\s:=,(\"-]{1,5}){0,3}?[^\W\d_A-Za-z]{0,8}?[\s:=,(\"-]{0,5}"
    rf"(?:{_SMALL}|(?<=\bis )(?!I\s+[a-z]){_LONE % '([A-Z])'}|{_CAPITAL})"
)
_ANSWERED = re.compile(
    r"(?:\b(?i:answer|choose|pick|select|antwort|lösung|antwoord|svar|respuesta|resposta|risposta|réponse|reponse|"
    r"odpowiedź|odpověď|răspunsul|ответ|відповідь|cevap|yanıt|jawaban|đáp án)|"
    r"答案|答え|答|回答|解答|正解|选择|選擇|选|選|정답|답변|답|الإجابة|الجواب|إجابة|उत्तर|উত্তর|คำตอบ)" + _CUED
)
_OPTION = re.compile(
    r"(?:\b(?i:option|choice|opción|opcion|opção|opzione|optie|letter|lettre|letra|buchstabe|вариант)|选项|選項|選択肢|보기)"
    + _CUED
)
_NAMED = rf"\(?{_LONE % '[A-Z]'}\)?"
_NOT_IT = re.compile(
    r"(?:(?:\b(?i:not|rather than|instead of|over|unlike|neither|nor|nicht|statt|pas|non|não|не)|n't)\s+|"
    r"不是|不选|不選|而非|并非)(?:(?i:be|the|an?|option|choice|answer|选项)\s+)*" + _NAMED
)
_IT_IS_NOT = re.compile(
    _NAMED + r",?\s*(?:(?i:which|that|is|are|was|be|must|would|seems|looks|does|can|also|just|an?|ist|est|es|è|é|"
    r"[a-z]{1,12}ly)\s+|是){0,4}(?:(?i:not|cannot|wrong|incorrect|false|excluded|eliminated|ruled out|impossible|"
    r"unlikely|(?:common )?distractor|falsch|faux|fausse|incorrecta?|incorrecte|falsa?|errada?|неверно|"
    r"[a-z]{2,6}n't)\b|错|錯|不对|不對|不正确|不正確|不是|ではな|じゃな|[가이은는]? ?아니|[가이은는]? ?틀)"
)
_AND = r"(?:/|&|\b(?i:or|and|oder|und|o|y|ou|et|e|или|и)\b|或|和|还是|と|か|또는|아니면)"
_SEVERAL = re.compile(
    rf"{_NAMED}(?:\s*,\s*{_NAMED}){{0,9}}\s*,?\s*{_AND}\s*(?:(?i:option|choice)\s+)?{_NAMED}"
    rf"|{_NAMED}(?:\s*,\s*{_NAMED}){{1,9}}(?=\s*(?:[.!?)]|$))"
)
_LISTED = r"(?m)^\s*\(?([A-Z])[.):]\s"


def _unmarked(text: str) -> str:
    """What ``text`` says in the end, without Markdown and TeX; all brackets round, a letter in quotes bracketed."""
    text = unify(text).rpartition("</think>")[2].rpartition("<answer>")[2].partition("</answer>")[0]
    text = text.replace("\\boxed", " answer: ")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\b|[$*`_#]|\\", "", text)
    text = text.translate(str.maketrans("[]{}<>", "()()()"))
    text = re.sub(r"(['\"])([A-Za-z])\1", r"(\2)", text)
    lines = (" ".join(line.split()) for line in text.splitlines())  # for patterns that would be slow on long gaps
    return "\n".join(filter(None, lines))


def _first_letter(text: str) -> str | None:
    """A letter that is all of ``text``, or leads it."""
    found = re.fullmatch(r"\W*([A-Za-z])\W*", text) or re.match(
        r"\(?([A-Za-z])(?:(?:\)|[.:])(?![A-Za-z0-9À-ɏ])|,(?=\s*[^\x00-\x7f])|\s+-\s)", text
    )
    return found[1].upper() if found else None


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def _number(text: str) -> float | None:
    text = _ungrouped(unify(text).strip())
    found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)", text)
    return float(found[1]) / (100 if found[2] else 1) if found else None


def _says_yes(text: str) -> bool | None:
    """POPE's rule: yes unless the first sentence has the word "no" or "not"; None where there is no word at all."""
    text = unify(text)
    if not re.search(r"\w", text):
        return None
    return not {"no", "not"} & set(text.partition(".")[0].replace(",", "").lower().split())


def _box(text: str) -> tuple[float, ...] | None:
    found = re.search(" ?, ?".join([r"(-?\d+(?:\.\d+)?)"] * 4), " ".join(unify(text).split()))
    return tuple(map(float, found.groups())) if found else None
