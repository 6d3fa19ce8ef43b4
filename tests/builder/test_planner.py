from dataclasses import replace

import pytest

from tests.builder.models import LLAMA_8B, llama_8b, sizing, spec_of
from trtx.builder.engine import ParallelMapping
from trtx.builder.gpus import table
from trtx.builder.ledger import account
from trtx.builder.planner import Workload, pick, plan, plans
from trtx.builder.shard import obstacle
from trtx.builder.torch_backend import TorchBackend
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.errors import DoesNotFitError, UnsupportedError
from trtx.quantize.formats import Quantization

BACKEND = TorchBackend()
WORKLOAD = Workload(1024, 256)


def test_every_split_of_the_ranks_is_considered():
    found = [(p.mapping.tp, p.mapping.pp) for p in plans(sizing(), BACKEND, 12, WORKLOAD)]
    assert found == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]


@pytest.mark.parametrize(
    "changes, tp, pp, reason",
    [
        ({}, 3, 1, "3 does not divide 32 attention heads"),
        ({}, 16, 1, "16 does not divide 8 key/value heads"),
        ({"intermediate_size": 14340}, 8, 1, "8 does not divide 14340 intermediate size"),
        ({}, 1, 3, "3 does not divide 32 layers"),
        ({}, 8, 4, ""),
    ],
)
def test_what_does_not_divide_is_said(changes, tp, pp, reason):
    assert obstacle(llama_8b(**changes), ParallelMapping(tp, pp)) == reason


def test_groups_of_a_quantized_weight_are_not_cut():
    model = CheckpointConfig(spec_of(LLAMA_8B, intermediate_size=1536), "bf16", Quantization("int4_awq", 128))
    assert obstacle(model, ParallelMapping(4)) == ""
    assert "would cut a unit of 128" in obstacle(model, ParallelMapping(8))


def test_batch_1_decode_is_the_weights_over_the_bandwidth():
    rated = plan(sizing(max_batch_size=1), BACKEND, Workload(8, 2)).estimate
    read = 2 * (8_030_261_248 - 128256 * 4096) + 9 * 128 * 1024
    assert rated.tpot == pytest.approx(read / 3.35e12, rel=1e-6)
    assert rated.batch == 1


def test_long_prefill_is_bound_by_flops():
    rated = plan(sizing(), BACKEND, Workload(2048, 1)).estimate
    linears = 2 * 2048 * (8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096)
    attention = 32 * 4 * 4096 * 2048 * 2049 // 2
    assert rated.ttft == pytest.approx((linears + attention + 2 * 128256 * 4096) / 989.5e12, rel=1e-6)


def test_tensor_parallel_costs_all_reduces():
    """Half the work, and 64 ring all-reduces of a token's hidden state, as far as tp 2 goes."""
    asked = sizing(max_batch_size=1)
    one = plan(asked, BACKEND, WORKLOAD).estimate
    two = plan(replace(asked, mapping=ParallelMapping(2)), BACKEND, WORKLOAD).estimate
    assert two.tpot == pytest.approx(one.tpot / 2 + 64 * (16e-6 + 4096 * 2 / 450e9), rel=1e-6)


def test_pipeline_does_not_shorten_a_single_sequence():
    asked = sizing(max_batch_size=1)
    one = plan(asked, BACKEND, WORKLOAD).estimate
    four = plan(replace(asked, mapping=ParallelMapping(1, 4)), BACKEND, WORKLOAD).estimate
    assert four.tpot == pytest.approx(one.tpot)
    assert four.ttft == pytest.approx(one.ttft)


def test_without_nvlink_the_pipeline_wins():
    fast, slow = (plans(sizing(gpu=name), BACKEND, 4, WORKLOAD) for name in ("h100-sxm", "l40s"))
    assert pick(fast, sizing(), BACKEND).mapping.tp > pick(slow, sizing(gpu="l40s"), BACKEND).mapping.tp


def test_the_pick_fits_and_has_the_highest_throughput():
    asked = sizing()
    found = plans(asked, BACKEND, 8, WORKLOAD)
    chosen = pick(found, asked, BACKEND)
    assert chosen.estimate.throughput == max(p.estimate.throughput for p in found if p.estimate)
    assert account(replace(asked, mapping=chosen.mapping), BACKEND).missing == 0


def test_nothing_divides():
    with pytest.raises(UnsupportedError, match="7 does not divide"):
        pick(plans(sizing(), BACKEND, 7, WORKLOAD), sizing(), BACKEND)


def test_nothing_fits():
    asked = sizing(gpu="l4", compute_dtype="fp32", kv_dtype="fp32", max_seq_len=65536)
    found = plans(asked, BACKEND, 2, WORKLOAD)
    assert {p.problem for p in found} == {"does not fit"}
    with pytest.raises(DoesNotFitError, match="2 × l4"):
        pick(found, asked, BACKEND)


def test_a_device_of_unknown_speed_is_not_rated():
    asked = sizing(gpu="cpu")
    found = plans(asked, BACKEND, 1, WORKLOAD)
    assert found[0].estimate is None
    assert pick(found, asked, BACKEND) is found[0]
    unknown = replace(table()["l4"], tflops={}, bandwidth=0.0)
    target = replace(sizing().target, gpu=unknown)
    assert plan(replace(sizing(), target=target), BACKEND, WORKLOAD).estimate is None
