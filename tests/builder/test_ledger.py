"""The ledger against hand-computed sizes, and against what the torch op set holds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builder.models import LLAMA_8B, TINY, llama_8b, sizing, spec_of
from tests.converters import published
from tests.converters.tiny import VARIANTS, config_json
from trtx.builder.engine import ParallelMapping
from trtx.builder.ledger import CPU_KV_CACHE, account
from trtx.builder.shard import Shard
from trtx.builder.suggest import does_not_fit, suggestions
from trtx.builder.torch_backend import TorchBackend
from trtx.converters.checkpoint import CheckpointConfig
from trtx.quantize.formats import DTYPES, Quantization
from trtx.runtime import weights
from trtx.runtime.ops.base import Mlp
from trtx.runtime.ops.torch_ops import ResidentLinear, ResidentNorm, TorchOps

BACKEND = TorchBackend()
PARAMETERS_8B = 8_030_261_248
"""Of Llama-3.1-8B, as Meta and transformers count them."""


def test_llama_8b_on_an_h100():
    ledger = account(sizing(), BACKEND)
    assert ledger.weights == 2 * PARAMETERS_8B
    assert ledger.kv_cache == ledger.kv_blocks * 32 * 128 * 1024
    assert ledger.sequence_blocks == 8192 // 32
    assert ledger.reserve == 8 * 10**9
    assert sum(ledger.rows.values()) == 80 * 10**9
    assert ledger.missing == 0
    assert ledger.free < 32 * 128 * 1024


def test_quantized_weights_are_resident_in_the_compute_dtype():
    dense = account(sizing(), BACKEND)
    quantized = account(sizing(llama_8b().with_quantization(Quantization("fp8"))), BACKEND)
    assert quantized.weights - dense.weights == 32 * 7 * 4  # the input scales


def test_fp8_halves_the_kv_block():
    full, half = account(sizing(), BACKEND), account(sizing(kv_dtype="fp8"), BACKEND)
    assert 2 * half.kv_cache // half.kv_blocks == full.kv_cache // full.kv_blocks


def test_cache_never_exceeds_what_full_batches_use():
    ledger = account(sizing(max_batch_size=4), BACKEND)
    assert ledger.kv_blocks == 1 + 4 * 256
    assert ledger.full_sequences == 4
    assert sum(ledger.rows.values()) == 80 * 10**9


def test_sliding_window_needs_only_its_window():
    spec = spec_of(LLAMA_8B, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096)
    ledger = account(sizing(CheckpointConfig(spec, "bf16"), max_seq_len=32768, max_batch_size=1), BACKEND)
    assert ledger.sequence_blocks == (4096 + 2048) // 32 + 1
    assert ledger.kv_blocks == 1 + ledger.sequence_blocks


def test_cpu_cache_is_modest_but_holds_one_sequence():
    asked = sizing(gpu="cpu")
    assert account(asked, BACKEND).kv_cache <= CPU_KV_CACHE
    long = replace(asked, max_seq_len=65536, max_batch_size=1, max_num_tokens=64)
    long = replace(long, target=replace(long.target, memory=256 << 30))
    assert account(long, BACKEND).kv_cache == (1 + 65536 // 32) * 32 * 128 * 1024 > CPU_KV_CACHE


def test_cache_limit_is_kept():
    ledger = account(sizing(kv_cache_memory=10 << 30), BACKEND)
    assert (10 << 30) - 32 * 128 * 1024 < ledger.kv_cache <= 10 << 30
    assert account(sizing(kv_cache_memory=1 << 20), BACKEND).missing > 0


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (4, 2)])
def test_ranks_share_the_model(tp, pp):
    whole = account(sizing(), BACKEND)
    mapping = ParallelMapping(tp, pp)
    shards = [Shard(llama_8b().spec, mapping, stage) for stage in range(pp)]
    held = tp * sum(BACKEND.weight_bytes(sizing(), shard) for shard in shards)
    norms = 2 * 65 * 4096
    assert held == whole.weights + (tp - 1) * norms
    block = account(sizing(mapping=mapping, max_batch_size=1), BACKEND)
    assert block.kv_cache // block.kv_blocks == whole.kv_cache // whole.kv_blocks // (tp * pp)


def test_missing_memory_is_exact():
    """With exactly the missing bytes more it fits, with one less it does not."""
    asked = sizing(gpu="l4", max_seq_len=32768, memory_fraction=1.0)
    missing = account(asked, BACKEND).missing
    assert missing > 0

    def with_more(count):
        return account(replace(asked, target=replace(asked.target, memory=asked.target.memory + count)), BACKEND)

    assert with_more(missing).missing == 0
    assert with_more(missing - 1).missing == 1


@settings(max_examples=25, deadline=None)
@given(
    gpu=st.sampled_from(["l4", "rtx-4090", "h100-sxm", "cpu"]),
    batch=st.sampled_from([1, 16, 256, 1024]),
    tokens=st.sampled_from([1024, 2048, 16384]),
    length=st.integers(1000, 131072),
    block=st.sampled_from([8, 64]),
    limit=st.sampled_from([None, 1 << 20, 1 << 30]),
    compute=st.sampled_from(["bf16", "fp32"]),
)
def test_suggestions_fit(gpu, batch, tokens, length, block, limit, compute):
    asked = sizing(
        gpu=gpu,
        max_batch_size=batch,
        max_num_tokens=max(tokens, batch),
        max_seq_len=length,
        kv_block_size=block,
        kv_cache_memory=limit,
        compute_dtype=compute,
        kv_dtype=compute,
    )
    if not account(asked, BACKEND).missing:
        return
    for suggestion in suggestions(asked, BACKEND):
        changed = suggestion.sizing
        assert account(changed, BACKEND).missing == 0, suggestion
        assert changed != asked
        assert changed.max_num_tokens >= changed.max_batch_size
        if "--max-seq-len" in suggestion.options:
            longer = replace(changed, max_seq_len=changed.max_seq_len + block)
            assert longer.max_seq_len > asked.max_seq_len or account(longer, BACKEND).missing > 0


def test_error_says_by_how_much_and_what_would_fit():
    error = does_not_fit(sizing(gpu="l4", max_seq_len=131072), BACKEND)
    assert "too little memory on l4 for one sequence of 131072 tokens" in error.cause
    assert "weights" in error.cause and "16.1 GB" in error.cause
    assert "--max-seq-len" in error.remedy and "--gpus" in error.remedy


def test_a_model_larger_than_the_gpu_needs_more_gpus():
    error = does_not_fit(sizing(gpu="l4", compute_dtype="fp32", kv_dtype="fp32"), BACKEND)
    assert "--max-seq-len" not in error.remedy
    assert "--gpus 4" in error.remedy


def held_bytes(decoder):
    """Bytes of every distinct storage that the decoder's weights keep alive."""
    found = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, ResidentLinear):
            visit(value.weight)
            visit(value.bias)
            if value.activation is not None:
                kept = value.activation.__closure__
                for cell in kept:
                    visit(cell.cell_contents)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, (ResidentNorm, Mlp)):
            visit(vars(value))

    visit([decoder.top, decoder.layers])
    return sum(found.values())


@pytest.mark.parametrize("form", ["none", "fp8", "int8_sq", "int4_awq", "nvfp4"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_equal_what_the_op_set_holds(write_checkpoint, form, tied):
    """Linears that can't be fused: what is counted is what is held. Fused ones share scales, and hold a little less."""
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": tied}
    spec = spec_of(TINY, **config)
    for shared in (False, True):
        checkpoint = write_checkpoint(spec, form, shared_scales=shared, name=f"checkpoint-{shared}")
        store = weights.WeightStore.of_checkpoint(checkpoint)
        decoder = weights.load(store, TorchOps(spec, DTYPES["fp16"]))
        counted = BACKEND.weight_bytes(
            sizing(checkpoint.config, compute_dtype="fp16"), Shard(spec, ParallelMapping(), 0)
        )
        held = held_bytes(decoder)
        assert held == counted if form == "none" or not shared else 0.97 * counted < held <= counted


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_of_every_family_equal_what_the_op_set_holds(name):
    spec = spec_of(config_json(VARIANTS[name]))
    config = CheckpointConfig(spec, "bf16")
    expected = config.expected()
    store = weights.WeightStore(
        config, lambda name: torch.zeros(expected[name].shape, dtype=expected[name].dtype), expected.__contains__
    )
    held = held_bytes(weights.load(store, TorchOps(spec, DTYPES["bf16"])))
    assert held == BACKEND.weight_bytes(sizing(config), Shard(spec, ParallelMapping(), 0))


def test_a_latent_cache_holds_the_latent_alone():
    """DeepSeek V2-Lite: 27 layers of 512 + 64 numbers, where expanded keys and values would be 16 * (192 + 128)."""
    entry = next(entry for entry in published.entries() if entry["family"] == "deepseek_v2")
    ledger = account(sizing(CheckpointConfig(spec_of(entry["config"]), "bf16")), BACKEND)
    assert ledger.token_bytes == 27 * (512 + 64) * 2
