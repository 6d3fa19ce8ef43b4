"""Kernels are interpreted on a CPU, and compiled on a GPU. Triton looks at the environment when it is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from trtx.runtime.cuda.launch import JitLaunch, Launch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def launch(device: torch.device) -> Launch:
    return JitLaunch(dependent=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))
