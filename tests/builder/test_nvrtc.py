"""Kernels in CUDA C++: compiled for GPUs that are not here, held by engines, and left out where NVRTC is missing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from tests.builder.models import TINY, spec_of
from tests.builder.test_cuda import assert_is_machine_code, index_of, kernels_of, small
from tests.builder.test_cuda import empty_caches as empty_caches
from trtx.builder.build import build, prepare
from trtx.builder.cuda import backend, kernels, nvrtc, trace
from trtx.builder.cuda.kernels import SHARED_BYTES, compile_kernels
from trtx.builder.engine import Engine
from trtx.converters.artifact import Manifest
from trtx.converters.spec import Activation
from trtx.quantize.formats import FORMATS
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import H100_SHARED, HOPPER, RecordLaunch, Variant

SILU = Activation("silu")
SHAPES = [(6144, 4096, False, None), (28672, 4096, False, SILU), (4096, 14336, True, None), (57344, 8192, True, SILU)]
"""Rows and inputs of linears, whether these are smoothed, and the activation of gated ones."""


def wide(**changes):
    """A tiny model but for linears that the kernels fit."""
    return spec_of({**TINY, "hidden_size": 512, "intermediate_size": 512}, **changes)


def recorded(sm: str, n: int, k: int, smooth: bool, activation: Activation | None = None, **changes) -> Variant:
    """What one token times an INT4 weight launches."""
    tensors = {
        "weight": torch.empty(n, k // 8, dtype=torch.int32, device="meta"),
        "weight_scale": torch.empty(n, k // 128, device="meta"),
        **({"pre_quant_scale": torch.empty(k, device="meta")} if smooth else {}),
    }
    w = linear.resident("w", FORMATS["int4_awq"], tensors, (n // 2, n // 2), torch.bfloat16)
    x = torch.empty(1, k, dtype=changes.pop("dtype", torch.bfloat16), device="meta")
    launch = RecordLaunch(float(sm) >= 9.0, **{"native": True, **changes})
    if activation is None:
        linear.linear(launch, x, w)
    else:
        linear.gated(launch, x, w, activation)
    (variant,) = launch.variants
    return variant


@pytest.fixture
def missing(monkeypatch):
    """No NVRTC."""
    for module in (backend, kernels, trace):
        monkeypatch.setattr(module, "nvrtc_version", lambda: "")


def compiled_without_spilling(variant: Variant, sm: str) -> tuple[bytes, str, int]:
    """Machine code, what ptxas says of it, and the registers of a thread."""
    code, log = nvrtc.compile_native(variant, sm, ("--ptxas-options=-v",))
    assert_is_machine_code(code, sm, variant.function)
    assert "0 bytes spill stores, 0 bytes spill loads" in log, variant
    return code, log, int(re.search(r"Used (\d+) registers", log)[1])


def assert_does_not_spill(variant: Variant, sm: str) -> None:
    """And as many programs fit side by side as asked for."""
    _, _, registers = compiled_without_spilling(variant, sm)
    blocks = dict(variant.constants)["BLOCKS"]
    assert registers * 32 * variant.warps * blocks <= 64 << 10, "the registers of a multiprocessor"


def compiled_for_hopper(variant: Variant) -> bytes:
    """Machine code of three warpgroups, whose products ptxas leaves as they are written: on their way side by side."""
    code, log, registers = compiled_without_spilling(variant, "9.0")
    assert variant.kernel in HOPPER and 48 << 10 < variant.shared_bytes <= H100_SHARED
    assert "serialized" not in log and registers == 168, "what 384 threads may have"
    return code


def disassembled(code: bytes, folder: Path) -> str:
    (folder / "kernel.cubin").write_bytes(code)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout


def around_the_wait(variant: Variant, folder: Path) -> tuple[str, str, str]:
    """The machine code for an H100 ahead of the wait for the kernel before, the wait, and what is behind."""
    return disassembled(nvrtc.compile_native(variant, "9.0")[0], folder).partition("ACQBULK")


@pytest.mark.parametrize("sm", SHARED_BYTES)
def test_compiles_without_spilling(sm):
    """For every compute capability, and as many programs side by side as asked for."""
    for shape in SHAPES:
        assert_does_not_spill(recorded(sm, *shape), sm)


def test_nothing_but_the_log_is_written_to():
    """An empty log is a byte long, and Python shares bytes of that length."""
    _, log = nvrtc.compile_native(recorded("9.0", 64, 512, False), "9.0")
    assert log == "" and [*b" x"[:1], *bytes(1)] == [32, 0]


@pytest.mark.parametrize("smooth", [False, True])
def test_weights_are_on_their_way_ahead_of_the_wait(tmp_path, smooth):
    """In machine code, not only where it is written: sixteen loads of 16 bytes."""
    ahead, wait, behind = around_the_wait(recorded("9.0", 6144, 4096, smooth), tmp_path)
    assert wait and len(re.findall(r"LDG\.E\.\S*128", ahead)) >= 16 and "LDG" in behind


def test_constants_are_defined():
    variant = recorded("9.0", 128, 512, True, Activation("quick_gelu", limit=7.0))
    lines = nvrtc.source(variant).split("\n")
    assert {"#define N 64", "#define SMOOTH 1", "#define HALF 0", "#define LIMIT 7.0f", "#define KIND quick_gelu"} < {
        *lines
    }
    plain = nvrtc.source(recorded("9.0", 128, 512, True))
    assert "#define GATED 0\n" in plain and "#define LIMIT" not in plain and "#define KIND" not in plain


@pytest.mark.parametrize(
    ("n", "k", "changes"),
    [
        (128, 512, {"native": False}),
        (128, 512, {"dtype": torch.float32}),
        (128, 640, {}),
        (8, 512, {}),
        (24, 512, {}),
    ],
)
def test_what_does_not_fit_is_left_to_triton(n, k, changes):
    assert recorded("9.0", n, k, False, **changes).kernel == "linear.gemv4"


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((6144, 4096, 1), (2, 8, 2)),
        ((4096, 4096, 1), (2, 8, 1)),
        ((14336, 4096, 2), (2, 8, 2)),
        ((4096, 14336, 1), (2, 7, 1)),
        ((1024, 4096, 1), (1, 8, 1)),
        ((4112, 512 * 9, 1), (1, 5, 1)),
        ((4112, 2560, 1), (1, 5, 2)),
    ],
)
def test_shapes(shape, wanted):
    """Of Llama-3.1-8B as they were measured; others by their rule."""
    assert linear.native_gemv4_shape(*shape) == wanted


def assert_built_with(native: list[Variant], checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that needs only these kernels, all in CUDA C++, is built and holds them."""
    monkeypatch.setattr(trace, "required_kernels", lambda *args: native)
    build(checkpoint, out, small())
    index = index_of(out)
    assert [cubin.variant for cubin in index] == native
    for cubin in index:
        assert cubin.symbol == cubin.variant.function
        assert_is_machine_code((out / "rank0" / "kernels" / cubin.file).read_bytes(), "9.0", cubin.symbol)


def test_engine_holds_the_kernel(write_checkpoint, tmp_path, monkeypatch):
    """An engine of INT4 weights, of which only the kernels in CUDA C++ are compiled here."""
    checkpoint = write_checkpoint(wide(), "int4_awq").path
    wanted = kernels_of(prepare(checkpoint, small()))
    assert "cu.gemv4" in {v.kernel for v in wanted} and "linear.gemv4" not in {v.kernel for v in wanted}
    out = tmp_path / "engine"
    assert_built_with([variant for variant in wanted if variant.native], checkpoint, out, monkeypatch)
    index = index_of(out)
    assert {f"rank0/kernels/{cubin.file}" for cubin in index} <= set(Manifest.read(out).files)
    assert Engine(out).config.fingerprint.versions["nvrtc"] == nvrtc.nvrtc_version()
    monkeypatch.setattr(kernels.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a compiler was started"))
    build(checkpoint, tmp_path / "second", small())
    monkeypatch.setattr(kernels, "nvrtc_version", lambda: "0.0")
    with pytest.raises(pytest.fail.Exception, match="a compiler was started"):
        build(checkpoint, tmp_path / "third", small())


def test_engine_without_nvrtc_holds_triton_s_kernel(write_checkpoint, missing):
    blueprint = prepare(write_checkpoint(wide(), "int4_awq").path, small())
    found = {variant.kernel for variant in kernels_of(blueprint)}
    assert "linear.gemv4" in found and "cu.gemv4" not in found
    assert "nvrtc" not in blueprint.config().fingerprint.versions
    assert any("pip install nvidia-cuda-nvrtc" in note for note in blueprint.notes)


def test_note_is_for_those_whom_it_concerns(write_checkpoint, monkeypatch):
    checkpoint = write_checkpoint(wide()).path
    assert not any("NVRTC" in note for note in prepare(checkpoint, small()).notes)
    monkeypatch.setattr(backend, "nvrtc_version", lambda: "")
    assert any("NVRTC" in note for note in prepare(checkpoint, small()).notes)
    assert not any("NVRTC" in note for note in prepare(checkpoint, small(gpu="cpu")).notes)


@pytest.mark.parametrize("found", ["nothing", "old", "new"])
def test_version(monkeypatch, found):
    """Of a library that can't be loaded, that does not know every GPU, or that does."""
    from cuda.bindings import nvrtc as library

    def version():
        if found == "nothing":
            raise RuntimeError("Failure finding libnvrtc.so")
        return (library.nvrtcResult.NVRTC_SUCCESS, 12, 6 if found == "old" else 8)

    monkeypatch.setattr(library, "nvrtcVersion", version)
    assert nvrtc.nvrtc_version.__wrapped__() == ("12.8" if found == "new" else "")


def test_kernel_that_does_not_compile_is_named(tmp_path):
    variant = recorded("9.0", 128, 512, False)
    constants = tuple((name, 500 if name == "K" else value) for name, value in variant.constants)
    broken = Variant(variant.kernel, variant.types, constants, variant.warps, variant.stages, variant.pdl)
    message = r"(?s)cu\.gemv4.*can't be compiled for compute capability 9\.0: .*gemv4\.cu\(\d+\).*static assertion"
    with pytest.raises(RuntimeError, match=message):
        compile_kernels([broken], "9.0", tmp_path)
    assert not list(tmp_path.iterdir())
