"""`trtx inspect` on directories made with the library, sound and damaged."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from trtx.cli.app import app
from trtx.converters.artifact import create
from trtx.converters.errors import ExitCode

runner = CliRunner(env={"COLUMNS": "80"})
SPEC = {"num_layers": 30, "windows": [None] * 30, "tied_embeddings": True}


def look(*arguments):
    return runner.invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    inputs = [{"path": "/models/smol.gguf", "identity": "ab"}]
    settings = {"dtype": "bf16"}
    with create(path, kind="checkpoint", command="convert", settings=settings, inputs=inputs) as draft:
        draft.write_json(
            "config.json", {"format": 1, "dtype": "bf16", "quantization": {"format": "none"}, "spec": SPEC}
        )
        save_file({"final_norm.weight": torch.ones(8, dtype=torch.bfloat16)}, draft.path / "model.safetensors")
        draft.describe(parameters=134_515_008)
    return path


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "engine"
    with create(path, kind="engine", command="build", settings={}) as draft:
        draft.write_json("engine.json", {"format": 1, "backend": "torch", "ledger": {"weights": 270_000_000}})
        (draft.path / "rank0").mkdir()
        save_file({"embed.weight": torch.ones(4, 2)}, draft.path / "rank0" / "weights.safetensors")
    return path


def test_checkpoint(checkpoint):
    done = look(checkpoint)
    assert done.exit_code == ExitCode.OK
    for text in (
        "trtx checkpoint",
        "trtx convert",
        "134,515,008",
        "30 × none",
        "/models/smol.gguf",
        "model.safetensors",
    ):
        assert text in done.stdout


def test_engine_shows_its_ledger_in_units(engine):
    done = look(engine)
    assert done.exit_code == ExitCode.OK
    for text in ("trtx engine", "trtx build", "ledger", "270.0 MB", "rank0/weights.safetensors"):
        assert text in done.stdout


def test_json(checkpoint):
    data = json.loads(look(checkpoint, "--json").stdout)
    assert data["kind"] == "checkpoint"
    assert data["settings"] == {"dtype": "bf16"}
    assert data["description"]["spec"] == SPEC
    assert data["bytes"] == sum(facts["bytes"] for facts in data["files"].values())
    assert "tensors" not in data


def test_tensors(checkpoint, engine):
    (tensor,) = json.loads(look(checkpoint, "--tensors", "--json").stdout)["tensors"]
    assert tensor == {"name": "final_norm.weight", "dtype": "bfloat16", "shape": [8], "file": "model.safetensors"}
    assert "4 × 2" in look(engine, "--tensors").stdout


def test_verify_finds_a_flipped_byte(checkpoint):
    assert look(checkpoint, "--verify").exit_code == ExitCode.OK
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    assert look(checkpoint).exit_code == ExitCode.OK, "size is what it was: only --verify can see it"
    done = look(checkpoint, "--verify", "--json")
    assert done.exit_code == ExitCode.INPUT
    assert json.loads(done.stdout)["differs"] == ["model.safetensors"]
    assert "model.safetensors" in done.stderr


def test_truncated_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = look(checkpoint)
    assert done.exit_code == ExitCode.INPUT
    assert "model.safetensors" in done.stderr


def test_what_is_no_trtx_directory(tmp_path):
    done = look(tmp_path)
    assert done.exit_code == ExitCode.INPUT
    assert "not a trtx directory" in done.stderr


def test_description_that_is_not_json(checkpoint):
    config = checkpoint / "config.json"
    config.write_bytes(b"\xff" * config.stat().st_size)
    done = look(checkpoint)
    assert done.exit_code == ExitCode.INPUT
    assert "config.json" in done.stderr


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A TensorRT engine for a GPU that is not here."""
    pytest.importorskip("tensorrt_rtx")
    from tests.converters import tiny
    from tests.converters.families import dense
    from trtx.builder.build import BuildSettings, build

    folder = tmp_path_factory.mktemp("model")
    checkpoint = tiny.checkpoint_of(tiny.of(dense.llama(num_hidden_layers=1, head_dim=16)), folder)
    limits = {"max_batch_size": 2, "max_num_tokens": 16, "max_seq_len": 32}
    build(checkpoint, folder / "engine", BuildSettings("tensorrt-rtx", gpu="rtx-5090", dtype="bf16", **limits))
    return folder / "engine"


def test_layers_of_an_engine_on_its_gpu(plan, monkeypatch):
    from trtx.runtime import tensorrt_runner

    monkeypatch.setattr(tensorrt_runner, "layers_of", lambda engine: ["matmul [fused]", "softmax"])
    done = look(plan, "--layers")
    assert done.exit_code == ExitCode.OK
    assert "  matmul [fused]\n" in done.stdout and "  softmax\n" in done.stdout
    assert json.loads(look(plan, "--layers", "--json").stdout)["layers"] == ["matmul [fused]", "softmax"]


def test_without_the_gpu_the_manifest_is_shown_and_the_reason(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = look(plan, "--layers")
    assert done.exit_code == ExitCode.MISMATCH
    assert "network_layers" in done.stdout and "[-1, 96] float" in done.stdout
    assert "--layers" in done.stderr and "rtx-5090" in done.stderr


def test_layers_are_those_of_a_tensorrt_engine(engine):
    done = look(engine, "--layers")
    assert done.exit_code == ExitCode.INPUT
    assert "not a TensorRT engine" in done.stderr
