"""The cost model against figures worked out by hand and against torch's own FLOP counter."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.builder.models import TINY, llama_8b, spec_of
from trtx.builder import cost
from trtx.builder.engine import EngineConfig, Fingerprint, Limits, ParallelMapping
from trtx.converters.checkpoint import CheckpointConfig
from trtx.quantize.formats import Quantization

LAYER = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
LINEARS = 32 * LAYER
HEAD = 128256 * 4096
NORMS = 65 * 4096


def engine(model, kv_dtype="bf16", compute="bf16"):
    limits = Limits(1, 1, 1024, 32, 33, kv_dtype)
    return EngineConfig("torch", model, compute, limits, ParallelMapping(), Fingerprint("cpu", "cpu", ""), {})


def test_weights_of_llama_8b():
    assert cost.weight_bytes(llama_8b()) == 2 * (LINEARS + HEAD + NORMS)


def test_kv_of_llama_8b_is_128_kib_a_token():
    model = llama_8b()
    assert cost.decode_bytes(model, 3, 1000) - cost.weight_bytes(model) == 3 * 1000 * 128 * 1024


def test_quantized_checkpoint_counts_as_stored_and_engine_as_resident():
    model = llama_8b().with_quantization(Quantization("fp8", kv_cache="fp8"))
    scales = 32 * 7 * 2 * 4
    assert cost.weight_bytes(model) == LINEARS + 2 * (HEAD + NORMS) + scales
    assert cost.decode_bytes(model, 1, 8) - cost.weight_bytes(model) == 8 * 64 * 1024
    assert cost.weight_bytes(engine(model)) == 2 * (LINEARS + HEAD + NORMS)
    assert cost.decode_bytes(engine(model, "fp8"), 1, 8) - cost.weight_bytes(engine(model)) == 8 * 64 * 1024


def test_tied_embedding_is_read_once():
    tied = CheckpointConfig(spec_of(TINY, tie_word_embeddings=True), "fp32")
    assert cost.weight_bytes(tied) == 4 * tied.spec.parameters


def test_window_bounds_what_is_read():
    spec = spec_of(TINY, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16)
    assert cost.kv_read_bytes(spec, "fp16", 100) == cost.kv_read_bytes(spec, "fp16", 16) == 16 * 2 * 2 * 2 * 16 * 2


def test_prefill_in_chunks_costs_the_same_but_for_the_logits():
    model = llama_8b()
    whole = cost.prefill_flops(model, 1000)
    chunks = cost.prefill_flops(model, 600) + cost.prefill_flops(model, 400, before=600)
    assert chunks - whole == 2 * HEAD


@pytest.mark.parametrize("window", [None, 8])
def test_flops_equal_torchs_count(window):
    """Attention with every (query, key) pair counted apart, as causal attention within a window has them."""
    length = 24
    family = ("MistralForCausalLM", "mistral") if window else ("LlamaForCausalLM", "llama")
    spec = spec_of(TINY, architectures=[family[0]], model_type=family[1], **({"sliding_window": 8} if window else {}))
    with FlopCounterMode(display=False) as counter:
        for module in spec.modules():
            if module.name.startswith("layers.") and len(module.shape) == 2:
                torch.ones(length, module.shape[1]) @ torch.ones(module.shape[1], module.shape[0])
        torch.ones(1, spec.hidden_size) @ torch.ones(spec.hidden_size, spec.vocab_size)
        for _ in range(spec.num_layers * spec.num_heads):
            for position in range(length):
                keys = min(position + 1, window or length)
                scores = torch.ones(1, spec.head_dim) @ torch.ones(spec.head_dim, keys)
                scores @ torch.ones(keys, spec.head_dim)
    assert cost.prefill_flops(CheckpointConfig(spec, "fp32"), length) == counter.get_total_flops()


def test_decode_flops_are_those_of_a_last_token():
    model = llama_8b()
    assert cost.decode_flops(model, 4, 512) == 4 * cost.prefill_flops(model, 1, before=511)


def test_module_does_not_import_torch():
    program = "import sys, trtx.builder.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
