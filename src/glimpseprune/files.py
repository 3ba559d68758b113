"""Files: written whole or not at all, with the permissions of the umask; and what a user is told where a disk refuses.

The only module that opens a file of ours for writing (``tests/test_files.py`` holds that): a file is written under
another name beside its own, brought to the disk, and only then given its name, at one stroke. Whoever reads meanwhile,
or after a kill or a full disk, finds the one that was there before.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"
"""Ends the name of a file that is being written, or that nobody has finished."""


def resolved(path: str | Path) -> Path:
    """Where ``path`` leads: ``~`` is the home folder, and a symbolic link what it points to, so that what is replaced
    is replaced there and the link stays."""
    path = Path(os.path.expanduser(path))
    if not path.is_symlink():
        return path
    if (real := Path(os.path.realpath(path))).is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


@contextmanager
def whole(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """The name under which to write the file ``path``, which it takes the place of when the block has ended well.

    Without ``sync`` it need not be on the disk by then, and may be lost with the machine.

    Raises:
        OSError: with the name of the file, also where a library has made something else of it.
    """
    path = resolved(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb"):
            mode = partial.stat().st_mode & 0o777  # as the umask has it; some libraries would choose 0600
        yield partial
        settle(partial, mode, sync)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        with naming(path):
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the disk in the block name the file ``path``."""
    try:
        yield
    except Exception as error:
        if (named := _named(error, path)) is error:
            raise
        raise named from error


def settle(file: Path, mode: int, sync: bool = True) -> None:
    """Give ``file`` its permissions and have it on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_mode & 0o777 != mode:
            os.fchmod(descriptor, mode)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def stream(path: str | Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """The file ``path`` as a binary stream, in its place when the block has ended well; else as :func:`whole`."""
    with whole(path, sync) as partial, open(partial, "wb") as opened:
        yield opened


def write(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Write the file ``path`` with ``content``; its folder is made if need be. Raises as :func:`whole`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with stream(path, sync) as opened:
        opened.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any, sync: bool = True, **form: Any) -> None:
    write(path, json.dumps(value, **form) + "\n", sync)


def copy(source: Path, path: Path) -> None:
    with whole(path) as partial:
        shutil.copyfile(source, partial)


def growing(path: str | Path, start: str = "") -> IO[str]:
    """A text stream that goes on growing under the name ``path`` once ``start``, with which it begins, is written."""
    path = resolved(path)
    partial = path.with_name(path.name + PARTIAL)
    with naming(path):
        opened = open(partial, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (kept open)
        opened.write(start)
        opened.flush()
        os.replace(partial, path)
    return opened


def require_folder(path: str | Path) -> None:
    """Raises OSError where no folder could be made, or written to, at ``path``. Changes nothing."""
    place = resolved(path)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def unfinished(path: str | Path) -> Path:
    """The hidden folder beside ``path`` in which it grows."""
    path = resolved(path)
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def folder(path: str | Path, journal: str = "") -> Iterator[Path]:
    """A hidden folder beside ``path`` to write into, which takes its place when the block has ended well.

    What was at ``path`` goes only then: whether it may is for the caller to say. Leftovers of a process that was killed
    are taken over, one that is still at it is :class:`Held`. Permissions are those of the umask, whatever a library
    chose. With ``journal``, the name of a folder in it, the work can be gone on with: while that is there, what the
    block has written stays when it ends badly, and is there again; it goes last of all. Raises as :func:`whole`.
    """
    path, partial = resolved(path), unfinished(path)
    partial.mkdir(parents=True, exist_ok=True)
    lasting = partial / (journal or PARTIAL)
    with lock(partial) as own:
        try:
            _put_right(path, journal)
            if not lasting.is_dir():
                empty(partial, own)
            write(partial / "mode", "")  # as the umask has it now
            mode = (partial / "mode").stat().st_mode & 0o777
            remove(partial / "mode")
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    settle(file, mode)
            own.unlink(missing_ok=True)
            _replace(partial, path)
            if journal:
                remove(path / journal)
        except BaseException:
            with suppress(OSError):
                if not lasting.is_dir():
                    remove(partial)
            with naming(path):
                raise


def empty(folder: Path, *but: Path) -> None:
    """Delete all that is in ``folder``, but these."""
    for left in folder.iterdir():
        if left not in but:
            remove(left)


def recover(path: str | Path, journal: str) -> None:
    """Put right what a process left that was killed while it put :func:`folder` in its place; what may be gone on with
    stays. Raises :class:`Held` where one is still at work."""
    path, partial = resolved(path), unfinished(path)
    if not partial.is_dir():
        return _put_right(path, journal)
    with lock(partial):
        _put_right(path, journal)
        if not (partial / journal).is_dir():
            remove(partial)


def _put_right(path: Path, journal: str) -> None:
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():  # killed between two renames
        os.replace(old, path)
    remove(old)
    if journal and path.is_dir():
        remove(path / journal)


def _replace(partial: Path, path: Path) -> None:
    """Have ``partial`` in the place of ``path``, and nothing in its own: at one stroke where the system can."""
    try:
        return os.replace(partial, path)  # over an empty folder, too
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchanged(partial, path):
        return remove(partial)
    old = path.with_name(f".{path.name}.old")
    os.replace(path, old)
    os.replace(partial, path)
    remove(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two paths were made to change places: Linux can, on most of its disks."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE, as linux/fcntl.h and linux/fs.h have them."""


# -------------------------------------------------------------------------------------------------- one at a time


class Held(OSError):
    """Another process is at work in a folder; ``str`` says which, and what to do."""


@contextmanager
def lock(folder: Path, name: str = ".lock") -> Iterator[Path]:
    """Be the only process at work in ``folder``, which is there; gives the lock's file, which goes with the block.

    The kernel holds it, so that it ends with the process, however that ends. Where a network disk knows no locks, the
    file alone says who is there: one that has ended on this machine, or was of the same SLURM job, does not count.

    Raises:
        Held: there is one; it is named by host, process and command.
    """
    file = folder / name
    opened = _claim(file)
    _locks.add(opened)
    try:
        with suppress(OSError):  # for people; a full disk does not matter
            os.ftruncate(opened, 0)
            os.pwrite(opened, json.dumps(_self()).encode(), 0)
        yield file
    finally:
        if opened in _locks:  # else in a process that was forked
            with suppress(OSError):
                if _same(opened, file):
                    file.unlink()
            _locks.remove(opened)
            os.close(opened)


_locks: set[int] = set()


def _let_go() -> None:
    """A worker has no part in the locks of its parent, who may be killed before it."""
    for opened in _locks:
        os.close(opened)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def _claim(file: Path) -> int:
    """The lock's file, open and locked."""
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            there = _read(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) or not _ended(there):
                os.close(opened)
                raise Held(error.errno, _who(file, there)) from None
        if _same(opened, file):
            return opened
        os.close(opened)  # who held it has taken the file away meanwhile


def _same(opened: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(file))
    except FileNotFoundError:
        return False


def _self() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "command": " ".join(sys.argv)[:500]}
    return own | {"job": os.environ.get("SLURM_JOB_ID")}


def _read(file: Path) -> dict[str, Any]:
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return there if isinstance(there, dict) else {}


def _ended(there: Mapping[str, Any]) -> bool:
    """Whether who wrote this is known to be at work no more."""
    if not there or (there.get("job") is not None and there["job"] == os.environ.get("SLURM_JOB_ID")):
        return True
    if there.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(there.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return True
    except PermissionError:
        pass
    return False


def _who(file: Path, there: Mapping[str, Any]) -> str:
    told = "another process"
    if there:
        told = f"process {there.get('pid')} on {there.get('host')}, started {there.get('started')}"
        told += f" ({there['command']})" if there.get("command") else ""
    else_ = f"; if it is no more, remove {file}" if there and there.get("host") != socket.gethostname() else ""
    return f"{file.parent} is in use by {told}: wait for it, end it, or give another folder{else_}"


def _named(error: BaseException, path: Path) -> BaseException:
    """The disk's error that ``error`` is or hides, with the name of the file; another one as it is."""
    found = trouble(error)
    if found is None or (found is error and found.filename is not None and found.errno not in HARD):
        return error
    return OSError(found.errno, os.strerror(found.errno), str(path))


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- what a disk refuses

WRONG = {
    errno.ENOSPC: "the disk is full: make room, or give a place on another disk, then go on",
    errno.EDQUOT: "your disk quota is used up: make room, or give a place on another disk, then go on",
    errno.EFBIG: "the file would be larger than this disk, or your limits, allow: give a place on another disk",
    errno.EROFS: "the disk is read-only: give a place that can be written",
    errno.EACCES: "permission denied: give a place that you may use, or have its permissions changed",
    errno.EPERM: "that is not permitted: give a place that you may use, or have its permissions changed",
    errno.ENOENT: "there is no such file or folder: give one that is there",
    errno.ENOTDIR: "a part of this path is a file, where a folder is needed: give another path",
    errno.EISDIR: "that is a folder, where a file is needed: give another path",
    errno.EEXIST: "that is there already: give another path",
    errno.ENOTEMPTY: "the folder is not empty: give another one",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ELOOP: "the symbolic links go round in a circle: give another path",
    errno.EXDEV: "that leads to another disk: give a path on one disk",
    errno.EBUSY: "that is in use, perhaps as a mount point: give a folder inside it",
    errno.ETXTBSY: "that is in use: give another path",
    errno.EIO: "the disk could not be read or written (input/output error): look after the disk, then go on",
    errno.ESTALE: "the network disk has lost this file: run the command again",
    errno.ENODEV: "there is no such device: give another path",
    errno.ENXIO: "there is no such device: give another path",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n), or give fewer workers",
    errno.ENFILE: "too many files are open on this machine: end other programs, or give fewer workers",
}
"""What can be wrong with a disk, and what would be right."""
HARD = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
"""Of these, what nobody catches and goes on; an error that comes after one of them comes of it."""
_TOLD = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_TORN = re.compile(r"unexpected pos \d+|PytorchStreamWriter failed|inline_container")
"""What torch says where it could not write on."""


def trouble(error: BaseException | None) -> OSError | None:
    """The disk's error that ``error`` is, or that a library has wrapped in it; None if it is another one."""
    first, seen = error, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in WRONG and (error is first or error.errno in HARD):
            return error
        if not isinstance(error, (OSError, ValueError)):  # safetensors, torch; a ValueError is what we say ourselves
            if found := _TOLD.search(str(error)):
                if (number := int(found[1] or found[2])) in HARD:
                    return OSError(number, os.strerror(number))
            elif _TORN.search(str(error)):
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


def said(error: BaseException) -> str | None:
    """One line about a disk that refused: which file, what is wrong, what would be right; None if it is no such error.

    A disk is full, read-only, not ours ...; not what a network or another process did, which are OSErrors, too.
    """
    if isinstance(error, Held):
        return error.strerror
    found = trouble(error)
    if found is None or (found.filename is None and found.errno not in HARD):
        return None
    number = found.errno
    if number == errno.EEXIST and os.path.isfile(found.filename):  # of mkdir
        number = errno.ENOTDIR
    names = [os.fsdecode(name) for name in (found.filename, found.filename2) if isinstance(name, (str, bytes))]
    place = " -> ".join(name.removesuffix(PARTIAL) for name in names)
    return f"{place or 'cannot write'}: {WRONG[number]}"
