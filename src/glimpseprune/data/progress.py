"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then; with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from glimpseprune.legible import legible

EVERY = 30.0
"""Seconds between two lines."""
REFRESH = 0.1
"""Seconds between two pictures of the bar."""


class Watch:
    """As a context. It has no thread of its own, for the process that it is in will be forked."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console or Console(), clock
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()
        said = TextColumn("{task.fields[said]}", markup=False)
        live = self.console.is_terminal
        self.bar = Progress(*columns, said, console=self.console, auto_refresh=False) if live else None

    def __enter__(self) -> Watch:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, what: str, total: int | None) -> None:
        self.what, self.total, self.kept = legible(what, 100), total, 0
        self.began = self.shown = self.clock()
        self.task = self.bar.add_task(self.what, total=total, said="") if self.bar is not None else None

    def at(self, done: int, kept: int = 0) -> None:
        """``kept`` of those ``done`` were before it began: they say nothing of how fast it goes."""
        now, self.kept = self.clock(), kept
        if now - self.shown >= (EVERY if self.bar is None else REFRESH):
            self.shown = now
            self._show(done, said(done, self.total, kept, now - self.began))

    def end(self, done: int) -> None:
        self.total = done
        self._show(done, said(done, done, self.kept, self.clock() - self.began))

    def _show(self, done: int, text: str) -> None:
        if self.bar is None:
            self.console.print(Text(f"{self.what}: {text}"), soft_wrap=True)
        else:
            self.bar.update(self.task, completed=done, total=self.total, said=text, refresh=True)


def said(done: int, total: int | None, kept: int, seconds: float) -> str:
    """``5120 of 20000 samples (25.6%), 143/s, 1:44 left``, or as much of it as can be known."""
    parts = [f"{done} samples" if total is None else f"{done} of {total} samples ({done / max(total, 1):.1%})"]
    pace = (done - kept) / seconds if seconds > 0 else 0.0
    if pace > 0:
        parts.append(f"{pace:.3g}/s" if pace < 100 else f"{pace:.0f}/s")
        if total is not None:
            left = max(total - done, 0) / pace
            parts.append(f"{clock_time(left)} left" if done < total else f"in {clock_time(seconds)}")
    if kept:
        parts.append(f"{kept} were there")
    return ", ".join(parts)


def clock_time(seconds: float) -> str:
    """h:mm:ss, or m:ss within an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
