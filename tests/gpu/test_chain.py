"""The chain on a CUDA GPU with the torch op set: the same tokens as on the CPU."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.converters.tiny import FIRST, checkpoint_of
from tests.runtime.models import GREEDY, assert_greedy, engine_of, logits_of, random_model, relative_error
from tests.runtime.test_smollm2 import PROMPTS
from trtx.converters.checkpoint import Checkpoint
from trtx.quantize.pipeline import QuantizeSettings, quantize
from trtx.runtime.llm import LLM
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False,
}  # fmt: skip


def trtx(*arguments: object) -> str:
    """Run the command; returns its standard output."""
    command = [sys.executable, "-c", "from trtx.cli.app import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    trtx("convert", smollm2_gguf, out, "--dtype", "fp32")
    return out


def test_commands_give_the_cpu_s_tokens(checkpoint, smollm2_reference, gpu, tmp_path, record_property):
    """SmolLM2 in fp32: 64 greedy tokens on 20 prompts, by the command line on both devices."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": p}) + "\n" for i, p in enumerate(PROMPTS)))
    outputs = {}
    limits = ["--backend", "torch", "--max-batch-size", 8, "--max-num-tokens", 48, "--max-seq-len", 256]
    for device in ("auto", "cpu"):
        engine = tmp_path / device
        trtx("build", checkpoint, engine, "--gpu", device, *limits)
        options = ["--temperature", 0, "--max-tokens", 64, "--ignore-eos", "--json"]
        lines = trtx("run", engine, "--input", prompts, *options).splitlines()
        outputs[device] = [json.loads(line)["token_ids"] for line in lines]
    assert json.loads((tmp_path / "auto" / "engine.json").read_text())["fingerprint"]["device"] == "cuda"
    tokenizer = Tokenizer.load(checkpoint)
    for prompt, tokens in zip(PROMPTS, outputs["auto"], strict=True):
        assert len(tokens) == 64
        assert_greedy(smollm2_reference, tokenizer.encode(prompt), tokens)
    same = sum(a == b for a, b in zip(outputs["auto"], outputs["cpu"], strict=True))
    record_property("prompts_with_all_64_tokens_identical_to_the_cpu", f"{same} of {len(PROMPTS)}")


@pytest.mark.parametrize("family", FIRST)
def test_tiny_models_equal_the_cpu_and_transformers(family, tmp_path, record_property):
    """Every family in fp32: the CPU's logits, and tokens batched in flight with chunked prefill and scarce blocks."""
    model = random_model(FIRST[family])
    checkpoint = checkpoint_of(model, tmp_path)
    ids = torch.randint(80, (2, 90), generator=torch.Generator().manual_seed(1))
    error = relative_error(*(logits_on(device, checkpoint, ids) for device in ("cuda", "cpu")))
    record_property("largest_relative_difference", error)
    assert error < 1e-4
    settings = {"gpu": "auto", "backend": "torch", "max_num_tokens": 24, "kv_cache_memory": 192 << 10}
    llm = LLM(engine_of(checkpoint, tmp_path / "engine", **settings))
    assert llm.executor.runner.device.type == "cuda"
    rng = random.Random(family)
    prompts = [[rng.randrange(80) for _ in range(rng.randrange(1, 60))] for _ in range(20)]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert_greedy(model, prompt, completion.token_ids)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "fp8"])
def test_block_sizes_and_kv_dtypes_run(block_size, kv_dtype, tmp_path):
    """Tokens agree with the CPU's engine of the same settings, as far as rounding lets them."""
    checkpoint = checkpoint_of(random_model("qwen2-some-windows"), tmp_path)
    prompt = list(range(60))
    outputs = []
    for device in ("auto", "cpu"):
        settings = {"gpu": device, "backend": "torch", "kv_block_size": block_size, "kv_cache_dtype": kv_dtype}
        llm = LLM(engine_of(checkpoint, tmp_path / device, **settings))
        outputs.append(llm.generate([prompt], GREEDY)[0].token_ids)
    assert outputs[0][:8] == outputs[1][:8]


@pytest.mark.parametrize(
    ("form", "kv_cache"),
    [("none", "none"), ("fp8", "none"), ("int8_sq", "none"), ("int4_awq", "none"), ("nvfp4", "none"), ("fp8", "fp8")],
)
def test_quantized_on_the_gpu(form, kv_cache, checkpoint, tmp_path, record_property):
    """Quantize on the GPU; what was written means the same on both devices."""
    quantized = checkpoint
    if form != "none":
        quantized = tmp_path / "quantized"
        report = quantize(checkpoint, quantized, QuantizeSettings(form, kv_cache, device="cuda", max_ppl_increase=1000))
        record_property("perplexity_increase_percent", round(report.comparison.ppl_increase, 3))
    ids = torch.tensor([Tokenizer.load(quantized).encode("".join(PROMPTS[:12]))[:128]])
    on_gpu, on_cpu = (logits_on(device, quantized, ids) for device in ("cuda", "cpu"))
    record_property("largest_relative_difference", relative_error(on_gpu, on_cpu))
    record_property("kl_between_devices", divergence(on_gpu, on_cpu))
    if form in ("none", "int4_awq"):
        assert relative_error(on_gpu, on_cpu) < 1e-4
    else:
        # An activation at the edge between two codes may fall to either side, and later layers carry that on: the
        # devices may differ, but by less than the rounding itself costs.
        from_source = divergence(on_cpu, logits_on("cpu", checkpoint, ids))
        record_property("kl_from_source", from_source)
        assert divergence(on_gpu, on_cpu) < from_source


def logits_on(device: str, checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of whole sequences [B, S] in fp32 → [B, S, V] on the CPU."""
    opened = Checkpoint(checkpoint)
    return logits_of(opened, ids, TorchOps(opened.spec, torch.float32, device, max_positions=ids.shape[1]))


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean KL divergence of the next-token distributions from the reference's, in nats."""
    chosen, given = (x.flatten(0, -2).log_softmax(-1) for x in (logits, reference))
    return F.kl_div(chosen, given, log_target=True, reduction="batchmean").item()


def test_8b_engine_of_random_weights_runs_in_its_ledger(gpu, tmp_path, record_property):
    """Llama-3.1-8B's shape in bf16: built without storing weights, benchmarked, and never above its ledger."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    engine, report = tmp_path / "engine", tmp_path / "report.json"
    trtx("build", f"random:{config}", engine, "--backend", "torch", "--max-batch-size", 16, "--max-seq-len", 1024)
    options = ["--isl", 128, "--osl", 32, "--concurrency", 16, "--num-requests", 32]
    trtx("bench", engine, *options, "--output", report, "--json")
    record_property("bench", json.loads(report.read_text())["metrics"])
    ledger = json.loads((engine / "engine.json").read_text())["ledger"]
    gc.collect()
    before = torch.cuda.memory_allocated()
    llm = LLM(engine)
    torch.cuda.reset_peak_memory_stats()
    llm.generate([[i] * 100 for i in range(1, 17)], GREEDY)
    used = torch.cuda.max_memory_allocated() - before
    record_property("ledger", ledger)
    record_property("peak_allocated_bytes", used)
    planned = sum(ledger[purpose] for purpose in ("weights", "kv_cache", "activations", "rope_tables"))
    assert used < planned
