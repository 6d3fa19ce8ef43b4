"""The user's cache folder: what builds and runs have found out and the next ones need not find out again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/trtx/NAME`, in `~/.cache` unless that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtx" / name


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one step, its folder too; of two processes that do so, the last wins.

    Raises:
        OSError: it can't be written; nothing is left of the attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
