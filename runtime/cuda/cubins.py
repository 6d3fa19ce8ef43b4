"""Kernels from cubins, launched through cuda-bindings: no Triton, no compiler.

A folder holds `index.json`, a list of kernels, and a file of machine code for each:

    {"variant": {…}, "file": "….cubin", "symbol": "…", "shared_bytes": …}

A kernel that Triton compiled takes its run-time arguments in order, those that are absent left out, and two pointers
to scratch memory behind them, which no kernel here uses. One in CUDA C++ (`Variant.native`) takes its arguments and
nothing else, null for those that are absent.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtx.converters.errors import InputError, MissingPackageError
from trtx.runtime.cuda.launch import HOPPER, Argument, Arguments, Constants, How, Launch, TensorMap, Variant, type_of

INDEX = "index.json"


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel.

    Attributes:
        file: its machine code, beside the index.
        symbol: the entry point.
        shared_bytes: dynamic shared memory of a program.
    """

    variant: Variant
    file: str
    symbol: str
    shared_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For the index."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Cubin:
        """From the index."""
        return cls(Variant.from_json(entry["variant"]), entry["file"], entry["symbol"], entry["shared_bytes"])


def driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingPackageError(
            f"An engine of the cuda backend launches its kernels through cuda-bindings, which can't be imported "
            f"({error}).",
            "Install it: pip install cuda-bindings",
        ) from error
    return driver


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of the driver.

    Raises:
        RuntimeError: the call failed.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA driver: {status.name}")
    return values[0] if values else None


class CubinLaunch(Launch):
    """Launches the kernels of a folder on one GPU.

    Args:
        dependent: launch with programmatic dependent launch.

    Raises:
        InputError: the folder is incomplete.
    """

    def __init__(self, folder: Path, device: torch.device, dependent: bool) -> None:
        self.dependent = dependent
        properties: Any = torch.cuda.get_device_properties(device)
        self.shared_bytes = properties.shared_memory_per_block_optin
        self.multiprocessors = properties.multi_processor_count
        self._index = device.index or 0  # torch looks a number up sooner than a device
        self._driver = driver()
        try:
            entries = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            found = [Cubin.from_json(entry) for entry in entries]
            code = {cubin.file: (folder / cubin.file).read_bytes() for cubin in found}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: its kernels can't be read ({error}).", "Build the engine again.") from error
        self.native = any(cubin.variant.native for cubin in found)
        self.hopper = any(cubin.variant.kernel in HOPPER for cubin in found)
        torch.cuda.current_stream(device)  # the context has to stand
        maps = Maps(self._driver)
        self._kernels = {cubin.variant: Kernel(self._driver, cubin, code[cubin.file], maps) for cubin in found}
        self._known: dict[tuple[Any, ...], Kernel] = {}

    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        if 0 in grid:
            return
        types = tuple(map(type_of, args))
        key = kernel, types, tuple(constants.items()), how
        found = self._known.get(key)
        if found is None:
            variant = self.variant(kernel, types, constants, how)
            if variant not in self._kernels:
                raise RuntimeError(f"the engine was built without the kernel {variant}")
            found = self._known[key] = self._kernels[variant]
        found(grid, args, torch.cuda.current_stream(self._index).cuda_stream)


MAP_BYTES = 128
"""Of a map, encoded."""

MAPS = 4096
"""Encoded maps that are kept: those of weights, and of what is multiplied with them in captured and other steps."""


class Maps:
    """Encodes maps (`TensorMap`), or has done so before.

    Args:
        driver: `cuda.bindings.driver`.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._known: dict[tuple[int, int, int, int, int], bytes] = {}

    def encoded(self, given: TensorMap) -> bytes:
        """What a kernel takes for a map."""
        tensor, (rows, columns) = given.tensor, given.tensor.shape
        key = tensor.data_ptr(), rows, columns, tensor.itemsize, given.rows
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MAPS:
                self._known.clear()
            found = self._known[key] = self._encode(*key)
        return found

    def _encode(self, address: int, rows: int, columns: int, size: int, box: int) -> bytes:
        driver, long, short = self._driver, ctypes.c_uint64, ctypes.c_uint32
        kinds = driver.CUtensorMapDataType
        kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16
        room = ctypes.create_string_buffer(2 * MAP_BYTES)
        place = -(-ctypes.addressof(room) // MAP_BYTES) * MAP_BYTES
        status = encoder()(
            ctypes.c_void_p(place),
            int(kind),
            2,
            ctypes.c_void_p(address),
            (long * 2)(columns, rows),
            (long * 1)(columns * size),
            (short * 2)(128 // size, box),
            (short * 2)(1, 1),
            int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
            int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
            int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B),
            int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        )
        if status:
            raise RuntimeError(f"CUDA driver: {driver.CUresult(status).name} from cuTensorMapEncodeTiled")
        return ctypes.string_at(place, MAP_BYTES)


@cache
def encoder() -> Any:
    """The driver's `cuTensorMapEncodeTiled`.

    cuda-bindings has it too, but puts maps where they are not aligned as the driver wants them (cuda-python, #1692).
    """
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


class Kernel:
    """An entry point in machine code, with a buffer for its arguments: eight bytes each, but for maps.

    Args:
        driver: `cuda.bindings.driver`.
        maps: encodes those among the arguments.
    """

    def __init__(self, driver: Any, cubin: Cubin, code: bytes, maps: Maps | None = None) -> None:
        self._driver, self._maps = driver, maps or Maps(driver)
        self._module = checked(driver.cuModuleLoadData(code))
        self._function = checked(driver.cuModuleGetFunction(self._module, cubin.symbol.encode()))
        if cubin.shared_bytes > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self._function, attribute, cubin.shared_bytes))
        formats = {"fp32": "f4x", "i32": "i4x"}
        self._native = cubin.variant.native
        self._scratch = () if self._native else (0, 0)
        present = [kind for kind in cubin.variant.types if kind != "none" or self._native]
        kinds = [*(formats.get(kind, "Q") for kind in present), *("Q" for _ in self._scratch)]
        self._format = struct.Struct("<" + "".join(kinds))
        self._values = ctypes.create_string_buffer(self._format.size)
        base, count = ctypes.addressof(self._values), len(kinds)
        self._pointers = (ctypes.c_void_p * count)(*(base + 8 * index for index in range(count)))
        self._address = ctypes.addressof(self._pointers)
        self._mapped = {
            index: ctypes.create_string_buffer(MAP_BYTES) for index, kind in enumerate(present) if kind == "map"
        }
        for index, place in self._mapped.items():
            self._pointers[index] = ctypes.addressof(place)
        self._config = config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * cubin.variant.warps, 1, 1
        config.sharedMemBytes = cubin.shared_bytes
        if cubin.variant.pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1

    def __call__(self, grid: tuple[int, ...], args: Arguments, stream: int) -> None:
        given: Iterable[Any] = args if self._native else (arg for arg in args if arg is not None)
        if self._mapped:
            given = self._without_maps(args)
        values = [arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in given]
        self._format.pack_into(self._values, 0, *values, *self._scratch)
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.hStream = stream
        checked(self._driver.cuLaunchKernelEx(config, self._function, self._address, 0))

    def _without_maps(self, args: Arguments) -> list[Argument]:
        """Arguments with None for maps, which go to places of their own."""
        given = list(args)
        for index, place in self._mapped.items():
            argument, given[index] = args[index], None
            assert isinstance(argument, TensorMap)
            place.raw = self._maps.encoded(argument)
        return given
