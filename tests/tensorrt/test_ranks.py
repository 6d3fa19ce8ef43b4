"""Tensor parallelism: the ranks' networks, evaluated side by side, give what one rank gives."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tensorrt_rtx")

from tests.builder.models import spec_of
from tests.converters import tiny
from tests.converters.families import dense
from tests.runtime.models import random_model, relative_error
from tests.tensorrt.interpreter import evaluate
from tests.tensorrt.models import RTX, UNBUILT
from tests.tensorrt.test_build import settings
from tests.tensorrt.test_linears import BOUNDS, LLAMA, largest_errors, store_of
from trtx.builder.build import prepare, write
from trtx.builder.engine import PLAN, Engine, ParallelMapping
from trtx.builder.shard import Rank, obstacle
from trtx.builder.tensorrt.network import Network
from trtx.builder.tensorrt.plan import LOGITS, cache_names, network
from trtx.converters.artifact import Manifest
from trtx.converters.checkpoint import Checkpoint, CheckpointConfig
from trtx.converters.errors import UnsupportedError
from trtx.converters.spec import ModelSpec
from trtx.quantize.formats import FORMATS, Quantization
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.llm import LLM
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.slots import slot_inputs
from trtx.runtime.weights import WeightStore, load


def splits(name: str) -> bool:
    """Whether a tiny model can be split over two ranks."""
    config = tiny.config_json(tiny.VARIANTS[name])
    return not obstacle(CheckpointConfig(spec_of(config), "fp32"), ParallelMapping(tp=2))


CUT = [name for name, variant in tiny.VARIANTS.items() if variant.family not in UNBUILT and splits(name)]
OFTEN = {*tiny.FIRST.values(), "llama-tied", "llama-biases", "falcon-rw", "opt-350m"}
"""Tied embeddings, biases everywhere, ALiBi, an embedding narrower than the model; a variant of each family."""
QUANTIZED = spec_of({**LLAMA, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 95})


class Ranks:
    """Networks of the ranks of one model, each in a thread; collectives meet at a barrier."""

    def __init__(self, spec: ModelSpec, nets: list[Network]) -> None:
        self.spec = spec
        self.nets = nets
        self.barrier = threading.Barrier(len(nets))
        self.held: list[Any] = [None] * len(nets)
        self.asked: list[str] = []
        """What rank 0's collectives were, in their order."""

    def run(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The outputs of each rank, given the inputs of each."""
        with ThreadPoolExecutor(len(self.nets)) as pool:
            return [
                done.result(timeout=300) for done in [pool.submit(self._run, i, own) for i, own in enumerate(inputs)]
            ]

    def _run(self, index: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        net = self.nets[index]
        try:
            with torch.inference_mode():
                return evaluate(net.definition, net.constants, inputs, lambda layer, x: self._meet(index, layer, x))
        except BaseException:
            self.barrier.abort()  # the others wait for it
            raise

    def _meet(self, index: int, layer: Any, x: Tensor) -> Tensor:
        """As NCCL: every rank comes with the same operation."""
        said = re.fullmatch(r"(ALL_REDUCE|ALL_GATHER) \[(.*)\]", layer.metadata)
        assert said and [int(rank) for rank in said[2].split(",")] == list(range(layer.num_ranks))
        self.held[index] = layer.name, said[1], x
        self.barrier.wait()
        names, operations, values = zip(*self.held, strict=True)
        assert len(set(names)) == len(set(operations)) == 1
        if index == 0:
            self.asked.append(said[1])
        result = torch.cat(values) if said[1] == "ALL_GATHER" else torch.stack(values).sum(0)
        self.barrier.wait()  # nobody goes on, and brings its next value, before all have read
        return result


def ranks_of(store: WeightStore, tp: int = 2) -> Ranks:
    spec = store.config.spec
    return Ranks(spec, [network(store, RTX, torch.float32, BOUNDS, rank=Rank(spec, tp, i)) for i in range(tp)])


def batches(vocabulary: int) -> list[list[SequenceSlice]]:
    """Two prompts, one after the other, then both decode; ids from both ends of each rank's part."""
    half, last = -(-vocabulary // 2), vocabulary - 1
    return [
        [SequenceSlice([0, last, half - 1, half, 49, 3, 80], 0, ([2],), 7)],
        [SequenceSlice([90], 7, ([2],), 1), SequenceSlice([5, 66, 31], 0, ([1],), 3)],
        [SequenceSlice([1], 8, ([2],), 1), SequenceSlice([half + 1], 3, ([1],), 1)],
    ]


def logits_of(ranks: Ranks) -> list[Tensor]:
    """Of each batch; all ranks' are the same."""
    part = Rank(ranks.spec, len(ranks.nets)).part
    shape = (2, part.num_kv_heads, BOUNDS.max_seq_len, part.head_dim)
    pairs = [pair for layer in range(part.num_layers) for pair in cache_names(layer)]
    caches = [{pair: torch.zeros(shape) for pair in pairs} for _ in ranks.nets]
    logits = []
    for batch in batches(ranks.spec.vocab_size):
        inputs = slot_inputs(batch)
        slots = len(inputs["written"])
        held = [{before: cache[:slots] for (before, _), cache in own.items()} for own in caches]
        found = ranks.run([{**inputs, **own} for own in held])
        for own, outputs in zip(caches, found, strict=True):
            for (_, after), cache in own.items():
                cache[:slots] = outputs[after]
        assert all(torch.equal(outputs[LOGITS], found[0][LOGITS]) for outputs in found)
        logits.append(found[0][LOGITS])
    return logits


def torch_logits_of(store: WeightStore) -> list[Tensor]:
    """The same batches on one rank of the torch op set."""
    spec = store.config.spec
    ops = TorchOps(spec, torch.float32, max_positions=BOUNDS.max_seq_len)
    layout = KVLayout.of(spec, BOUNDS.max_seq_len, 4)
    groups = range(len(layout.groups))
    cache = TorchKVCache(layout, 1 + 2 * len(groups), torch.float32, torch.device("cpu"))
    logits = []
    with torch.inference_mode():
        decoder = load(store, ops)
        for batch in batches(spec.vocab_size):
            paged = [replace(x, tables=tuple([x.tables[0][0] + 2 * group] for group in groups)) for x in batch]
            logits.append(decoder.forward(ops.step(paged, cache)))
    return logits


@pytest.mark.parametrize("name", [x if x in OFTEN else pytest.param(x, marks=pytest.mark.slow) for x in CUT])
def test_two_ranks_equal_one(name, tmp_path):
    """Within 1e-5 in fp32; prefill, both kinds of sequences in one step, decode."""
    store = WeightStore.of_checkpoint(Checkpoint(tiny.checkpoint_of(random_model(name), tmp_path)))
    ranks = ranks_of(store)
    for ours, theirs in zip(logits_of(ranks), torch_logits_of(store), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    spec = store.config.spec
    each = 1 if spec.parallel != "no" else 2
    assert ranks.asked == 3 * [*["ALL_REDUCE"] * (1 + each * spec.num_layers), "ALL_GATHER"]


def quantized(name: str) -> WeightStore:
    """A Llama whose vocabulary does not divide, in a format whose groups do."""
    return store_of(QUANTIZED, name, 64)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8_pc_pt"])
def test_quantized_weights_are_cut(name):
    """As with one rank; where formats round activations, a sum's order may decide a code in a tenth of the tokens."""
    store = quantized(name)
    found = list(map(largest_errors, logits_of(ranks_of(store)), torch_logits_of(store)))
    assert (torch.cat(found) < 1e-5).float().mean() >= (0.9 if FORMATS[name].changes_input else 1)


def test_each_rank_scales_its_part_of_a_token():
    """Scales a token differ from one rank's, so the logits do; they are no farther from those of exact activations."""
    store = quantized("fp8_pc_pt")
    unrounded = replace(store, config=store.config.with_quantization(Quantization("fp8_wo")))
    exact, one, two = torch_logits_of(unrounded), torch_logits_of(store), logits_of(ranks_of(store))
    ours, theirs = (torch.cat(list(map(largest_errors, logits, exact))).mean() for logits in (two, one))
    assert 0 < ours < 1.1 * theirs


def test_four_ranks_and_a_padded_vocabulary(tmp_path):
    """97 rows: three ranks hold 25, the last 22."""
    model = tiny.make("llama", vocab_size=97, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    store = WeightStore.of_checkpoint(Checkpoint(tiny.checkpoint_of(tiny.randomize(model, 0, 1.5), tmp_path)))
    ranks = ranks_of(store, tp=4)
    assert Rank(store.config.spec, 4).part.vocab_size == 25
    for ours, theirs in zip(logits_of(ranks), torch_logits_of(store), strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny.of(dense.llama(num_hidden_layers=1, head_dim=16))
    return tiny.checkpoint_of(tiny.randomize(model, 0, 1.0), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("gpu", ["rtx-4090", "rtx-5090"])
def test_a_plan_for_each_rank(checkpoint, gpu, tmp_path):
    blueprint = prepare(checkpoint, settings(gpu=gpu, tp=2))
    assert any("does not run them" in note for note in blueprint.notes)
    write(blueprint, tmp_path / "engine")
    engine = Engine(tmp_path / "engine")
    assert {path.name for path in engine.path.glob("rank*")} == {"rank0", "rank1"}
    for index in range(2):
        assert (engine.rank(index) / PLAN).stat().st_size > 100_000
    facts = json.loads((engine.path / "manifest.json").read_text())["about"]
    assert facts["bindings"]["keys.*"].startswith("[-1, 1, 32, 16]"), "one of two heads"
    assert facts["bindings"]["logits"] == "[-1, 96] float"
    assert not Manifest.read(engine.path).verify(engine.path)
    with pytest.raises(UnsupportedError, match="built for 2 GPUs"):
        LLM(engine.path)


def test_plans_have_no_pipeline_stages(checkpoint):
    with pytest.raises(UnsupportedError, match="pipeline"):
        prepare(checkpoint, settings(pp=2))
    chosen = prepare(checkpoint, settings(gpus=2))
    assert chosen.sizing.mapping == ParallelMapping(tp=2)


def test_heads_that_do_not_divide(checkpoint):
    with pytest.raises(UnsupportedError, match="key/value heads"):
        prepare(checkpoint, settings(tp=4))
