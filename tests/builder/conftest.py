"""Checkpoints for the builder's tests."""

import json

import pytest
import torch

from trtx.converters.artifact import create
from trtx.converters.checkpoint import Checkpoint, CheckpointConfig
from trtx.converters.shards import Entry, write_shards
from trtx.converters.spec import Kind
from trtx.quantize.formats import FORMATS, Quantization


def stored_tensor(name, stored, generator):
    """Any value that the dtype allows; scales positive."""
    if name.endswith(("_scale", "_scale_2")):
        return (torch.rand(stored.shape, generator=generator) + 0.5).to(stored.dtype)
    if stored.dtype.is_floating_point:
        return torch.randn(stored.shape, generator=generator).to(stored.dtype)
    return torch.randint(0, 127, stored.shape, generator=generator).to(stored.dtype)


@pytest.fixture
def write_checkpoint(tmp_path):
    """Writes a checkpoint of random values, with the library's own shard format but none of the converters."""

    def write(spec, format="none", kv_cache="none", dtype="bf16", shared_scales=True, name="checkpoint"):
        form = FORMATS[format]
        group = form.group_size(min(m.shape[1] for m in spec.modules() if m.kind is Kind.LINEAR))
        config = CheckpointConfig(spec, dtype, Quantization(format, group, kv_cache))
        generator = torch.Generator().manual_seed(0)
        scales = {}

        def value(full_name, stored):
            suffix = full_name.rpartition(".")[2]
            if shared_scales and not stored.rows and suffix.endswith(("_scale", "_scale_2")):
                key = (suffix, stored.shape)
                if key not in scales:
                    scales[key] = stored_tensor(full_name, stored, generator)
                return scales[key]
            return stored_tensor(full_name, stored, generator)

        tensors = {full_name: value(full_name, stored) for full_name, stored in config.expected().items()}
        path = tmp_path / name
        with create(path, kind="checkpoint", command="convert", settings={}) as draft:
            config.write(draft)
            (draft.path / "tokenizer.json").write_text(json.dumps({"model": {}}))
            entries = [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
            write_shards(draft, entries)
        return Checkpoint(path)

    return write
