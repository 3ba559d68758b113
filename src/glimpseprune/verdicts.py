"""Verdicts of a judge on disk: what it said once to a request it is not asked again.

A folder of ``.jsonl`` files, one of each process that has added to it, so that processes need not wait for each other;
a line is ``{"key": ..., "score": ...}``. The key is a hash of the whole request (model, messages with prompt, question,
references and prediction, temperature, length) and of the server's address without its secrets: whatever could change
the verdict changes the key. Only scores are kept: what is missing is asked again. A line that cannot be read, such as
the last one of a process that was killed, counts for nothing. Left out: throwing anything away.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from glimpseprune import files


def key(request: Mapping[str, Any]) -> str:
    """Of a request and where it goes."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Verdicts:
    """Scores by the keys of their requests."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = files.resolved(folder)
        self.stream: IO[str] | None = None
        self.scores: dict[str, float] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            with open(file, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    self._read(line)

    def _read(self, line: str) -> None:
        try:
            found = json.loads(line)
            score, name = found["score"], found["key"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        if isinstance(name, str) and type(score) in (int, float) and 0 <= score <= 1:
            self.scores[name] = float(score)

    def get(self, name: str) -> float | None:
        return self.scores.get(name)

    def put(self, name: str, score: float) -> None:
        """Remember, at once on disk."""
        if self.stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.jsonl"
            self.stream = files.growing(self.folder / own)
        self.scores[name] = score
        with files.naming(self.folder):
            self.stream.write(json.dumps({"key": name, "score": score}) + "\n")
            self.stream.flush()
