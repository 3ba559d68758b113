"""Where the tests run: ``--device cuda`` puts models, prompts and whatever a test makes on a GPU; ``--device pretend``
does the same without one.

Only what tests do is moved: the package runs as it always does, and must put its own tensors where its model is. With
``pretend`` numbers are those of the CPU, every tensor carries the device on which it would be, and what mixes devices
is refused, as CUDA does. What that finds is code that would fail on a GPU because one of its tensors was made in the
wrong place, which on a machine without a GPU nothing else finds. :class:`Pretend` sees every call of torch's Python
functions: a tensor that is made with ``device=`` cuda, and what is computed from one, is marked; ``.device`` says so; a
call with marked and unmarked tensors raises. As on a GPU, a number (a tensor without dimensions) may come from the CPU,
and so may an index. Gradients, which C++ computes unseen, take the mark of their parameter.

Trainings and evaluations find that GPU, too. Not seen: a GPU's kernels, numbers and memory, other threads, and what C++
does by itself (hooks of gradients, ``autograd.Function``).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors

import glimpseprune
from glimpseprune import host, replay
from glimpseprune.lookup import find, names

HERE, PACKAGE = str(Path(__file__).parent), str(Path(glimpseprune.__file__).parent)
CUDA = torch.device("cuda", 0)
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 3e-2)}
"""Absolute and relative, of comparisons on a GPU, whose sums run in another order: float32 without TF32, and bfloat16.
Tests that ask for less strict ones get theirs. Not yet tried on a GPU."""
device = "cpu"
"""What pytest was told."""


def start(chosen: str) -> None:
    """Run the whole session on a device, cpu, cuda or pretend.

    Raises:
        pytest.UsageError: there is no GPU.
    """
    global device
    if chosen == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here; --device pretend needs none")
    device = chosen
    if chosen == "cpu":
        return
    if chosen == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # Hugging Face's forward, which is the oracle, in float32 too
    if chosen == "pretend":
        global PRETENDING
        PRETENDING = Pretend().__enter__()
        pretend_cuda()
    Placed().__enter__()

    from glimpseprune import pruners
    from glimpseprune.data.collate import Collator
    from glimpseprune.training._stage import StageModule

    backbones = [find("glimpseprune.backbones", name).Backbone for name in names("glimpseprune.backbones")]
    for owner, name in (
        (pruners, "build"),
        *((backbone, "prepare") for backbone in backbones),
        (Collator, "__call__"),
        (torch, "from_numpy"),
        (torch, "load"),
        (safetensors.torch, "load_file"),
    ):
        setattr(owner, name, placing(getattr(owner, name)))
    StageModule.device = property(lambda self: self.backbone.device)  # without a trainer, nothing else would set it
    torch.testing.assert_close = comparing(torch.testing.assert_close)
    torch.autocast.__init__ = casting(torch.autocast.__init__)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, but for a GPU, where sums of many threads run in another order each time."""
    if device != "cuda":
        return torch.equal(one, other)
    atol, rtol = TOLERANCE[one.dtype]
    return torch.allclose(one, other, atol=atol, rtol=rtol)


def put(value: Any) -> Any:
    """``value`` (a module, a tensor, or a structure with tensors in it) on the device of the tests."""
    if device == "cpu":
        return value
    if isinstance(value, (nn.Module, Tensor)):
        return value.to("cuda")
    if isinstance(value, dict):
        return {key: put(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(put, value))
    if dataclasses.is_dataclass(value) and any(True for _ in tensors(vars(value))):
        return dataclasses.replace(value, **put(vars(value)))
    return value


def is_called_from(folder: str) -> bool:
    """Whether the caller of the caller is in a file of ``folder``."""
    return sys._getframe(2).f_code.co_filename.startswith(folder)


def placing(make: Callable) -> Callable:
    """``make``, and put what it gives to a test on the device; what the package gets stays where it is."""

    @functools.wraps(make)
    def placed(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        return put(made) if is_called_from(HERE) else made

    return placed


def loosened(dtype: torch.dtype, options: dict) -> dict:
    """Options of a comparison with at least a GPU's tolerance."""
    if device != "cuda" or dtype not in TOLERANCE:
        return options
    least = dict(zip(("atol", "rtol"), TOLERANCE[dtype]))
    return options | {name: max(options.get(name, 0), value) for name, value in least.items()}


def comparing(close: Callable) -> Callable:
    """``torch.testing.assert_close`` wherever its tensors are."""

    @functools.wraps(close)
    def compare(actual: Any, expected: Any, **options: Any) -> None:
        on_cpu = (each.cpu() if isinstance(each, Tensor) else each for each in (actual, expected))
        close(*on_cpu, **loosened(getattr(actual, "dtype", None), options))

    return compare


def casting(init: Callable) -> Callable:
    """``torch.autocast(kind)`` where the tensors of the tests really are."""

    @functools.wraps(init)
    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cuda" if device == "cuda" else "cpu", *args, **kwargs)

    return autocast


# ------------------------------------------------------------------------------------------------- what a test makes

MAKERS = _device_constructors()


class Placed(TorchFunctionMode):
    """What a test makes itself is made on the device, and what it compares may be anywhere."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not is_called_from(HERE):
            return func(*args, **kwargs)
        if func in (torch.equal, torch.allclose, Tensor.equal, Tensor.allclose):
            if func in (torch.allclose, Tensor.allclose):
                kwargs = loosened(args[0].dtype, kwargs)
            return func(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
        if func in MAKERS and "device" not in kwargs:  # made on the CPU: the same numbers as there
            leaf = kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs).to("cuda")
            return made.requires_grad_() if leaf else made
        return func(*args, **kwargs)


# --------------------------------------------------------------------------------------------------- a pretended GPU

MOVERS = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type_as}
COPYING = {torch.tensor, torch.as_tensor, torch.asarray}
JOINING = {torch.cat, torch.stack, torch.concat, torch.concatenate, torch.hstack, torch.vstack, torch.dstack}
ANYWHERE = {Tensor.copy_, Tensor.fill_, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.__deepcopy__}
ANYWHERE.add(torch._has_compatible_shallow_copy_type)
"""Whose other tensors may be anywhere: they are copied, or only their sizes are read."""
ARRAYS = {Tensor.numpy, Tensor.__array__}
FACTS = {Tensor.device.__get__: CUDA, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False, Tensor.get_device: 0}
WRONG_GENERATOR = "Expected a 'cuda' device type for generator but found 'cpu'"
AUGMENTED = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor matmul".split()}


def mark(tensor: Tensor, cuda: bool = True) -> Tensor:
    tensor._on_cuda = cuda
    return tensor


def is_marked(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_on_cuda", False)


def keeping(new: Callable) -> Callable:
    """``nn.Parameter`` with the mark of its data."""

    @functools.wraps(new)
    def parameter(cls: type, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:
        return mark(new(cls, data, requires_grad), is_marked(data))

    return parameter


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


PRETENDED = ((nn.Parameter, "__new__"), (host, "download"), (replay, "record"), (torch.cuda, "current_stream"))


def pretend_cuda() -> None:
    """What the package, Lightning and transformers ask of a GPU that they find, load to, train on and measure."""
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy

    torch.cuda.is_available = lambda: is_called_from(PACKAGE)
    torch.cuda.device_count = lambda: int(is_called_from(PACKAGE))
    answers = {
        "current_device": 0,
        "get_device_name": "",
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda device=None, answer=answer: answer)
    CPUAccelerator.setup_device = lambda self, device: None  # Lightning takes the GPU for a CPU
    SingleDeviceStrategy.root_device = property(lambda self: CUDA)
    transformers.modeling_utils.caching_allocator_warmup = lambda *_: None
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # other threads do not pretend


WAITING = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
WAITING |= {torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select, torch.equal, Tensor.equal}
WAITING |= {torch.unique, Tensor.unique, torch.bincount, Tensor.bincount, torch.multinomial, Tensor.multinomial}
WAITING |= {torch.unique_consecutive, Tensor.unique_consecutive, torch.allclose, Tensor.allclose, Tensor.cpu}
"""Of a tensor on a GPU: the host needs a number, or a size, of what the GPU has yet to compute."""


def waits(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call waits for a GPU until all that it was told is done."""
    own = bool(args) and is_marked(args[0])
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        return own and any(index.dtype == torch.bool for index in tensors(args[1]))
    if func in (torch.repeat_interleave, Tensor.repeat_interleave):
        return any(map(is_marked, tensors((args[1:], kwargs))))
    if func in MOVERS or func in COPYING:
        said = kwargs.get("device", args[1] if len(args) > 1 and isinstance(args[1], (str, torch.device)) else None)
        if (said is None and func is not Tensor.cuda) or (
            func in COPYING and isinstance(args[0], list) and not args[0]
        ):
            return False
        there = func is Tensor.cuda or torch.device(said).type == "cuda"
        return there != own and not (there and kwargs.get("non_blocking"))
    return func in WAITING and own


class Pretend(TorchFunctionMode):
    """While it lasts, there is a GPU, where tensors that are marked are. ``waited``: in which files and lines the host
    waited for it."""

    def __enter__(self) -> Pretend:
        self.waited: list[str] = []
        self.undo = [(owner, name, getattr(owner, name)) for owner, name in PRETENDED]
        nn.Parameter.__new__ = keeping(nn.Parameter.__new__)
        host.download = lambda x: lambda: mark(x.detach().clone(), False)
        replay.record = lambda backbone, run, trial=None: (trial or run)() or run
        torch.cuda.current_stream = lambda device=None: None
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for owner, name, value in self.undo:
            setattr(owner, name, value)
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        given = list(tensors((args, kwargs)))
        marked = [is_marked(tensor) for tensor in given]
        own = bool(args) and is_marked(args[0])
        if waits(func, args, kwargs):
            frame = sys._getframe(1)
            while frame.f_code.co_filename == __file__:  # another mode
                frame = frame.f_back
            self.waited.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        if own and func in FACTS:
            return FACTS[func]
        if own and func in ARRAYS:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: .cpu() first")
        if func in MOVERS or func in MAKERS or kwargs.get("device") is not None:
            return self.placed(func, args, kwargs)
        if func == Tensor.data.__set__:
            mark(args[0], is_marked(args[1]))
            return func(*args)
        if func in ANYWHERE:
            found = func(*args, **kwargs)
            return mark(found, own) if isinstance(found, Tensor) else found
        if any(marked):
            self.check(func, args, kwargs, given, marked)
        found = func(*args, **kwargs)
        if any(marked):
            for tensor in tensors(found):
                mark(tensor)
        return found

    def placed(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A call that may say where its result is to be."""
        said, like = kwargs.get("device"), args[0] if args and (func not in MAKERS or func in COPYING) else None
        if func in (Tensor.cuda, Tensor.cpu):
            said, args = func.__name__, args[:1]
        elif func in MOVERS:
            if len(args) > 1 and isinstance(args[1], Tensor):
                like = args[1]
            elif len(args) > 1 and isinstance(args[1], (str, torch.device)):
                said = args[1]
                args = (args[0], "cpu" if torch.device(said).type == "cuda" else said, *args[2:])
        cuda = is_marked(like) if said is None else torch.device(said).type == "cuda"
        if cuda and kwargs.get("generator") is not None:
            raise RuntimeError(WRONG_GENERATOR)
        if cuda and said is not None and "device" in kwargs:
            kwargs["device"] = "cpu"
        found = args[0] if func is Tensor.cuda else func(*args, **kwargs)
        if args and found is args[0] and cuda != is_marked(found):  # moved, so another tensor
            found = found.clone()
        return mark(found, cuda)

    def check(self, func: Callable, args: tuple, kwargs: dict, given: list[Tensor], marked: list[bool]) -> None:
        """Raise where CUDA would: for tensors on the CPU, that are more than a number, among those on the GPU."""
        if kwargs.get("generator") is not None:
            raise RuntimeError(WRONG_GENERATOR)
        own = bool(args) and is_marked(args[0])
        strays = [tensor for tensor, there in zip(given, marked) if not there]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index, value = list(tensors(args[1])), list(tensors(args[2:]))
            if own or not any(map(is_marked, index)):
                sliced = not index and not isinstance(args[1], list)  # copied into, from anywhere
                strays = [] if sliced else [each for each in value if is_marked(each) != own]
        named = resolve_name(func) or func
        if writes(func) and not own and isinstance(args[0], Tensor):
            raise RuntimeError(f"{named}: changes a tensor on the CPU by one on the GPU")
        if any(tensor.ndim or func in JOINING for tensor in strays):
            sizes = [list(tensor.shape) for tensor in strays]
            raise RuntimeError(f"{named}: tensors on the GPU and on the CPU, the latter of {sizes}")


def writes(func: Callable) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in AUGMENTED or name.endswith("_") and not name.endswith("__")
