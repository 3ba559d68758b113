"""Files that were brought from elsewhere, or unpacked, kept on a local disk up to a number of bytes.

A file is there whole or not at all (:mod:`..files`). One process brings it, under a lock that the kernel ends with it,
while the others wait; those used longest ago make room. A file that is open stays readable when it leaves, and takes
up the disk until it is closed. While several processes bring one each, there may be that many too many.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from glimpseprune import files
from glimpseprune.config import UserError

DATA = ".shard"
"""Ends the names of files that may leave; others (indices) are small and stay."""
_LOCK = ".lock"
_PATIENCE = 3600.0  # seconds for another process to bring a file


def default_folder() -> Path:
    """In the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glimpseprune" / "shards"


def used(stream: IO[bytes]) -> None:
    """Note that a file of a cache was used just now."""
    now = time.time_ns()  # the kernel's own is milliseconds late
    os.utime(stream.fileno(), ns=(now, now))


class Cache:
    """A folder of at most ``limit`` bytes; may be shared by any number of processes of one machine."""

    def __init__(self, folder: str | Path | None = None, limit: int = 50 * 10**9) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self.limit = limit

    def open(self, name: str, make: Callable[[Path], None], size: int | None = None) -> IO[bytes]:
        """The file for ``name`` (any text that says exactly what it is), which ``make(path)`` writes, whole or not at
        all, if it is not here; ``size`` in bytes, if known.

        Raises:
            UserError: it is larger than the whole cache. And what ``make`` raises.
        """
        file = self.path(name, DATA)
        while True:
            with suppress(FileNotFoundError):
                stream = open(file, "rb", buffering=0)  # noqa: SIM115 (whose it is from now on)
                used(stream)
                return stream
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone(file.name):
                if file.exists():
                    continue
                self._room(size or 0)
                make(file)
                self._room(0, but=file)

    def text(self, name: str, make: Callable[[Path], None], *, anew: bool = False) -> bytes:
        """A small file that stays, as :meth:`open`; ``anew``: written again, even if it is here."""
        file = self.path(name, ".json")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(file.name):
            if anew or not file.exists():
                make(file)
            return file.read_bytes()

    def path(self, name: str, suffix: str) -> Path:
        key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self.folder / (key + suffix)

    def _room(self, wanted: int, but: Path | None = None) -> None:
        """Let files go, those used longest ago first, until ``wanted`` bytes more are within the limit."""
        if wanted > self.limit:
            raise self._too_small(wanted)
        with self._alone("room"):
            there = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # another process has just let it go
                    if entry.name.endswith(files.PARTIAL):
                        self._leftover(Path(entry.path))
                    elif DATA in entry.name and not entry.name.endswith(_LOCK):
                        status = entry.stat()
                        there.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
            total = wanted + sum(size for _, size, _ in there)
            for _, size, file in sorted(there):
                if total <= self.limit:
                    return
                if file != but:
                    file.unlink(missing_ok=True)
                    total -= size
        if total > self.limit and but is not None:
            but.unlink(missing_ok=True)
            raise self._too_small(total)

    def _leftover(self, partial: Path) -> None:
        """Remove what a process that was killed had begun; what is being written stays."""
        name = partial.name.removesuffix(files.PARTIAL)
        name = name.partition(DATA)[0] + DATA if DATA in name else name
        with suppress(files.Held), files.lock(self.folder, name + _LOCK):
            partial.unlink(missing_ok=True)

    def _too_small(self, size: int) -> UserError:
        return UserError(
            f"data.cache_gb={self.limit / 1e9:g}: a shard has {size / 1e9:.3g} GB: give more, or smaller shards"
        )

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        until = time.monotonic() + _PATIENCE
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(files.lock(self.folder, name + _LOCK))
                    break
                except files.Held:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.02)
            yield
