"""How stored tensors are cut for tensor-parallel ranks: what the parts stand for is the part of what the whole does."""

import pytest
import torch

from tests.builder.conftest import stored_tensor
from tests.builder.models import TINY, spec_of
from trtx.builder.engine import ParallelMapping
from trtx.builder.shard import Rank, Shard
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.spec import Kind, Module, Split
from trtx.quantize.formats import FORMATS, Quantization
from trtx.runtime.weights import WeightStore

OUT, INTO, TP = 64, 256, 2


def linear(split, kind=Kind.LINEAR, shape=(OUT, INTO), bias=True):
    return Module("layers.0.mlp.up", kind, shape, split, bias)


def tensors_of(name, module):
    """A random weight in a format, and what calibration adds to it."""
    generator = torch.Generator().manual_seed(0)
    form = FORMATS[name]
    weight = torch.randn(module.shape, generator=generator)
    found = {**form.pack(weight, form.group_size(64)), "bias": torch.randn(module.shape[0], generator=generator)}
    given = {
        "pre_quant_scale": torch.rand(module.shape[1], generator=generator) + 0.5,
        "input_scale": torch.tensor(0.1),
    }
    return {**found, **{suffix: given[suffix] for suffix in form.input_tensors}}


def random_store(spec, name):
    """A store of any values that the format's dtypes allow."""
    model = CheckpointConfig(spec, "fp32", Quantization(name, FORMATS[name].group_size(64)))
    generator = torch.Generator().manual_seed(0)
    tensors = {full: stored_tensor(full, stored, generator) for full, stored in model.expected().items()}
    return WeightStore(model, tensors.__getitem__, tensors.__contains__)


def cut(name, module, tensors, index):
    stored = Quantization(name, FORMATS[name].group_size(64), excluded=()).stored(module, torch.float32)
    assert stored.keys() == tensors.keys()
    rank = Rank(spec_of(TINY), TP, index)
    return {suffix: rank.cut(module, suffix, stored[suffix], tensor) for suffix, tensor in tensors.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name):
    """Each rank gives its outputs of the linear, bias included, from the whole input."""
    module = linear(Split.ROWS)
    tensors, form = tensors_of(name, module), FORMATS[name]
    whole = form.weight(tensors, torch.float32)
    for index in range(TP):
        part = cut(name, module, tensors, index)
        mine = slice(index * OUT // TP, (index + 1) * OUT // TP)
        assert torch.equal(form.weight(part, torch.float32), whole[mine])
        assert torch.equal(part["bias"], tensors["bias"][mine])
        for suffix in form.input_tensors:
            assert torch.equal(part[suffix], tensors[suffix])


@pytest.mark.parametrize("name", FORMATS)
def test_columns(name):
    """The ranks' outputs, each from its part of the input, add up; the bias comes in once."""
    module = linear(Split.COLUMNS)
    tensors, form = tensors_of(name, module), FORMATS[name]
    whole = form.weight(tensors, torch.float32)
    parts = [cut(name, module, tensors, index) for index in range(TP)]
    assert torch.equal(torch.cat([form.weight(part, torch.float32) for part in parts], 1), whole)
    assert torch.equal(sum(part["bias"] for part in parts), tensors["bias"])
    assert not parts[1]["bias"].any()
    if "pre_quant_scale" in tensors:
        assert torch.equal(torch.cat([part["pre_quant_scale"] for part in parts]), tensors["pre_quant_scale"])


@pytest.mark.parametrize("name", FORMATS)
def test_stored_is_what_the_rank_expects(name):
    """Shapes and dtypes are those that the rank's own spec leads to: a reader can check them."""
    spec = spec_of({**TINY, "hidden_size": 256, "intermediate_size": 256, "vocab_size": 95})
    store = random_store(spec, name)
    for index in range(TP):
        part = store.of_rank(Rank(spec, TP, index))
        for full_name, stored in part.config.expected().items():
            tensor = part.tensor(full_name)
            assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape), full_name
            assert tensor.is_contiguous()


@pytest.mark.parametrize("name", ["none", "fp8", "int4_awq"])
def test_fused_linears_are_cut_part_by_part(name):
    """A rank's qkv holds its heads' queries, keys and values: not the first half of all rows."""
    spec = spec_of(TINY)
    store = random_store(spec, name)
    modules = [m for m in spec.modules() if m.name in ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v")]
    dense = {m.name: store.linear(m).dense(torch.float32) for m in modules}
    for index in range(TP):
        part = store.of_rank(Rank(spec, TP, index))
        mine = [m for m in part.config.spec.modules() if m.name in dense]
        expected = torch.cat([dense[m.name][index * m.shape[0] : (index + 1) * m.shape[0]] for m in mine])
        found = torch.cat([w.dense(torch.float32) for w in part.group("layers.0.attn.qkv", mine)])
        assert torch.equal(found, expected)


def test_vocabulary_is_padded_with_its_last_row():
    """Five rows on four ranks: two, two, one and a copy, two copies."""
    spec = spec_of({**TINY, "vocab_size": 5, "num_attention_heads": 4, "num_key_value_heads": 4})
    module = spec.modules()[0]
    table = torch.arange(5.0)[:, None].expand(module.shape).contiguous()
    stored = Quantization().stored(module, torch.float32)["weight"]
    ranks = [Rank(spec, 4, index) for index in range(4)]
    assert [rank.first_token for rank in ranks] == [0, 2, 4, 6]
    rows = [rank.cut(module, "weight", stored, table)[:, 0].tolist() for rank in ranks]
    assert rows == [[0, 1], [2, 3], [4, 4], [4, 4]]


def test_vectors_and_norms_of_heads_follow_the_heads():
    rank = Rank(spec_of(TINY), TP, 1)
    sinks = Module("layers.0.attn.sinks", Kind.VECTOR, (4,), Split.ROWS)
    norm = Module("layers.0.attn.q_norm", Kind.NORM, (4, 16), Split.ROWS)
    for module in (sinks, norm):
        tensor = torch.randn(module.shape)
        stored = Quantization().stored(module, torch.float32)["weight"]
        assert torch.equal(rank.cut(module, "weight", stored, tensor), tensor[2:])
    assert rank.heads == slice(2, 4)


def test_what_is_not_split_is_whole():
    rank = Rank(spec_of(TINY), TP, 1)
    module = Module("final_norm", Kind.NORM, (64,))
    tensor = torch.randn(64)
    assert rank.cut(module, "weight", Quantization().stored(module, torch.float32)["weight"], tensor) is tensor


def test_one_rank_is_the_model():
    spec = spec_of(TINY)
    assert Rank(spec).part is spec
    store = WeightStore.of_seed(CheckpointConfig(spec, "fp32"), 0, torch.device("cpu"))
    assert store.of_rank(Rank(spec)) is store
    assert list(Shard(spec, ParallelMapping(), 0).modules()) == list(spec.modules())
