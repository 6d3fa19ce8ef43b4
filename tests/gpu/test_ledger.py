"""The ledger against CUDA's allocator: the worst steps of the torch op set never take more than was set aside.

And against the driver: what a process that serves an engine of the cuda backend takes of the GPU, its context included.
"""

import gc
import json
import subprocess
import sys

import pytest
import torch

from tests.builder.models import LLAMA_8B, sizing, spec_of
from tests.converters import published
from trtx.builder.build import BuildSettings, build
from trtx.builder.cuda import tune
from trtx.builder.engine import Engine
from trtx.builder.ledger import account
from trtx.builder.torch_backend import CONTEXT, TorchBackend
from trtx.converters.checkpoint import CheckpointConfig
from trtx.quantize.formats import DTYPES, E4M3, FORMATS, Quantization
from trtx.runtime import weights
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.runner import CudaRunner
from trtx.runtime.cuda.shapes import MOST_MIXED
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.sampler import Row, sample
from trtx.runtime.sampling import SamplingParams

pytestmark = pytest.mark.gpu

LAYERS = 3
ROW = Row(SamplingParams(temperature=1.0, top_p=0.9, logprobs=5), tokens=[1, 2], prompt_length=1, seed=1, index=0)


def random_store(model):
    expected = model.expected()

    def tensor(name):
        stored = expected[name]
        if stored.dtype.is_floating_point:
            return (0.02 * torch.rand(stored.shape, device="cuda")).to(stored.dtype)
        return torch.randint(0, 100, stored.shape, device="cuda").to(stored.dtype)

    return weights.WeightStore(model, tensor, expected.__contains__)


def worst_steps(asked, tables):
    """Steps that fill every limit: a decode batch beside a prefill chunk, chunks of all sequences, decodes alone."""
    batch, tokens, length = asked.max_batch_size, asked.max_num_tokens, asked.max_seq_len
    decode = SequenceSlice([1], length - 1, tables, 1)
    rest = tokens - batch + 1
    share = tokens // batch
    return [
        [decode] * (batch - 1) + [SequenceSlice([1] * rest, length - rest, tables, 1)],
        [SequenceSlice([1] * share, length - share, tables, 1)] * batch,
        [decode] * batch,
    ]


@torch.inference_mode()
@pytest.mark.parametrize(
    "form, compute, kv, batch, tokens, length",
    [
        ("none", "bf16", "bf16", 64, 2048, 8192),
        ("none", "bf16", "fp8", 64, 2048, 8192),
        ("none", "fp32", "fp32", 16, 2048, 4096),
        ("none", "bf16", "bf16", 2, 2048, 32768),
        ("none", "bf16", "bf16", 256, 256, 512),
        ("fp8", "bf16", "bf16", 4, 4096, 4096),
        ("int8_sq", "fp32", "fp32", 4, 4096, 4096),
        ("int4_awq", "bf16", "bf16", 4, 4096, 4096),
        ("nvfp4", "bf16", "bf16", 4, 4096, 4096),
        ("nvfp4", "fp32", "fp32", 4, 4096, 4096),
    ],
)
def test_worst_steps_fit(form, compute, kv, batch, tokens, length):
    spec = spec_of(LLAMA_8B, num_hidden_layers=LAYERS)
    assert_fits(spec, form, compute, kv, batch, tokens, length)


@torch.inference_mode()
@pytest.mark.parametrize(
    "family, layers",
    [("deepseek_v2", 2), ("gemma2", 2), ("gpt_oss", 2), ("bloom", 2), ("qwen3_moe", 2), ("falcon", 2), ("opt", 2)],
)
@pytest.mark.parametrize("batch, tokens, length", [(16, 2048, 2048), (64, 512, 1024)])
def test_worst_steps_of_other_families_fit(family, layers, batch, tokens, length):
    """Latents, soft caps, sinks, ALiBi, experts: what no fused kernel computes takes room of its own."""
    entry = next(entry for entry in published.entries() if entry["family"] == family)
    config = {**entry["config"], "num_hidden_layers": layers}
    spec = spec_of({key: value for key, value in config.items() if key != "layer_types"})
    length = min(length, spec.max_positions)
    # Many small tensors, of which the allocator rounds each up; that is what the reserve is for.
    assert_fits(spec, "none", "bf16", "bf16", batch, tokens, length, rounding=0.03, least=0.3)


def assert_fits(spec, form, compute, kv, batch, tokens, length, rounding=1e-3, least=0.6):
    """Weights are as large as the ledger says, and no step takes more than it set aside."""
    gc.collect()
    model = CheckpointConfig(spec, "bf16", Quantization(form, FORMATS[form].group_size(spec.hidden_size)))
    asked = sizing(
        model, compute_dtype=compute, kv_dtype=kv, max_batch_size=batch, max_num_tokens=tokens, max_seq_len=length
    )
    ledger = account(asked, TorchBackend())
    torch.zeros(1, 1, device="cuda").mm(torch.zeros(1, 1, device="cuda"))  # cuBLAS takes its workspace

    before = torch.cuda.memory_allocated()
    ops = TorchOps(spec, DTYPES[compute], "cuda", length)
    decoder = weights.load(random_store(model), ops)
    allocated = torch.cuda.memory_allocated() - before
    assert allocated == pytest.approx(ledger.weights, rel=rounding)

    kv_dtype = E4M3 if kv == "fp8" else DTYPES[kv]
    one = torch.ones((), device="cuda")
    scales = [(one, one)] * spec.num_layers if kv == "fp8" else None
    layout = KVLayout.of(spec, asked.kv_block_size, kv_dtype.itemsize)
    cache = TorchKVCache(layout, ledger.sequence_blocks + 1, kv_dtype, torch.device("cuda"), scales)
    tables = (list(range(1, ledger.sequence_blocks + 1)),) * len(layout.groups)

    def run(step):
        sample(decoder.forward(ops.step(step, cache)).float(), [ROW] * len(step))

    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for step in worst_steps(asked, tables):
        run(step)
    peak = torch.cuda.max_memory_allocated() - resting
    assert least * ledger.activations < peak <= ledger.activations + ledger.rope_tables


USED = ("weights", "kv_cache", "activations", "rope_tables", "workspace")
"""What an engine itself takes; the rest of the ledger is free, or reserve."""

DRAWN = Row(
    SamplingParams(temperature=1.0, top_k=50, top_p=0.9, presence_penalty=0.5, logprobs=5),
    tokens=[1, 2], prompt_length=1, seed=1, index=0,
)  # fmt: skip

ALONE = "import sys; from tests.gpu.test_ledger import serve_worst_steps; serve_worst_steps(sys.argv[1])"


def serve_worst_steps(path):
    """Serve the largest steps of an engine, twice, with and without draws, and mixed ones of as many shapes as are
    captured; print what the GPU has left, and torch."""
    runner, limits = CudaRunner(Engine(path)), Engine(path).config.limits
    blocks = runner.layout.blocks_for(limits.max_seq_len, limits.max_num_tokens)
    assert limits.kv_blocks > blocks
    tables = (list(range(1, blocks + 1)),) * len(runner.layout.groups)  # of every sequence: the same
    greedy = Row(SamplingParams(temperature=0), tokens=[1, 2], prompt_length=1, seed=1, index=0)
    for row in (DRAWN, greedy) * 2:
        for step in [*worst_steps(limits, tables), *mixed_steps(runner._steps.shapes, tables)]:
            (sampled,) = runner.collect(runner.launch(step, [row] * len(step)))
            assert all(it.token is not None for it in sampled)
    torch.cuda.synchronize()
    left = {  # torch keeps what it once took: what is left now was left at the peak
        "free": torch.cuda.mem_get_info()[0],
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    print(json.dumps(left))


def mixed_steps(shapes, tables):
    """A step of each of the largest mixed shapes."""
    for shape in shapes.mixed[-MOST_MIXED:]:
        decodes = max(1, shape.decodes - 1)
        prompt = SequenceSlice([1] * (shape.tokens - decodes), 0, tables, 1)
        if len(prompt.tokens) > 1:
            yield [SequenceSlice([1], 100, tables, 1)] * decodes + [prompt]


@pytest.mark.parametrize(
    "form, layers, least",
    [("none", 32, 0.97), ("fp8", 32, 0.97), ("int4_awq", 32, 0.97), ("none", 8, None)],
    ids=["bf16", "fp8", "int4", "8-layers"],
)
def test_a_process_takes_what_the_ledger_says(form, layers, least, tmp_path, monkeypatch, record_property):
    """On an H100 the KV cache of Llama-3.1-8B gets all that the budget leaves: the process takes that, and no more.

    With 8 layers full batches need less than there is, and what is estimated (activations, context, libraries) is a
    tenth: there the share is recorded only, since an estimate may be on the safe side.
    """
    monkeypatch.setattr(tune, "SECONDS", 0)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": layers}))
    settings = BuildSettings(
        backend="cuda", gpu="auto", max_batch_size=64, max_num_tokens=8192, max_seq_len=8192, random_format=form
    )
    ledger = build(f"random:{config}", tmp_path / "engine", settings).ledger

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path / "engine"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout.splitlines()[-1])
    used, planned = before - left["free"], sum(ledger[purpose] for purpose in USED)
    record_property("ledger", ledger)
    record_property("used_bytes", used)
    record_property("used_of_the_ledger", round(used / planned, 4))
    record_property("allocated_bytes", left["allocated"])
    record_property("reserved_bytes", left["reserved"])
    assert used <= planned
    assert left["allocated"] <= planned - CONTEXT["cuda"]
    if least is not None:
        assert used >= least * planned
