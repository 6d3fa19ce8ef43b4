"""prefill.cu: compiled for a GPU that is not here, chosen where it fits, and held by engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.builder.test_decode import attended, empty
from tests.builder.test_nvrtc import compiled_for_hopper, disassembled
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.attention import AttentionStep, Slopes
from trtx.runtime.cuda.launch import RecordLaunch, Variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """Tokens of prompts, and heads."""

    tokens: int = 2048
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    rope: int = 128


def recorded(
    case: Case, native: bool = True, hopper: bool = True, **settings: object
) -> Variant:  # fmt: skip
    """What a step of `case` launches beside storing; settings as for `attended`."""
    ids, table = empty(case.tokens + 1, dtype=torch.int32), empty(1, 128, dtype=torch.int32)
    step = AttentionStep(ids, ids, ids, ids, [table], empty(case.tokens // 32, 2, dtype=torch.int32), 0, ids)
    return attended(RecordLaunch(True, native=native, hopper=hopper), case[1:], case.tokens, step, False, **settings)


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("case", [Case(), Case(dim=64, rope=64), Case(heads=6, kv_heads=2, rope=0)], ids=str)
def test_compiles(tmp_path: Path, case: Case, codes: bool, norm: str | None) -> None:
    """With products that nothing waits for but what needs them, and the softmax while values are multiplied."""
    variant = recorded(case, norm=norm, codes=codes)
    assert variant.kernel == "cu.prefill"
    text = disassembled(compiled_for_hopper(variant), tmp_path)
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
