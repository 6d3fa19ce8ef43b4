"""Kernels to machine code, on any machine: Triton's, and those in CUDA C++ by NVRTC.

Compiling happens in processes of its own (`builder.cuda.worker`). A cache holds what was compiled before, by content:
the sources of the kernels, the compiler's version, the GPU's compute capability and the variant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import xxhash

from trtx.builder.cache import cache_folder, replace_file
from trtx.builder.cuda.nvrtc import nvrtc_version, source
from trtx.converters.errors import MissingPackageError
from trtx.runtime.cuda.cubins import INDEX, Cubin
from trtx.runtime.cuda.launch import Variant

SHARED_BYTES = {
    "8.0": 163 << 10,
    "8.6": 99 << 10,
    "8.9": 99 << 10,
    "9.0": 227 << 10,
    "10.0": 227 << 10,
    "12.0": 99 << 10,
}
"""Shared memory that a program may take, by compute capability (CUDA C++ Programming Guide, table of technical
specifications). The ones that kernels are compiled for."""


def triton_version() -> str:
    """The version of Triton.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return version("triton")
    except PackageNotFoundError as error:
        raise MissingPackageError(
            "--backend cuda compiles its kernels with Triton, which is not installed.",
            "Install it: pip install 'triton>=3.6,<3.8'",
        ) from error


def compile_kernels(
    variants: Iterable[Variant], sm: str, folder: Path, advance: Callable[[int], None] = lambda count: None
) -> list[Cubin]:
    """Compile kernels into `folder`, with their index.

    Args:
        sm: the compute capability, '9.0'.
        advance: called with 1 for each kernel.
    """
    wanted = {variant: _digest(variant, sm) for variant in variants}
    missing = [variant for variant, digest in wanted.items() if not _cached(digest).exists()]
    for _ in range(len(wanted) - len(missing)):
        advance(1)
    if missing:
        _compile_all(missing, sm, advance)
    folder.mkdir(parents=True, exist_ok=True)
    cubins = []
    for variant, digest in wanted.items():
        stored = json.loads(_cached(digest).read_text(encoding="utf-8"))
        name = f"{variant.kernel}-{digest[:16]}.cubin"
        (folder / name).write_bytes(bytes.fromhex(stored["code"]))
        cubins.append(Cubin(variant, name, stored["symbol"], stored["shared_bytes"]))
    (folder / INDEX).write_text(json.dumps([cubin.to_json() for cubin in cubins], indent=1), encoding="utf-8")
    return cubins


def _cached(digest: str) -> Path:
    return cache_folder("kernels") / f"{digest}.json"


def _digest(variant: Variant, sm: str) -> str:
    made = (source(variant), nvrtc_version()) if variant.native else (_sources(), triton_version())
    content = repr((*made, sm, astuple(variant)))
    return xxhash.xxh3_128_hexdigest(content.encode())


@cache
def _sources() -> str:
    """What Triton's kernels are made from."""
    folder = files("trtx.runtime.kernels")
    sources = sorted((entry.name, entry.read_bytes()) for entry in folder.iterdir() if entry.name.endswith(".py"))
    return xxhash.xxh3_128_hexdigest(b"".join(name.encode() + text for name, text in sources))


def _compile_all(variants: list[Variant], sm: str, advance: Callable[[int], None]) -> None:
    numbered = list(enumerate(variants))
    count = min(len(variants), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count) as pool:
        workers = [_start_worker() for _ in range(count)]
        try:
            shares = [pool.submit(_feed, worker, numbered[i::count], sm, advance) for i, worker in enumerate(workers)]
            for share in shares:
                share.result()
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def _start_worker() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "trtx.builder.cuda.worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _feed(
    worker: subprocess.Popen[str], share: list[tuple[int, Variant]], sm: str, advance: Callable[[int], None]
) -> None:
    """Let a worker compile its share, and put what comes into the cache."""
    assert worker.stdin is not None and worker.stdout is not None
    json.dump({"sm": sm, "variants": [(index, variant.to_json()) for index, variant in share]}, worker.stdin)
    worker.stdin.close()
    known = dict(share)
    for line in worker.stdout:
        compiled = json.loads(line)
        variant = known.pop(compiled.pop("index"))
        if compiled.get("shared_bytes", 0) > SHARED_BYTES[sm]:
            compiled["error"] = f"it takes {compiled['shared_bytes']} bytes of shared memory, more than there are"
        if "error" in compiled:
            raise RuntimeError(f"{variant} can't be compiled for compute capability {sm}: {compiled['error']}")
        replace_file(_cached(_digest(variant, sm)), json.dumps(compiled).encode())
        advance(1)
    if known:
        raise RuntimeError(f"a compiler's process ended before it had compiled {next(iter(known.values()))}")
