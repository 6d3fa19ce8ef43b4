"""decode.cu: compiled for GPUs that are not here, chosen where it fits, and held by engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.builder.test_nvrtc import around_the_wait, assert_does_not_spill
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.attention import AttentionStep, CachedAttention, HeadNorm, Rotation, Slopes
from trtx.runtime.cuda.launch import RecordLaunch, Variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """Sequences that decode, and heads."""

    sequences: int = 256
    longest: int = 2048
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    rope: int = 128


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(
    sm: str, case: Case, native: bool = True, block_size: int = 32, **settings: object
) -> Variant:  # fmt: skip
    """What a step of `case` launches; settings as for `attended`."""
    count = case.sequences
    ids = empty(count + 1, dtype=torch.int32)
    table = empty(count, case.longest // block_size, dtype=torch.int32)
    step = AttentionStep(ids, ids, ids, ids, [table], empty(0, 2, dtype=torch.int32), count, ids)
    launch = RecordLaunch(float(sm) >= 9.0, native=native)
    return attended(launch, case[2:], count, step, True, block_size=block_size, **settings)


def attended(
    launch: RecordLaunch, sizes: tuple[int, ...], tokens: int, step: AttentionStep, stores: bool, *,
    dtype: torch.dtype = BF16, cached: torch.dtype = BF16, norm: str | None = None, codes: bool = False,
    block_size: int = 32, offset: int = 0, norm_dtype: torch.dtype = BF16, smooth_dtype: torch.dtype = FP32,
    **settings: object,
) -> Variant:  # fmt: skip
    """What attention of a step launches.

    Args:
        sizes: heads, kv_heads, dim, rope.
        stores: new keys and values are given too.
    """
    heads, kv_heads, dim, rope = sizes
    keys, values = (empty(8, kv_heads, block_size, dim, dtype=cached) for _ in range(2))
    width = heads + 2 * kv_heads
    qkv = empty(tokens, width * dim + offset, dtype=dtype)[:, offset:].unflatten(1, (width, dim))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    weight = empty(dim, dtype=norm_dtype)
    made = HeadNorm(weight, weight if norm == "layer" else None, 1e-5, norm) if norm else None
    rotation = Rotation((empty(4096, rope // 2),) * 2 if rope else None, rope, made, made)
    layer = CachedAttention(launch, keys, values, step.tables[0], dim, rotation, **settings)
    given = (empty(2), empty(heads * dim, dtype=smooth_dtype)) if codes else None
    layer.attend(q, (k, v) if stores else None, step, 0.1, given)
    (variant,) = launch.variants
    return variant


CASES = [
    Case(), Case(8), Case(1), Case(64, 8192), Case(dim=64, rope=64), Case(8, dim=64, rope=32),
    Case(heads=16, kv_heads=1, dim=96, rope=96), Case(4, heads=16, kv_heads=1), Case(heads=8, rope=0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cached", "sm"),
    [(BF16, "8.0"), *((cached, sm) for cached in (BF16, E4M3) for sm in ("8.9", "9.0", "10.0", "12.0"))],
    ids=str,
)
def test_compiles_without_spilling(cached: torch.dtype, sm: str) -> None:
    """And as many programs side by side as asked for."""
    for case in CASES:
        for norm in (None, "rms"):
            variant = recorded(sm, case, cached=cached, norm=norm, codes=cached == E4M3)
            assert variant.kernel == "cu.decode"
            assert_does_not_spill(variant, sm)


@pytest.mark.parametrize("cached", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("case", [Case(), Case(8), Case(dim=64, rope=64)], ids=str)
def test_a_tile_is_on_its_way_ahead_of_the_wait(tmp_path: Path, case: Case, cached: torch.dtype) -> None:
    """In machine code, not only where it is written: keys and values. Keys are loaded again ahead of the softmax."""
    variant = recorded("9.0", case, cached=cached)
    ahead, wait, behind = around_the_wait(variant, tmp_path)
    row, tiles = case.dim * cached.itemsize, dict(variant.constants)["TILES"]
    of_keys, of_values = tiles * 2 * row // 64, tiles * 4 * row // min(row, 128)
    loads = r"LDG\.E\.NA\.\S*(?:128|64)\b"
    assert wait and len(re.findall(loads, ahead)) == of_keys + of_values
    before_softmax, softmax, _ = behind.partition("SHFL")
    assert softmax and len(re.findall(loads, before_softmax)) >= of_keys


@pytest.mark.parametrize(
    "changes",
    [
        {"native": False}, {"dtype": FP32, "cached": FP32}, {"norm": "layer"}, {"block_size": 4}, {"offset": 4},
        {"cached": FP32}, {"alibi": Slopes(empty(32), 0.0)}, {"norm": "rms", "norm_dtype": FP16},
        {"codes": True, "smooth_dtype": BF16}, {"case": Case(dim=256)}, {"case": Case(heads=34, kv_heads=2)},
        {"case": Case(dim=72, rope=0)}, {"case": Case(dim=80, rope=0), "cached": E4M3}, {"case": Case(rope=20)},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_left_to_triton(changes: dict) -> None:
    case = changes.pop("case", Case())
    assert recorded("9.0", case, **changes).kernel == "attention.decode"


def test_numbers_of_sequences_share_kernels() -> None:
    """Those of all batch sizes, in sequences of up to 2048 tokens."""
    found = {recorded("9.0", Case(count)) for count in range(1, 257)}
    assert {variant.kernel for variant in found} == {"cu.decode"} and len(found) <= 5
