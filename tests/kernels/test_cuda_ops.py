"""The whole op set against the torch op set, on a tiny model of every family: kernels interpreted, or on a GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.converters.tiny import FIRST, checkpoint_of
from tests.runtime.models import random_model, relative_error
from tests.kernels.checks import poisoned  # noqa: F401 - a fixture
from trtx.converters.checkpoint import Checkpoint
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.steps import Steps
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.weights import WeightStore, load

LENGTH, BLOCK, BLOCKS, BATCH, TOKENS = 64, 8, 120, 4, 40


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
    lengths = (23, 9, 14)
    tables = [tuple([next(blocks) for _ in range(4)] for _ in layout.groups) for _ in lengths]
    tokens = [[rng.randrange(vocabulary) for _ in range(32)] for _ in lengths]

    def piece(index: int, start: int, end: int, logits: int) -> SequenceSlice:
        return SequenceSlice(tokens[index][start:end], start, tables[index], logits)

    return [
        [piece(0, 0, 13, 0), piece(1, 0, 9, 1)],
        [piece(1, 9, 10, 1), piece(0, 13, 23, 1), piece(2, 0, 14, 2)],
        [piece(index, length, length + 1, 1) for index, length in enumerate((23, 10, 14))],
        [piece(2, 15, 16, 1), piece(0, 24, 25, 1)],
    ]


@torch.inference_mode()
@pytest.mark.parametrize("family", FIRST)
def test_logits_equal_the_torch_op_set(family: str, tmp_path: Path, launch: Launch, device: torch.device) -> None:
    checkpoint = Checkpoint(checkpoint_of(random_model(FIRST[family]), tmp_path))
    pair = pair_of(checkpoint, launch, device, torch.float32)
    for batch in batches(pair.layout, checkpoint.spec.vocab_size):
        ours, theirs = pair.logits(batch)
        assert relative_error(ours, theirs) < 2e-5
