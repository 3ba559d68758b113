"""Rewards: found by name, weighted, and what becomes of values that do not apply, are missing, or are wrong."""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

from glimpseprune import judge, lookup, rewards
from glimpseprune.config import UserError
from glimpseprune.options import JudgeOptions
from glimpseprune.rewards import MISSING, Rewards

nan = math.nan


def score(values, completions=None, **options):
    """Scores of functions that return the given values, weight 1 each."""
    functions = {name: lambda completions, column=column, **fields: column for name, column in values.items()}
    completions = completions or ["x"] * len(next(iter(values.values())))
    return Rewards(functions, {name: options.get(name, 1.0) for name in values})(completions)


def test_find():
    assert rewards.find("format") is rewards.format
    found = rewards.find("exact_match")(["red", "a blue"], answers=[("Red.",), ("blue",)], samples=[], kinds=[])
    assert found == [1.0, 0.0]
    with pytest.raises(UserError, match="did you mean 'exact_match'.*choices are anls, .*format, judge, .*vqa_acc"):
        rewards.find("exact_mach")
    with pytest.raises(UserError, match="no 'build'"):
        rewards.find("build")


@pytest.mark.parametrize(
    ("name", "answers", "values"),
    [
        ("box_iou", [("[0, 0, 2, 2]",), ("red",), ()], [1.0, None, None]),
        ("choice", [("(B)",), ("red",), ()], [0.0, None, None]),
        ("pope", [("yes",), ("no",), ()], [1.0, 0.0, None]),
        ("anls", [("0,0,2,2",), ("",), ()], [1.0, 0.0, None]),
    ],
)
def test_a_metric_applies_where_the_reference_would_score(name, answers, values):
    assert rewards.find(name)(["0,0,2,2"] * 3, answers=answers) == values


OWN = sorted(lookup.functions("glimpseprune.rewards", "completions"))


@pytest.mark.parametrize(
    "name", [name for name in OWN if "client" not in inspect.signature(rewards.find(name)).parameters]
)
def test_every_reward_gives_one_value_for_each_completion(name):
    """Given all fields, whatever the texts are; those of a judge are tested in test_judge.py."""
    texts, rows = ["", "a", "a dog\nand a cat", "[0, 0, 2, 2]"], 4
    fields = {
        "samples": [SimpleNamespace(dataset="tags")] * rows,
        "questions": ["?"] * rows,
        "answers": [("a",), (), ("a dog", "b"), ("",)],
    }
    built = rewards.build({name: 1.0})
    scores = built(texts, **fields, kinds=["all"] * rows, truncated=[False] * rows)
    assert scores.values.shape == (rows, 1) and scores.valid.any() and rewards.find(name).__doc__
    again = built(texts, **fields, kinds=["all"] * rows, truncated=[False] * rows)
    torch.testing.assert_close(scores.values, again.values, equal_nan=True, atol=0, rtol=0)


def test_the_reward_of_a_task_is_its_metric():
    """By the data set of each sample, or of the one that is named."""
    answers, texts = [("abcd",), ("yes",), ("100",)], ["abcx", "Yes, it is", "104"]
    samples = [SimpleNamespace(dataset=name) for name in ("docvqa", "pope", "chartqa")]
    built = rewards.build({"task": 1.0})
    assert built(texts, answers=answers, samples=samples).total.tolist() == [0.75, 1.0, 1.0]
    named = rewards.build({"task": 1.0}, task="docvqa")
    assert named(texts[:1], answers=answers[:1], samples=[SimpleNamespace(dataset="mine")]).total.tolist() == [0.75]


@pytest.mark.parametrize(
    ("weights", "task", "dataset", "message"),
    [
        ({"task": 1.0}, None, "mine", "no task is about the data set 'mine': give rewards.task, one of chartqa"),
        ({"task": 1.0}, None, "viscot", "scored by a judge: give rewards.task and rewards.judge"),
        ({"task": 1.0}, "viscot", "", "reward 'task' needs a judge"),
        ({"task": 1.0}, "docvaq", "", "did you mean 'docvqa'"),
        ({"anls": 1.0}, "docvqa", "", "give its reward a weight"),
    ],
)
def test_tasks_that_cannot_reward(weights, task, dataset, message):
    with pytest.raises(UserError, match=message):
        rewards.build(weights, task=task)(["a"], answers=[("a",)], samples=[SimpleNamespace(dataset=dataset)])


def test_format():
    completions = ["a dog", " a dog\n", "a\ndog", "", " \n", "a dog"]
    assert rewards.format(completions, truncated=[False] * 5 + [True], samples=[]) == [1, 1, 0, 0, 0, 0]
    assert rewards.format(completions) == [1, 1, 0, 0, 0, 1]


def test_weights_and_validity():
    scores = score(
        {
            "a": [1, 0.5, None, None, MISSING, 1],
            "b": [1, None, 2.0, None, 1.0, torch.tensor(1.0)],
            "watched": [1, MISSING, None, 1.0, 1.0, None],
        },
        a=2.0,
        b=-1.0,
        watched=0.0,
    )
    expected = [[1, 1, 1], [0.5, nan, nan], [nan, 2, nan], [nan, nan, 1], [nan, 1, 1], [1, 1, nan]]
    torch.testing.assert_close(scores.values, torch.tensor(expected), equal_nan=True)
    # a missing value of weight 0 harms nothing; a rollout to which only that one applies has no reward
    assert scores.valid.tolist() == [True, True, True, False, False, True]
    torch.testing.assert_close(scores.total, torch.tensor([1.0, 1.0, -2.0, nan, nan, 1.0]), equal_nan=True)
    assert scores.values.dtype == scores.total.dtype == torch.float32


def warned(call, *args, **fields):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = call(*args, **fields)
    return scores, [str(warning.message) for warning in caught]


def test_what_gives_no_value_says_why_once():
    built = rewards.build({"choice": 1.0, "exact_match": 0.0})
    built.functions["own"] = lambda completions, **fields: [None, MISSING, 1.0, None]
    built.weights["own"] = 1.0
    answers = [("(B)",), ("red",), ("blue",), ()]
    scores, said = warned(built, ["B"] * 4, answers=answers)
    assert scores.applies.tolist() == [
        [True, True, False],
        [False, True, True],
        [False, True, True],
        [False, False, False],
    ]
    assert [line.partition(" (said once")[0] for line in said] == [
        "reward 'choice' gave no value for 2 of 4 answers: by it even the reference answer would score 0",
        "reward 'choice' gave no value for 1 of 4 answers: there is no reference answer",
        "reward 'exact_match' gave no value for 1 of 4 answers: there is no reference answer",
        "reward 'own' gave no value for 1 of 4 answers: it returned None",
        "reward 'own' gave no value for 1 of 4 answers: it returned NaN",
        "reward 'own' gave no value for 1 of 4 answers: there is no reference answer",
    ]
    assert warned(built, ["B"] * 4, answers=answers)[1] == []
    assert warned(rewards.build({"choice": 1.0}), ["B"], answers=[("B",)])[1] == []


def test_a_missing_verdict_says_why(monkeypatch):
    async def verdicts(self, questions, answers, predictions):
        self.failures.update({"timeout": 1, "judge down": 2} if predictions[0] == "fail" else {})
        return [None if text == "fail" else 1.0 for text in predictions]

    monkeypatch.setattr(judge.Judge, "verdicts", verdicts)
    built = rewards.build({"judge": 1.0}, JudgeOptions(base_url="http://127.0.0.1:1/v1", model="tiny"))
    fields = {"questions": ["q"] * 3, "answers": [("a",)] * 3}
    assert warned(built, ["good"] * 3, **fields)[1] == []
    said = warned(built, ["fail"] * 3, **fields)[1]
    assert [line.partition(" (said once")[0] for line in said] == [
        "reward 'judge' gave no value for 1 of 3 answers: no verdict, timeout",
        "reward 'judge' gave no value for 2 of 3 answers: no verdict, judge down",
    ]
    assert warned(built, ["fail"] * 3, **fields)[1] == []


def test_fields_reach_the_functions():
    def length(completions, kinds, **fields):
        return [len(text) if kind == "short" else None for text, kind in zip(completions, kinds)]

    scores = Rewards({"length": length}, {"length": 1})(["ab", "abc"], kinds=["short", "long"], samples=[None, None])
    assert scores.total[0] == 2 and scores.valid.tolist() == [True, False]
    assert Rewards({"format": rewards.format}, {"format": 1})([], truncated=[]).values.shape == (0, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward 'bad': it returned 1 values for 2 completions"),
        (None, "reward 'bad': TypeError"),
        (["x", "y"], "reward 'bad': ValueError.*'x'"),
        ([1.0, -math.inf], "reward 'bad': it returned an infinite value"),
    ],
)
def test_wrong_values_name_the_function(values, message):
    async def later(completions, **fields):
        return values

    with pytest.raises(UserError, match=message):
        score({"bad": values}, ["x", "y"])
    with pytest.raises(UserError, match=message):
        Rewards({"bad": later}, {"bad": 1.0})(["x", "y"])


def test_an_exception_names_the_function():
    async def broken(completions, **fields):
        raise KeyError("boxes")

    with pytest.raises(UserError, match="^reward 'broken': KeyError: 'boxes'$") as caught:
        Rewards({"ok": rewards.format, "broken": broken}, {"ok": 1, "broken": 1})(["x"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UserError, match="^reward 'vqa_accuracy': vqa_accuracy needs ten human answers, got 1"):
        rewards.build({"vqa_accuracy": 1.0})(["x"], answers=[("x",)])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no reward has a weight"),
        ({"format": 0.0}, "no reward has a weight"),
        ({"format": nan}, "weight of reward 'format' must be a finite number"),
        ({"nothing": 1.0}, "no 'nothing' in rewards and metrics"),
        ({"format": 1.0, "judge": 1.0}, "reward 'judge' needs a judge: give its base_url and model"),
    ],
)
def test_build_refuses(weights, message):
    with pytest.raises(UserError, match=message):
        rewards.build(weights)
    with pytest.raises(UserError, match="do not match"):
        Rewards({"format": rewards.format}, {"from": 1.0})


class Meeting:
    """Coroutine functions that return only once all of them are under way."""

    def __init__(self, count):
        self.count, self.here, self.threads = count, 0, set()

    async def __call__(self, completions, **fields):
        self.threads.add(threading.current_thread())
        self.here += 1
        start = time.perf_counter()
        while self.here < self.count:
            assert time.perf_counter() - start < 2, "the functions do not run concurrently"
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)


def meeting():
    meeting = Meeting(2)

    async def left(completions, **fields):
        return await meeting(completions)

    async def right(completions, **fields):
        return await meeting(completions)

    def own_loop(completions, **fields):
        return [asyncio.run(asyncio.sleep(0, result=1.0))] * len(completions)

    functions = {"left": left, "own_loop": own_loop, "right": right}
    return functions, meeting


def test_coroutine_functions_run_together_without_a_loop():
    functions, here = meeting()
    assert Rewards(functions, dict.fromkeys(functions, 1.0))(["x", "y"]).total.tolist() == [3.0, 3.0]
    assert here.threads == {threading.current_thread()}


def test_coroutine_functions_run_together_within_a_loop():
    functions, here = meeting()
    del functions["own_loop"]

    async def main():
        return Rewards(functions, dict.fromkeys(functions, 1.0))(["x", "y"])

    assert asyncio.run(main()).total.tolist() == [2.0, 2.0]
    assert len(here.threads) == 1 and here.threads != {threading.current_thread()}


def test_judge(monkeypatch):
    asked = []

    async def verdicts(self, questions, answers, predictions):
        asked.append((questions, answers, predictions))
        return [None if text == "fail" else 0.5 for text in predictions]

    monkeypatch.setattr(judge.Judge, "verdicts", verdicts)
    options = JudgeOptions(base_url="http://127.0.0.1:1/v1", model="tiny")
    assert rewards.build({"format": 1.0}, options).judge is None
    built = rewards.build({"judge": 2.0, "format": 1.0}, options)
    completions = ["good", "fail", "no reference", ""]
    scores = built(completions, questions=list("qrst"), answers=[("a",), ("b",), (), ("d",)], truncated=[False] * 4)
    assert asked == [(["q", "r", "t"], [("a",), ("b",), ("d",)], ["good", "fail", ""])]
    torch.testing.assert_close(scores.total, torch.tensor([2.0, nan, 1.0, 1.0]), equal_nan=True)
    assert scores.valid.tolist() == [True, False, True, True] and built.judge.coverage == 1
    again = pickle.loads(pickle.dumps(rewards.build({"judge": 1.0, "anls": 1.0}, options)))  # as spawned processes do
    assert again.judge.options == options
