"""Weights in files that others wrote: which files of a folder hold them, and what makes them unusable.

A language model's folder holds ``model.safetensors``, or several such files and an index. Everything is refused by
name: a file that is missing, cut short or outside of the folder, a tensor that is no floating-point one, NaN and Inf.
Left out: pickles, which can hold programs, and quantised weights. Numbers are looked at where they were loaded to, in
one pass (15 to 25 GiB/s on one core: a second for 7B), headers without reading a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from glimpseprune.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DERIVED = ("position_ids", "inv_freq")
"""Ends of the names of what is in older files, but which a model makes by itself."""
ONE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"


def require_files(folder: str | Path) -> list[Path]:
    """The files with the weights of the language model in ``folder``, whole, with floating-point tensors only.

    Raises:
        UserError: there are none, or one is missing, damaged or of another kind; the file and the tensor are named.
    """
    folder = Path(folder)
    if (folder / ADAPTER).is_file():  # with which transformers would load the model that it names
        raise UserError(f"'{folder}' holds adapters of PEFT ({ADAPTER}): merge them into their model first")
    if (folder / ONE).is_file():
        files = {ONE: set()}
    elif (folder / INDEX).is_file():
        files = _indexed(folder / INDEX)
    else:
        pickles = sorted(path.name for kind in ("bin", "pt", "pth") for path in folder.glob(f"*.{kind}"))
        there = f"{pickles[0]} is a pickle, which is not read: save it as safetensors" if pickles else f"no {ONE}"
        raise UserError(f"there are no weights in '{folder}': {there}")
    for name, promised in files.items():
        there = header(folder / name)
        if gone := sorted(promised - set(there)):
            raise UserError(f"{folder / name}: tensor '{gone[0]}' is not in it, though {INDEX} says so")
        if odd := next((x for x, kind in there.items() if kind not in FLOATS and not x.endswith(DERIVED)), None):
            raise UserError(
                f"{folder / name}: tensor '{odd}' is {there[odd]}: quantised weights are not supported, take the model "
                "in bfloat16 or float16"
            )
    return [folder / name for name in files]


def header(file: Path) -> dict[str, str]:
    """The type of each tensor of a file, as safetensors calls it.

    Raises:
        UserError: the file cannot be read, or not to its end.
    """
    try:
        with safe_open(file, "np") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise UserError(said_of(file, error)) from None


def said_of(file: Path, error: Exception) -> str:
    """Why a file cannot be read as safetensors."""
    try:
        with open(file, "rb") as stream:
            pointer = stream.read(8) == b"version "
    except OSError:
        pointer = False
    if pointer:
        return f"{file} is a pointer of Git LFS, not the file itself: git lfs pull"
    return f"{file}: cannot be read as safetensors ({error}); is the file complete?"


def require_good(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise UserError, which names it, for a tensor that is no floating-point one, or holds NaN or Inf."""
    from glimpseprune import sharded  # torch, which who looks at headers does without

    for name, tensor in tensors:
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in FLOATS.values():
            raise UserError(f"{source}: tensor '{name}' is {kind}, which is no floating-point type of weights")
        if not is_finite(sharded.own(tensor)):
            raise UserError(
                f"{source}: tensor '{name}' holds NaN or Inf: the file is damaged, or its training diverged"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are. One pass without a copy: NaN and Inf both show in the least and the greatest."""
    return not tensor.numel() or all(math.isfinite(float(edge)) for edge in tensor.detach().aminmax())


def _indexed(index: Path) -> dict[str, set[str]]:
    """The files that an index names, each with the tensors that it shall hold."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {(tensor, file) for tensor, file in named.items() if isinstance(file, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: no index of weights ({type(error).__name__}: {error})") from None
    files: dict[str, set[str]] = {}
    for tensor, file in sorted(pairs):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: '{file}' is no safetensors file of this folder")
        files.setdefault(file, set()).add(tensor)
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise UserError(f"{index.parent}: {len(missing)} of {len(files)} files of weights are missing: {missing[0]}")
    if not files:
        raise UserError(f"{index}: it names no weights")
    return files
