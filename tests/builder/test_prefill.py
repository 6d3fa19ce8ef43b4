"""prefill.cu: compiled for a GPU that is not here, chosen where it fits, and held by engines."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton

from tests.builder.test_cuda import assert_is_machine_code
from tests.builder.test_decode import empty
from trtx.builder.cuda import nvrtc
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.attention import AttentionStep, CachedAttention, HeadNorm, Rotation, Slopes
from trtx.runtime.cuda.launch import H100_SHARED, RecordLaunch, Variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """Tokens of prompts, and heads."""

    tokens: int = 2048
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    rope: int = 128


def recorded(
    case: Case, dtype: torch.dtype = BF16, cached: torch.dtype = BF16, norm: str | None = None, codes: bool = False,
    native: bool = True, hopper: bool = True, block_size: int = 32, offset: int = 0, norm_dtype: torch.dtype = BF16,
    smooth_dtype: torch.dtype = FP32, **settings: object,
) -> Variant:  # fmt: skip
    """What a step of `case` launches beside storing."""
    launch = RecordLaunch(True, native=native, hopper=hopper)
    keys, values = (empty(8, case.kv_heads, block_size, case.dim, dtype=cached) for _ in range(2))
    width = case.heads + 2 * case.kv_heads
    qkv = empty(case.tokens, width * case.dim + offset, dtype=dtype)[:, offset:].unflatten(1, (width, case.dim))
    weight = empty(case.dim, dtype=norm_dtype)
    made = HeadNorm(weight, weight if norm == "layer" else None, 1e-5, norm) if norm else None
    tables = (empty(4096, case.rope // 2),) * 2 if case.rope else None
    ids, table = empty(case.tokens + 1, dtype=torch.int32), empty(1, 128, dtype=torch.int32)
    step = AttentionStep(ids, ids, ids, ids, [table], empty(case.tokens // 32, 2, dtype=torch.int32), 0, ids)
    rotation = Rotation(tables, case.rope, made, made)
    layer = CachedAttention(launch, keys, values, table, case.dim, rotation, **settings)
    given = (empty(2), empty(case.heads * case.dim, dtype=smooth_dtype)) if codes else None
    layer.attend(qkv[:, : case.heads], None, step, 0.1, given)
    (variant,) = launch.variants
    return variant


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("case", [Case(), Case(dim=64, rope=64), Case(heads=6, kv_heads=2, rope=0)], ids=str)
def test_compiles(tmp_path: Path, case: Case, codes: bool, norm: str | None) -> None:
    """With products that nothing waits for but what needs them, and the softmax while values are multiplied."""
    variant = recorded(case, norm=norm, codes=codes)
    assert variant.kernel == "cu.prefill" and 48 << 10 < variant.shared_bytes <= H100_SHARED
    code, log = nvrtc.compile_native(variant, "9.0", ("--ptxas-options=-v",))
    assert_is_machine_code(code, "9.0", "prefill")
    assert "serialized" not in log and "0 bytes spill stores, 0 bytes spill loads" in log
    assert int(re.search(r"Used (\d+) registers", log)[1]) == 168, "what 384 threads may have"
    (tmp_path / "kernel.cubin").write_bytes(code)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([tool, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"tnspB|HGMMA|DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2", text)
    for begin in (i for i, name in enumerate(found) if name.endswith("0x1")):
        softmax = found[begin + 1 : found.index("DEPBAR.LE gsb0, 0x0", begin)]
        assert set(softmax) == {"MUFU.EX2"} and len(softmax) >= 64, "of 128 keys and two rows, a lane"
    assert sum(name.endswith("0x1") for name in found) == 2, "masked tiles, and others"


@pytest.mark.parametrize(
    "changes",
    [
        {"native": False}, {"hopper": False}, {"dtype": FP32, "cached": FP32}, {"cached": E4M3}, {"norm": "layer"},
        {"block_size": 4}, {"offset": 4}, {"alibi": Slopes(empty(32), 0.0)}, {"window": 512}, {"softcap": 30.0},
        {"sinks": empty(32)}, {"norm": "rms", "norm_dtype": FP16}, {"codes": True, "smooth_dtype": BF16},
        {"case": Case(dim=256, rope=256)}, {"case": Case(dim=80, rope=0)}, {"case": Case(rope=64)},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_left_to_triton(changes: dict) -> None:
    assert recorded(**{"case": Case(), **changes}).kernel == "attention.prefill"


def test_numbers_of_tokens_share_a_kernel() -> None:
    found = {recorded(Case(count)) for count in (32, 64, 512, 2048, 8192)}
    assert {variant.kernel for variant in found} == {"cu.prefill"} and len(found) == 1
