"""What the benchmark of the cuda backend does beside measuring: its table, and engines that hold random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.bench import h100
from tests.builder.models import TINY
from trtx.builder.cuda.backend import CudaBackend
from trtx.builder.engine import Engine
from trtx.quantize.formats import E4M3

CASES = {case.name: case for case in h100.CASES}


def test_table():
    """Rows of loading stand with the others of their case, whenever they were measured; failures do not. The ratio is
    to vLLM on the same GPU, where it ran there."""
    fp8 = {"case": "8b-fp8", "batch": 8, "isl": 512, "osl": 256, "peer": {"out_tok_s": 1614}, "out_tok_s": 1900.4}
    load = {"case": "8b-bf16", "peer": {"load_s": 50.0}, "load_s": 4.0, "bytes": 16_060_000_000, "gb_s": 4.0}
    failed = {"case": "1b-bf16", "error": "RuntimeError()"}
    one = {"case": "8b-fp8", "batch": 1, "isl": 9, "osl": 1, "peer": {"ttft_ms": 18.7}, "beside": {"ttft_ms": 20.0}}
    one["ttft_ms"] = 5.0
    rows = [row | {"commit": "0123456789"} for row in (fp8, failed, load, one)]
    assert h100.table({"rows": rows}).splitlines()[2:] == [
        "| Llama-3.1-8B bf16 |  | 16.1 GB | start from files, s | 50.0 |  | 4.00 | 0.08 | 0123456 |",
        "| Llama-3.1-8B fp8 | 1 | 9 → 1 | TTFT, ms | 18.7 | 20.0 | 5.00 | 0.25 | 0123456 |",
        "| Llama-3.1-8B fp8 | 8 | 512 → 256 | output tokens/s | 1614 |  | 1900 | 1.18 | 0123456 |",
    ]


def test_rows_take_the_place_of_earlier_ones():
    """Of the same work: what else is known stays."""
    bench = {"case": "8b-bf16", "batch": 1, "isl": 128, "osl": 128, "ttft_ms": 7.0, "commit": "a"}
    longer = {**bench, "isl": 2048}
    load = {"case": "8b-bf16", "load_s": 9.0, "commit": "a"}
    failed = {"case": "8b-bf16", "error": "RuntimeError()", "commit": "a"}
    rows = [bench, longer, load, failed]
    assert h100.joined(rows, load | {"commit": "b"}) == [bench, longer, load | {"commit": "b"}]
    assert h100.joined(rows, bench | {"commit": "b"}) == [longer, load, bench | {"commit": "b"}]
    assert h100.joined(rows, failed | {"commit": "b"}) == [bench, longer, load, failed | {"commit": "b"}]
    assert h100.joined(rows, {**failed, "case": "8b-fp8"}) == [*rows, {**failed, "case": "8b-fp8"}]


@pytest.mark.parametrize("name", h100.LOADED)
def test_engines_that_are_loaded_hold_random_weights(name, tmp_path, monkeypatch):
    """Of every tensor, as many bytes as the model has; the checkpoint is gone."""
    monkeypatch.setattr(h100, "config_of", lambda model: TINY)
    monkeypatch.setattr(CudaBackend, "add_kernels", lambda *args: None)
    case = replace(CASES[name], works=(h100.Work(2, 8, 8, 1), h100.Work(1, 100, 100, 1)))
    engine = Engine(h100.stored_engine(case, tmp_path, torch.device("cpu"), "h100-sxm"))
    assert (engine.config.limits.max_batch_size, engine.config.limits.max_seq_len) == (2, 16)
    assert not (tmp_path / "checkpoint").exists() and engine.config.random_seed is None
    assert engine.config.has_random_weights
    tensors = {tensor: engine.shards.tensor(tensor) for tensor in engine.shards}
    assert (tensors["layers.0.attn.qkv.weight"].dtype == E4M3) == (case.format == "fp8")
    for full_name, tensor in tensors.items():
        assert not tensor.shape or tensor.float().std() > 0, full_name
    sizes = sum(file.stat().st_size for file in engine.shards.files)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= sizes == h100.read_all(engine.shards.files)
    assert engine.config.model.bytes <= sizes
