"""A plugin of pytest: what ran, on which GPU, with what outcome and figures, goes into a JSON file.

`record_property(name, value)` in a test puts a figure beside its outcome. What the file holds already is kept.
"""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from trtx.converters.artifact import now

RESULTS = "TRTX_GPU_RESULTS"
"""Environment variable: where to write the results."""
COMMIT = "TRTX_COMMIT"
"""Environment variable: the commit under test, where there is no git."""
PACKAGES = ("torch", "triton", "transformers", "nvidia-modelopt", "safetensors", "tokenizers")

_reports: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        figures = dict(report.user_properties)
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        _reports.append(entry | ({"figures": figures} if figures else {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RESULTS not in os.environ or not torch.cuda.is_available() or hasattr(session.config, "workerinput"):
        return
    properties = torch.cuda.get_device_properties(0)
    file = Path(os.environ[RESULTS])
    reports = [*(json.loads(file.read_text())["tests"] if file.exists() else []), *_reports]
    outcomes = [report["outcome"] for report in reports]
    content = {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "versions": {"python": os.sys.version.split()[0], "cuda": torch.version.cuda, **_versions()},
        "date": now(),
        "commit": os.environ.get(COMMIT) or _commit(),
        "summary": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "tests": reports,
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


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
