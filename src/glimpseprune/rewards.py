"""Rewards: ``reward(completions, **fields) -> one number per completion``, found by name, weighted and added.

A reward is a public function here whose first parameter is ``completions``, or any metric of ``metrics.py``: the
metric is the reward. ``task`` is that of a task, as its file in ``tasks/`` says, so that what is trained is what is
evaluated. It may be a coroutine function. ``fields`` are lists beside ``completions``: ``samples``,
``questions``, ``answers``, ``kinds``, ``truncated``; a function names those it needs and swallows the rest. One that
has a parameter ``client`` is given the :class:`~glimpseprune.judge.Judge`. Per completion it returns

- a number,
- None: not applicable, such as a box reward where the answer is no box. It is not counted.
- NaN (``MISSING``): there should be a number and there is none, such as the verdict of a judge that failed. The whole
  rollout has to leave its group, for a reward without one of its parts cannot be compared.

Neither is silent: a warning says once per reward and reason why there was no value.

``truncated`` says which answers were cut at the token limit. A metric scores those as they stand, in training,
validation and evaluation alike (a reference that is met before the limit is met); a reward may think otherwise, as
``format`` does.

Left out: the reward for pruning (it is about tokens kept, not about a text; training adds it).
"""

from __future__ import annotations

import asyncio
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glimpseprune import lookup, tasks
from glimpseprune.config import UserError
from glimpseprune.judge import PROMPT, Judge
from glimpseprune.options import JudgeOptions

Values = Sequence[float | None]
Reward = Callable[..., Values | Awaitable[Values]]

MISSING = math.nan
"""What a reward returns where it should have a value and has none."""


@dataclass
class Scores:
    """What R rollouts earned from F rewards, on the CPU."""

    values: Tensor  # [R, F] NaN where not applicable or missing
    applies: Tensor  # [R, F] bool: False where a reward gave None
    total: Tensor  # [R] weighted sum over the applicable; NaN where not valid, lest a part be taken for the whole
    valid: Tensor  # [R] bool: no value is missing, at least one applies; rewards of weight 0 have no say


@dataclass
class Rewards:
    """Weighted rewards by name; their order is that of the columns of :class:`Scores`.

    A reward of weight 0 is measured and not counted. ``judge`` is the client that those who asked for one share: its
    ``failures`` and ``coverage`` are worth logging.

    Raises:
        UserError: no reward, none with a weight, or a weight that is not a finite number.
    """

    functions: Mapping[str, Reward]
    weights: Mapping[str, float]
    judge: Judge | None = None
    told: set[tuple[str, str]] = field(default_factory=set)
    """Rewards and reasons for which the warning has been given."""

    def __post_init__(self) -> None:
        if set(self.functions) != set(self.weights):
            raise UserError(f"rewards {sorted(self.functions)} and weights for {sorted(self.weights)} do not match")
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise UserError(f"the weight of reward '{name}' must be a finite number, got {weight}")
        if not any(self.weights.values()):
            raise UserError("no reward has a weight: give at least one, such as exact_match: 1")

    def __call__(self, completions: Sequence[str], **fields: Sequence[Any]) -> Scores:
        """Score R completions; ``fields`` are lists as long as ``completions``.

        Coroutine functions run concurrently, after the others; it does not matter whether an event loop is running in
        this thread (which waits).

        Raises:
            UserError: a reward raised, or did not return one finite number, NaN or None per completion.
        """
        columns: dict[str, list[float | None]] = dict.fromkeys(self.functions, [])  # in their order
        failures = Counter(self.judge.failures) if self.judge else Counter()
        slow = [name for name, function in self.functions.items() if inspect.iscoroutinefunction(function)]

        async def wait_for(name: str) -> None:
            with _blame(name):
                columns[name] = _column(await self.functions[name](completions, **fields), len(completions))

        async def gather() -> None:
            await asyncio.gather(*map(wait_for, slow))

        for name, function in self.functions.items():
            if name not in slow:  # outside of our loop, so that it may run one of its own
                with _blame(name):
                    columns[name] = _column(function(completions, **fields), len(completions))
        if slow:
            _run(gather())
        failures = Counter(self.judge.failures) - failures if self.judge else failures
        for name, column in columns.items():
            self._explain(name, column, fields.get("answers"), failures)
        return self._scores(list(columns.values()))

    def _explain(
        self, name: str, column: list[float | None], answers: Sequence[Any] | None, failures: Counter[str]
    ) -> None:
        """Warn, once per reason, about values that reward ``name`` did not give; ``failures`` of the judge."""
        function = getattr(self.functions[name], "func", None)
        reasons: Counter[str] = Counter()
        for row, value in enumerate(column):
            if value is None and answers is not None and not answers[row]:
                reasons["there is no reference answer"] += 1
            elif value is None and function is _from_metric:
                reasons["by it even the reference answer would score 0"] += 1
            elif value is None:
                reasons["it returned None"] += 1
            elif math.isnan(value) and function is not judge:
                reasons["it returned NaN"] += 1
        if function is judge:
            reasons |= {f"no verdict, {reason}": count for reason, count in failures.items()}
        for reason, count in reasons.items():
            if (name, reason) not in self.told:
                self.told.add((name, reason))
                warnings.warn(
                    f"reward '{name}' gave no value for {count} of {len(column)} answers: {reason} "
                    "(said once; train/rewards/*/none and */missing count)",
                    stacklevel=3,
                )

    def _scores(self, columns: list[list[float | None]]) -> Scores:
        """``columns``: F lists of R."""
        numbers = [[math.nan if x is None else x for x in column] for column in columns]
        values = torch.tensor(numbers, dtype=torch.float32).T  # [R, F]
        applies = torch.tensor([[x is not None for x in column] for column in columns], dtype=torch.bool).T  # [R, F]
        weights = torch.tensor([float(self.weights[name]) for name in self.functions])  # [F]
        counted = applies & (weights != 0)  # [R, F]
        valid = counted.any(1) & ~(counted & values.isnan()).any(1)  # [R]
        total = (values * weights).masked_fill(~counted, 0).sum(1).masked_fill(~valid, math.nan)  # [R]
        return Scores(values, applies, total, valid)


def build(weights: Mapping[str, float], judge: JudgeOptions | None = None, task: str | None = None) -> Rewards:
    """The rewards called by the names in ``weights``; ``judge`` is used only if one of them wants it, and ``task`` says
    which one the reward of that name is about (default: each sample's, by its data set).

    Raises:
        UserError: as :func:`find` and :class:`Rewards`, a reward needs a judge and there is none, or ``task`` is given
            and no reward asks for it.
    """
    functions = {name: find(name) for name in weights}
    if task is not None and "task" not in functions:
        raise UserError(f"rewards.task={task}: give its reward a weight: rewards.functions={{exact_match: 0, task: 1}}")
    known = None if task is None else tasks.find(task)
    if known is not None:
        functions["task"] = find(known.metrics[0])
    prompt = known.prompt if known is not None and known.prompt is not None else PROMPT
    wanting = [name for name, function in functions.items() if "client" in inspect.signature(function).parameters]
    if not wanting:
        return Rewards(functions, weights)
    if judge is None:
        raise UserError(f"reward '{wanting[0]}' needs a judge: give its base_url and model")
    client = Judge(judge, prompt)
    functions |= {name: partial(functions[name], client=client) for name in wanting}
    return Rewards(functions, weights, client)


def find(name: str) -> Reward:
    """The reward ``name``: a function of this module, else a metric made into one (see :func:`_from_metric`).

    Raises:
        UserError: neither; it lists the choices.
    """
    metrics = lookup.functions("glimpseprune.metrics", "prediction")
    choices = {key: partial(_from_metric, metric=metric) for key, metric in metrics.items()}
    choices |= lookup.functions(__name__, "completions")
    return choices[lookup.choose(name, choices, "rewards and metrics")]


def format(completions: Sequence[str], truncated: Sequence[bool] | None = None, **fields: Any) -> list[float]:
    """1 for an answer that is shaped like one: not empty, a single line, ended before the token limit."""
    cut = truncated if truncated is not None else [False] * len(completions)
    return [float(len(text.strip().splitlines()) == 1 and not c) for text, c in zip(completions, cut, strict=True)]


async def judge(
    completions: Sequence[str], questions: Sequence[str], answers: Sequence[Sequence[str]], client: Judge, **fields: Any
) -> list[float | None]:
    """The judge's verdict; not applicable without a reference answer."""
    rows = [i for i, references in enumerate(answers) if references]
    verdicts = await client.verdicts(*([texts[i] for i in rows] for texts in (questions, answers, completions)))
    values: list[float | None] = [None] * len(completions)
    for i, verdict in zip(rows, verdicts, strict=True):
        values[i] = MISSING if verdict is None else verdict
    return values


def task(
    completions: Sequence[str], answers: Sequence[Sequence[str]], samples: Sequence[Any], **fields: Any
) -> list[float | None]:
    """What the task of each sample's data set is scored by (``rewards.task`` names one for all).

    Raises:
        UserError: no task is about a data set, or it is scored by a judge.
    """
    values: list[float | None] = []
    for text, references, sample in zip(completions, answers, samples, strict=True):
        name = tasks.of_dataset(sample.dataset).metrics[0]
        if name == tasks.JUDGE:
            raise UserError(
                f"the data set '{sample.dataset}' is scored by a judge: give rewards.task and rewards.judge"
            )
        values += _from_metric([text], [references], lookup.function("glimpseprune.metrics", name, "prediction"))
    return values


def _from_metric(
    completions: Sequence[str],
    answers: Sequence[Sequence[str]],
    metric: Callable[[str, Sequence[str]], float],
    **fields: Any,
) -> list[float | None]:
    """``metric`` as a reward. Not applicable where even the reference would score 0: a question whose answer is no
    letter (``choice``), or no box (``box_iou``)."""
    return [
        metric(text, references) if references and metric(references[0], references) else None
        for text, references in zip(completions, answers, strict=True)
    ]


def _column(values: Values, count: int) -> list[float | None]:
    column = [None if value is None else float(value) for value in values]
    if len(column) != count:
        raise UserError(f"it returned {len(column)} values for {count} completions")
    if any(value is not None and math.isinf(value) for value in column):
        raise UserError("it returned an infinite value")
    return column


@contextmanager
def _blame(name: str) -> Iterator[None]:
    """Whatever is raised inside becomes a UserError that names the reward."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"reward '{name}': {what}") from error


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:  # a loop cannot be entered twice
        thread.submit(asyncio.run, work).result()
