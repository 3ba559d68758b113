"""What a run asks of a device, counted: kernels, host syncs, and the most bytes that its tensors hold.

On a GPU the profiler counts kernels, and torch itself the calls that wait for the device. Without one, the operations
that would be kernels and syncs there are counted on a CPU: :class:`Counting` follows the tensors that would be on the
device, from weights and prompts on. A fused kernel of a GPU may be several operations on a CPU and the other way round.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.clock import Run, free
from glimpseprune.replay import WAITED


@dataclass
class Counts:
    kernels: int
    """Kernels on a GPU; on a CPU operations that compute something on the device."""
    syncs: int
    """Times that the host waits for the device."""
    launches: int | None = None
    """On a GPU: what the host starts; a replayed graph is one."""
    where: dict[str, int] = field(default_factory=dict)
    """Line of code that waited, and for what -> how often."""


def count(run: Run, device: torch.device, on_device: Iterable[Tensor | nn.Module], warm_up: bool = True) -> Counts:
    """Of one ``run``, after one that is not counted. ``on_device``: the tensors and modules that the device holds."""
    if warm_up:
        run()
    return _on_gpu(run) if device.type == "cuda" else _on_cpu(run, on_device)


def peak(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Most bytes held by tensors while ``run`` lasts, and when it has returned, beyond those before."""
    free()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = run()
        torch.cuda.synchronize(device)
        most, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del held
        return most - before, after - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = run()
    level = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    del held
    return most, level


INNER = (str(Path(__file__)), str(Path(torch.__file__).parent))
"""Code that does not ask for anything itself."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


def _on_gpu(run: Run) -> Counts:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = launches = 0
    for event in recorded.profiler.kineto_results.events():  # as they come: building torch's own takes seconds
        if str(event.device_type()).endswith("CUDA"):
            kernels += not event.name().startswith(("Memcpy", "Memset"))
        launches += event.name().startswith(LAUNCHES)
    where: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        where.update(f"{each.filename}:{each.lineno}" for each in waits if WAITED in str(each.message))
    return Counts(kernels, where.total(), launches, dict(where.most_common()))


def _on_cpu(run: Run, on_device: Iterable[Tensor | nn.Module]) -> Counts:
    with Counting(on_device) as counting:
        run()
    return Counts(counting.kernels, counting.syncs.total(), None, dict(counting.syncs.most_common()))


WAITING = {  # the host must know a number to go on, or the sizes of what comes
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip
NOTHING = {"_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "detach", "alias"}
"""Operations that start no kernel, beside those that only look at another's memory or ask for some."""
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
DEVICE, DEVICE_OF = torch.device("cpu", 0), Tensor.device.__get__
"""What tensors on the device say where they are: a CPU for torch, and another one than the host's."""
READERS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}


class Counting(TorchDispatchMode):
    """While it lasts, counts ``kernels`` and ``syncs`` on the tensors that would be on a device: ``on_device``, what is
    made or moved where these are, and all that is computed from them. Numbers stay as they are."""

    def __init__(self, on_device: Iterable[Tensor | nn.Module]) -> None:
        super().__init__()
        self.kernels, self.syncs = 0, Counter()
        for each in on_device:
            for tensor in [each] if isinstance(each, Tensor) else [*each.parameters(), *each.buffers()]:
                _mark(tensor)
        self.calls = _Calls(self)

    def __enter__(self) -> Counting:
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(_is_marked, given)):
            return found
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                _mark(tensor)
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.wait(name)
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None and not _is_marked(index):
                    self.wait("index from the host")
                elif index is not None and index.dtype == torch.bool:
                    self.wait("index by a mask")
        returns = func._schema.returns
        makes = any(each.alias_info is None or each.alias_info.is_write for each in returns)
        self.kernels += makes and name not in NOTHING and "empty" not in name
        return found

    def wait(self, kind: str) -> None:
        """One sync, by the line of code below torch that asked for it."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(INNER):
            frame = frame.f_back
        place = Path(frame.f_code.co_filename)
        self.syncs[f"{'/'.join(place.parts[-2:])}:{frame.f_lineno} {kind}"] += 1


class _Calls(TorchFunctionMode):
    """What the dispatcher is not told on a CPU: reading whole tensors, and copies between host and device."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        own = bool(args) and _is_marked(args[0])
        if own and func == DEVICE_OF:  # made anew each time it is asked for
            return DEVICE
        found = func(*args, **kwargs)
        if func in READERS:
            if own:
                self.counting.wait(func.__name__)
            return _read(found)
        device = kwargs.get("device", args[1] if func is Tensor.to and len(args) > 1 else None)
        if not (isinstance(found, Tensor) and isinstance(device, (torch.device, str))):
            return found
        waits = found.numel() and not kwargs.get("non_blocking")
        if torch.device(device) != DEVICE:
            if func is Tensor.to and own:
                if waits:
                    self.counting.wait("copy to the host")
                return _read(found)
            return found
        if waits and not own and (func in MAKERS or func is Tensor.to):
            self.counting.wait("copy from the host")
        return _mark(found)


def _read(found: Any) -> Any:
    """What was read from the device, which the host now has: another tensor, even where none was made."""
    if isinstance(found, Tensor):
        found = found.detach()
        found._on_device = False
    return found


def _mark(tensor: Tensor) -> Tensor:
    tensor._on_device = True
    return tensor


def _is_marked(value: Any) -> bool:
    return getattr(value, "_on_device", False)
