"""few.cu: compiled for GPUs that are not here, chosen where it fits, and held by engines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.builder.test_cuda import empty_caches as empty_caches
from tests.builder.test_cuda import kernels_of, small
from tests.builder.test_nvrtc import around_the_wait, assert_built_with, assert_does_not_spill, wide
from tests.builder.test_nvrtc import missing as missing
from trtx.builder.build import prepare
from trtx.builder.cuda import nvrtc
from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3, FORMATS
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import RecordLaunch, Variant

SILU, BF16 = Activation("silu"), torch.bfloat16
SHAPES = [(6144, 4096, None), (4096, 4096, None), (28672, 4096, SILU), (4096, 14336, None), (2048, 2048, None)]
"""Rows and inputs of linears, and the activation of gated ones."""


def recorded(
    sm: str, form: str, m: int, n: int, k: int, activation: Activation | None = None, native: bool = True,
    dtype: torch.dtype = BF16,
) -> list[Variant]:  # fmt: skip
    """What m tokens times a weight launch."""
    tensors = {
        "weight": torch.empty(n, k, dtype=dtype if form == "none" else E4M3, device="meta"),
        "weight_scale": torch.empty(n if form == "fp8_pc_pt" else (), device="meta"),
        "input_scale": torch.empty((), device="meta"),
        **({"pre_quant_scale": torch.empty(k, device="meta")} if form == "w4a8_awq" else {}),
    }
    w = linear.resident("w", FORMATS[form], tensors, (n // 2, n // 2), dtype)
    x = torch.empty(m, k, dtype=dtype, device="meta")
    launch = RecordLaunch(float(sm) >= 9.0, native=native)
    if activation is None:
        linear.linear(launch, x, w)
    else:
        linear.gated(launch, x, w, activation)
    return list(launch.variants)


@pytest.mark.parametrize(
    ("form", "sm"),
    [
        ("none", "8.0"),
        *((form, sm) for form in ("none", "fp8", "fp8_pc_pt", "w4a8_awq") for sm in ("8.9", "9.0", "10.0", "12.0")),
    ],
)
def test_compiles_without_spilling(form: str, sm: str) -> None:
    """And as many programs side by side as asked for."""
    for shape in SHAPES:
        for m in (2, 16):
            variant = recorded(sm, form, m, *shape)[-1]
            assert variant.kernel == "cu.few"
            assert_does_not_spill(variant, sm)


@pytest.mark.parametrize("form", ["none", "fp8"])
@pytest.mark.parametrize("m", [2, 16])
def test_weights_are_on_their_way_ahead_of_the_wait(tmp_path: Path, form: str, m: int) -> None:
    """In machine code, not only where it is written: all that a chunk has, 16 bytes at a time."""
    (variant,) = recorded("9.0", form, m, 6144, 4096)
    ahead, wait, behind = around_the_wait(variant, tmp_path)
    constants = dict(variant.constants)
    assert wait and len(re.findall(r"LDG\.E\.\S*128", ahead)) == 4 * constants["TILES"] * constants["PAIRS"]
    assert "LDG" in behind


@pytest.mark.parametrize(
    ("m", "n", "k", "changes"),
    [
        (17, 64, 512, {}),
        (2, 72, 512, {}),
        (2, 64, 544, {}),
        (2, 64, 512, {"native": False}),
        (2, 64, 576, {"form": "fp8"}),
        (2, 64, 512, {"form": "fp8_wo"}),
    ],
)
def test_what_does_not_fit_is_left_to_triton(m: int, n: int, k: int, changes: dict) -> None:
    variants = recorded("9.0", changes.pop("form", "none"), m, n, k, **changes)
    assert "linear.skinny" in {variant.kernel for variant in variants}


@pytest.mark.parametrize("form", ["none", "fp8", "fp8_pc_pt"])
def test_numbers_of_tokens_share_kernels(form: str) -> None:
    """Two of them for all."""
    found = [recorded("9.0", form, m, 4096, 4096)[-1] for m in range(2, 17)]
    assert set(found[:7]) == {found[0]} and set(found[7:]) == {found[-1]} and found[0] != found[-1]


@pytest.mark.parametrize("form", ["none", "fp8"])
def test_engine_holds_the_kernel(write_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """An engine of which only the kernels in CUDA C++ are compiled here."""
    checkpoint = write_checkpoint(wide(), form).path
    wanted = kernels_of(prepare(checkpoint, small()))
    native = [variant for variant in wanted if variant.native]
    assert {variant.kernel for variant in native} == {"cu.few", "cu.decode", "cu.prefill"}
    assert_built_with(native, checkpoint, tmp_path / "engine", monkeypatch)


@pytest.mark.parametrize("form", ["none", "fp8"])
def test_engine_without_nvrtc_holds_triton_s_kernel(write_checkpoint, missing, form: str) -> None:
    found = {variant.kernel for variant in kernels_of(prepare(write_checkpoint(wide(), form).path, small()))}
    assert "linear.skinny" in found and "cu.few" not in found


def test_files_are_put_where_they_are_included() -> None:
    (variant,) = recorded("9.0", "none", 2, 64, 512)
    text = nvrtc.source(variant)
    assert "#include" not in text and text.count("number(unsigned short bits) {") == 1
    after = text.split('#line 1 "common.cu"')[1].split("#line ")[1]
    number = int(after.split(" ")[0])
    kernel = (Path(linear.__file__).parents[1] / "kernels" / "few.cu").read_text().split("\n")
    assert kernel[number - 2].startswith("#include") and after.split("\n")[1] == kernel[number - 1]
