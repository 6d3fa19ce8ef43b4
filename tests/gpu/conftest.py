"""GPU tests fail where there is no GPU: they were asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trtx.builder.cuda import tune


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The GPU's name."""
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA GPU"
    assert not torch.backends.cuda.matmul.allow_tf32, "fp32 is compared with the CPU's"
    return torch.cuda.get_device_name()


@pytest.fixture(scope="session", autouse=True)
def tuned_a_little() -> Iterator[None]:
    """Builds measure some products, and leave the others to the heuristic: nobody waits for a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "SECONDS", 0.5)
        yield
