"""Reading an engine's files: what `runtime.cuda.load` finds is what safetensors finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converters.tiny import checkpoint_of
from tests.runtime.models import engine_of, random_model
from trtx.builder.cuda.backend import CudaBackend
from trtx.builder.engine import Engine
from trtx.converters.errors import InputError
from trtx.runtime.cuda import load
from trtx.runtime.weights import WeightStore

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files of all dtypes and odd shapes, read in pieces of 64 bytes."""
    monkeypatch.setattr(load, "PIECE", 64)
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator).view(dtype)

    contents = [
        {
            "fp32": torch.randn(7, 33, generator=generator),
            "bf16": torch.randn(1, 65, generator=generator).bfloat16(),
            "fp16": torch.randn(3, generator=generator).half(),
            "scalar": torch.tensor(0.25),
            "empty": torch.zeros(0, 4),
        },
        {
            "e4m3": codes(5, 13, dtype=torch.float8_e4m3fn),
            "int8": codes(64, dtype=torch.int8),
            "uint8": codes(2, 129, dtype=torch.uint8),
            "int32": torch.arange(-40, 40, dtype=torch.int32).view(8, 10),
        },
    ]
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path, tensors in zip(paths, contents, strict=True):
        save_file(tensors, path, metadata={"format": "pt"})
    return paths


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8))


def test_tensors_are_those_that_safetensors_reads(files):
    expected = {**load_file(files[0]), **load_file(files[1])}
    moved: list[int] = []
    found = load.read_tensors(files, CPU, moved.append)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor)
    assert sum(moved) == sum(tensor.nbytes for tensor in expected.values()) and max(moved) <= 64


def test_truncated_file(files):
    with files[1].open("r+b") as file:
        file.truncate(files[1].stat().st_size - 1)
    with pytest.raises(InputError, match=r"1\.safetensors: is truncated") as caught:
        load.read_tensors(files, CPU, lambda size: None)
    assert "Build the engine again" in caught.value.remedy


def test_store_of_an_engine(tmp_path, monkeypatch):
    """Every tensor once, in kernel layout; random weights are drawn instead, and are not."""
    monkeypatch.setattr(CudaBackend, "add_kernels", lambda *args: None)
    checkpoint = checkpoint_of(random_model("llama"), tmp_path)
    stored = Engine(engine_of(checkpoint, tmp_path / "stored", gpu="h100-sxm", backend="cuda"))
    store, laid_out = load.loaded_store(stored, CPU)
    assert laid_out and store.has("layers.0.attn.qkv.weight") and not store.has("layers.0.attn.q.weight")
    for name in stored.shards:
        assert_same(store.tensor(name), stored.shards.tensor(name))
    with pytest.raises(KeyError):
        store.tensor("embed.weight")  # memory is not held twice

    source = f"random:{tmp_path / 'hf' / 'config.json'}"
    drawn = Engine(engine_of(source, tmp_path / "drawn", gpu="h100-sxm", backend="cuda", seed=5))
    store, laid_out = load.loaded_store(drawn, CPU)
    assert not laid_out
    expected = WeightStore.of_seed(drawn.config.model, 5, CPU)
    assert_same(store.tensor("layers.1.attn.k.weight"), expected.tensor("layers.1.attn.k.weight"))
