import json
import shutil

import pytest
import torch

from tests.builder.models import TINY, spec_of
from trtx.builder import build as library
from trtx.builder.build import BuildSettings, build, prepare, write
from trtx.builder.engine import Engine
from trtx.builder.gpus import Target
from trtx.converters.artifact import Manifest
from trtx.converters.errors import DoesNotFitError, InputError, MismatchError, OutputError, UnsupportedError
from trtx.converters.families import find_family
from trtx.converters.shards import tensor_bytes
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.weights import WeightStore, load

CPU = BuildSettings(gpu="cpu", dtype="fp32")


@pytest.fixture
def checkpoint(write_checkpoint):
    return write_checkpoint(spec_of(TINY, attention_bias=True))


@pytest.fixture
def random_config(tmp_path):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path


def on_cpu(**changes):
    return BuildSettings(**{"gpu": "cpu", "dtype": "fp32", **changes})


def parts_of(fused):
    layer, _, kind = fused.rpartition("attn.qkv") if "attn.qkv" in fused else fused.rpartition("mlp.gate_up")
    return [f"{layer}{p}{kind}" for p in (("attn.q", "attn.k", "attn.v") if "qkv" in fused else ("mlp.gate", "mlp.up"))]


@pytest.mark.parametrize("form", ["none", "fp8", "int8_sq", "int4_awq", "nvfp4"])
def test_weights_are_the_checkpoints_bit_for_bit(write_checkpoint, tmp_path, form):
    source = write_checkpoint(spec_of(TINY, attention_bias=True), form)
    build(source.path, tmp_path / "engine", CPU)
    engine = Engine(tmp_path / "engine")
    unused = set(source.shards)
    for name in engine.shards:
        found = engine.shards.tensor(name)
        sources = parts_of(name) if "qkv" in name or "gate_up" in name else [name]
        tensors = [source.tensor(part) for part in sources]
        expected = torch.cat(tensors) if found.shape != tensors[0].shape else tensors[0]
        assert found.dtype == expected.dtype
        assert tensor_bytes(found) == tensor_bytes(expected), name
        unused -= set(sources)
    assert not unused
    assert "layers.1.attn.qkv.weight" in engine.shards and "layers.1.attn.q.weight" not in engine.shards


@pytest.mark.parametrize("form", ["none", "int8_sq"])
def test_engine_computes_what_the_checkpoint_says(write_checkpoint, tmp_path, form):
    spec = spec_of(TINY, attention_bias=True)
    source = write_checkpoint(spec, form)
    build(source.path, tmp_path / "engine", CPU)
    engine = Engine(tmp_path / "engine")
    tokens = torch.arange(20)[None] * 4
    logits = []
    for store in (WeightStore.of_checkpoint(source), WeightStore.of_engine(engine, torch.device("cpu"))):
        ops = TorchOps(spec, torch.float32)
        logits.append(load(store, ops).forward(ops.uncached_step(tokens)))
    assert torch.equal(*logits)


def test_linears_whose_inputs_are_treated_differently_stay_apart(write_checkpoint, tmp_path):
    source = write_checkpoint(spec_of(TINY), "fp8", shared_scales=False)
    build(source.path, tmp_path / "engine", CPU)
    assert set(Engine(tmp_path / "engine").shards) == set(source.shards)


def test_weights_are_read_when_their_turn_comes(checkpoint, tmp_path, monkeypatch):
    blueprint = prepare(checkpoint.path, CPU)
    read = []
    monkeypatch.setattr(library.torch, "cat", lambda tensors: read.append(len(tensors)))
    assert sum(entry.bytes for entry in blueprint.entries) == sum(
        stored.bytes for stored in checkpoint.config.expected().values()
    )
    assert not read


def test_engine_says_what_it_is(checkpoint, tmp_path):
    config = build(checkpoint.path, tmp_path / "engine", on_cpu(max_batch_size=4, max_seq_len=128, kv_block_size=16))
    engine = Engine(tmp_path / "engine")
    assert engine.config == config
    limits = config.limits
    assert (limits.max_batch_size, limits.max_seq_len, limits.kv_blocks) == (4, 128, 1 + 4 * 8)
    assert (limits.kv_dtype, limits.max_num_tokens) == ("fp32", 512)
    assert config.fingerprint.device == "cpu" and config.fingerprint.sm == ""
    assert set(config.fingerprint.versions) == {"trtx", "torch"}
    assert (engine.path / "tokenizer.json").read_text() == (checkpoint.path / "tokenizer.json").read_text()
    manifest = Manifest.read(engine.path)
    assert manifest.settings["max_batch_size"] == 4
    assert manifest.inputs[0]["identity"] == Manifest.read(checkpoint.path).identity()
    assert not manifest.verify(engine.path)


def test_named_gpu(checkpoint, tmp_path):
    config = build(checkpoint.path, tmp_path / "engine", BuildSettings("torch", gpu="a100-80-sxm"))
    assert (config.fingerprint.device, config.fingerprint.gpu, config.fingerprint.sm) == ("cuda", "a100-80-sxm", "8.0")
    assert config.compute_dtype == "bf16"


def test_fp8_on_a_gpu_without_fp8_units_is_said(write_checkpoint):
    source = write_checkpoint(spec_of(TINY), "fp8")
    (text,) = prepare(source.path, BuildSettings("torch", gpu="a100-80-sxm")).notes
    assert "a100-80-sxm has no fp8 units" in text
    (text,) = prepare(source.path, BuildSettings("torch", gpu="h100-sxm")).notes
    assert "units" not in text and "dequantizes" in text
    assert not prepare(source.path, BuildSettings(gpu="h100-sxm")).notes, "the default backend multiplies in fp8"


def test_16_bit_dtype_on_a_cpu_without_instructions_for_it(checkpoint, monkeypatch):
    monkeypatch.setattr(library, "cpu_flags", lambda: "sse2 avx2")
    blueprint = prepare(checkpoint.path, BuildSettings(gpu="cpu"))
    assert blueprint.sizing.compute_dtype == "fp32"
    assert "bf16" in blueprint.notes[0]
    monkeypatch.setattr(library, "cpu_flags", lambda: "avx512_bf16")
    assert prepare(checkpoint.path, BuildSettings(gpu="cpu")).sizing.compute_dtype == "bf16"


# KV cache dtype.


def scales_of(engine):
    return {
        name: engine.shards.tensor(name).item() for name in engine.shards if name.endswith((".k_scale", ".v_scale"))
    }


def test_calibrated_fp8_cache(write_checkpoint, tmp_path):
    source = write_checkpoint(spec_of(TINY), kv_cache="fp8", shared_scales=False)
    assert build(source.path, tmp_path / "engine", CPU).limits.kv_dtype == "fp8"
    engine = Engine(tmp_path / "engine")
    assert len(scales_of(engine)) == 4
    assert all(value == source.tensor(name).item() for name, value in scales_of(engine).items())


def test_fp8_cache_without_scales_takes_1_and_says_so(checkpoint, tmp_path):
    blueprint = prepare(checkpoint.path, on_cpu(kv_cache_dtype="fp8"))
    assert "1.0 is used" in blueprint.notes[0]
    write(blueprint, tmp_path / "engine")
    assert set(scales_of(Engine(tmp_path / "engine")).values()) == {1.0}


def test_calibrated_scales_can_be_left_unused(write_checkpoint, tmp_path):
    source = write_checkpoint(spec_of(TINY), kv_cache="fp8")
    assert build(source.path, tmp_path / "engine", on_cpu(kv_cache_dtype="bf16")).limits.kv_dtype == "bf16"
    assert not scales_of(Engine(tmp_path / "engine"))


# Random weights.


def test_random_weights_are_kept_as_a_seed(random_config, tmp_path):
    config = build(f"random:{random_config}", tmp_path / "engine", on_cpu(seed=7))
    assert config.random_seed == 7 and config.has_random_weights
    assert config.model.spec == find_family(TINY, "").spec(TINY, "")
    assert config.model.dtype == "bf16"
    assert not list((tmp_path / "engine").rglob("*.safetensors"))
    assert Manifest.read(tmp_path / "engine").about["random_weights"] is True
    assert Engine(tmp_path / "engine").config == config


# Loading is strict.


def damaged(engine, change):
    """An engine whose engine.json was changed, with a manifest that does not notice (same size)."""
    path = engine / "engine.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["files"]["engine.json"]["bytes"] = path.stat().st_size
    (engine / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (lambda c: c.update(surprise=1), InputError, "unknown key 'surprise'"),
        (lambda c: c["limits"].pop("kv_blocks"), InputError, "missing key 'kv_blocks'"),
        (lambda c: c["limits"].update(kv_dtype="int3"), InputError, "kv_dtype"),
        (lambda c: c.update(format=99), MismatchError, "format 99"),
    ],
)
def test_engine_json_is_read_strictly(checkpoint, tmp_path, change, error, text):
    build(checkpoint.path, tmp_path / "engine", CPU)
    damaged(tmp_path / "engine", change)
    with pytest.raises(error, match=text):
        Engine(tmp_path / "engine")


def test_missing_shard(checkpoint, tmp_path):
    build(checkpoint.path, tmp_path / "engine", CPU)
    shutil.rmtree(tmp_path / "engine" / "rank0")
    with pytest.raises(InputError, match="is missing"):
        Engine(tmp_path / "engine")


# Bad input.


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"max_seq_len": 257}, InputError, "at most 256 tokens"),
        ({"kv_block_size": 20}, InputError, "--kv-block-size is 20"),
        ({"max_batch_size": 64, "max_num_tokens": 32}, InputError, "less than --max-batch-size"),
        ({"max_seq_len": 0}, InputError, "--max-seq-len is 0"),
        ({"osl": 0}, InputError, "--osl is 0"),
        ({"gpus": 0}, InputError, "at least 1"),
        ({"memory_fraction": 1.5}, InputError, "--memory-fraction"),
        ({"dtype": "int8"}, InputError, "--dtype is 'int8'"),
        ({"kv_cache_dtype": "int8"}, InputError, "--kv-cache-dtype is 'int8'"),
        ({"isl": 200, "osl": 100}, InputError, "make 300 tokens"),
        ({"gpu": "voodoo2"}, UnsupportedError, "voodoo2"),
        ({"backend": "cuda"}, UnsupportedError, "--backend cuda"),
        ({"gpus": 2}, UnsupportedError, "one rank"),
        ({"gpu": "l4", "gpus": 4, "tp": 2}, InputError, "2 ranks, not the 4"),
        ({"gpu": "l4", "tp": 3}, UnsupportedError, "3 does not divide 4 attention heads"),
        ({"kv_cache_memory": 1000}, DoesNotFitError, "too little memory on the KV cache"),
    ],
)
def test_bad_settings(checkpoint, tmp_path, changes, error, text):
    with pytest.raises(error, match=text) as caught:
        build(checkpoint.path, tmp_path / "engine", on_cpu(**changes))
    assert caught.value.remedy
    assert not (tmp_path / "engine").exists()


def test_more_than_one_rank_is_planned_and_not_built(checkpoint, tmp_path):
    blueprint = prepare(checkpoint.path, BuildSettings(gpu="h100-sxm", gpus=2))
    assert blueprint.sizing.mapping.ranks == 2
    assert [plan.problem for plan in blueprint.plans] == ["", ""]
    with pytest.raises(UnsupportedError, match="one GPU"):
        write(blueprint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_too_little_ram(checkpoint, monkeypatch):
    monkeypatch.setattr(library, "resolve", lambda name: Target("cpu", "cpu", None, 500 << 20))
    with pytest.raises(DoesNotFitError, match="too little memory on cpu"):
        prepare(checkpoint.path, CPU)


def test_hugging_face_folder(random_config, tmp_path):
    with pytest.raises(InputError, match="is a Hugging Face checkpoint") as caught:
        build(random_config.parent, tmp_path / "engine", CPU)
    assert "trtx convert" in caught.value.remedy


def test_engine_given_instead_of_a_checkpoint(checkpoint, tmp_path):
    build(checkpoint.path, tmp_path / "engine", CPU)
    with pytest.raises(InputError, match="is a trtx engine"):
        build(tmp_path / "engine", tmp_path / "again", CPU)


def test_target_exists(checkpoint, tmp_path):
    build(checkpoint.path, tmp_path / "engine", CPU)
    with pytest.raises(OutputError, match="exists already"):
        build(checkpoint.path, tmp_path / "engine", CPU)
    build(checkpoint.path, tmp_path / "engine", on_cpu(max_batch_size=2), force=True)
    assert Engine(tmp_path / "engine").config.limits.max_batch_size == 2
