"""What the op set has been asked for and leaves to the kernel that comes next.

A decode step of few tokens waits more for kernels to follow each other than for what small ones do. So a norm is left
to the linear that reads it, and a block's last linear is left to the addition to the residual stream. Whoever can't
do both at once asks for the `value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from trtx.runtime.cuda import elementwise, linear
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.cuda.linear import CudaLinear
from trtx.runtime.ops.torch_ops import ResidentNorm


@dataclass(frozen=True)
class Normed:
    """The norm of x [T, H], which must not change before the value is asked for."""

    launch: Launch
    x: Tensor
    norm: ResidentNorm

    @cached_property
    def value(self) -> Tensor:
        return elementwise.norm(self.launch, self.x, self.norm)


@dataclass(frozen=True)
class Product:
    """x [T, K] times a weight."""

    launch: Launch
    x: Tensor
    weight: CudaLinear

    @cached_property
    def value(self) -> Tensor:
        return linear.linear(self.launch, self.x, self.weight)

    def added(self, to: Tensor) -> Tensor:
        """The sum with `to` [T, N], which is overwritten where a kernel can do both."""
        if linear.adds(self.x, self.weight):
            return linear.linear(self.launch, self.x, self.weight, add_to=to)
        return to + self.value


def value(x: Any) -> Any:
    """x, computed now if it was left for later."""
    return x.value if isinstance(x, (Normed, Product)) else x
