"""Configuration: a dataclass schema <- YAML files, left to right <- ``key=value`` overrides, strictly checked.

The only module that knows OmegaConf, which parses, merges, converts and interpolates (``${other.key}``); what a wrong
input is told, in one line with its full key, is decided here. Below the entry points there are only plain dataclasses.
Nothing heavy is imported, so a typo is answered before torch has loaded. Left out: config groups and sweeps (a YAML
file may say ``extends: base.yaml``), objects built from dotted names, and element-wise edits of lists (a list is
replaced as a whole, a mapping is merged).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from glimpseprune import resources

__all__ = [
    "MISSING",
    "UserError",
    "answering",
    "as_typed",
    "entry",
    "load",
    "merge_options",
    "option",
    "read",
    "save",
    "to_yaml",
    "without_secrets",
]

T = TypeVar("T")


class UserError(ValueError):
    """A mistake of the user: one line that says what was wrong and what would be right."""


def option(default: Any = MISSING, help: str = "", *, was: str = "") -> Any:
    """A dataclass field with its documentation; a list, a dict or a dataclass as ``default`` is built anew each time.

    A class as default means an instance of it (``option(Trainer)``). ``MISSING`` makes the key mandatory. ``was``: the
    name that it had before, under which it is still read, for saved runs have it.
    """
    metadata = {"help": help, "was": was}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)) or is_dataclass(default):
        build = functools.partial(OmegaConf.to_object, OmegaConf.create(default))
        return field(default_factory=build, metadata=metadata)
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
    files = [arg for arg in argv if "=" not in arg]
    for arg in files:
        if not arg.endswith((".yaml", ".yml")):
            raise UserError(f"cannot read argument {arg!r}: give a .yaml file or key=value (--help lists the keys)")
    layers = [(f"{file}: ", _read_yaml(Path(resources.find(file)))) for file in files]
    kinds = {key: kind for key, kind, *_ in _keys(schema)}
    layers += [("", _override(kinds, arg)) for arg in argv if "=" in arg]
    if under is not None:
        given = OmegaConf.to_container(OmegaConf.merge(*({}, *(layer for _, layer in layers))))
        layers.insert(0, ("", under(given)))
    return _build(schema, layers)


def read(schema: type[T], path: str | Path) -> T:
    """An instance of ``schema`` from one YAML file; raises as :func:`load` does."""
    return _build(schema, [(f"{path}: ", _read_yaml(Path(path)))])


def merge_options(schema: type[T], options: Mapping[str, Any] | T | None, key: str) -> T:
    """Free-form ``options`` (as they stand under ``key`` of some config) as an instance of the dataclass ``schema``.

    Raises:
        UserError: as :func:`load`, with ``key`` before each name, such as ``pruner.options.thresold``.
    """
    if isinstance(options, schema):
        return options
    if not isinstance(options or {}, Mapping):
        raise UserError(f"{key}: expected a mapping with the options of {schema.__module__}, got {options!r}")
    return _build(schema, [("", options or {})], f"{key}.")


def to_yaml(cfg: Any) -> str:
    """A dataclass instance as YAML; ``read(type(cfg), file)`` gives it back, but what :func:`without_secrets` drops."""
    node = OmegaConf.structured(cfg)
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
    """Write :func:`to_yaml` to ``path``, whose folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(to_yaml(cfg), encoding="utf-8")


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
            with answering(prog):
                return main(load(schema, sys.argv[1:] if argv is None else argv, prog=prog, doc=doc, under=under))

        del run.__wrapped__  # its signature is ours, not that of main
        return run

    return decorate


@contextmanager
def answering(command: str) -> Iterator[None]:
    """Answer a :class:`UserError`, or an extra that is not installed, with one line ``error: ...`` on stderr and exit
    code 2; ``command`` is the one at work, as :func:`as_typed` takes it."""
    try:
        yield
    except UserError as error:
        said = " ".join(str(error).splitlines())
    except ModuleNotFoundError as error:
        package, extra = _extra(error)
        if extra is None:
            raise
        said = f"{command} needs the package {package}: pip install 'glimpseprune[{extra}]'"
    else:
        return
    print("error:", as_typed(said), file=sys.stderr)
    raise SystemExit(2)


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
    cfg = OmegaConf.structured(schema)
    for origin, layer in layers:
        # One leaf at a time, for OmegaConf does not always name the key that failed.
        for key, kind, value in _leaves(schema, layer, origin, prefix):
            try:
                OmegaConf.update(cfg, key.removeprefix(prefix), value, merge=True)
            except (OmegaConfBaseException, TypeError):
                raise UserError(f"{origin}{key}: expected {_kind_name(kind)}, got {_show(value)}") from None
    try:
        missing = OmegaConf.missing_keys(cfg)
        for key, kind, _, doc in _keys(schema):
            if key in missing:
                doc = doc and f" ({doc})"
                raise UserError(f"missing mandatory key '{prefix}{key}'{doc}: give {prefix}{key}=<{_kind_name(kind)}>")
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or to a wrong type
        raise UserError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}") from None


def _leaves(
    schema: type, layer: Mapping[str, Any], origin: str, prefix: str, root: type | None = None, top: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Each (full key, declared type, value) of a nested mapping, sections opened, unknown keys refused."""
    root = root or schema
    top = top or prefix
    hints = get_type_hints(schema)
    renamed = {item.metadata["was"]: item.name for item in fields(schema) if item.metadata.get("was")}
    for name, value in layer.items():
        name = renamed.get(name, name)
        key = f"{prefix}{name}"
        if name not in hints:
            raise UserError(f"{origin}unknown key '{key}': {_suggest(root, top, key, list(hints))}")
        section = _section(hints[name])
        if section and isinstance(value, Mapping):
            yield key, hints[name], {}  # opens a section that is null by default
            yield from _leaves(section, value, origin, f"{key}.", root, top)
        else:
            yield key, hints[name], value


def _keys(schema: type, prefix: str = "", defaults: Mapping | None = None) -> Iterator[tuple[str, Any, Any, str]]:
    """Each (full key, declared type, default, documentation) of a schema, a section before its keys."""
    hints = get_type_hints(schema)
    defaults = defaults or OmegaConf.to_container(OmegaConf.structured(schema))
    for item in fields(schema):
        kind, default = hints[item.name], defaults[item.name]
        yield f"{prefix}{item.name}", kind, default, item.metadata.get("help", "")
        if section := _section(kind):
            yield from _keys(section, f"{prefix}{item.name}.", default)


def _section(kind: Any) -> type | None:
    """The dataclass that ``kind`` is or may be (``Judge | None``)."""
    found = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and is_dataclass(part)]
    return found[0] if found and get_origin(kind) in (None, Union, types.UnionType) else None


def _suggest(root: type, top: str, key: str, siblings: list[str]) -> str:
    parent, _, name = key.rpartition(".")
    everywhere = [f"{top}{known}" for known, *_ in _keys(root)]
    near = [f"{parent}.{x}" if parent else x for x in difflib.get_close_matches(name, siblings, 1)]
    near += [known for known in everywhere if known.rpartition(".")[2] == name]
    near += difflib.get_close_matches(key, everywhere, 1, cutoff=0.8)
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(siblings)}"


def _name_bare(schema: type, argv: Sequence[str]) -> list[str]:
    """``argv``, in which arguments without a key that are no YAML files are the value of the key that ``schema.BARE``
    names, if it names one: all of them where that is a list. A key has no slash."""
    bare = [a for a in argv if ("=" not in a or "/" in a.partition("=")[0]) and not a.endswith((".yaml", ".yml"))]
    key = getattr(schema, "BARE", None)
    if key is None or not bare:
        return list(argv)
    many = get_origin(get_type_hints(schema)[key]) is list
    if len(bare) > 1 and not many:
        raise UserError(f"give one {key}, not {len(bare)}: {' '.join(bare)}")
    value = json.dumps(bare) if many else bare[0]
    return [arg for arg in argv if arg not in bare] + [f"{key}={value}"]


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the files it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself, through {' <- '.join(p.name for p in seen)}")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {_show(layer)}")
    bases = layer.pop("extends", [])
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = OmegaConf.merge(merged, _read_yaml(path.parent / base, (*seen, path.resolve())))
    return OmegaConf.to_container(OmegaConf.merge(merged, layer))


def _override(kinds: Mapping[str, Any], arg: str) -> dict[str, Any]:
    """``a.b=value`` as a nested mapping. Keys that ``kinds`` declares as text take the value as it stands, others read
    it as YAML."""
    key, text = arg.split("=", 1)
    kind = kinds.get(key)
    if kind is str or (set(get_args(kind)) == {str, types.NoneType} and text != "null"):
        value: Any = text
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except yaml.YAMLError:
            raise UserError(f"{key}: cannot read {text!r} as a YAML value") from None
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
    return "null" if value is None else repr(value)


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
