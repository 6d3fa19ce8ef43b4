"""What the kernels' tests share: outputs poisoned until they are written, and comparison with fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from trtx.runtime.cuda.launch import Launch, RecordLaunch, kernel_function

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is handed out uninitialized holds NaN, or a number that is no valid index; random numbers repeat."""
    torch.manual_seed(0)
    named = {"empty": torch.empty, "empty_like": torch.empty_like}
    methods = {"new_empty": Tensor.new_empty}
    with (
        patch.multiple(torch, **{name: _poisoning(make) for name, make in named.items()}),
        patch.multiple(Tensor, **{name: _poisoning(make) for name, make in methods.items()}),
    ):
        yield


def assert_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`found` has the dtype and is the fp64 result `exact` but for its rounding."""
    assert found.dtype == dtype and found.shape == exact.shape
    error = (found.double() - exact).abs()
    bound = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.51) * exact.abs() + 1e-6
    assert (error <= bound).all(), (error - bound).max()


def _poisoning(make):
    def made(*args, **kwargs) -> Tensor:
        x = make(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else -77)

    return made


def assert_needs_no_values(call: Callable[[Launch], object]) -> None:
    """A call on meta tensors launches kernels with the parameters that they have: it can be recorded and captured."""
    record = RecordLaunch(dependent=True)
    call(record)
    assert record.variants
    for variant in record.variants:
        names = kernel_function(variant.kernel).arg_names
        constants = {name for name, _ in variant.constants}
        assert constants <= set(names) and len(variant.types) + len(constants) == len(names), variant
