"""What TensorRT learns on a GPU, kept from one run to the next in the user's cache folder.

    timing-MODULE-VERSION-GPU.bin         which kernels were the fastest: `tensorrt` measures them as it builds
    runtime-MODULE-VERSION-GPU-PLAN.bin   kernels that were compiled as a plan ran: `tensorrt_rtx` does so on the GPU

A file that is damaged or of another machine is ignored and replaced, and one that can't be written is left: caches save
time and change nothing. Of two processes that write one, the last wins. Not tried on a GPU.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtx.builder.cache import cache_folder, replace_file
from trtx.builder.tensorrt.library import Flavor, load


class TimingCache:
    """The timings of one GPU and TensorRT version.

    Args:
        gpu: its name, as the driver has it.
    """

    def __init__(self, flavor: Flavor, gpu: str) -> None:
        self.path = _path("timing", flavor, gpu)
        self._held: Any = None

    def attach(self, config: Any) -> None:
        """Let a build use what is known: `config` is its `IBuilderConfig`."""
        self._held = config.create_timing_cache(_read(self.path))
        if self._held is None or not config.set_timing_cache(self._held, False):
            self._held = config.create_timing_cache(b"")
            config.set_timing_cache(self._held, False)

    def save(self) -> None:
        """Keep what the build has added."""
        _write(self.path, self._held.serialize())


class RuntimeCache:
    """The compiled kernels of one plan, for all its contexts, which it has to outlive.

    Args:
        gpu: its name, as the driver has it.
        plan: a digest of it.
    """

    def __init__(self, flavor: Flavor, gpu: str, plan: str) -> None:
        self.path = _path("runtime", flavor, gpu, plan)
        self._held: Any = None

    def attach(self, config: Any) -> None:
        """Let the context that is made with `config`, an `IRuntimeConfig`, use what is known and add to it."""
        if self._held is None:
            self._held = config.create_runtime_cache()
            if content := _read(self.path):
                self._held.deserialize(content)  # False, and still empty, where the file is another machine's
        config.set_runtime_cache(self._held)

    def save(self) -> None:
        """Keep what running has added."""
        _write(self.path, self._held.serialize())


def _path(kind: str, flavor: Flavor, *parts: str) -> Path:
    words = [kind, flavor.module, load(flavor).__version__, *parts]
    return cache_folder("tensorrt") / ("-".join(re.sub(r"[^0-9A-Za-z._]+", "_", word) for word in words) + ".bin")


def _read(path: Path) -> bytes:
    """The content, or nothing."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def _write(path: Path, content: Any) -> None:
    """Replace a file in one step; None (TensorRT had nothing to give) and a refusal of the disk leave it as it is."""
    if content is None:
        return
    with suppress(OSError):
        replace_file(path, memoryview(content))
