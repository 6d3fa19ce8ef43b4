"""Tests that only a GPU runs: without one, pytest can still say whether all that they ask for is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_fixtures_are_there() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "", "-q", "-p", "no:cacheprovider", "--setup-plan"]
    done = subprocess.run([*command, "tests/gpu", "tests/kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "SETUP    M launch" in done.stdout
