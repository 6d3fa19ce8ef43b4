"""Launching an engine's kernels: what the driver is given, by a driver that only takes notes."""

from __future__ import annotations

import ctypes
import json
import struct
from types import SimpleNamespace

import pytest
import torch

from trtx.converters.errors import InputError
from trtx.quantize.formats import FORMATS
from trtx.runtime.cuda import cubins, linear
from trtx.runtime.cuda.cubins import INDEX, Cubin, CubinLaunch, Kernel
from trtx.runtime.cuda.launch import RecordLaunch, TensorMap, Variant


class Driver:
    """Keeps what is launched, with the eight bytes of each of seven arguments."""

    CUlaunchConfig = CUlaunchAttribute = lambda self: SimpleNamespace(value=SimpleNamespace())
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="pdl")

    def __init__(self):
        self.launched = []

    def cuModuleLoadData(self, code):
        return 0, code

    def cuModuleGetFunction(self, module, name):
        return 0, name.decode()

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        pointers = (ctypes.c_void_p * 7).from_address(parameters)
        values = [struct.unpack("<Q", ctypes.string_at(pointer, 8))[0] for pointer in pointers]
        self.launched.append((function, config.gridDimX, config.blockDimX, [a.id for a in config.attrs], values))
        return (0,)


@pytest.mark.parametrize("native", [False, True])
def test_arguments(tmp_path, monkeypatch, native):
    """The kernel that was noted down when the engine was built is found, and gets what was launched.

    Triton's leave out what is absent and take two null pointers; those in CUDA C++ take null for what is absent.
    """
    w = linear.resident(
        "w", FORMATS["int4_awq"], {"weight": torch.zeros(64, 64, dtype=torch.int32), "weight_scale": torch.ones(64, 4)},
        (64,), torch.bfloat16,
    )  # fmt: skip
    x, residual = (torch.zeros(1, n, dtype=torch.bfloat16) for n in (512, 64))
    record = RecordLaunch(dependent=True, native=native)
    linear.linear(record, x, w, residual)
    (variant,) = record.variants
    assert variant.native == native and variant.function == "gemv4"

    cubin = Cubin(variant, "gemv4.cubin", "gemv4", 0)
    (tmp_path / INDEX).write_text(json.dumps([cubin.to_json()]))
    (tmp_path / cubin.file).write_bytes(b"code")
    driver = Driver()
    monkeypatch.setattr(cubins, "driver", lambda: driver)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(shared_memory_per_block_optin=0, multi_processor_count=132),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    launch = CubinLaunch(tmp_path, torch.device("cuda", 0), dependent=True)
    assert launch.native == native
    linear.linear(launch, x, w, residual)

    given, last = [t.data_ptr() for t in (x, w.weight, w.groups)], residual.data_ptr()
    (launched,) = driver.launched
    values = [*given, 0, 0, last, last] if native else [*given, last, last, 0, 0]
    assert launched == ("gemv4", 4 if native else 64, 32 * variant.warps, ["pdl"], values)


@pytest.mark.parametrize("damage", ["[", "null", "[1]", '{"a": 1}', '[{"variant": {"kernel": "linear.gemv"}}]'])
def test_damaged_index_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(cubins, "driver", Driver)
    properties = SimpleNamespace(shared_memory_per_block_optin=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    (tmp_path / INDEX).write_text(damage)
    with pytest.raises(InputError, match="kernels can't be read") as caught:
        CubinLaunch(tmp_path, torch.device("cuda"), dependent=False)
    assert "Build the engine again" in caught.value.remedy


def test_maps(monkeypatch):
    """Each is encoded once: a contiguous matrix, boxes of 128 bytes in a row, in place of what is a pointer else."""
    bindings = pytest.importorskip("cuda.bindings").driver
    encoded = []

    def encode(place, kind, rank, address, sizes, strides, box, steps, *modes):
        assert place.value % 64 == 0 and list(steps) == [1, 1]
        encoded.append((kind, rank, address.value, *sizes, *strides, *box, *modes))
        ctypes.memset(place.value, len(encoded), 128)
        return 0

    monkeypatch.setattr(cubins, "encoder", lambda: encode)
    driver = Driver()
    for name in ("DataType", "Interleave", "Swizzle", "L2promotion", "FloatOOBfill"):
        monkeypatch.setattr(driver, f"CUtensorMap{name}", getattr(bindings, f"CUtensorMap{name}"), raising=False)
    x, codes = torch.zeros(70, 256, dtype=torch.bfloat16), torch.zeros(3, 512, dtype=torch.float8_e4m3fn)
    variant = Variant("cu.gated", ("map", "none", "i32", "map", "*fp32", "map", "none"), (), 12, 1, True)
    kernel = Kernel(driver, Cubin(variant, "", "gated", 0), b"")
    scale = torch.zeros(2)
    for _ in range(2):
        kernel((4,), (TensorMap(x, 128), None, 70, TensorMap(codes, 16), scale, TensorMap(x, 64), None), 0)
        first, second, third = (int.from_bytes(8 * [number], "little") for number in (1, 2, 3))
        assert driver.launched[-1][-1] == [first, 0, 70, second, scale.data_ptr(), third, 0]
    modes = 0, 3, 3, 0  # neither interleaved nor NaN beyond the end; swizzled by 128 bytes, 256 bytes to L2
    assert encoded == [
        (1, 2, x.data_ptr(), 256, 70, 512, 64, 128, *modes),
        (0, 2, codes.data_ptr(), 512, 3, 512, 128, 16, *modes),
        (1, 2, x.data_ptr(), 256, 70, 512, 64, 64, *modes),
    ]
