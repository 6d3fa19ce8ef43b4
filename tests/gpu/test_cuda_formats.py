"""Whole engines of the cuda backend in every weight format, and with an fp8 KV cache, beside the torch op set.

One checkpoint a format is built three times: for the cuda backend in bf16, and for torch in bf16 and fp32. Each of them
computes the same steps with a cache of its own. Formats that round their inputs turn a difference of one rounding into
one of a whole code, so two implementations in bf16 differ by more than bf16's epsilon; but one that computes what the
stored tensors mean is, over many logits, about as far from fp32 as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.builder.models import LLAMA_8B, spec_of
from tests.runtime.models import engine_of
from trtx.builder.build import BuildSettings, prepare
from trtx.builder.cuda.kernels import compile_kernels
from trtx.builder.cuda.trace import required_kernels
from trtx.builder.engine import Engine
from trtx.builder.shard import Shard
from trtx.converters.artifact import create
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.shards import Entry, write_shards
from trtx.converters.spec import Kind, Module
from trtx.quantize.formats import E4M3_MAX, FORMATS, Quantization
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.runner import CudaRunner
from trtx.runtime.runner import TorchRunner
from trtx.runtime.weights import fused_groups

pytestmark = pytest.mark.gpu

SMALL = {
    **LLAMA_8B, "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True,
}  # fmt: skip
"""Inputs in multiples of 512 and groups of 128, which the kernel for int4 in CUDA C++ asks for; biases."""

SEQUENCES, LENGTH, BLOCK = 48, 64, 16
LIMITS = {
    "gpu": "auto", "max_batch_size": SEQUENCES, "max_num_tokens": 192, "max_seq_len": LENGTH, "kv_block_size": BLOCK,
}  # fmt: skip

CASES = [*((form, "none") for form in FORMATS), ("none", "fp8"), ("fp8", "fp8")]
"""Weight format and KV cache."""

MORE = 1.3
"""How much farther from fp32 than torch in bf16 the cuda backend may be."""

LEVELS = {"int8_sq": 127.0, "nvfp4": 6 * E4M3_MAX}
"""What the largest input becomes in units of `input_scale`; E4M3_MAX elsewhere."""

LARGEST = {"qkv": 4.5, "o": 4.0, "gate_up": 4.5, "down": 3.0}
"""The largest inputs of the linears that the scales reach; a few are larger and saturate."""


def checkpoint_in(folder: Path, form: str, kv_cache: str) -> Path:
    """A random checkpoint whose activations are about 1; linears that read one input share its scale, and so fuse."""
    spec, generator = spec_of(SMALL), torch.Generator().manual_seed(0)
    quantization = Quantization(form, FORMATS[form].group_size(SMALL["hidden_size"]), kv_cache)
    config = CheckpointConfig(spec, "bf16", quantization)
    tensors: dict[str, Tensor] = {}

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    for module in spec.modules():
        if module.kind is Kind.NORM:
            tensors[f"{module.name}.weight"] = 1 + normal(*module.shape, std=0.1)
        elif module.kind is not Kind.LINEAR:
            tensors[f"{module.name}.weight"] = normal(*module.shape)
        if module.bias:
            tensors[f"{module.name}.bias"] = normal(module.shape[0], std=0.3)
    for name, modules in fused_groups(config):
        tensors |= packed(name, modules, quantization, normal)
    for layer in range(spec.num_layers if kv_cache == "fp8" else 0):
        tensors |= {f"layers.{layer}.attn.{which}": torch.tensor(5 / E4M3_MAX) for which in ("k_scale", "v_scale")}

    def entry(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        tensor = tensors[name].to(dtype)
        return Entry(name, dtype, shape, lambda: tensor)

    with create(folder, kind="checkpoint", command="convert", settings={}) as draft:
        config.write(draft)
        write_shards(draft, [entry(name, it.dtype, it.shape) for name, it in config.expected().items()])
    return folder


def packed(
    name: str, modules: list[Module], quantization: Quantization, normal: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What is stored for linears that read one input, packed as one and cut into their rows."""
    first, heights = modules[0], [module.shape[0] for module in modules]
    form, width, kind = quantization.format_of(first), first.shape[1], name.rpartition(".")[2]
    whole = form.pack(normal(sum(heights), width, std=width**-0.5), quantization.group_size)
    if "input_scale" in form.input_tensors:
        whole["input_scale"] = torch.tensor(LARGEST[kind] / LEVELS.get(form.name, E4M3_MAX))
    if "pre_quant_scale" in form.input_tensors:
        whole["pre_quant_scale"] = 0.5 + normal(width, std=0.1).abs()
    for suffix, meaning in form.stored(sum(heights), width, quantization.group_size, torch.bfloat16).items():
        rows = [height // meaning.rows for height in heights] if meaning.rows else []
        parts = whole[suffix].split(rows) if rows else [whole[suffix]] * len(modules)
        yield from ((f"{module.name}.{suffix}", part) for module, part in zip(modules, parts, strict=True))


def steps() -> Iterator[tuple[str, list[SequenceSlice]]]:
    """Steps of random tokens by what they are, so that every linear is multiplied in all its ways."""
    tokens = torch.randint(
        SMALL["vocab_size"], (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1)
    ).tolist()
    blocks, lengths = LENGTH // BLOCK, [0] * SEQUENCES
    tables = [([*range(1 + blocks * i, 1 + blocks * (i + 1))],) for i in range(SEQUENCES)]

    def pieces(sequences: range, count: int) -> list[SequenceSlice]:
        found = []
        for i in sequences:
            start, lengths[i] = lengths[i], lengths[i] + count
            found.append(SequenceSlice(tokens[i][start : lengths[i]], start, tables[i], 1))
        return found

    yield "192 tokens", pieces(range(SEQUENCES), 4)
    yield "40 tokens", pieces(range(8), 5)
    yield "decodes beside chunks", [*pieces(range(8, 40), 1), *pieces(range(8), 5)]
    for kind, count, times in (("48 decodes", SEQUENCES, 2), ("5 decodes", 5, 6), ("1 decode", 1, 12)):
        for _ in range(times):
            yield kind, pieces(range(count), 1)
    for i in range(8, SEQUENCES):
        yield "prompts of 20 tokens", pieces(range(i, i + 1), 20)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A checkpoint for each case; what their engines need is compiled at once, which builds then take from a cache."""
    folder = tmp_path_factory.mktemp("formats")
    found = {case: checkpoint_in(folder / "-".join(case), *case) for case in CASES}
    variants = {}
    for checkpoint in found.values():
        blueprint = prepare(checkpoint, BuildSettings(backend="cuda", **LIMITS))
        sizing = blueprint.sizing
        layout = blueprint.backend.kv_layout(sizing, Shard(sizing.model.spec, sizing.mapping, 0))
        variants |= dict.fromkeys(required_kernels(sizing, layout, blueprint.store))
    compile_kernels(list(variants), sizing.target.gpu.sm, folder / "kernels")
    return found


@torch.inference_mode()
@pytest.mark.parametrize(("form", "kv_cache"), CASES)
def test_as_near_to_fp32_as_torch_in_bf16(form, kv_cache, checkpoints, tmp_path, record_property):
    def engine(backend: str, dtype: str) -> Engine:
        settings = {**LIMITS, "backend": backend, "dtype": dtype}
        return Engine(engine_of(checkpoints[form, kv_cache], tmp_path / f"{backend}-{dtype}", **settings))

    ours, theirs, exact = (
        CudaRunner(engine("cuda", "bf16")), TorchRunner(engine("torch", "bf16")), TorchRunner(engine("torch", "fp32")),
    )  # fmt: skip
    assert ours.layout.itemsize == (1 if kv_cache == "fp8" else 2)
    logits: dict[str, list[tuple[Tensor, ...]]] = {}
    for kind, batch in steps():
        found = ours._steps.logits(batch)[: len(batch)].double()
        torch_s = [runner.decoder.forward(runner.ops.step(batch, runner.cache)).double() for runner in (theirs, exact)]
        logits.setdefault(kind, []).append((found, *torch_s))
    errors = {kind: errors_of(*map(torch.cat, zip(*rows, strict=True))) for kind, rows in logits.items()}
    record_property("error_and_torch_s", {kind: [float(f"{e:.3g}") for e in both] for kind, both in errors.items()})
    for kind, (mine, other) in errors.items():
        assert 0 < other < 0.25, f"{kind}: the reference is no measure"
        assert mine < MORE * other, kind


def errors_of(found: Tensor, reference: Tensor, exact: Tensor) -> tuple[float, float]:
    """How far logits [R, V] are from the exact ones, relative to these."""
    assert found.isfinite().all()
    return tuple(((it - exact).norm() / exact.norm()).item() for it in (found, reference))
