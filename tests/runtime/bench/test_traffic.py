"""Bytes that the cuda backend's kernels move, against arithmetic on the model's shape."""

import pytest

from tests.builder.models import TINY, spec_of
from trtx.builder.engine import EngineConfig, Fingerprint, Limits, ParallelMapping
from trtx.converters.checkpoint import CheckpointConfig
from trtx.quantize.formats import Quantization
from trtx.runtime.cuda.launch import LIBRARY
from trtx.runtime.cuda.traffic import Traffic

WIDTH, INNER, VOCABULARY, LAYERS = 64, 128, 96, 2
KV = 2 * 2 * 16
"""Numbers cached for a token in a layer: keys and values of 2 heads of 16."""
LINEARS = LAYERS * (WIDTH * (64 + 32 + 32) + WIDTH * WIDTH + 3 * WIDTH * INNER)
HEAD = WIDTH * VOCABULARY


def traffic(quantization="none", kv_dtype="bf16", config=TINY, versions=None, **changes):
    spec = spec_of(config, **changes)
    model = CheckpointConfig(
        spec, "bf16", Quantization(quantization, group_size=64 if quantization == "int4_awq" else 0)
    )
    limits = Limits(8, 1024, 2048, 16, 100, kv_dtype)
    return Traffic(
        EngineConfig(
            "cuda",
            model,
            "bf16",
            limits,
            ParallelMapping(),
            Fingerprint("cuda", "h100-sxm", "9.0", versions or {}),
            ledger={},
        )
    )


def decodes(*contexts):
    """Sequences that each decode a token, with so many in the cache."""
    return [(context, 1, 1) for context in contexts]


def test_a_decode_reads_every_weight_once():
    found = traffic().of_step(decodes(100))["linear.gemv"]
    assert found == pytest.approx(2 * (LINEARS + HEAD), rel=0.05)
    assert found > 2 * (LINEARS + HEAD), "and its inputs"


def test_weights_in_words_take_half_a_byte():
    """And a scale in fp32 for 64 of them, and for each input; the head is not quantized."""
    found = traffic("int4_awq").of_step(decodes(100))
    smooth = LAYERS * (3 * WIDTH + INNER)
    assert found["linear.gemv4"] == pytest.approx(LINEARS / 2 + 4 * LINEARS / 64 + 4 * smooth, rel=0.1)
    assert found["linear.gemv"] == pytest.approx(2 * HEAD, rel=0.1)


def test_an_engine_made_with_nvrtc_has_kernels_in_cuda():
    """They move what Triton's do, but for counters."""
    triton, native = (traffic(versions=versions).of_step(decodes(100, 200)) for versions in ({}, {"nvrtc": "13.0"}))
    assert triton["linear.skinny"] > native["cu.few"] > 2 * (LINEARS + HEAD)
    assert "linear.skinny" not in native and "cu.few" not in triton


@pytest.mark.parametrize("contexts", [(100,), (100, 200), (50,) * 8])
def test_attention_in_cuda_reads_what_triton_s_does(contexts):
    of_triton, of_native = (
        traffic(versions=versions).of_step(decodes(*contexts)) for versions in ({}, {"nvrtc": "13"})
    )
    assert of_native["cu.decode"] == of_triton["attention.decode"] > sum(contexts) * LAYERS * KV * 2


@pytest.mark.parametrize(("kv_dtype", "size"), [("bf16", 2), ("fp8", 1)])
def test_attention_reads_what_is_cached_of_its_sequences(kv_dtype, size):
    """Five sequences run as eight, of which three have nothing to read."""
    of = traffic(kv_dtype=kv_dtype)
    short, long = (of.of_step(decodes(10, 20, 30, 40, 50 + more))["attention.decode"] for more in (0, 1000))
    assert long - short == 1000 * LAYERS * KV * size
    assert short > (11 + 21 + 31 + 41 + 51) * LAYERS * KV * size


def test_a_window_bounds_what_is_read():
    of = traffic(config={**TINY, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}, sliding_window=32)
    near, at, far = (of.of_step(decodes(context))["attention.decode"] for context in (20, 31, 900))
    assert at - near == 11 * LAYERS * KV * 2 and at == far
    chunks = [of.of_step([(before, 100, 1)])["attention.prefill"] for before in (0, 31, 900)]
    assert chunks[1] - chunks[0] == 31 * LAYERS * KV * 2 and chunks[1] == chunks[2]


def test_prefill_in_cuda_reads_what_triton_s_does():
    """Of heads that it knows, on a GPU that it is for."""
    batch = [(50, 200, 1), (0, 90, 1)]
    triton, native = (traffic(versions=versions, head_dim=64).of_step(batch) for versions in ({}, {"nvrtc": "13"}))
    assert native["cu.prefill"] == triton["attention.prefill"] > 340 * LAYERS * 2 * 2 * 64 * 2


def test_a_gated_product_in_cuda_keeps_what_is_between():
    """Of sizes that it knows: it reads the weight and x, and writes what the next product reads."""
    triton, native = (
        traffic(versions=versions, intermediate_size=128, hidden_size=64).of_step([(0, 512, 0)])
        for versions in ({}, {"nvrtc": "13"})
    )
    once = 2 * (2 * WIDTH * INNER + 512 * (WIDTH + INNER))
    assert native["cu.gated"] == (LAYERS - 1) * once
    assert triton[LIBRARY] - native[LIBRARY] == (LAYERS - 1) * (once + 2 * 512 * INNER)


def test_a_prefill_reads_what_is_cached_and_leaves_the_rest_to_libraries():
    of = traffic()
    fresh, later = (of.of_step([(before, 512, 0)]) for before in (0, 300))
    assert later["attention.prefill"] - fresh["attention.prefill"] == 300 * LAYERS * KV * 2
    first = WIDTH * (64 + 32 + 32) + 512 * (WIDTH + 64 + 32 + 32)
    others = WIDTH * WIDTH + 3 * WIDTH * INNER + 512 * (WIDTH + WIDTH + INNER + WIDTH + 2 * INNER + WIDTH)
    assert fresh[LIBRARY] == 2 * (LAYERS * first + (LAYERS - 1) * others), "the last layer goes on with one row"
    assert fresh[LIBRARY] == later[LIBRARY]


def test_a_mixed_step_has_attention_of_both_kinds():
    """Two decodes run as eight beside a prompt, as eight others do by themselves."""
    of = traffic()
    eight, more = (of.of_step(decodes(*[context] * 8))["attention.decode"] for context in (100, 101))
    mixed = of.of_step([*decodes(100, 100), (0, 256, 1)])
    unread = 6 * 101 * (more - eight) // 8
    assert mixed["attention.decode"] == pytest.approx(eight - unread, abs=100), "but for a few numbers a sequence"
    few = of.of_step([*decodes(*[100] * 7), (0, 16, 1)])
    assert few["attention.prefill"] == pytest.approx(of.of_step([(0, 16, 0)])["attention.prefill"], rel=0.05)
    assert mixed["attention.prefill"] == pytest.approx(of.of_step([(0, 256, 0)])["attention.prefill"], rel=0.01)


def test_embedding_reads_the_rows_of_its_tokens():
    """Ids of 4 bytes, rows of a table of 16 bits that is not read whole, and as many that are written."""
    of = traffic(vocab_size=9600)
    assert of.of_step(decodes(5, 5, 5))["elementwise.embed"] == 3 * (4 + 2 * 2 * WIDTH)


def test_of_experts_only_those_in_use_are_read():
    """One token uses 2 of 8; with 1000 tokens, all are in use."""
    moe = {**TINY, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    of = traffic(config=moe, num_local_experts=8, num_experts_per_tok=2)
    all_of_them = 8 * LAYERS * 3 * WIDTH * INNER * 2
    single = of.of_step(decodes(5))
    assert single["experts.pair_up"] + single["experts.pair_down"] == pytest.approx(all_of_them * 2 / 8, rel=0.05)
    inputs, between, outputs = 1000 * WIDTH, 2 * 1000 * INNER, 2 * 1000 * WIDTH
    moved = all_of_them / LAYERS + 2 * (inputs + 2 * between + outputs)
    found = of.of_step([(0, 1000, 1)])["experts.grouped"]
    assert found == pytest.approx((LAYERS - 1) * moved, rel=0.05), "in the last layer one token is left"
