"""Our metrics beside lmms-eval's scorers, on thousands of generated pairs: every difference has a reason.

Runs where lmms-eval is installed (``pip install --no-deps lmms-eval`` beside the packages it imports).
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from glimpseprune import metrics

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install --no-deps lmms-eval")

PAIRS = 6000
WORDS = (
    "a an the red blue Blue dog dogs cat's two 2 three 10 ten none zero yes no Yes No not left Left right street "
    "don't dont wont it's its oclock 1,000 1000 12.5 3.50 $5.00 50% 0.5 5 105 95 2,5 10:30 U.S.A. t-shirt black&white "
    "paris Paris new york New York coca-cola well shed he'd 2019 A B C D (B) B. hot/cold stop!"
).split()


def text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))))


def slip(draw: random.Random, said: str) -> str:
    """Nearly the same: another case, a mark, a space, a letter."""
    place = draw.randrange(len(said) + 1)
    return draw.choice(
        (
            said,
            said,
            said.upper(),
            said.lower(),
            f"{said}.",
            f"{said}!",
            f"the {said}",
            f" {said} ",
            f"{said}\n",
            said.replace(" ", "  "),
            said[:place] + draw.choice("aeiou ,.-'") + said[place:],
            said[:place] + said[place + 1 :] or "x",
        )
    )


def pairs(seed: int, count: int = PAIRS) -> Iterator[tuple[str, str]]:
    """A prediction, as lmms-eval hands it to scorers, and an answer."""
    draw = random.Random(seed)
    for _ in range(count):
        answer = text(draw)
        yield (slip(draw, answer) if draw.random() < 0.75 else text(draw)).strip(), answer


def differences(
    name: str,
    found: Iterable[tuple[str, Any]],
    ours: Callable[[str, Any], float],
    theirs: Callable[[str, Any], float],
    reason: Callable[[str, Any], str],
) -> tuple[int, Counter[str]]:
    """How many pairs agree, and how many do not, by reason; one without fails."""
    same: int = 0
    others: Counter[str] = Counter()
    for said, meant in found:
        a, b = ours(said, meant), float(theirs(said, meant))
        if a == pytest.approx(b, abs=1e-9):
            same += 1
            continue
        why = reason(said, meant)
        assert why, f"{said!r} of {meant!r}: ours {a}, lmms-eval {b}"
        others[why] += 1
    print(f"{name}: {same} of {same + sum(others.values())} agree; {dict(others)}")
    return same, others


def bare(said: str) -> str:
    return said.lower().translate(str.maketrans("", "", string.punctuation))


def test_exact_match_beside_gqa():
    """GQA's takes away all ASCII punctuation, inside of words, too: "12.5" is "125"."""
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    def theirs(said, meant):
        return exact_match_hf_evaluate([said], [meant], ignore_case=True, ignore_punctuation=True)["exact_match"]

    def reason(said, meant):
        if bare(said) == bare(meant):
            return "ours heeds a mark"
        return "theirs heeds doubled spaces" if bare(said).split() == bare(meant).split() else ""

    ours = metrics.exact_match
    same, others = differences("exact_match", pairs(1), lambda s, m: ours(s, [m]), theirs, reason)
    assert same > 0.8 * PAIRS and len(others) == 2


def ten(seed: int) -> Iterator[tuple[str, list[str]]]:
    draw = random.Random(seed)
    for said, meant in pairs(seed, PAIRS // 2):
        yield said, [draw.choice((meant, meant, slip(draw, meant), text(draw))) for _ in range(10)]


@pytest.mark.parametrize("task", ["vqav2", "textvqa"])
def test_vqa_accuracy(task):
    """Answers of articles alone keep them in ours; TextVQA's loses a comma where VQAv2's and ours part words by it."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    def theirs(said, meant):
        if task == "vqav2":
            answers = [{"answer": answer, "answer_id": place} for place, answer in enumerate(meant)]
            return vqav2_process_results({"answers": answers, "question_id": 0}, [said])["exact_match"]
        return textvqa_process_results({"answers": list(meant), "question_id": 0}, [said])["exact_match"]

    def reason(said, meant):
        texts = [said, *meant]
        if task == "textvqa" and any("," in each for each in texts):
            return "theirs loses a comma"
        if any(each and set(each.split()) <= {"a", "an", "the"} for each in map(bare, texts)):
            return "an answer of articles alone"
        return "an apostrophe in front" if "'" in said else ""

    same, others = differences(f"vqa_accuracy ({task})", ten(2), metrics.vqa_accuracy, theirs, reason)
    assert same > 0.98 * PAIRS // 2 and "an answer of articles alone" in others


def test_anls():
    from lmms_eval.api.metrics import anls

    def theirs(said, meant):
        return anls(references=meant, predictions=[said])["anls"]

    found = ((said, [meant, meant.upper() + "s"]) for said, meant in pairs(3))
    assert differences("anls", found, metrics.anls, theirs, lambda said, meant: "")[0] == PAIRS


def test_relaxed_accuracy():
    """Ours folds spaces, 1,000 is a number, and 0% is 0."""
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    def reason(said, meant):
        if "  " in said or "\n" in said:
            return "theirs heeds doubled spaces"
        if meant == "0":
            return "ours meets 0 in another form"
        return "ours reads 1,000 as a number" if "," in said + meant else ""

    ours = metrics.relaxed_accuracy
    draw = random.Random(8)
    numbers = [str(draw.choice((100, 5, 0.5, 0, -3, 1000, 2019))) for _ in range(PAIRS)]
    near = [(f"{float(n) * draw.uniform(0.93, 1.07):.4g}" + draw.choice(("", "", "%")), n) for n in numbers]
    same, _ = differences(
        "relaxed_accuracy", [*pairs(4), *near], lambda s, m: ours(s, [m]), relaxed_correctness, reason
    )
    assert same > 0.9 * 2 * PAIRS


def test_pope():
    """The official script, which ours follows, reads a sentence: yes unless it says no or not. lmms-eval's wants the
    word alone. On answers of one word they agree in everything but yes_ratio, which theirs takes of the labels."""
    from lmms_eval.tasks.pope import utils

    def theirs(said, meant):
        return utils.pope_process_results({"answer": meant, "question_id": 0}, [said])["pope_accuracy"]["score"]

    draw = random.Random(5)
    others = ("Yes.", "no, there is none", "I see a dog")
    found = [(draw.choice(("yes", "no", "Yes", "No", *others)), draw.choice(("yes", "no"))) for _ in range(PAIRS)]

    def reason(said, meant):
        return "theirs wants one word" if said.lower() not in ("yes", "no") else ""

    differences("pope", found, lambda s, m: metrics.pope(s, [m]), theirs, reason)
    short = [(said, meant) for said, meant in found if said.lower() in ("yes", "no")]
    rows = [{"question_id": 0, "score": theirs(s, m), "prediction": s.lower(), "ground_truth": m} for s, m in short]
    scores = metrics.pope_scores(*zip(*short))
    for name, key in {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}.items():
        assert scores[name] == pytest.approx(getattr(utils, f"pope_aggregate_{key}")(rows))
    labels = sum(meant == "yes" for _, meant in short) / len(short)
    assert utils.pope_aggregate_yes_ratio(rows) == pytest.approx(labels)
    assert scores["yes_ratio"] == pytest.approx(sum(said.lower() == "yes" for said, _ in short) / len(short))


def test_choice():
    """Theirs knows a letter alone and "B. ..."; ours reads prose, too."""
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    def theirs(said, meant):
        return sqa_process_results({"choices": "abcde", "answer": "ABCDE".index(meant)}, [said])["exact_match"]

    def reason(said, meant):
        alone = len(said) == 1 or (said[0].isupper() and said[1] == "." and not said[2:3].isalnum())
        return "" if alone and said[0].upper() == meant else "ours reads prose"

    draw = random.Random(6)
    forms = (*"ABCDEabcde", "B. dog", "A. cat", "C.", "(D)", "The answer is B")
    found = [(draw.choice((said or "x", *forms)), draw.choice("ABCDE")) for said, _ in pairs(6)]
    same, _ = differences("choice", found, lambda s, m: metrics.choice(s, [m]), theirs, reason)
    assert same > 0.95 * PAIRS


def test_iou():
    from lmms_eval.tasks.refcoco.utils_rec import compute_iou

    draw = random.Random(7)

    def box():
        x, y = draw.uniform(0, 80), draw.uniform(0, 80)
        return [x, y, x + draw.uniform(1, 40), y + draw.uniform(1, 40)]

    for _ in range(PAIRS):
        a, b = box(), box()
        assert metrics.iou(a, b) == pytest.approx(compute_iou(a, b), abs=1e-6)
