"""GPU tests: what ran, on which GPU, with what outcome and figures, goes into a JSON file.

`record_property(name, value)` in a test puts a figure beside its outcome.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = "TRTX_GPU_RESULTS"
"""Environment variable: where to write the results."""
COMMIT = "TRTX_COMMIT"
"""Environment variable: the commit under test, where there is no git."""
PACKAGES = ("torch", "triton", "transformers", "nvidia-modelopt", "safetensors", "tokenizers")

_reports: list[dict[str, Any]] = []


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The GPU's name. Without one the tests fail: they were asked for."""
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA GPU"
    assert not torch.backends.cuda.matmul.allow_tf32, "fp32 is compared with the CPU's"
    return torch.cuda.get_device_name()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        figures = dict(report.user_properties)
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        _reports.append(entry | ({"figures": figures} if figures else {}))


def pytest_sessionfinish() -> None:
    if RESULTS not in os.environ or not torch.cuda.is_available():
        return
    properties = torch.cuda.get_device_properties(0)
    outcomes = [report["outcome"] for report in _reports]
    content = {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "versions": {"python": os.sys.version.split()[0], "cuda": torch.version.cuda, **_versions()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get(COMMIT) or _commit(),
        "summary": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "tests": _reports,
    }
    Path(os.environ[RESULTS]).write_text(json.dumps(content, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
