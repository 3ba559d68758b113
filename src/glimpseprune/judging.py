"""A judge over the records of an evaluation: asked once, when all answers are there, and again for what is missing.

Verdicts are kept in the evaluation's folder (``verdicts/``) as they come, so that one that is killed, or whose judge
falls silent, goes on with ``resume=true`` and has the scores that it would have had.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glimpseprune.config import UserError
from glimpseprune.judge import PROMPT, TEMPERATURE, Judge
from glimpseprune.options import JudgeOptions
from glimpseprune.tasks import JUDGE, Task

VERDICTS = "verdicts"


@dataclass
class Told:
    """What came of asking."""

    new: int = 0
    """Verdicts that records did not have before."""
    asked: int = 0
    judged: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def said(self) -> str:
        if not self.asked:
            return ""
        why = ", ".join(f"{reason} {count}" for reason, count in self.failures.most_common())
        missing = f"; missing are left out, not 0: {why}; ask again with resume=true" if why else ""
        return f"judge: {self.judged} of {self.asked} answers have a verdict{missing}"


def require(options: JudgeOptions | None, tasks: Mapping[str, Task]) -> None:
    """Raises UserError where there are tasks with a judge, and it does not answer a first question."""
    for task in tasks.values():
        if JUDGE in task.metrics:
            judge = Judge(replace(options, cache=None), task.prompt or PROMPT)
            asyncio.run(judge.verdicts(["Is snow white?"], [("yes",)], ["yes"]))
            return


def judge(
    records: Sequence[dict[str, Any]], tasks: Mapping[str, Task], options: JudgeOptions | None, out: Path
) -> Told:
    """Give the records of tasks with a judge their verdicts, in place.

    Raises:
        UserError: the judge does not answer; the answers are kept.
    """
    told = Told()
    for name, task in tasks.items():
        own = [record for record in records if record.get("task", "") == name and JUDGE in record["metrics"]]
        todo = [record for record in own if record["metrics"][JUDGE] is None]
        if todo:
            client = Judge(replace(options, cache=options.cache or str(out / VERDICTS)), task.prompt or PROMPT)
            client.proven = len(todo) < len(own)
            try:
                verdicts = asked(client, task, todo, f"judging {name}".strip())
            except UserError as error:
                raise UserError(f"{error}; all answers are there, ask again with resume=true") from None
            for record, verdict in zip(todo, verdicts):
                record["metrics"][JUDGE] = verdict
                if task.metrics[0] == JUDGE:
                    record["score"] = verdict
            told.failures += client.failures
        told.asked += len(own)
        told.judged += sum(record["metrics"][JUDGE] is not None for record in own)
        told.new += sum(record["metrics"][JUDGE] is not None for record in todo)
    return told


def asked(client: Judge, task: Task, records: Sequence[Mapping[str, Any]], saying: str) -> list[float | None]:
    from rich.progress import Progress

    rows = [(task.bare(record["question"]), tuple(record["answers"]), record["prediction"]) for record in records]
    with Progress(transient=True) as progress:
        bar = progress.add_task(saying, total=len(set(rows)))
        return asyncio.run(client.verdicts(*zip(*rows), done=lambda count: progress.advance(bar, count)))


def described(options: JudgeOptions, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """What of a judge decides what it says, for evaluation.yaml; where it was reached may change, as jobs move."""
    prompts = {name: task.prompt or PROMPT for name, task in tasks.items() if JUDGE in task.metrics}
    return {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": TEMPERATURE,
        "prompt": {
            name or "default": hashlib.sha256(json.dumps([prompt.system, prompt.user]).encode()).hexdigest()
            for name, prompt in prompts.items()
        },
    }
