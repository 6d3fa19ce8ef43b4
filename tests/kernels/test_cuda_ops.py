"""The whole op set against the torch op set, on tiny models: of every family on a GPU, of a few in the interpreter."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builder.models import TINY, spec_of
from tests.converters import tiny
from tests.converters.tiny import FIRST, VARIANTS, checkpoint_of
from tests.kernels.checks import poisoned as poisoned
from tests.runtime.models import random_model, relative_error
from trtx.converters.checkpoint import Checkpoint, CheckpointConfig
from trtx.quantize.formats import Quantization
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.deferred import Product
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import Launch, RecordLaunch
from trtx.runtime.cuda.linear import Codes
from trtx.runtime.cuda.meta import META, meta_steps
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.step import Shape
from trtx.runtime.cuda.steps import Steps
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.weights import WeightStore, load

LENGTH, BLOCK, BLOCKS, BATCH = 64, 8, 120, 4

IN_FULL = torch.cuda.is_available()
"""The interpreter takes 10 ms a program: there, few families with two layers and shorter prompts and windows."""

FAMILIES = list(FIRST) if IN_FULL else ["llama", "gemma2", "gpt_oss", "deepseek_v3"]
TOKENS = 40 if IN_FULL else 16
LENGTHS = (23, 9, 14) if IN_FULL else (13, 4, 8)


@dataclass
class Pair:
    """The same model on both op sets, each with a cache of its own."""

    steps: Steps
    reference: TorchOps
    decoder: object
    cache: TorchKVCache
    layout: KVLayout

    def logits(self, batch: list[SequenceSlice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the cuda and of the torch op set."""
        ours = self.steps.logits(batch)[: sum(piece.logits for piece in batch)]
        theirs = self.decoder.forward(self.reference.step(batch, self.cache))
        return ours.float().cpu(), theirs.float().cpu()


def pair_of(checkpoint: Checkpoint, launch: Launch, device: torch.device, dtype: torch.dtype) -> Pair:
    spec, store = checkpoint.spec, WeightStore.of_checkpoint(checkpoint)
    layout = KVLayout.of(spec, BLOCK, dtype.itemsize)
    ops = CudaOps(spec, dtype, device, LENGTH, launch, laid_out=False)
    steps = Steps(load(store, ops), ops, CudaKVCache(layout, BLOCKS, dtype, device), BATCH, TOKENS, LENGTH)
    reference = TorchOps(spec, dtype, device, LENGTH)
    return Pair(steps, reference, load(store, reference), TorchKVCache(layout, BLOCKS, dtype, device), layout)


def batches(layout: KVLayout, vocabulary: int) -> list[list[SequenceSlice]]:
    """Prompts of three sequences in ragged chunks, then decodes beside chunks, then decodes alone."""
    rng = random.Random(0)
    blocks = iter(range(1, BLOCKS))
    tables = [tuple([next(blocks) for _ in range(4)] for _ in layout.groups) for _ in LENGTHS]
    tokens = [[rng.randrange(vocabulary) for _ in range(32)] for _ in LENGTHS]
    first, second, third = LENGTHS
    half = (first + 2) // 2

    def piece(index: int, start: int, end: int, logits: int) -> SequenceSlice:
        return SequenceSlice(tokens[index][start:end], start, tables[index], logits)

    return [
        [piece(0, 0, half, 0), piece(1, 0, second, 1)],
        [piece(1, second, second + 1, 1), piece(0, half, first, 1), piece(2, 0, third, 2)],
        [piece(0, first, first + 1, 1), piece(1, second + 1, second + 2, 1), piece(2, third, third + 1, 1)],
        [piece(2, third + 1, third + 2, 1), piece(0, first + 1, first + 2, 1)],
    ]


def checkpoint_in(folder: Path, family: str) -> Checkpoint:
    if IN_FULL:
        return Checkpoint(checkpoint_of(random_model(FIRST[family]), folder))
    variant = VARIANTS[FIRST[family]]
    less = {"num_hidden_layers": 2} | ({"sliding_window": 6} if "sliding_window" in variant.settings else {})
    model = tiny.of(replace(variant, settings={**variant.settings, **less}))
    return Checkpoint(checkpoint_of(tiny.randomize(model, 0, 1.5), folder))


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_torch_op_set(family: str, tmp_path: Path, launch: Launch, device: torch.device) -> None:
    checkpoint = checkpoint_in(tmp_path, family)
    pair = pair_of(checkpoint, launch, device, torch.float32)
    for batch in batches(pair.layout, checkpoint.spec.vocab_size):
        ours, theirs = pair.logits(batch)
        assert relative_error(ours, theirs) < 2e-5


@dataclass
class CountedLaunch(RecordLaunch):
    """Counts launches by kernel."""

    counts: Counter[str] = field(default_factory=Counter)

    def start(self, kernel: str, *args: Any) -> None:
        self.counts[kernel] += 1
        super().start(kernel, *args)


class WatchedOps(CudaOps):
    """Keeps what the weights of `project` are multiplied with, by their names."""

    def project(self, x: Any, weight: Any) -> Product:
        product = super().project(x, weight)
        self.__dict__.setdefault("inputs", {})[weight.name] = product.x
        return product


@pytest.mark.parametrize(
    ("form", "shape", "coded"),
    [
        ("fp8", Shape.of_decodes(17), True),
        ("fp8", Shape.of_decodes(16), False),
        ("fp8", Shape(32, 1, 1, 1, 0), True),
        ("fp8", Shape(16, 1, 1, 1, 0), False),
        ("fp8", Shape(32, 3, 3, 1, 2), True),
        ("none", Shape.of_decodes(17), False),
    ],
    ids=["decodes", "few decodes", "prefill", "short prefill", "mixed", "unquantized"],
)
@torch.inference_mode()
def test_attention_gives_the_codes_that_the_next_linear_takes(form: str, shape: Shape, coded: bool) -> None:
    """And is computed once a layer; then nothing is left to be rounded by itself. The last one goes on with the rows
    that want logits: with few of them here."""
    launch, spec = CountedLaunch(), spec_of(TINY)
    ops = WatchedOps(spec, torch.bfloat16, META, 64, launch, laid_out=False)
    cache = CudaKVCache(KVLayout.of(spec, 16, 2), 2, torch.bfloat16, META)
    model = CheckpointConfig(spec, "bf16", Quantization(form))
    meta_steps(model, ops, cache, (32, 32, 64)).compute("mixed", shape)
    for layer in range(spec.num_layers):
        given = ops.inputs[f"layers.{layer}.attn.o"]
        narrow = layer == spec.num_layers - 1 and shape.rows is not None
        assert isinstance(given, Codes if coded and not narrow else torch.Tensor)
        assert len(given) == (shape.rows if narrow else shape.tokens) and given.dtype == torch.bfloat16
    assert launch.counts["attention.decode"] == (spec.num_layers if shape.decodes else 0)
    assert launch.counts["attention.prefill"] == (spec.num_layers if shape.tiles else 0)
    if coded:
        assert not launch.counts["linear.multiplied"]
