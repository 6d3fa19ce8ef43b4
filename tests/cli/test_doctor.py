"""`trtx doctor` on machines that lack things."""

import json
import sys

import pytest
from typer.testing import CliRunner

from trtx.cli import doctor
from trtx.cli.app import app
from trtx.converters.errors import ExitCode

runner = CliRunner()


def ask(*arguments):
    done = runner.invoke(app, ["doctor", *arguments])
    return done.exit_code, json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` with the given shell body first on the path."""

    def install(body):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_this_machine():
    import torch

    code, data = ask("--json")
    assert code == ExitCode.OK
    assert data["packages"]["torch"] == torch.__version__
    assert data["backends"][0]["ready"]
    assert data["backends"][1]["ready"] == torch.cuda.is_available()


def test_table_names_backends_and_packages():
    code, shown = ask()
    assert code == ExitCode.OK
    for name in ("torch on the CPU", "torch on CUDA", *doctor.PACKAGES):
        assert name in shown


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_without_torch(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # Python's own way to make an import fail
    code, shown = ask(*arguments)
    assert code == ExitCode.MISSING
    assert "torch can't be imported" in str(shown)


def test_gpu_that_torch_can_not_use(driver):
    driver("echo 'NVIDIA H100 80GB HBM3, 9.0, 81559, 535.104.05'")
    code, data = ask("--json")
    assert code == ExitCode.OK
    assert data["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "sm": "90", "memory_bytes": 81559 * 1024 * 1024, "driver": "535.104.05"}
    ]
    assert data["backends"][1]["ready"] is False
    remedy = data["backends"][1]["remedy"]
    assert remedy and ask()[1].count(remedy) == 1


def test_gpu_that_shares_the_memory_of_the_cpu(driver):
    driver("echo 'NVIDIA GB10, 12.1, [N/A], 580.95.05'")
    assert ask("--json")[1]["gpus"][0]["memory_bytes"] is None
    assert "shared memory" in ask()[1]


@pytest.mark.parametrize("body", ["exit 9", "echo 'No devices were found'", "echo"])
def test_driver_that_answers_nothing_useful(driver, body):
    driver(body)
    code, data = ask("--json")
    assert code == ExitCode.OK
    assert data["gpus"] == []


def cuda_backend():
    (found,) = [backend for backend in ask("--json")[1]["backends"] if backend["name"] == "cuda"]
    return found


def test_cuda_backend_builds_without_a_gpu(driver):
    driver("exit 9")
    found = cuda_backend()
    assert found["ready"] and "9.0" in found["builds_for"] and "runs here" not in found["builds_for"]


def test_cuda_backend_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "triton" else "1")
    found = cuda_backend()
    assert not found["ready"] and "triton" in found["problem"] and found["remedy"] == "pip install triton"


@pytest.mark.parametrize(("sm", "runs"), [("9.0", True), ("7.5", False)])
def test_cuda_backend_runs_where_kernels_can_be_compiled_for_the_gpu(driver, monkeypatch, sm, runs):
    driver(f"echo 'NVIDIA GPU, {sm}, 81559, 580.95.05'")
    usable = {"error": None, "version": "2", "cuda_runtime": "13.0", "cuda_available": True, "architectures": []}
    monkeypatch.setattr(doctor, "_torch", lambda: usable)
    assert cuda_backend()["builds_for"].endswith("runs here") == runs
