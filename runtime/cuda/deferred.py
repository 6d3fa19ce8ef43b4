"""What the op set has been asked for and leaves to the word that comes next, which knows more.

A norm, and attention, may give the codes that the next linear multiplies, and the kernel that computes a block's last
linear can add it to the residual stream. Whoever can make no use of it asks for the `value`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import CodeScales, Launch
from trtx.runtime.cuda.linear import Codes, CudaLinear


@dataclass(frozen=True)
class Deferred:
    """A norm's result or attention's, [T, N]. Nothing that it is computed from may change before it has been.

    Attributes:
        like: a tensor of T rows, of its dtype, on its device.
        compute: gives it, or codes for a linear of these scales.
    """

    like: Tensor
    compute: Callable[[CodeScales | None], Tensor]

    @cached_property
    def value(self) -> Tensor:
        return self.compute(None)

    def as_input(self, reader: CudaLinear) -> Tensor | Codes:
        """What a linear multiplies."""
        if not linear.takes_codes(self.like, reader):
            return self.value
        assert reader.scales is not None
        return Codes(self.compute((reader.scales, reader.smooth)), self.like.dtype)


@dataclass(frozen=True)
class Product:
    """x [T, K] times a weight, a block's last."""

    launch: Launch
    x: Tensor | Codes
    weight: CudaLinear

    @cached_property
    def value(self) -> Tensor:
        return linear.linear(self.launch, self.x, self.weight)

    def added(self, to: Tensor) -> Tensor:
        """The sum with `to` [T, N], which is overwritten."""
        return linear.linear(self.launch, self.x, self.weight, to)


def value(x: Any) -> Any:
    """x, computed now if it was left for later."""
    return x.value if isinstance(x, (Deferred, Product)) else x


def as_input(x: Tensor | Codes | Deferred, reader: CudaLinear) -> Tensor | Codes:
    """x as a linear multiplies it."""
    return x.as_input(reader) if isinstance(x, Deferred) else x
