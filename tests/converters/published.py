"""Models whose hyperparameters and size were published, with where that was read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def entries() -> list[dict[str, Any]]:
    """The entries of data/published.yaml; its head says what they hold."""
    file = Path(__file__).parent / "data/published.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))
