"""Kernels are interpreted on a CPU (see tests/conftest.py), and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import mend
from trtx.runtime.cuda.launch import JitLaunch, Launch

if not torch.cuda.is_available():
    mend()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def launch(device: torch.device) -> Launch:
    return JitLaunch(dependent=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))
