"""Tasks: every file of the folder names what there is, and what is asked follows from it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from glimpseprune import config, evaluate, lookup, prepare, rewards, tasks
from glimpseprune.config import UserError
from glimpseprune.data.sources import official, viscot
from glimpseprune.tasks import JUDGE, Task
from glimpseprune.types import Sample

NAMES = tasks.names()


def test_the_tasks_of_the_papers_are_there():
    wanted = "viscot gqa docvqa infovqa textvqa vqav2 pope chartqa scienceqa easy_vqa tags"
    assert set(wanted.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_names_data_metric_and_length_that_there_are(name):
    task = tasks.find(name)
    assert isinstance(task, Task) and task.datasets and task.max_new_tokens > 0 and task.metrics
    for metric in task.metrics:
        assert metric == JUDGE or rewards.find(metric)
    source = lookup.find(prepare.SOURCES, task.prepare["source"])
    options = config.merge_options(source.Options, task.prepare.get("options", {}), "options")
    assert task.split in source.splits and task.suffix == task.suffix.rstrip()
    if task.prepare["source"] == "official":  # what prepare puts behind a question is not put there twice
        assert task.suffix == official.FORMATS[options.set].suffix and options.set in task.datasets
    assert re.match(r"python -m src\.prepare source=\w+", task.command) and task.command.endswith(f"out={task.data}")
    assert lookup.find("glimpseprune.tasks", name).__doc__


def test_no_data_set_belongs_to_two_tasks():
    datasets = [dataset for name in NAMES for dataset in tasks.find(name).datasets]
    assert len(datasets) == len(set(datasets))
    assert tasks.of_dataset("infographicvqa") is tasks.find("infovqa")
    for unknown in ("", "mine"):
        with pytest.raises(UserError, match="no task is about the data set"):
            tasks.of_dataset(unknown)


def test_a_suffix_is_put_once():
    task = Task("d", suffix="\nBriefly.")
    sample = Sample("k", "what?", ("a",), [])
    asked = task.ask(sample)
    assert asked.question == "what?\nBriefly." and task.ask(asked) is asked and sample.question == "what?"
    assert task.bare(asked.question) == "what?" and Task("d").ask(sample) is sample
    assert tasks.asking(task, lambda samples: [s.question for s in samples])([sample]) == ["what?\nBriefly."]


def test_visual_cot_is_the_published_protocol():
    """Twelve sets in five groups; the prompt has the three texts, and the words that papers print."""
    task = tasks.find("viscot")
    mean, *groups = task.groups.values()
    assert sorted(mean) == sorted(kind for kinds in groups for kind in kinds) == sorted(viscot.SETS)
    assert task.metrics == (JUDGE,) and task.max_new_tokens == 1024 and not task.suffix and task.split == "test"
    system, user = task.prompt.messages(("q?", ("a",), "p"))
    assert 'in the form "score: <score>"' in system["content"]
    assert user["content"] == "question: q?\nstandard answer: a\nmodel's answer: p"


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from glimpseprune.tasks import Task\nTASK = Task('there', metrics=('anls',))\n")
    assert tasks.find(str(file)).data == "there" and tasks.label(str(file)) == "mine"
    file = tmp_path / "none.py"
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no TASK"):
        tasks.find(str(file))


def asked(*args: str) -> dict[str, Task]:
    cfg = config.load(evaluate.EvaluateConfig, list(args))
    evaluate.check_tasks(cfg)
    return evaluate.asked_tasks(cfg, "shards")


def test_what_a_run_says_goes_before_what_a_task_says():
    docvqa = tasks.find("docvqa")
    assert asked("tasks=[docvqa]") == {"docvqa": docvqa}
    given = asked("tasks=[docvqa]", "data.path=x", "data.split=train", "metric=[anls]", "max_new_tokens=7")["docvqa"]
    assert (given.data, given.split, given.metrics, given.max_new_tokens) == ("x", "train", ("anls",), 7)
    assert given.suffix == docvqa.suffix
    two = asked("tasks=[docvqa,tags]", "data.paths.tags=x")
    assert list(two) == ["docvqa", "tags"] and (two["docvqa"].data, two["tags"].data) == (docvqa.data, "x")
    assert asked("tasks=docvqa") == {"docvqa": docvqa}
    (plain,) = asked().values()
    assert plain == Task("shards", "test", metrics=("exact_match",), max_new_tokens=64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tasks=[docvqa,docvqa]"], "tasks: docvqa is there twice"),
        (["tasks=[docvaq]"], "did you mean 'docvqa'"),
        (["tasks=[docvqa,tags]", "data.path=x"], "give data.paths.docvqa=<folder>"),
        (["tasks=[docvqa]", "data.paths.tags=x"], "data.paths.tags: the tasks are docvqa"),
        (["data.paths.tags=x"], "the tasks are none, give data.path"),
        (["tasks=[viscot]"], "the task viscot is scored by a judge: give judge.base_url"),
        (["tasks={a: 1}"], "tasks={'a': 1}: give the name of a task, or a list of names"),
        (["tasks=[1]"], "give the name of a task"),
        (["metric=judge"], "metric=judge needs one: give judge.base_url"),
    ],
)
def test_tasks_that_cannot_be_asked(args, message):
    with pytest.raises(UserError, match=message):
        asked(*args)


def test_data_that_are_not_there_are_said_to_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"not in data/tags: make them \(python -m src.prepare source=tags out=data/t"):
        evaluate.require_data("tags", tasks.find("tags"))
    evaluate.require_data("", Task("nowhere"))  # of no task: the reader of shards says it


def test_rewards_name_a_task_as_evaluations_do():
    built = rewards.build({"task": 1.0}, task="pope")
    scores = built(["No, it is not."], answers=[("no",)], samples=[SimpleNamespace(dataset="")])
    assert scores.total.tolist() == [1.0]
