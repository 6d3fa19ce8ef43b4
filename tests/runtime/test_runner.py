"""Loading an engine where it does not belong, or does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.converters.tiny import checkpoint_of
from tests.runtime.models import engine_of, random_model
from trtx.builder.engine import Engine
from trtx.cli.app import app
from trtx.converters.errors import DoesNotFitError, ExitCode, InputError, MismatchError
from trtx.runtime import runner
from trtx.runtime.llm import LLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(random_model("llama"), tmp_path_factory.mktemp("model"))


def test_engine_of_a_gpu_where_there_is_none(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = engine_of(checkpoint, tmp_path / "engine", gpu="h100-sxm", backend="torch")
    with pytest.raises(MismatchError, match=r"built for h100-sxm.*no CUDA GPU") as caught:
        LLM(engine)
    assert "--gpu cpu" in caught.value.remedy
    result = CliRunner().invoke(app, ["run", str(engine), "Hello"])
    assert result.exit_code == ExitCode.MISMATCH and result.stdout == ""


def test_engine_of_the_cpu_asked_for_on_a_gpu(checkpoint, tmp_path):
    with pytest.raises(MismatchError, match="built for cpu, and cuda was asked for") as caught:
        LLM(engine_of(checkpoint, tmp_path / "engine"), device="cuda")
    assert "--gpu auto" in caught.value.remedy


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_what_is_no_device(checkpoint, tmp_path, device):
    engine = engine_of(checkpoint, tmp_path / "engine")
    with pytest.raises(InputError, match=f"'{device}' is no device"):
        LLM(engine, device=device)


def test_gpu_with_too_large_a_number(checkpoint, tmp_path, monkeypatch):
    engine = engine_of(checkpoint, tmp_path / "engine", gpu="h100-sxm", backend="torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="no cuda:7 here"):
        LLM(engine, device="cuda:7")


@pytest.mark.parametrize(("name", "count"), [("NVIDIA H100 80GB HBM3", 0), ("NVIDIA L4", 1), ("NVIDIA Unheard-of", 1)])
def test_another_gpu_is_said_and_not_refused(checkpoint, tmp_path, monkeypatch, name, count):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    engine = Engine(engine_of(checkpoint, tmp_path / "engine", gpu="h100-sxm", backend="torch"))
    notes = runner.differences(engine, torch.device("cuda"))
    assert len(notes) == count
    assert all("built for h100-sxm" in note and name in note and "--gpu auto" in note for note in notes)


def test_too_little_memory_is_said_before_anything_is_loaded(checkpoint, tmp_path, monkeypatch):
    engine = engine_of(checkpoint, tmp_path / "engine")
    ledger = json.loads((engine / "engine.json").read_text())["ledger"]
    needed = ledger["weights"] + ledger["kv_cache"]
    monkeypatch.setattr(runner, "available_memory", lambda: needed)
    LLM(engine)
    monkeypatch.setattr(runner, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(runner.weights, "load", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(DoesNotFitError, match="too little"):
        LLM(engine)
