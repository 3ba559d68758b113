"""MLPs of a tower as wide as the matrix kernels of GPUs want them.

A width that is no multiple of 8 numbers makes them fall back to slow kernels, in half precision: Qwen2.5-VL's 3,420
cost a fifth of its tower's time on an H100. Zeros fill it up to a multiple of 64. What they make is zero, and is
multiplied by zeros, so every sum has the same terms as before, though it may be taken in another order.

To everyone else parameters stay what they were: shape, numbers, gradients, names in a checkpoint. They become views of
the wider tensors, and only while the tower runs are they these themselves. Whoever changes them in place changes these;
whoever replaces them (``model.to``) has them widened anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor, nn

ALIGNED, STEP = 8, 64
_LOCK = RLock()
"""One tower runs at a time: another thread must not find parameters that are half wide."""


class Aligned:
    """Parameters with the dimension in which each is filled up with zeros, all of the same size there."""

    def __init__(self, dims: Mapping[nn.Parameter, int]) -> None:
        self.dims = dims
        self.whole: dict[nn.Parameter, Tensor] = {}
        self.is_needed = any(parameter.shape[dim] % ALIGNED for parameter, dim in dims.items())

    def forget(self) -> None:
        """Let go of the wider tensors, once the model is where they are of no use."""
        self.whole.clear()

    @contextmanager
    def widened(self) -> Iterator[None]:
        """While it lasts they are as wide as kernels want them."""
        with _LOCK:
            own = {parameter: self._view(parameter, dim) for parameter, dim in self.dims.items()}
            try:
                for parameter in own:
                    parameter.data = self.whole[parameter]
                yield
            finally:
                for parameter, view in own.items():
                    parameter.data = view

    @torch.inference_mode(False)
    @torch.no_grad()
    def _view(self, parameter: nn.Parameter, dim: int) -> Tensor:
        """The parameter as it is, a view of its wider tensor, which is made where there is none of this parameter."""
        whole, size = self.whole.get(parameter), parameter.shape[dim]
        if whole is None or whole.data_ptr() != parameter.data_ptr():
            shape = list(parameter.shape)
            shape[dim] = -(-size // STEP) * STEP
            self.whole[parameter] = whole = parameter.new_zeros(shape)
            whole.narrow(dim, 0, size).copy_(parameter)
        return whole.narrow(dim, 0, size)
