"""GPUs: what datasheets say of them (`data/gpus.yaml`), and which one an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from trtx.converters.errors import UnsupportedError
from trtx.converters.spec import from_json

CPU = "cpu"

_GIGA = 10**9


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. A figure that is not known is 0 or absent.

    Attributes:
        name: in the table ('h100-sxm').
        device_names: what the driver calls it.
        sm: compute capability ('9.0').
        memory: GB, as the datasheet counts them (10⁹ bytes).
        bandwidth: of the memory, GB/s.
        tflops: dense TFLOP/s by dtype.
        nvlink, pcie: GB/s, both directions together; 0 without NVLink.
        source: where the figures are from.
    """

    name: str
    device_names: tuple[str, ...]
    sm: str
    memory: float
    bandwidth: float
    tflops: dict[str, float]
    nvlink: float
    pcie: float
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * _GIGA)

    @property
    def link_bytes_per_second(self) -> float:
        """To another GPU of the host, one direction: NVLink where there is one, else PCIe."""
        return (self.nvlink or self.pcie) / 2 * _GIGA


@dataclass(frozen=True)
class Target:
    """What an engine is built for.

    Attributes:
        name: in the GPU table, or 'cpu'.
        gpu: its row; None for a CPU.
        memory: bytes of one device.
        warning: what the user should know about how it was found; empty: nothing.
    """

    device: Literal["cpu", "cuda"]
    name: str
    gpu: GPU | None
    memory: int
    warning: str = ""


@cache
def table() -> Mapping[str, GPU]:
    """Every GPU of the table, by name."""
    import yaml

    source = resources.files("trtx.builder") / "data" / "gpus.yaml"
    rows = yaml.safe_load(source.read_text(encoding="utf-8"))
    return {name: from_json(GPU, {"name": name, **row}, f"{source}: {name}") for name, row in rows.items()}


def resolve(name: str) -> Target:
    """The device that `--gpu` means.

    Args:
        name: of the table; 'cpu'; or 'auto': the first CUDA GPU that torch sees, else the CPU.

    Raises:
        UnsupportedError: not in the table.
    """
    name = name.lower()
    if name == "auto":
        return _present() or _cpu()
    if name == CPU:
        return _cpu()
    if name not in table():
        near = get_close_matches(name, table(), n=5, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UnsupportedError(f"--gpu {name}: not in the GPU table.", f"{hint}Use auto, cpu, {', '.join(table())}.")
    gpu = table()[name]
    present = _present()
    if present is not None and present.name == name:
        return present
    return Target("cuda", name, gpu, gpu.memory_bytes)


def find(device_name: str) -> GPU | None:
    """The row of the GPU that the driver calls `device_name`."""
    return next((gpu for gpu in table().values() if device_name in gpu.device_names), None)


def _present() -> Target | None:
    """The first CUDA GPU of this machine, with its memory as the driver counts it."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gpu = find(properties.name)
    if gpu is not None:
        return Target("cuda", gpu.name, gpu, properties.total_memory)
    gpu = _from_properties(properties)
    return Target(
        "cuda",
        gpu.name,
        gpu,
        properties.total_memory,
        f"{properties.name} is not in the GPU table: its memory is as the driver says, its speed is not known, "
        "so plans are not rated.",
    )


def _from_properties(properties: Any) -> GPU:
    return GPU(
        name=properties.name.removeprefix("NVIDIA ").lower().replace(" ", "-"),
        device_names=(properties.name,),
        sm=f"{properties.major}.{properties.minor}",
        memory=properties.total_memory / _GIGA,
        bandwidth=0.0,
        tflops={},
        nvlink=0.0,
        pcie=0.0,
        source="the driver",
    )


def _cpu() -> Target:
    return Target("cpu", CPU, None, available_memory())


def available_memory() -> int:
    """Bytes of RAM that this process may still take: what the kernel calls available, within the container's limit."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    limits = [_limit(path) for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    return min([available, *(limit for limit in limits if limit is not None)])


def _limit(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such controller, or 'max'
        return None


def native_dtypes(flags: str) -> frozenset[str]:
    """The 16-bit dtypes that a CPU multiplies in hardware, from its flags in /proc/cpuinfo (x86 and Arm names)."""
    words = set(flags.split())
    units = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
    return frozenset(dtype for dtype, names in units.items() if words & names)


def cpu_flags() -> str:
    """The flags of this machine's CPU; empty when the kernel lists none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line.partition(":")[2]
    return ""
