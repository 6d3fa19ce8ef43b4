"""`trtx doctor`: what this machine has, and what each backend needs. It must work where nothing else does."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from trtx import __version__
from trtx.cli.common import Json, emit
from trtx.converters.errors import ExitCode

PACKAGES = {
    "torch": "for all commands but inspect, doctor and make",
    "triton": "for trtx build --backend cuda",
    "nvidia-cuda-nvrtc": "for trtx build --backend cuda, where torch for CUDA has not brought it",
    "cuda-bindings": "to run engines of the backend cuda",
    "nvidia-modelopt": "for trtx quantize",
    "transformers": "for trtx's tests",
    "gguf": "for trtx convert MODEL.gguf",
    "huggingface-hub": "for trtx convert OWNER/MODEL",
    "tokenizers": "for trtx quantize, run and bench",
    "matplotlib": "for trtx bench --plot",
    "tensorrt": "for trtx build --backend tensorrt",
    "tensorrt-rtx-cu13": "for trtx build --backend tensorrt-rtx",
}
"""Distribution → what it is for."""

_SMI_QUERY = ("name", "compute_cap", "memory.total", "driver_version")
_MEBI = 1 << 20


def doctor(as_json: Json = False) -> None:
    """Show what this machine has and which backends would work.

    Exits with 10 when no backend works. Nothing is downloaded and no server is asked.
    """
    torch = _torch()
    gpus = _gpus()
    data: dict[str, Any] = {
        "trtx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": torch,
        "gpus": gpus,
        "backends": [
            _backend("torch on the CPU", "torch", _torch_problem(torch)),
            _backend("torch on CUDA", "torch with CUDA, an NVIDIA GPU and its driver", _gpu_problem(torch, gpus)),
            _cuda_backend(torch, gpus),
            *_tensorrt_backends(torch),
        ],
    }
    emit(data, as_json, lambda: _render(data))
    if not any(backend["ready"] for backend in data["backends"]):
        raise typer.Exit(ExitCode.MISSING)


def _version(distribution: str) -> str | None:
    from importlib import metadata  # a tenth of the start-up time of `trtx --help`

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """What torch says of itself; `error` is None when it can be imported."""
    try:
        import torch

        available = torch.cuda.is_available()
        return {
            "error": None,
            "version": torch.__version__,
            "cuda_runtime": torch.version.cuda,
            "cuda_available": available,
            "architectures": torch.cuda.get_arch_list() if available else [],
        }
    except Exception as error:  # a broken installation fails in many ways, and saying so is what this command is for
        return {
            "error": f"{type(error).__name__}: {error}",
            "version": None,
            "cuda_runtime": None,
            "cuda_available": False,
            "architectures": [],
        }


def _gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver's own tool lists, with or without a torch that can use them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(_SMI_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [
        {"name": name, "sm": sm.replace(".", ""), "memory_bytes": _mebibytes(memory), "driver": driver}
        for name, sm, memory, driver in (row for row in rows if len(row) == len(_SMI_QUERY))
    ]


def _mebibytes(text: str) -> int | None:
    """Bytes from nvidia-smi's MiB; GPUs that share the CPU's memory say '[N/A]'."""
    return int(text) * _MEBI if text.isdigit() else None


def _gpu_problem(torch: dict[str, Any], gpus: list[dict[str, Any]]) -> tuple[str, str] | None:
    if problem := _torch_problem(torch):
        return problem
    if not gpus:
        return "no NVIDIA GPU is visible (nvidia-smi lists none)", ""
    if torch["cuda_runtime"] is None:
        return "this torch is built without CUDA", "Install a CUDA build of torch."
    if not torch["cuda_available"]:
        return (
            f"torch can't use the GPU: driver {gpus[0]['driver']}, CUDA {torch['cuda_runtime']} in torch",
            "Update the driver, or install a torch for an older CUDA.",
        )
    return None


def _cuda_backend(torch: dict[str, Any], gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether engines can be built, which takes no GPU; running one does."""
    problem, builds_for = _torch_problem(torch), ""
    if problem is None:
        from trtx.builder.cuda.kernels import SHARED_BYTES

        missing = [name for name in ("triton", "cuda-bindings") if _version(name) is None]
        if missing:
            problem = f"{' and '.join(missing)} can't be found", f"pip install {' '.join(missing)}"
        known = {sm.replace(".", "") for sm in SHARED_BYTES}
        runs = _gpu_problem(torch, gpus) is None and any(gpu["sm"] in known for gpu in gpus)
        builds_for = f"builds for compute capability {', '.join(SHARED_BYTES)}" + (" and runs here" if runs else "")
    row = _backend("cuda", "Triton, cuda-bindings and, to run, such a GPU", problem)
    return {**row, "builds_for": builds_for}


def _tensorrt_backends(torch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Whether engines can be built; running one takes a GPU of the kind that it was built for."""
    from trtx.builder.tensorrt.library import FLAVORS, load, targets
    from trtx.converters.errors import TrtxError

    for flavor in FLAVORS.values():
        problem, builds_for = _torch_problem(torch), ""
        if problem is None:
            try:
                module = load(flavor)
                builds_for = f"{module.__version__} builds for {', '.join(targets(flavor)) or 'the GPU at hand'}"
            except TrtxError as error:
                problem = (error.cause.partition(": ")[2].rstrip("."), error.remedy)
        row = _backend(flavor.backend, f"the module {flavor.module} and, to run, such a GPU", problem)
        yield {**row, "builds_for": builds_for}


def _torch_problem(torch: dict[str, Any]) -> tuple[str, str] | None:
    if torch["error"] is None:
        return None
    return f"torch can't be imported ({torch['error']})", "Install torch again."


def _backend(name: str, needs: str, problem: tuple[str, str] | None) -> dict[str, Any]:
    cause, remedy = problem or ("", "")
    return {"name": name, "ready": problem is None, "needs": needs, "problem": cause, "remedy": remedy}


def _render(data: dict[str, Any]) -> RenderableType:
    machine = _table()
    machine.add_row("trtx", data["trtx"])
    machine.add_row("Python", data["python"])
    machine.add_row("platform", Text(f"{data['platform']}, {data['cpus']} CPUs"))
    machine.add_row("CUDA in torch", data["torch"]["cuda_runtime"] or "none")
    for gpu in data["gpus"]:
        memory = decimal(gpu["memory_bytes"]) if gpu["memory_bytes"] else "shared memory"
        machine.add_row("GPU", Text(f"{gpu['name']}, SM {gpu['sm']}, {memory}, driver {gpu['driver']}"))
    packages = _table()
    for name, version in data["packages"].items():
        packages.add_row(name, version or Text("not installed", "dim"), Text(PACKAGES[name], "dim"))
    backends = _table()
    for backend in data["backends"]:
        ready = backend.get("builds_for") or "ready"
        state = Text(ready, "green") if backend["ready"] else Text(backend["problem"], "red")
        backends.add_row(backend["name"], state, Text(backend["remedy"] or f"needs {backend['needs']}", "dim"))
    sections = {"Machine": machine, "Packages": packages, "Backends": backends}
    return Group(*(Group(Text(title, "bold"), table) for title, table in sections.items()))


def _table() -> Table:
    return Table(box=None, show_header=False, padding=(0, 2, 0, 2))
