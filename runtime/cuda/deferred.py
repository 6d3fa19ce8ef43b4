"""What the op set has been asked for and leaves to the word that comes next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.cuda.linear import CudaLinear


@dataclass(frozen=True)
class Product:
    """x [T, K] times a weight, a block's last: the kernel that computes it can add it to the residual stream."""

    launch: Launch
    x: Tensor
    weight: CudaLinear

    @cached_property
    def value(self) -> Tensor:
        return linear.linear(self.launch, self.x, self.weight)

    def added(self, to: Tensor) -> Tensor:
        """The sum with `to` [T, N], which is overwritten."""
        return linear.linear(self.launch, self.x, self.weight, to)


def value(x: Any) -> Any:
    """x, computed now if it was left for later."""
    return x.value if isinstance(x, Product) else x
