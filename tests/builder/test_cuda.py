"""The backend `cuda`: engines built for GPUs that are not here, with their kernels in machine code."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from tests.builder.models import TINY, llama_8b, sizing, spec_of
from trtx.builder import build as library
from trtx.builder.build import Blueprint, BuildSettings, build, prepare
from trtx.builder.cuda import kernels
from trtx.builder.cuda.backend import CudaBackend
from trtx.builder.cuda.kernels import SHARED_BYTES, compile_kernels
from trtx.builder.cuda.trace import recorded, required_kernels
from trtx.builder.engine import Engine
from trtx.builder.gpus import Target, table
from trtx.builder.ledger import account
from trtx.builder.shard import Shard
from trtx.converters.artifact import Manifest
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.errors import MissingPackageError, UnsupportedError
from trtx.converters.shards import tensor_bytes
from trtx.converters.spec import Kind
from trtx.quantize.formats import FORMATS, Quantization
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.cubins import INDEX, Cubin
from trtx.runtime.cuda.launch import RecordLaunch, Variant
from trtx.runtime.cuda.linear import kernel_layout
from trtx.runtime.cuda.load import loaded_store
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.step import Shape
from trtx.runtime.sampler import Row
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore, fused_groups, load

ELF_MACHINE_CUDA = 190
"""`e_machine` of NVIDIA's machine code, in the ELF header."""


@pytest.fixture(scope="module", autouse=True)
def empty_caches(tmp_path_factory):
    """Caches of this file's own, trtx's and Triton's: what is compiled here is not taken from elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("trtx")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def checkpoint(write_checkpoint):
    return write_checkpoint(spec_of(TINY)).path


@pytest.fixture
def random_source(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return f"random:{path}"


@pytest.fixture
def no_workers(monkeypatch):
    """Starting a compiler fails the test."""
    monkeypatch.setattr(kernels.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a compiler was started"))


def small(**changes) -> BuildSettings:
    limits = {"max_batch_size": 1, "max_num_tokens": 2, "max_seq_len": 64, "kv_block_size": 16}
    return BuildSettings(**{"gpu": "h100-sxm", **limits, **changes})


def kernels_of(blueprint: Blueprint) -> list[Variant]:
    asked = blueprint.sizing
    layout = blueprint.backend.kv_layout(asked, Shard(asked.model.spec, asked.mapping, 0))
    return required_kernels(asked, layout, blueprint.store)


def index_of(engine: Path) -> list[Cubin]:
    return [Cubin.from_json(entry) for entry in json.loads((engine / "rank0" / "kernels" / INDEX).read_text())]


def assert_is_machine_code(code: bytes, sm: str, symbol: str) -> None:
    """An ELF file of NVIDIA's, for one compute capability, with an entry point."""
    assert code[:4] == b"\x7fELF" and int.from_bytes(code[18:20], "little") == ELF_MACHINE_CUDA
    flags = int.from_bytes(code[48:52], "little")
    assert int(sm.replace(".", "")) in (flags & 0xFF, flags >> 8 & 0xFF)
    assert symbol.encode() + b"\0" in code


def test_engine_of_a_named_gpu_holds_its_kernels(checkpoint, tmp_path, monkeypatch):
    """The default backend: an engine with the checkpoint's weights and every kernel that its steps ask for."""
    out = tmp_path / "engine"
    config = build(checkpoint, out, small())
    engine = Engine(out)
    assert engine.config == config and config.backend == "cuda"
    assert config.fingerprint.sm == "9.0" and config.fingerprint.versions["triton"] == version("triton")
    index = index_of(out)
    assert {cubin.variant for cubin in index} == set(kernels_of(prepare(checkpoint, small())))
    assert {"linear.gemv", "cu.few", "cu.decode", "attention.prefill", "sampling.draw"} <= {
        cubin.variant.kernel for cubin in index
    }
    for cubin in index:
        assert_is_machine_code((out / "rank0" / "kernels" / cubin.file).read_bytes(), "9.0", cubin.symbol)
        assert cubin.shared_bytes <= SHARED_BYTES["9.0"]
    manifest = Manifest.read(out)
    assert {f"rank0/kernels/{cubin.file}" for cubin in index} | {f"rank0/kernels/{INDEX}"} <= set(manifest.files)
    assert manifest.about["kernels"] == len(index) and not manifest.verify(out)
    assert "layers.1.attn.qkv.weight" in engine.shards


def test_second_build_compiles_nothing(checkpoint, random_source, tmp_path, no_workers):
    """Also with random weights, whose kernels are the same; after the test before, all are in the cache."""
    for number, source in enumerate([checkpoint, checkpoint, random_source]):
        build(source, tmp_path / str(number), small(seed=3))
    found = [index_of(tmp_path / str(number)) for number in range(3)]
    assert found[0] == found[1] == found[2]
    assert Engine(tmp_path / "2").config.random_seed == 3 and not list((tmp_path / "2").rglob("*.safetensors"))


@pytest.mark.parametrize("change", ["sources", "version", "gpu"])
def test_other_sources_compiler_or_gpu_compile_again(random_source, tmp_path, no_workers, monkeypatch, change):
    if change == "sources":
        monkeypatch.setattr(kernels, "_sources", lambda: "others")
    if change == "version":
        monkeypatch.setattr(kernels, "triton_version", lambda: "0.0")
    gpu = "b200" if change == "gpu" else "h100-sxm"
    with pytest.raises(pytest.fail.Exception, match="a compiler was started"):
        build(random_source, tmp_path / "engine", small(gpu=gpu))
    assert not (tmp_path / "engine").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100-80-sxm", "l4", "b200", "rtx-5090"])
def test_kernels_compile_for_other_gpus(random_source, tmp_path, gpu):
    blueprint = prepare(random_source, small(gpu=gpu))
    sm = blueprint.config().fingerprint.sm
    wanted = kernels_of(blueprint)
    for cubin in compile_kernels(wanted, sm, tmp_path):
        assert_is_machine_code((tmp_path / cubin.file).read_bytes(), sm, cubin.symbol)
        assert cubin.shared_bytes <= SHARED_BYTES[sm]
    assert any(variant.pdl for variant in wanted) == (sm not in ("8.0", "8.9")), "sm_90 and newer launch dependently"


# What goes wrong.


def test_without_triton(random_source, tmp_path, monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(kernels, "version", missing)
    with pytest.raises(MissingPackageError, match="Triton, which is not installed") as caught:
        build(random_source, tmp_path / "engine", small())
    assert "pip install 'triton" in caught.value.remedy


def test_gpu_that_kernels_are_not_compiled_for(random_source, monkeypatch):
    turing = Target("cuda", "t4", replace(table()["l4"], name="t4", sm="7.5"), 16 << 30)
    monkeypatch.setattr(library, "resolve", lambda name: turing)
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5 \(t4\)") as caught:
        prepare(random_source, small(gpu="t4"))
    assert "--backend torch" in caught.value.remedy
    assert prepare(random_source, small(gpu="t4", backend="torch")).backend.name == "torch"


def test_every_cuda_gpu_of_the_table_is_compiled_for():
    assert {row.sm for row in table().values()} <= set(SHARED_BYTES)


def test_interrupted_compilation_leaves_nothing(random_source, tmp_path, monkeypatch):
    """No engine, no temporary folder, no compiler that goes on."""
    started = []

    def start(*args, **kwargs):
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "_sources", lambda: "never compiled")
    monkeypatch.setattr(kernels, "_start_worker", start)
    monkeypatch.setattr(kernels, "_feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(random_source, tmp_path / "engine", small())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert started and all(worker.returncode is not None for worker in started)


def resolve_variant(**constants) -> Variant:
    """The smallest kernel."""
    values = {"BLOCK": 128, "PDL": False, **constants}
    types = ("*i32", "*i32", "*i32", "*i32", "i32")
    return Variant("step.resolve", types, tuple(sorted(values.items())), warps=4, stages=2, pdl=False)


def test_kernel_that_does_not_compile_is_named(tmp_path):
    message = r"(?s)step\.resolve.*can't be compiled for compute capability 9\.0: .*power of 2"
    with pytest.raises(RuntimeError, match=message):
        compile_kernels([resolve_variant(BLOCK=100)], "9.0", tmp_path)
    assert not list(tmp_path.iterdir())


def test_kernel_that_takes_too_much_shared_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(SHARED_BYTES, "9.0", -1)
    with pytest.raises(RuntimeError, match="more than there are"):
        compile_kernels([resolve_variant(BLOCK=256)], "9.0", tmp_path)


def test_compiler_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.sys, "executable", "true")
    with pytest.raises((RuntimeError, BrokenPipeError)):
        compile_kernels([resolve_variant(BLOCK=512)], "9.0", tmp_path)


# Memory.


@pytest.mark.parametrize("form", ["none", "fp8", "int4_awq"])
def test_ledger_adds_up(form):
    ledger = account(sizing(llama_8b().with_quantization(Quantization(form, 128))), CudaBackend())
    assert sum(ledger.rows.values()) == 80 * 10**9 and ledger.missing == 0
    if form == "none":
        assert ledger.weights == 2 * 8_030_261_248, "in bf16, as Meta counts the parameters"


@pytest.mark.parametrize("tokens, batch", [(8, 4), (24, 8), (24, 20), (64, 8)])
def test_kernels_of_any_step_are_there(tokens, batch):
    """However few of a step's tokens want logits, or are decodes; codes of 8 bits begin at 17 tokens."""
    spec = spec_of(TINY, num_attention_heads=8, num_key_value_heads=8)
    asked = sizing(
        CheckpointConfig(spec, "bf16", Quantization("fp8")), max_batch_size=batch, max_num_tokens=tokens,
        max_seq_len=64,
    )  # fmt: skip
    layout = CudaBackend().kv_layout(asked, Shard(asked.model.spec, asked.mapping, 0))
    known = set(required_kernels(asked, layout))
    launch, steps = recorded(asked, layout)
    with torch.inference_mode():
        for count, rows, decodes in [(17, 1, 0), (tokens, 1, 0), (tokens, 2, 2), (tokens, 3, 1), (tokens, 4, 3)]:
            if count <= tokens:
                steps.compute("mixed", Shape(count, max(rows, decodes), rows, 2, decodes))
        row, rng = Row(SamplingParams(temperature=0), [1], 1, 0, 0), random.Random(0)
        for _ in range(20):
            decodes = rng.randrange(batch + 1)
            prompts = rng.randrange(not decodes, batch - decodes + 1)
            counts, left = [1] * decodes, tokens - decodes
            while len(counts) < decodes + prompts and left > 1:
                counts.append(rng.randint(2, left))
                left -= counts[-1]
            slices = [SequenceSlice([1] * count, 0, ([1],), 1) for count in counts]
            steps.launch(slices, [row] * len(slices))
    assert launch.variants.keys() <= known


def test_mixed_steps_launch_the_same_kernels_by_themselves_and_in_graphs():
    """A shape's first step, those that are replayed, and those that there is no room for."""
    asked = sizing(CheckpointConfig(spec_of(TINY), "bf16"), max_batch_size=8, max_num_tokens=64, max_seq_len=64)
    layout = CudaBackend().kv_layout(asked, Shard(asked.model.spec, asked.mapping, 0))
    launch, steps = recorded(asked, layout)
    captured: list[list[Variant]] = []

    class Graphs:
        def capture(self, compute):
            launch.variants.clear()
            compute()
            captured.append(list(launch.variants))
            return compute

    row = Row(SamplingParams(temperature=0), [1], 1, 0, 0)
    slices = [SequenceSlice([1] * count, 0, ([1],), 1) for count in (1, 1, 20)]
    with torch.inference_mode():
        steps.logits(slices)
        eager = list(launch.variants)
        steps._graphs = Graphs()
        steps.launch(slices, [row] * 3)
        assert captured == [eager]
        launch.variants.clear()
        steps.logits(slices[:1] + slices[2:])
    assert list(launch.variants) == eager and len(captured) == 1


# Weights in kernel layout.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shared", [True, False], ids=["fused", "apart"])
def test_engine_holds_the_kernel_layout_of_the_stored_weights(write_checkpoint, tmp_path, monkeypatch, form, shared):
    """Linears whose inputs are treated alike are one, the others are apart; what is no linear is as it was."""
    monkeypatch.setattr(CudaBackend, "add_kernels", lambda *args: None)
    source = write_checkpoint(spec_of(TINY, attention_bias=True), form, shared_scales=shared)
    build(source.path, tmp_path / "engine", small())
    engine, store = Engine(tmp_path / "engine"), WeightStore.of_checkpoint(source)
    expected = {}
    for module in source.spec.modules():
        if module.kind is not Kind.LINEAR:
            expected[f"{module.name}.weight"] = store.tensor(f"{module.name}.weight")
    for name, modules in fused_groups(source.config):
        for weight in store.group(name, modules):
            for suffix, tensor in kernel_layout(weight, torch.bfloat16).items():
                expected[f"{weight.name}.{suffix}"] = tensor
    assert set(engine.shards) == set(expected)
    for name, tensor in expected.items():
        found = engine.shards.tensor(name)
        assert found.dtype == tensor.dtype and tensor_bytes(found) == tensor_bytes(tensor.contiguous()), name
    assert_same_decoder(engine, store)


def assert_same_decoder(engine: Engine, checkpoint: WeightStore) -> None:
    """What a runner makes of an engine's tensors is what becomes of the checkpoint's."""
    spec, cpu = engine.config.model.spec, torch.device("cpu")
    decoders = [
        load(store, CudaOps(spec, torch.bfloat16, cpu, 64, RecordLaunch(), laid_out))
        for store, laid_out in (loaded_store(engine, cpu), (checkpoint, False))
    ]
    ours, theirs = ([decoder.top, *decoder.layers] for decoder in decoders)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            for one, other in zip(flat(found[name]), flat(wanted), strict=True):
                assert one.dtype == other.dtype and tensor_bytes(one) == tensor_bytes(other.contiguous()), name


def flat(weight: object) -> list[torch.Tensor]:
    """The tensors of whatever an op set made of a weight."""
    fields = getattr(weight, "__dict__", {}) | getattr(weight, "_asdict", dict)()
    parts = weight if isinstance(weight, (list, tuple)) else fields.values()
    return [weight] if isinstance(weight, torch.Tensor) else [tensor for part in parts for tensor in flat(part)]
