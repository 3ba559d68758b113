"""Configuration: a dataclass schema <- YAML files, left to right <- ``key=value`` overrides, strictly checked.

The only module that knows OmegaConf, which merges, converts and interpolates (``${other.key}``), and imports it only
where a config is merged or written: a model runs without it. YAML is read by :mod:`.notation`. What a wrong input is
told, in one line with its full key, is decided here: unknown keys, types, and the ranges and forms that each
:func:`option` declares. Below the entry points there are only plain dataclasses.
Nothing heavy is imported, so a typo is answered before torch has loaded. Left out: config groups and sweeps (a YAML
file may say ``extends: base.yaml``), objects built from dotted names, and element-wise edits of lists (a list is
replaced as a whole, a mapping is merged).
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from glimpseprune import files, notation, resources
from glimpseprune.legible import legible
from glimpseprune.notation import Plain, Unreadable

__all__ = [
    "FREE",
    "MISSING",
    "PLACE",
    "SEEDS",
    "START",
    "Interrupted",
    "UserError",
    "advising",
    "answering",
    "as_typed",
    "check",
    "command",
    "entry",
    "flat",
    "interrupt",
    "load",
    "merge_options",
    "option",
    "read",
    "received",
    "roles",
    "save",
    "to_yaml",
    "without_secrets",
]

T = TypeVar("T")

MISSING: Any = "???"
"""Default of a mandatory key, as OmegaConf has it."""
START, FREE, PLACE = "start", "free", "place"
SEEDS = 2**32 - 1
"""The largest seed that all random generators take."""


class UserError(ValueError):
    """A mistake of the user: one line that says what was wrong and what would be right."""


@dataclass(frozen=True)
class Range:
    """What a number may be, or each number of a list, a tuple or a mapping: finite, and between these."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = (("at least", self.least), ("above", self.above), ("up to", self.most), ("below", self.below))
        words = {word: int(end) if end == int(end) else end for word, end in ends if end is not None}
        if words.keys() == {"at least", "up to"}:
            return f"{words['at least']} to {words['up to']}"
        return ", ".join(f"{word} {end}" for word, end in words.items()) or "a finite number"


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    was: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    form: tuple[str, str] = ("", ""),
    role: str = "",
) -> Any:
    """A dataclass field with its documentation; a list, a dict or a dataclass as ``default`` is built anew each time.

    A class as default means an instance of it (``option(Trainer)``). ``MISSING`` makes the key mandatory. ``was``: the
    name that it had before, under which it is still read, for saved runs have it. ``least`` and so on: the
    :class:`Range` of a number, or of each one of several, which every numeric option has. ``form``: a pattern that a
    text matches as a whole, and the same in words. ``role``: what a key, or a section with its keys, has to do with
    what a run *is*: nothing with ``START`` (how it was started: not saved, and read from no saved file), so little
    with ``FREE`` that it may change when a run is resumed, and with ``PLACE`` it is where something lies.
    """
    metadata = {"help": help, "was": was, "range": Range(least, above, most, below), "form": form, "role": role}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)) or is_dataclass(default):
        return field(default_factory=functools.partial(copy.deepcopy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


Under = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Given all that files and overrides say, what goes below them and above the defaults."""


def load(schema: type[T], argv: Sequence[str], *, prog: str = "", doc: str = "", under: Under | None = None) -> T:
    """An instance of ``schema`` from command line arguments: ``a.yaml b.yaml key=value``, later ones win.

    Files come before overrides whatever their order; one that is not there may be of those that the package brings
    (:mod:`.resources`). ``-h`` or ``--help`` prints every key and exits with 0.

    Other arguments are the value of the key that an attribute ``BARE`` of the schema names.

    Raises:
        UserError: unknown key, wrong type, missing mandatory key, absent or malformed file or argument.
    """
    if {"-h", "--help"} & set(argv):
        print(as_typed(_help(schema, prog, doc)))
        raise SystemExit(0)
    argv = _name_bare(schema, argv)
    files_given = [arg for arg in argv if "=" not in arg]
    for arg in files_given:
        if not arg.endswith((".yaml", ".yml")):
            raise UserError(f"cannot read argument {arg!r}: give a .yaml file or key=value (--help lists the keys)")
        _check_text("config file", arg)
    layers = [(f"{file}: ", _recipe(schema, file)) for file in files_given]
    kinds = {key: kind for key, kind, *_ in _keys(schema)}
    layers += [("", _override(kinds, arg)) for arg in argv if "=" in arg]
    if under is not None:
        _merged(schema, layers)  # what is given has the types that are declared
        given = functools.reduce(_over, (layer for _, layer in layers), {})
        layers.insert(0, ("", under(_at_home(_settled(given, schema), ""))))
    made = _build(schema, layers)
    if any("out" in layer for _, layer in layers):
        try:
            files.require_folder(made.out)
        except OSError as error:
            raise UserError(f"out: {files.said(error)}") from None
    return made


def _recipe(schema: type, file: str) -> dict[str, Any]:
    """The keys in a YAML file but those that only a command line may say: no file replaces or resumes anything."""
    layer = _read_yaml(Path(resources.find(_at_home(file, "config file"))))
    spoken = [name for name in _of_a_start(schema) if get_type_hints(schema)[name] is bool]
    for name in spoken:
        if (said := _settled(layer.pop(name, False), bool)) is None or not _is_truth(said):
            raise UserError(f"{file}: {name}: expected bool, got {_show(said)}")
        if said is True:
            print(f"note: {name}: true in {file} does not count: give {name}=true yourself", file=sys.stderr)
    return layer


def read(schema: type[T], path: str | Path) -> T:
    """An instance of ``schema`` from one YAML file that :func:`save` wrote; raises as :func:`load` does.

    Keys of a ``START`` have their defaults, whatever an older file says; a mandatory one (``out``) is its folder, where
    the file does not name another, by a relative path.
    """
    start = _of_a_start(schema)
    layer = {
        name: value
        for name, value in _read_yaml(Path(path)).items()
        if name not in start or _travels(start[name], value)
    }
    here = {name: str(Path(path).parent) for name, item in start.items() if item.default == MISSING}
    return _build(schema, [("", here), (f"{path}: ", layer)])


def names(path: str | Path) -> set[str]:
    """The keys that a YAML file has on top; raises as :func:`load`."""
    return set(_read_yaml(Path(path)))


def _travels(item: Any, value: Any) -> bool:
    """Whether what a start said is saved: a mandatory path that is relative, and means something elsewhere, too."""
    text = str(getattr(value, "text", value))
    return item.default == MISSING and not text.startswith(("/", "~")) and text != ""


def _of_a_start(schema: type) -> dict[str, Any]:
    return {item.name: item for item in fields(schema) if item.metadata.get("role") == START}


def roles(schema: type, prefix: str = "", role: str = "") -> Iterator[tuple[str, str]]:
    """Each full key of a schema with its role, or that of the section it is in."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        key, own = f"{prefix}{item.name}", item.metadata.get("role") or role
        yield key, own
        if section := _section(hints[item.name]):
            yield from roles(section, f"{key}.", own)


def flat(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each full key of an instance with its value; of a section that is null, the section's."""
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def merge_options(schema: type[T], options: Mapping[str, Any] | T | None, key: str) -> T:
    """Free-form ``options`` (as they stand under ``key`` of some config) as an instance of the dataclass ``schema``.

    Raises:
        UserError: as :func:`load`, with ``key`` before each name, such as ``pruner.options.thresold``.
    """
    if isinstance(options, schema):
        check(options, f"{key}.")
        return options
    if not isinstance(options, Mapping | None):
        raise UserError(f"{key}: expected a mapping with the options of {schema.__module__}, got {_show(options)}")
    return _build(schema, [("", options or {})], f"{key}.")


def check(cfg: Any, prefix: str = "") -> None:
    """Raises UserError where a number of the dataclass ``cfg``, or of one in it, is out of its range, or a text of no
    use as one. Whatever :func:`load` and its like give was checked."""
    for item in fields(cfg):
        key, value = f"{prefix}{item.name}", getattr(cfg, item.name)
        within, (form, words) = item.metadata.get("range", Range()), item.metadata.get("form", ("", ""))
        for place, found in _scalars(value):
            if is_dataclass(found):
                check(found, f"{key}{place}.")
            elif isinstance(found, str) and found != MISSING:
                _check_text(f"{key}{place}", found, item.default)
                if form and not re.fullmatch(form, found):
                    shown = found.partition("?")[0].rpartition("@")[2]  # no password, no key
                    raise UserError(f"{key}{place}: give {words}, got {_show(shown)}")
            elif isinstance(found, int | float) and not isinstance(found, bool) and found not in within:
                raise UserError(f"{key}{place}: give {within}, got {_show(found)}")


def _scalars(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What is in lists and mappings, with its place there."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _scalars(item, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _scalars(item, f"{place}[{number}]")
    else:
        yield place, value


def _check_text(key: str, text: str, default: Any = MISSING) -> None:
    """Raises UserError where a text is no name, path or list of such."""
    if not text and default != "":
        raise UserError(f"{key}: give a text that is not empty")
    if "${" in text:
        raise UserError(f"{key}: got {_show(text)}, but ${{...}} stands for the value of another key")
    if any(len(part.encode(errors="replace")) > 255 for part in text.split("/")):
        raise UserError(f"{key}: got {_show(text)}: a name has 255 bytes at most")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
        raise UserError(f"{key}: got {_show(text)}, which has characters that are no text")


def to_yaml(cfg: Any) -> str:
    """A dataclass instance as YAML, without keys of a ``START`` (but a relative ``out``); ``read(type(cfg), file)``
    gives it back, but for what :func:`without_secrets` drops."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(cfg)
    start = _of_a_start(type(cfg))
    said = [key for key in node if key not in start or _travels(start[key], getattr(cfg, key))]
    node = OmegaConf.masked_copy(node, said)
    plain = OmegaConf.to_container(node)
    public = _public(plain)
    return OmegaConf.to_yaml(node if public == plain else OmegaConf.create(public))


def without_secrets(text: str) -> str:
    """``text``, and if it is a URL, without user and password, and without the parameters that may be keys."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*://)([^/?#]*)([^?]*)(?:\?(.*))?", text, re.IGNORECASE | re.DOTALL)
    if found is None:
        return text
    scheme, host, path, query = found.groups(default="")
    named = [part for part in query.split("&") if part and not _SECRET.search(part.partition("=")[0])]
    return scheme + host.rpartition("@")[2] + path + "?" * bool(named) + "&".join(named)


_SECRET = re.compile("key|token|secret|pass|pwd|sig|auth|cred|code", re.IGNORECASE)


def _public(value: Any) -> Any:
    """Plain data with every text in it :func:`without_secrets`."""
    if isinstance(value, Mapping):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    return without_secrets(value) if isinstance(value, str) else value


def save(cfg: Any, path: str | Path) -> None:
    """Write :func:`to_yaml` to ``path``, whose folder is made if need be. The config of a run names folders so that the
    run may be moved (:mod:`.resources`)."""
    from omegaconf import OmegaConf

    path, text = Path(path), to_yaml(cfg)
    if path.name == resources.CONFIG:
        text = OmegaConf.to_yaml(resources.stored(OmegaConf.to_container(OmegaConf.create(text)), path.parent))
    files.write(path, text)


def entry(schema: type[T], under: Under | None = None) -> Callable[[Callable[[T], Any]], Callable[..., Any]]:
    """Make ``main(cfg)`` an entry point ``main(argv=None)`` that loads its config from the command line.

    The help text opens with the docstring of main's module. What is wrong in the config, or within main, is told as by
    :func:`answering`. A function of another name than ``main`` is a command within that of its module.
    """

    def decorate(main: Callable[[T], Any]) -> Callable[..., Any]:
        prog = f"python -m src.{main.__module__.rpartition('.')[2]}"
        prog += "" if main.__name__ == "main" else f" {main.__name__}"

        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> Any:
            doc = inspect.getdoc(inspect.getmodule(main)) or ""
            given = sys.argv[1:] if argv is None else argv
            with answering(prog, given):
                return main(load(schema, given, prog=prog, doc=doc, under=under))

        del run.__wrapped__  # its signature is ours, not that of main
        run.schema = schema
        return run

    return decorate


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. ``advice`` says what to do next."""

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(number, advice)
        self.number, self.advice = number, advice


@contextmanager
def advising(say: Callable[[], str]) -> Iterator[None]:
    """Should the block be interrupted, the user is told what ``say`` gives then."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        if not getattr(error, "advice", ""):
            error.advice = say()
        raise


_commands: list[tuple[str, Sequence[str]]] = []
"""Those at work, and their arguments; the last one is inside the others."""


def command(*more: str) -> str:
    """The command at work, as one types it, with ``more`` arguments in the place of those of the same keys."""
    prog, argv = _commands[-1] if _commands else ("python -m src.train", ())
    keys = {arg.partition("=")[0] for arg in more}
    keys |= {"overwrite"} if "resume" in keys else set()
    kept = [arg for arg in argv if arg.partition("=")[0] not in keys]
    return as_typed(f"{prog} {shlex.join([*kept, *more])}".strip())


def interrupt(number: int, _: Any = None) -> None:
    """What a signal does to a command; the same one again ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    _received.append(number)
    raise Interrupted(number)


_received: list[int] = []


def received() -> int:
    """The signal that this command got, though the code that it reached may have swallowed what it raised; or 0."""
    return _received[-1] if _received else 0


def _once_more(otherwise: Callable[[Any], None], what: Any) -> None:
    """As ``sys.unraisablehook``: a signal that came where Python ignores what is raised (a ``__del__``, a hook of
    fork) comes again in a moment."""
    if not isinstance(error := what.exc_value, Interrupted):
        return otherwise(what)
    signal.signal(error.number, interrupt)
    threading.Timer(0.01, os.kill, (os.getpid(), error.number)).start()


@contextmanager
def _listening() -> Iterator[None]:
    """Signals that would end this process say so first; those that are ignored or listened to stay as they are."""
    before: dict[int, Any] = {}
    if len(_commands) == 1:
        _received.clear()
    ignored = sys.unraisablehook
    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = functools.partial(_once_more, ignored)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = ignored
        for number, handler in before.items():
            if signal.getsignal(number) in (interrupt, signal.SIG_DFL):
                signal.signal(number, handler)


@contextmanager
def answering(prog: str, argv: Sequence[str] = ()) -> Iterator[None]:
    """Answer a :class:`UserError`, an extra that is not installed, or a disk that refuses, with one line ``error: ...``
    on stderr and exit code 2, and what :class:`Interrupted` it with one that says how to go on, and 128 + the signal.
    ``prog`` is the command at work, as :func:`as_typed` takes it, ``argv`` what it was given."""
    _commands.append((prog, argv))
    try:
        with _listening():
            yield
    except (Interrupted, KeyboardInterrupt) as error:
        _end(getattr(error, "number", signal.SIGINT), getattr(error, "advice", ""))
    except UserError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        package, extra = _extra(error)
        if extra is None:
            raise
        said = f"{prog} needs the package {package}: pip install 'glimpseprune[{extra}]'"
    except Exception as error:
        if number := received():  # a library has made another error of it
            _end(number)
        if (said := files.said(error)) is None:
            raise
    else:
        return
    finally:
        _commands.pop()
    print("error:", as_typed(legible(" ".join(said.split("\n")))), file=sys.stderr)
    raise SystemExit(2)


def _end(number: int, advice: str = "") -> NoReturn:
    """End a command that got the signal ``number``."""
    advice = advice or f"nothing is half-written; again: {command()}"
    print(f"\ninterrupted ({signal.Signals(number).name}): {advice}", file=sys.stderr)
    raise SystemExit(128 + number) from None


def as_typed(text: str) -> str:
    """``text``, in which commands are written as ``python -m src.x``, with all of them named the way that the present
    one was typed, such as ``glimpseprune x``."""
    typed = Path(sys.argv[0])
    if typed.name == "glimpseprune":
        way = "glimpseprune "
    elif typed.parts[-2:] == ("glimpseprune", "__main__.py"):
        way = "python -m glimpseprune "
    else:
        return text
    return re.sub(r"(python -m )?\bsrc\.(?=[a-z])", way, text)


def _extra(error: ModuleNotFoundError) -> tuple[str, str | None]:
    """The package that was not found, and which extra of ours, as its metadata say, would bring it (None: no one)."""
    # Who looks before they import tell the name in words only, as Lightning does of tensorboard.
    names = [error.name.partition(".")[0]] if error.name else re.findall(r"[\w-]+", str(error))
    try:
        requirements = metadata.requires("glimpseprune") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        requirements = []
    for requirement in requirements:
        package = re.match(r"[\w.-]+", requirement)[0]
        extra = re.search(r"extra == ['\"](.+?)['\"]", requirement)
        if extra and {"scikit-learn": "sklearn"}.get(package, package.replace("-", "_")) in names:
            return package, extra[1]
    return names[0], None


def _build(schema: type[T], layers: Iterable[tuple[str, Mapping[str, Any]]], prefix: str = "") -> T:
    """Merge ``layers`` (each with what its errors begin with) over the defaults, and check the whole."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = _merged(schema, layers, prefix)
    try:
        missing = OmegaConf.missing_keys(cfg)
        for key, kind, _, doc in _keys(schema):
            if key in missing:
                doc = doc and f" ({doc})"
                raise UserError(f"missing mandatory key '{prefix}{key}'{doc}: give {prefix}{key}=<{_kind_name(kind)}>")
        made = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or to a wrong type
        raise UserError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}".removeprefix(": ")) from None
    except RecursionError:
        raise UserError("a value ${...} stands for itself, through others") from None
    for key, kind, value in _values(made, prefix):
        if not _fits(value, kind):  # through an interpolation, or a list in a list
            raise UserError(f"{key}: expected {_kind_name(kind)}, got {_show(value)}")
    check(made, prefix)
    return made


def _merged(schema: type, layers: Iterable[tuple[str, Mapping[str, Any]]], prefix: str = "") -> Any:
    """The ``layers`` over the defaults, as OmegaConf holds them; mandatory keys may be missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = OmegaConf.structured(schema)
    for origin, layer in layers:
        # One leaf at a time, for OmegaConf does not always name the key that failed.
        for key, kind, value in _leaves(schema, _settled(layer, schema), origin, prefix):
            if (retyped := _retyped(value, kind)) is not None:
                raise UserError(f"{origin}{key}: expected a text, but YAML takes {_show(retyped)} for none: quote it")
            try:
                if bool in _parts(kind) and not _is_truth(value):
                    raise TypeError
                OmegaConf.update(cfg, key.removeprefix(prefix), value, merge=True)
            except (OmegaConfBaseException, TypeError, ValueError, AssertionError, RecursionError):
                raise UserError(f"{origin}{key}: expected {_kind_name(kind)}, got {_show(value)}") from None
    return cfg


def _settled(value: Any, kind: Any) -> Any:
    """``value`` with each unquoted scalar as what ``kind`` declares: the text that was written, or what YAML makes of
    it."""
    if isinstance(value, Plain):
        return value.text if _is_text(kind) and value.value is not None else value.value
    if isinstance(value, list):
        item = _of(kind, list, tuple)
        return [_settled(part, item) for part in value]
    if isinstance(value, Mapping):
        if section := kind if is_dataclass(kind) else _section(kind):
            hints = get_type_hints(section)
            renamed = _renamed(section)
            return {name: _settled(part, hints.get(renamed.get(name, name), Any)) for name, part in value.items()}
        item = _of(kind, dict)
        return {name: _settled(part, item) for name, part in value.items()}
    return value


def _values(cfg: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Each (full key, declared type, value) of an instance that is no section itself."""
    for name, kind in get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind, value


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any or value == MISSING:
        return True
    if value is None:
        return types.NoneType in get_args(kind)
    for part in _parts(kind):
        container = get_origin(part) or part
        if container is Literal:
            if value in get_args(part):
                return True
        elif isinstance(value, bool) <= (container is bool) and isinstance(value, container):
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            item = _of(part, list, tuple, dict)
            return all(_fits(found, item) for found in inner)
    return False


def _parts(kind: Any) -> list[Any]:
    """What a value that is not null may be."""
    if get_origin(kind) in (Union, types.UnionType):
        return [part for part in get_args(kind) if part is not types.NoneType]
    return [kind]


def _of(kind: Any, *containers: type) -> Any:
    """What ``kind``, one of ``containers``, has in it."""
    found = [
        args[-1 if part_of is dict else 0]
        for part in _parts(kind)
        if (part_of := get_origin(part)) in containers
        if (args := get_args(part))
    ]
    return found[0] if found else Any


def _is_text(kind: Any) -> bool:
    def text(part: Any) -> bool:
        return part is str or get_origin(part) is Literal and all(isinstance(word, str) for word in get_args(part))

    return all(map(text, _parts(kind)))


def _retyped(value: Any, kind: Any) -> Any:
    """A number or a truth value in the place of a text, whose notation has been lost (null is told by its type, and
    whole numbers are written in one way only); None: there is none."""
    if isinstance(value, float | bool):
        return value if _is_text(kind) else None
    inner = value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else ()
    item = _of(kind, dict if isinstance(value, Mapping) else list, tuple)
    return next((found for part in inner if (found := _retyped(part, item)) is not None), None)


def _is_truth(value: Any) -> bool:
    """Whether ``value`` says yes or no; OmegaConf takes any number for one."""
    words = {"true", "false", "yes", "no", "on", "off", "y", "n", "0", "1"}
    return value is None or str(value).lower() in words or "${" in str(value)


def _renamed(schema: type) -> dict[str, str]:
    """Names that fields had before -> theirs."""
    return {item.metadata["was"]: item.name for item in fields(schema) if item.metadata.get("was")}


def _over(below: Any, layer: Any) -> Any:
    """``layer`` over what is ``below``: mappings are merged, all else is replaced."""
    if not (isinstance(below, Mapping) and isinstance(layer, Mapping)):
        return layer
    return {**below, **{name: _over(below.get(name), value) for name, value in layer.items()}}


def _leaves(
    schema: type, layer: Mapping[str, Any], origin: str, prefix: str, root: type | None = None, top: str | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Each (full key, declared type, value) of a nested mapping, sections opened, unknown keys refused."""
    root = root or schema
    top = prefix if top is None else top
    hints = get_type_hints(schema)
    renamed = _renamed(schema)
    for name, value in layer.items():
        name = renamed.get(name, name)
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(f"{origin}unknown key '{key}': {_suggest(root, top, key, list(hints), renamed)}")
        section = _section(hints[name])
        if section and isinstance(value, Mapping):
            yield key, hints[name], {}  # opens a section that is null by default
            yield from _leaves(section, value, origin, f"{key}.", root, top)
        else:
            yield key, hints[name], _at_home(value, f"{origin}{key}")


def _at_home(value: Any, key: str) -> Any:
    """``value`` with its paths that begin with ``~`` in the home folder, at any depth: a shell expands it only where a
    word begins with it, and no text but a path does."""
    if isinstance(value, list):
        return [_at_home(item, key) for item in value]
    if isinstance(value, Mapping):
        return {name: _at_home(item, f"{key}.{name}") for name, item in value.items()}
    if not isinstance(value, str) or not re.match(r"~$|~[\w.-]*/", value):
        return value
    if (found := os.path.expanduser(value)) == value:
        raise UserError(
            f"{key}: {value!r} is in the home of a user who is not here; a folder of that name is ./{value}"
        )
    return found


def _keys(schema: type, prefix: str = "", defaults: Mapping | None = None) -> Iterator[tuple[str, Any, Any, str]]:
    """Each (full key, declared type, default, documentation) of a schema, a section before its keys."""
    from omegaconf import OmegaConf

    hints = get_type_hints(schema)
    defaults = defaults or OmegaConf.to_container(OmegaConf.structured(schema))
    for item in fields(schema):
        kind, default = hints[item.name], defaults[item.name]
        within = item.metadata.get("range", Range())
        doc = [item.metadata.get("help", ""), *[str(within)] * (within != Range())]
        yield f"{prefix}{item.name}", kind, default, "; ".join(filter(None, doc))
        if section := _section(kind):
            yield from _keys(section, f"{prefix}{item.name}.", default)


def _section(kind: Any) -> type | None:
    """The dataclass that ``kind`` is or may be (``Judge | None``)."""
    found = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and is_dataclass(part)]
    return found[0] if found and get_origin(kind) in (None, Union, types.UnionType) else None


def _suggest(root: type, top: str, key: str, siblings: list[str], renamed: Mapping[str, str]) -> str:
    parent, _, name = key.rpartition(".")
    everywhere: dict[str, str] = {}  # the first key of each name
    for known, *_ in _keys(root):
        everywhere.setdefault(known.rpartition(".")[2], f"{top}{known}")

    def close(names: Iterable[str], cutoff: float) -> list[str]:  # of names, without their sections, to this one
        return difflib.get_close_matches(name, names, 1, cutoff)

    def here(cutoff: float) -> list[str]:
        return [f"{parent}.{renamed.get(x, x)}".removeprefix(".") for x in close([*siblings, *renamed], cutoff)]

    near = here(0.8) + [everywhere[x] for x in everywhere if x == name]
    near += here(0.6) + [everywhere[x] for x in close(everywhere, 0.8)]
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(siblings)}"


def _name_bare(schema: type, argv: Sequence[str]) -> list[str]:
    """``argv``, in which arguments without a key that are no YAML files are the value of the key that ``schema.BARE``
    names, if it names one: all of them where that is a list. A key has no slash and no space."""
    is_bare = re.compile(r"[^=]*[/ ][^=]*=|[^=]*$").match
    bare = [arg for arg in argv if is_bare(arg) and not arg.endswith((".yaml", ".yml"))]
    key = getattr(schema, "BARE", None)
    if key is None or not bare:
        return list(argv)
    many = get_origin(get_type_hints(schema)[key]) is list
    if len(bare) > 1 and not many:
        raise UserError(f"give one {key}, not {len(bare)}: {' '.join(bare)}")
    value = json.dumps(bare) if many else bare[0]
    return [arg for arg in argv if arg not in bare] + [f"{key}={value}"]


def _read_yaml(path: Path, seen: tuple[Path, ...] = (), known: dict[Path, Any] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the files it extends; its unquoted scalars are ``Plain``."""
    known = {} if known is None else known
    try:
        place = path.resolve()
        if place in seen:
            raise UserError(f"{path}: extends itself, through {' <- '.join(p.name for p in seen)}")
        if place in known:
            return known[place]
        layer = notation.read(path)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError in older Pythons
        raise UserError(f"cannot read config file {path}: {getattr(error, 'strerror', None) or error}") from None
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {_show(_settled(layer, Any))}")
    if path.name == resources.CONFIG:
        layer = resources.opened(layer, path.parent)
    bases = _settled(layer.pop("extends", []), str)
    bases = [bases] if isinstance(bases, str) else _settled(bases, list[str])
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise UserError(f"{path}: extends: give a YAML file, or a list of them, got {_show(bases)}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _over(merged, _read_yaml(path.parent / _at_home(base, "extends"), (*seen, place), known))
    known[place] = _over(merged, layer)
    return known[place]


def _override(kinds: Mapping[str, Any], arg: str) -> dict[str, Any]:
    """``a.b=value`` as a nested mapping. Keys that ``kinds`` declares as text take the value as it stands, others read
    it as YAML."""
    key, text = arg.split("=", 1)
    kind = kinds.get(key)
    if kind is str or (set(get_args(kind)) == {str, types.NoneType} and text != "null"):
        value: Any = text
    else:
        try:
            value = notation.parse(text) if text.strip() else Plain(None, text)
        except Unreadable as error:
            raise UserError(
                f"{key}: cannot read {_show(text)} as a YAML value: {str(error).rpartition(': ')[2]}"
            ) from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _kind_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(_kind_name, get_args(kind)))
    if section := _section(kind):
        return f"a section with keys {', '.join(item.name for item in fields(section))}"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def _show(value: Any) -> str:
    """A value in an error message."""
    said = "null" if value is None else repr(value)
    return said if len(said) <= 200 else f"{said[:150]} ..."


def _help(schema: type, prog: str, doc: str) -> str:
    rows = []
    for key, kind, default, text in _keys(schema):
        if section := _section(kind):
            rows.append((f"{key}:", section.__name__, "" if default else "= null", text))
        elif default == MISSING:
            rows.append((key, _kind_name(kind), "(mandatory)", text))
        else:
            plain = isinstance(default, str) and default
            rows.append((key, _kind_name(kind), f"= {plain or json.dumps(default)}", text))
    widths = [min(max(len(row[i]) for row in rows), 40) for i in range(3)]
    lines = ["  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
    usage = f"usage: {prog} [config.yaml ...] [key=value ...]"
    return "\n".join([usage, "", *([doc, ""] if doc else []), "keys:", *(line.rstrip() for line in lines)])
