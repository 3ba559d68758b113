"""One file per task: what is asked of which data, how it is scored, and how long an answer may be.

A file defines ``TASK``, a :class:`Task`, and is found by its name (``tasks=[docvqa,textvqa]``), as one of a user's own
is by its path (``tasks=[./mine.py]``). Evaluation, rewards (``rewards.functions={exact_match: 0, task: 1}``) and the
demo read it, so that data, metric and reward of a task stand together. What a run says itself (``metric=...``) goes
before what is here.
Where figures and suffixes of papers' tasks come from: docs/evaluation.md §1.3 and §3.4.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimpseprune import lookup
from glimpseprune.config import UserError

if TYPE_CHECKING:
    from glimpseprune.judge import Prompt
    from glimpseprune.types import Sample

DEFINES = ("TASK",)
"""Names that every file has."""

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""What papers put behind a question to get a short answer."""
JUDGE = "judge"
"""The name of the metric that is no function: the verdict of a judge."""


@dataclass(frozen=True)
class Task:
    """What stands together about a task."""

    data: str
    """Folder of its shards, where no other is given."""
    split: str = "test"
    prepare: Mapping[str, Any] = field(default_factory=dict)
    """What ``python -m src.prepare`` makes the shards of: source, options."""
    datasets: tuple[str, ...] = ()
    """Names by which samples call the data set (``Sample.dataset``), by which a reward finds the task."""
    suffix: str = ""
    """Put behind every question that does not end in it; ``prepare`` may have done so."""
    metrics: tuple[str, ...] = ("exact_match",)
    """Functions of metrics.py, or ``judge``; the first one is the accuracy, and the reward."""
    max_new_tokens: int = 16
    prompt: Prompt | None = None
    """Of the judge; None is that of judge.py."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Kinds of question over which an average is reported, too: of their accuracies, each counting alike."""

    @property
    def command(self) -> str:
        """What makes the data."""
        words = [f"source={self.prepare['source']}"] if "source" in self.prepare else []
        words += [f"options.{name}={value}" for name, value in self.prepare.get("options", {}).items()]
        return f"python -m src.prepare {shlex.join([*words, f'out={self.data}'])}"

    def ask(self, sample: Sample) -> Sample:
        """A sample as it is asked."""
        if not self.suffix or sample.question.endswith(self.suffix):
            return sample
        return replace(sample, question=sample.question + self.suffix)

    def bare(self, question: str) -> str:
        """A question without what it is asked with."""
        return question.removesuffix(self.suffix) if self.suffix else question


def find(name: str) -> Task:
    """The task ``name``, or that of the file ``name``; raises UserError with the choices where there is none."""
    return lookup.find(__name__, name).TASK


def names() -> list[str]:
    return lookup.names(__name__)


def label(name: str) -> str:
    """What the rows of a task say: its name, of a user's own file without the folder."""
    return Path(name).stem if lookup.is_file(name) else name


def of_dataset(dataset: str) -> Task:
    """The task that samples of a data set belong to.

    Raises:
        UserError: there is none, so that it has to be named.
    """
    for name in names():
        if dataset and dataset in find(name).datasets:
            return find(name)
    raise UserError(f"no task is about the data set '{dataset}': give rewards.task, one of {', '.join(names())}")


def asking(task: Task, collate: Callable[[Sequence[Sample]], Any]) -> Callable[[Sequence[Sample]], Any]:
    """``collate`` of the samples as a task asks them."""
    return partial(_asked, task, collate) if task.suffix else collate


def _asked(task: Task, collate: Callable[[Sequence[Sample]], Any], samples: Iterable[Sample]) -> Any:
    return collate([task.ask(sample) for sample in samples])
