"""Files on http(s), s3, gs and whatever else fsspec knows, brought here with patience.

What the network does is tried again, with pauses that double, up to a minute in all; what is not there, or not ours, is
not. fsspec is imported where an address is read, and with it the package of its protocol (aiohttp, s3fs, gcsfs). A
filesystem is asked for anew each time: fsspec keeps one per process, and one from before a fork is of no use.
Left out: reading parts of a remote file. A shard is read in random order, and one request per sample is slow.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from glimpseprune import files
from glimpseprune.config import UserError, without_secrets
from glimpseprune.legible import legible

T = TypeVar("T")

TRIES = 8
PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try, and before the last ones."""
IDLE = 60.0
"""Seconds without a byte after which a server counts as silent."""

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+", re.DOTALL)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_AGAIN = {408, 425, 429}
"""Of the answers 4xx, those that another try may change."""
_jitter = random.SystemRandom()  # not the global generator, on which a resumed run relies


class Lost(Exception):
    """A file that no further try will bring: not there, not permitted, or not what its manifest says."""


class Unreachable(UserError):
    """A file that did not come, though it may be there."""


class _Wrong(Exception):
    """What came is not what was to come; it may be another time."""


def is_remote(path: str | Path) -> bool:
    return isinstance(path, str) and _REMOTE.fullmatch(path) is not None


def join(url: str, name: str) -> str:
    """The address of ``name`` in the folder ``url``, whose parameters (a signature) stay."""
    folder, mark, query = url.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def fetch(
    url: str, file: Path, *, most: int, size: int | None = None, sha256: str | None = None, storage: Mapping[str, Any]
) -> None:
    """Bring ``url`` into the new file ``file``, whole or not at all.

    Args:
        most: bytes after which to give up.
        size, sha256: what it must be, if that is known.
        storage: options of fsspec's filesystem, such as ``anon``.

    Raises:
        Lost, Unreachable: see there.
        UserError: a package that is not installed, a protocol or option that nobody knows.
    """

    def once() -> None:
        filesystem, path = _filesystem(url, storage)
        with files.whole(file) as partial:
            filesystem.get_file(path, str(partial), callback=_bounded(most))
            found = partial.stat().st_size
            if size is not None and found != size:
                raise _Wrong(f"{found} bytes came, where there should be {size}")
            if sha256 is not None and digest(partial) != sha256:
                raise _Wrong("its sha256 is another")

    _patiently(url, once)


def listing(url: str, storage: Mapping[str, Any]) -> dict[str, int | None]:
    """Name -> bytes, where known, of the files in the folder ``url``; raises as :func:`fetch`."""

    def once() -> dict[str, int | None]:
        filesystem, path = _filesystem(url, storage)
        found = filesystem.ls(path, detail=True, refresh=True)
        here = (entry for entry in found if entry["type"] == "file")
        return {entry["name"].rpartition("/")[2]: entry.get("size") for entry in here}

    return _patiently(url, once)


def digest(path: Path) -> str:
    """sha256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _patiently(url: str, do: Callable[[], T]) -> T:
    shown = legible(without_secrets(url), 200)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(min(LONGEST_PAUSE, PAUSE * 2 ** (attempt - 1)) * _jitter.uniform(0.7, 1))
        try:
            return do()
        except (UserError, Lost):
            raise
        except Exception as error:  # each protocol has its own
            if isinstance(error, OSError) and error.errno in files.HARD:
                raise
            reason, last = legible(without_secrets(str(error)) or type(error).__name__, 200), error
            if _is_final(error):
                raise Lost(f"{shown}: {_said(error) or reason}") from error
    if isinstance(last, _Wrong):
        raise Lost(f"{shown}: {reason}, {TRIES} times") from last
    raise Unreachable(f"{shown} did not come in {TRIES} tries: {reason}; see to the network, then go on") from last


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _AGAIN
    return isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | IsADirectoryError)


def _said(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return "you have no permission to read it"
    return ""


def _bounded(most: int) -> Any:
    from fsspec.callbacks import Callback

    class Bounded(Callback):
        def call(self, *_: Any, **__: Any) -> None:
            if self.value > most:
                raise Lost(f"it has more than {most} bytes")

    return Bounded()


def _filesystem(url: str, storage: Mapping[str, Any]) -> tuple[Any, str]:
    """fsspec's filesystem of an address, and the path in it."""
    protocol = url.partition("://")[0].lower()
    try:
        import fsspec

        options = dict(storage)
        if protocol in ("http", "https") and "client_kwargs" not in options:
            from aiohttp import ClientTimeout

            # Its default ends every transfer after five minutes, whatever has come by then.
            options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=IDLE, sock_read=IDLE)}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, getattr(error, "name", None) or "fsspec")
        package = "fsspec" if getattr(error, "name", "") == "fsspec" else package
        shown = without_secrets(url)
        raise UserError(f"{shown}: {protocol}:// needs the package {package}: pip install {package}") from None
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise UserError(f"{without_secrets(url)}: no protocol {protocol}://, give http, https, s3 or gs") from None
        raise
    except TypeError as error:
        raise UserError(f"data.storage: {protocol}:// does not take these options: {error}") from None
