"""Random weights of every format: what a checkpoint of that format would hold, fit to be fused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.builder.models import TINY
from trtx.builder.build import BuildSettings, prepare
from trtx.converters.random_weights import STD
from trtx.converters.spec import Kind
from trtx.quantize.formats import FORMATS
from trtx.runtime.weights import WeightStore, fused_groups

CPU = torch.device("cpu")


def store_of(tmp_path: Path, form: str, seed: int = 0) -> WeightStore:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "attention_bias": True}))
    settings = BuildSettings(gpu="cpu", seed=seed, random_format=form)
    return prepare(f"random:{tmp_path / 'config.json'}", settings).store


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_are_those_of_a_checkpoint(tmp_path, form):
    store, again, other = store_of(tmp_path, form), store_of(tmp_path, form), store_of(tmp_path, form, seed=1)
    assert store.config.quantization.format == form
    differing = set()
    for name, stored in store.config.expected().items():
        tensor = store.tensor(name)
        assert tensor.shape == stored.shape and tensor.dtype == stored.dtype, name
        assert torch.equal(tensor.float(), again.tensor(name).float()), name
        if not torch.equal(tensor.float(), other.tensor(name).float()):
            differing.add(name.rpartition(".")[0])
    assert differing == {module.name for module in store.config.spec.modules()}


@pytest.mark.parametrize("form", FORMATS)
def test_linears_fuse_and_their_weights_are_of_the_usual_size(tmp_path, form):
    store = store_of(tmp_path, form)
    for name, modules in fused_groups(store.config):
        (weight,) = store.group(name, modules)
        dense = weight.dense(torch.float32)
        assert dense.shape == (sum(module.shape[0] for module in modules), modules[0].shape[1])
        # A scale of a whole tensor is that of a larger one, whose extremes are further out.
        assert 0.8 * STD < dense.std().item() < 1.5 * STD, name
        assert dense.mean().abs().item() < 0.1 * STD
    assert sum(len(modules) for _, modules in fused_groups(store.config)) == sum(
        module.kind is Kind.LINEAR for module in store.config.spec.modules()
    )
