"""Where the shards of a folder lie, and how one is opened: as a plain tar on a disk of this machine, whatever it is.

A ``.tar`` here is opened where it is. What is elsewhere, or a ``.tar.gz``, cannot be read by index and goes through the
cache first. A ``.tar.gz`` may claim to hold any amount: unpacking ends at ``RATIO`` times its own size, or where the
cache does; one that is cut off or broken is unpacked as far as it goes.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from glimpseprune import files
from glimpseprune.config import UserError, without_secrets
from glimpseprune.data import remote
from glimpseprune.data.cache import Cache

RATIO, SLACK = 100, 1 << 20
"""Bytes that a .tar.gz may hold for each of its own, and in any case. Pictures hardly shrink."""
ENDS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Store:
    """How folders of shards are read that are not just plain files with our manifest.

    ``cache``: folder of the cache (default: in the user's), ``limit``: its bytes; ``storage``: options of fsspec's
    filesystem; ``fields``: where things stand in shards without a manifest of ours (:class:`.foreign.Fields`), which
    are refused if this is None.
    """

    cache: str | None = None
    limit: int = 50 * 10**9
    storage: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] | None = None

    @classmethod
    def of(cls, options: Any) -> Store:
        """As the section ``data`` of a config says."""
        return cls(options.cache, int(options.cache_gb * 1e9), options.storage, options.fields)

    def files(self) -> Cache:
        return Cache(self.cache, self.limit)


class Place:
    """A folder of shards, here or at an address.

    Raises (all methods):
        Lost: a file that is not there.
        UserError: as :mod:`.remote` and :class:`.Cache`.
    """

    def __init__(self, folder: str | Path, store: Store) -> None:
        self.remote = remote.is_remote(folder)
        self.folder = str(folder) if self.remote else Path(folder)
        self.store, self.cache = store, store.files()

    def __str__(self) -> str:
        return without_secrets(str(self.folder))

    def names(self) -> dict[str, int | None]:
        """Name -> bytes, where known, of what lies there."""
        if self.remote:
            return remote.listing(self.folder, self.store.storage)
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}

    def small(self, name: str, most: int) -> bytes:
        """A file of at most ``most`` bytes, as it is now."""
        url = remote.join(self.folder, name)
        return self.cache.text(url, partial(remote.fetch, url, most=most, storage=self.store.storage), anew=True)

    def cached(self, name: str) -> bool:
        """Whether :meth:`open` goes through the cache."""
        return self.remote or not name.endswith(".tar")

    def identity(self, name: str, size: int | None, sha256: str | None = None) -> str:
        """A text that is another one where the file is another one."""
        if self.remote:
            return json.dumps([remote.join(self.folder.partition("?")[0], name), size, sha256])
        status = (self.folder / name).stat()
        return json.dumps([os.path.realpath(self.folder / name), status.st_size, status.st_mtime_ns])

    def open(self, name: str, size: int | None = None, sha256: str | None = None) -> IO[bytes]:
        """The tar ``name`` as a file with a descriptor; ``size`` and ``sha256`` as a manifest has them, which what is
        brought from elsewhere must have."""
        packed = not name.endswith(".tar")
        if not self.cached(name):
            return open(self.folder / name, "rb", buffering=0, opener=open_file)

        def make(file: Path) -> None:
            if not self.remote:
                with open(self.folder / name, "rb", opener=open_file) as stream:
                    unpack(stream, file, name, self.cache.limit)
                return
            url, target = remote.join(self.folder, name), file.with_name(file.name + ".gz") if packed else file
            most = self.cache.limit if size is None else size
            remote.fetch(url, target, most=most, size=size, sha256=sha256, storage=self.store.storage)
            if packed:
                try:
                    with open(target, "rb") as stream:
                        unpack(stream, file, name, self.cache.limit)
                finally:
                    target.unlink(missing_ok=True)

        try:
            return self.cache.open(self.identity(name, size, sha256), make, size)
        except OSError as error:
            if error.errno in files.HARD:  # not the shard's fault
                raise UserError(files.said(error) or str(error)) from error
            raise


def unpack(stream: IO[bytes], file: Path, name: str, most: int) -> None:
    """Write the tar that a gzip file holds to ``file``.

    Raises:
        Lost: it holds more than ``most`` bytes, or than ``RATIO`` times its own size.
    """
    most = min(most, SLACK + RATIO * os.fstat(stream.fileno()).st_size)
    written = 0
    with files.stream(file) as out, gzip.GzipFile(fileobj=stream) as packed:
        try:
            while block := packed.read1(1 << 20):
                written += len(block)
                if written > most:
                    raise remote.Lost(f"{name} unpacks to more than {most} bytes")
                out.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            warnings.warn(f"{name}: unpacked up to byte {written} only: {error}", stacklevel=2)


def open_file(path: str, flags: int) -> int:
    """An opener of files, and of nothing that only has the name of one: a pipe would be waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no file")
    return descriptor
