"""`trtx build --backend tensorrt-rtx` for GPUs that are not here; what it refuses, and how."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

pytest.importorskip("tensorrt_rtx")

from tests.converters import tiny
from tests.converters.families import dense
from tests.runtime.models import random_model
from trtx.builder.build import BuildSettings, build, prepare
from trtx.builder.engine import Engine
from trtx.builder.tensorrt import library
from trtx.builder.tensorrt.plan import _interruptible
from trtx.cli.app import app
from trtx.converters.errors import ExitCode, InputError, MismatchError, MissingPackageError, UnsupportedError
from trtx.runtime.llm import LLM

LIMITS = {"max_batch_size": 2, "max_num_tokens": 16, "max_seq_len": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny.of(dense.llama(num_hidden_layers=1, head_dim=16))
    return tiny.checkpoint_of(tiny.randomize(model, 0, 1.0), tmp_path_factory.mktemp("model"))


def settings(**changes) -> BuildSettings:
    return BuildSettings(**{"backend": "tensorrt-rtx", "gpu": "rtx-5090", "dtype": "bf16", **LIMITS, **changes})


@pytest.mark.parametrize(("gpu", "sm"), [("rtx-4090", "8.9"), ("rtx-5090", "12.0")])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_builds_for_a_gpu_that_is_not_here(checkpoint, gpu, sm, dtype, tmp_path):
    seen = []
    config = build(checkpoint, tmp_path / "engine", settings(gpu=gpu, dtype=dtype), progress=counting(seen))
    assert config.fingerprint.sm == sm
    assert config.fingerprint.versions["tensorrt_rtx"]
    assert config.limits.kv_blocks == 1 + 2, "a slot a sequence"
    assert config.ledger["kv_cache"] == 2 * 32 * 2 * 2 * 16 * 2, "2 slots of 32 tokens"
    engine = Engine(tmp_path / "engine")
    assert engine.plan.stat().st_size > 100_000
    facts = json.loads((tmp_path / "engine/manifest.json").read_text())["about"]
    assert facts["bindings"]["keys.*"] == f"[-1, 2, 32, 16] {'half' if dtype == 'fp16' else dtype}"
    assert facts["bindings"]["logits"] == "[-1, 96] float"
    assert not list(engine.rank(0).glob("*.safetensors")), "the plan holds the weights"
    assert sum(seen[1:]) >= 0.9 * seen[0], "progress reaches the end"


def counting(seen):
    """A `Progress` that notes the total and then each advance."""
    from contextlib import contextmanager

    @contextmanager
    def progress(total):
        seen.append(total)
        yield seen.append

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "bloom", "falcon-40b", "gpt_oss", "mixtral", "phi3-window", "opt"])
def test_every_kind_of_layer_compiles(name, tmp_path):
    """Masks, ALiBi, soft caps, sinks, experts, LayerNorm, partial RoPE: what the network holds, TensorRT compiles."""
    checkpoint = tiny.checkpoint_of(random_model(name), tmp_path)
    for gpu in ("rtx-4090", "rtx-5090"):
        build(checkpoint, tmp_path / gpu, settings(gpu=gpu))


def test_random_weights_are_in_the_plan(checkpoint, tmp_path):
    config = tiny.config_json(dense.llama(num_hidden_layers=1))
    (tmp_path / "config.json").write_text(json.dumps(config))
    built = build(f"random:{tmp_path / 'config.json'}", tmp_path / "engine", settings())
    assert built.random_seed is None and built.has_random_weights


def test_engine_is_refused_where_its_gpu_is_not(checkpoint, tmp_path):
    build(checkpoint, tmp_path / "engine", settings())
    with pytest.raises(MismatchError, match="rtx-5090"):
        LLM(tmp_path / "engine")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "h100-sxm"}, "9.0"),
        ({"gpu": "cpu"}, "does not run on cpu"),
        ({"gpu": "rtx-4090", "kv_cache_dtype": "fp8"}, "KV cache"),
    ],
)
def test_what_can_not_be_built_is_said_before_the_build(checkpoint, changes, words):
    with pytest.raises(UnsupportedError, match=words) as caught:
        prepare(checkpoint, settings(**changes))
    assert caught.value.remedy


@pytest.mark.parametrize(("name", "words"), [("deepseek_v3", "latent"), ("phimoe", "SparseMixer"), ("gemma", "12")])
def test_what_has_no_layers_is_refused(name, words, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        prepare(tiny.checkpoint_of(random_model(name), tmp_path), settings())


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_the_module(checkpoint, backend, monkeypatch):
    """Every other command works; this one says what to install."""
    flavor = library.FLAVORS[backend]
    monkeypatch.setitem(sys.modules, flavor.module, None)
    library.load.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match=flavor.module) as caught:
            prepare(checkpoint, settings(backend=backend))
        assert "pip install" in caught.value.remedy
        done = CliRunner().invoke(app, ["doctor", "--json"])
        rows = {row["name"]: row for row in json.loads(done.stdout)["backends"]}
        assert not rows[backend]["ready"] and "pip install" in rows[backend]["remedy"]
        assert done.exit_code == ExitCode.OK
    finally:
        library.load.cache_clear()


def test_a_refused_layer_is_named():
    import torch

    from trtx.builder.tensorrt.network import Network

    net = Network(library.FLAVORS["tensorrt-rtx"])
    a = net.input("a", torch.float32, (2, 3))
    b = net.input("b", torch.float16, (2, 3))
    with net.scope("layers.3.mlp"), pytest.raises(UnsupportedError, match=r"layers\.3\.mlp/sum"):
        net.binary(a, b, "SUM")


def test_an_error_of_input_stays_one(tmp_path):
    with pytest.raises(InputError):
        prepare(tmp_path, settings())


def test_ctrl_c_stops_a_build():
    """TensorRT stops when its monitor says so; the signal is not lost while it computes."""

    class Monitor:
        interrupted = False

    def build_until_told():
        for _ in range(1000):
            if Monitor.interrupted:
                return
            time.sleep(0.01)

    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        _interruptible(build_until_told, Monitor)
    assert Monitor.interrupted
