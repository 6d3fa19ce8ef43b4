"""How a kernel is started.

The host code of a kernel says what to launch (`Launch`), and knows nothing of how: from the engine's cubins when it
runs (`runtime.cuda.cubins`), by Triton's own launcher or interpreter in tests (`JitLaunch`), or not at all while
`trtx build` notes down which variants an engine needs (`RecordLaunch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trtx.runtime.cuda.cublaslt import Products


class TensorMap(NamedTuple):
    """A contiguous matrix [rows, multiple of 16 bytes] that a kernel copies boxes of: `rows` of 128 bytes, swizzled."""

    tensor: Tensor
    rows: int


Argument = Tensor | TensorMap | int | float | None
Constant = int | float | bool | str | None
Arguments = tuple[Argument, ...]
Constants = Mapping[str, Constant]
CodeScales = tuple[Tensor, Tensor | None]
"""Of a linear that multiplies e4m3 codes: its `scales`, and what its input is multiplied with before."""

H100_SHARED = 227 << 10
"""Bytes of shared memory that a program may have on an H100, and a B200; 163 KiB on an A100, 99 on sm_89 and sm_120."""

LIBRARY = "matrix products (library)"
"""What stands for the kernels of cuBLAS and its like, where kernels are named."""

HOPPER = frozenset({"cu.gated", "cu.prefill"})
"""Kernels with instructions of compute capability 9.0 and of none after it ('sm_90a')."""

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float64: "*fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kernel, specialized: what one cubin holds.

    Attributes:
        kernel: 'module.function' in `runtime.kernels`, or 'cu.function' in function.cu there.
        types: of the run-time arguments, in Triton's words; 'none' for one that is absent, 'map' for a `TensorMap`.
        constants: by parameter name, in the order of the names.
        warps, stages: threads / 32 of a program, and the depth of its software pipeline.
        pdl: programmatic dependent launch.
        registers: the most that a thread may take; 0: any number.
    """

    kernel: str
    types: tuple[str, ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int
    stages: int
    pdl: bool
    registers: int = 0

    @property
    def native(self) -> bool:
        """Whether it is written in CUDA C++; else in Triton."""
        return self.kernel.startswith("cu.")

    @property
    def function(self) -> str:
        """The kernel's name in its file."""
        return self.kernel.partition(".")[2]

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a program of a kernel in CUDA C++: its constant `SHARED`."""
        return int(dict(self.constants).get("SHARED") or 0)

    def to_json(self) -> dict[str, Any]:
        """For an index of kernels."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Variant:
        """From an index of kernels."""
        constants = tuple((name, value) for name, value in entry["constants"])
        return cls(**{**entry, "types": tuple(entry["types"]), "constants": constants})


class How(NamedTuple):
    """How a kernel is compiled and launched; see `Launch`."""

    warps: int
    stages: int
    pdl: bool
    registers: int


class Launch(ABC):
    """Starts kernels on the current stream."""

    dependent: bool = False
    """Whether kernels are launched with `PDL` (programmatic dependent launch): sm_90 and newer."""
    shared_bytes: int = H100_SHARED
    """Shared memory that a program may take."""
    multiprocessors: int = 132
    """Of the GPU: kernels whose programs are resident have one on each."""
    native: bool = False
    """Whether kernels in CUDA C++ are launched too: NVRTC is there to compile them, or they are compiled."""
    hopper: bool = False
    """Whether those with instructions of compute capability 9.0 alone are launched too."""
    products: Products | None = None
    """cuBLASLt, for products of many tokens; None: they are left to torch."""

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, ...],
        args: Arguments,
        constants: Constants,
        warps: int = 4,
        stages: int = 2,
        pdl: bool = False,
        registers: int = 0,
    ) -> None:
        """Start a kernel.

        Args:
            kernel: as in `Variant`; in CUDA C++ only where these are `native`.
            grid: programs along up to three axes.
            args: run-time arguments: tensors (as pointers or maps), int32, fp32, or None for a pointer that is absent.
            constants: the other parameters, by name; `PDL` is added where the kernel is launched so.
            pdl: the kernel knows `PDL`.
            registers: the most that a thread may take, so that more programs fit side by side; 0: any number.
        """
        self.start(kernel, grid, args, constants, How(warps, stages, pdl, registers))

    @abstractmethod
    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        """What a call comes to; arguments as there."""

    def with_pdl(self, constants: Constants, pdl: bool) -> dict[str, Constant]:
        """The constants of a launch: kernels that know `PDL` are told whether they are launched so."""
        return {**constants, "PDL": self.dependent} if pdl else dict(constants)

    def variant(self, kernel: str, types: tuple[str, ...], constants: Constants, how: How) -> Variant:
        """What a launch asks for; `types` as in `Variant`."""
        chosen = tuple(sorted(self.with_pdl(constants, how.pdl).items()))
        return Variant(kernel, types, chosen, how.warps, how.stages, how.pdl and self.dependent, how.registers)


def type_of(argument: Argument) -> str:
    """A run-time argument's type, as in `Variant`."""
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    if isinstance(argument, TensorMap):
        return "map"
    if argument is None:
        return "none"
    return "fp32" if isinstance(argument, float) else "i32"


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number: what a block of Triton has to be."""
    return 1 << (number - 1).bit_length()


@cache
def kernel_function(kernel: str) -> Any:
    """The Triton function called 'module.function'; imports Triton."""
    module, function = kernel.split(".")
    return getattr(import_module(f"trtx.runtime.kernels.{module}"), function)


class JitLaunch(Launch):
    """Triton's own way: compiled at the first launch on a GPU, interpreted on a CPU under TRITON_INTERPRET=1."""

    def __init__(self, dependent: bool = False, shared_bytes: int = H100_SHARED) -> None:
        self.dependent, self.shared_bytes = dependent, shared_bytes

    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        kernel_function(kernel)[grid](*args, **self.options(constants, how))

    def options(self, constants: Constants, how: How) -> dict[str, Any]:
        """What a launch is given by name, in Triton's words."""
        named = self.with_pdl(constants, how.pdl)
        options: dict[str, Any] = {**named, "num_warps": how.warps, "num_stages": how.stages}
        if how.pdl and self.dependent:
            options["launch_pdl"] = True
        if how.registers:
            options["maxnreg"] = how.registers
        return options


@dataclass
class RecordLaunch(Launch):
    """Notes down which variants are launched; on meta tensors nothing else happens."""

    dependent: bool = False
    shared_bytes: int = H100_SHARED
    native: bool = False
    hopper: bool = False
    variants: dict[Variant, None] = field(default_factory=dict)

    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        types = tuple(map(type_of, args))
        self.variants[self.variant(kernel, types, constants, how)] = None
