"""gated.cu: compiled for a GPU that is not here, chosen where it fits, and held by engines."""

from __future__ import annotations

import pytest
import torch

from tests.builder.test_cuda import kernels_of, small
from tests.builder.test_decode import empty
from tests.builder.test_nvrtc import compiled_for_hopper, wide
from trtx.builder.build import prepare
from trtx.builder.cuda import tune
from trtx.builder.cuda.trace import _counts
from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3, FORMATS
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import HOPPER, RecordLaunch, Variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def resident(form: str, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> linear.CudaLinear:
    tensors = {
        "weight": empty(n, k, dtype=dtype if form == "none" else E4M3),
        "weight_scale": empty(*([n] if form in ("fp8_pc_pt", "fp8_wo") else [])),
        "input_scale": empty(),
        **({"pre_quant_scale": empty(k)} if form == "w4a8_awq" else {}),
        **({"bias": empty(n, dtype=dtype)} if bias else {}),
    }
    return linear.resident("w", FORMATS[form], tensors, (n // 2, n // 2), dtype)


def recorded(
    form: str = "none", m: int = 2048, n: int = 28672, k: int = 4096, dtype: torch.dtype = BF16, bias: bool = False,
    reader: str | None = None, activation: Activation | None = None, native: bool = True, hopper: bool = True,
) -> Variant:  # fmt: skip
    """What the MLP of m tokens launches last."""
    launch = RecordLaunch(True, native=native, hopper=hopper)
    read_by = resident(reader, 4096, n // 2, dtype) if reader else None
    w, x = resident(form, n, k, dtype, bias), empty(m, k, dtype=dtype)
    linear.gated(launch, x, w, activation or Activation("silu"), read_by)
    return list(launch.variants)[-1]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"form": "fp8", "reader": "fp8"},
        {"form": "w4a8_awq", "reader": "w4a8_awq"},
        {"form": "fp8_pc_pt", "bias": True, "m": 100},
        {"dtype": FP16, "m": 100, "activation": Activation("gelu_tanh", limit=7.0, offset=1.0)},
    ],
    ids=str,
)
def test_compiles(case: dict) -> None:
    """With products that nothing waits for but what needs them, and divisions that don't branch."""
    variant = recorded(**case)
    assert variant.kernel == "cu.gated"
    compiled_for_hopper(variant)


@pytest.mark.parametrize(
    "changes",
    [
        {"native": False}, {"hopper": False}, {"dtype": FP32}, {"n": 28672 + 128}, {"k": 4096 + 32},
        {"form": "fp8", "k": 4096 + 64}, {"form": "fp8_wo"},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_left_to_two_kernels(changes: dict) -> None:
    assert recorded(**changes).kernel == "linear.gated_activation"


@pytest.mark.parametrize("form", ["none", "fp8"])
def test_numbers_of_tokens_share_kernels(form: str) -> None:
    """What a trace records (`trace._counts`) are all that there are."""
    for n in (28672, 3 * 256, 256):
        found = {recorded(form, m, n) for m in (65, 100, 128, 129, 256, 300, 512, 1000, 2048, 2100, 5000, 8192)}
        assert {variant.kernel for variant in found} == {"cu.gated"}
        limit = linear.most_tokens(resident(form, n, 4096, BF16), BF16, gated=True)
        assert found == {recorded(form, m, n) for m in _counts(8192) if m > limit}


@pytest.mark.parametrize("tokens", [128, 129, 384, 2100])
def test_programs_share_what_takes_fewer_rounds(tokens: int) -> None:
    shape = linear.gated_shape(tokens, 14336)
    rounds = {mates: -(-(-(-tokens // (128 * mates[0])) * (112 // mates[1])) // 66) for mates in ((1, 2), (2, 1))}
    assert rounds[shape.token_mates, shape.output_mates] == min(rounds.values())
    assert linear.gated_shape(tokens, 128).output_mates == 1, "there is one tile of outputs"


@pytest.mark.parametrize("form", ["none", "fp8"])
def test_engine_holds_the_kernel(write_checkpoint, form: str) -> None:
    """And its algorithms are none of that product."""
    prepared = prepare(write_checkpoint(wide(intermediate_size=768), form).path, small(max_num_tokens=256))
    assert "cu.gated" in {variant.kernel for variant in kernels_of(prepared)}
    assert 2 * 768 not in {problem.n for problem in tune.problems(prepared.sizing, prepared.store)}


@pytest.mark.parametrize("gpu", ["b200", "a100-80-sxm"])
def test_engines_of_other_gpus_hold_none(write_checkpoint, gpu: str) -> None:
    """Nor prefill.cu: cuBLASLt's algorithms for the product are timed there."""
    prepared = prepare(write_checkpoint(wide(intermediate_size=768)).path, small(gpu=gpu, max_num_tokens=256))
    assert not HOPPER & {variant.kernel for variant in kernels_of(prepared)}
    assert 2 * 768 in {problem.n for problem in tune.problems(prepared.sizing, prepared.store)}
