"""The steps of an engine: decode steps as CUDA graphs, others launched kernel by kernel.

A graph is captured for each of a few batch sizes; a batch is padded to the next one. Tokens stay on the GPU: the next
step finds there what this one chose, and the host reads a step's tokens while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda import sampling
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.step import BlockTables, CudaStep, StepInputs, StepMaker, fill_decodes, resolve
from trtx.runtime.decoder import Decoder
from trtx.runtime.sampler import Row, Sampled, sample


def batch_sizes(most: int) -> list[int]:
    """The batch sizes that decode steps are captured for: all up to 4, then steps of 4, 8, 16 … to `most`."""
    sizes = [1, 2, 3, 4]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(4, 1 << (sizes[-1].bit_length() - 3)))
    return sorted({min(size, most) for size in sizes})


@dataclass
class Ticket:
    """A step that was launched.

    Attributes:
        count: rows of logits.
        chosen: tokens and whether their logits were finite, [2, count], pinned; valid once `done` has happened.
        sampled: what was chosen on the host; takes the place of `chosen`.
    """

    count: int
    chosen: Tensor | None = None
    done: torch.cuda.Event | None = None
    sampled: list[Sampled] | None = None


@dataclass(frozen=True)
class _Captured:
    """A decode step in a graph, and where it leaves its logits [B, V]."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class Steps:
    """Computes the steps of a decoder.

    Args:
        batch, tokens, length: the engine's limits.
    """

    def __init__(
        self, decoder: Decoder, ops: CudaOps, cache: CudaKVCache, batch: int, tokens: int, length: int
    ) -> None:
        self._decoder, self._ops = decoder, ops
        device = ops.device
        width = -(-length // cache.layout.block_size)
        self._single = StepInputs(batch, batch, device)
        self._mixed = StepInputs(tokens, batch, device)
        self.tables = BlockTables(batch, len(cache.layout.groups), width, device)
        shared = self.tables, cache, decoder.spec.num_heads, ops.dtype.itemsize
        self._singles, self._steps = StepMaker(self._single, *shared), StepMaker(self._mixed, *shared)
        self._ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(2, batch, dtype=torch.int32, device=device)
        self._host = [torch.zeros(2, batch, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._graphs: dict[int, _Captured] = {}
        self.sizes = batch_sizes(batch)
        self._turn = 0

    def capture(self) -> None:
        """Capture the decode steps, the largest first: the others fit into its memory."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        for count in reversed(self.sizes):
            fill_decodes(self._single, [], count)
            with torch.cuda.stream(stream):
                self.decode(count)  # libraries set themselves up at their first calls
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits = self.decode(count)
            self._graphs[count] = _Captured(graph, logits)
        torch.cuda.current_stream().wait_stream(stream)

    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row]) -> Ticket:
        """Start a step; see `Runner.launch`."""
        self.tables.fill(batch)
        if self._graphs and all(len(piece.tokens) == 1 and piece.logits for piece in batch):
            count = next(size for size in self.sizes if size >= len(batch))
            fill_decodes(self._single, batch, count)
            captured = self._graphs[count]
            captured.graph.replay()
            logits = captured.logits[: len(batch)]
        else:
            logits = self.compute(self.mixed(batch))
        return self._choose(logits, rows)

    def collect(self, ticket: Ticket) -> list[Sampled]:
        """Wait for a step, and read its tokens."""
        if ticket.sampled is not None:
            return ticket.sampled
        if not ticket.count:
            return []
        assert ticket.chosen is not None
        if ticket.done is not None:
            ticket.done.synchronize()
        tokens, finite = ticket.chosen.tolist()
        return [Sampled(token if whole else None) for token, whole in zip(tokens, finite, strict=True)]

    def decode(self, count: int) -> Tensor:
        """Logits of a step of `count` single tokens, whose numbers `fill_decodes` has sent."""
        resolve(self._ops.launch, self._single, count, self._chosen[0], self._ids)
        return self.compute(self._singles.decodes(count, self._ids[:count]))

    def mixed(self, batch: Sequence[SequenceSlice]) -> CudaStep:
        """A step of any tokens, its numbers on their way."""
        step = self._steps.mixed(batch, self._ids)
        resolve(self._ops.launch, self._mixed, len(step.token_ids), self._chosen[0], self._ids)
        return step

    def compute(self, step: CudaStep) -> Tensor:
        """Logits of a step; the likeliest tokens are left on the device for the next one."""
        logits = self._decoder.forward(step)
        if len(logits):
            for place, chosen in zip(self._chosen, sampling.greedy(self._ops.launch, logits), strict=True):
                place[: len(logits)].copy_(chosen)
        return logits

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> Ticket:
        count = len(rows)
        if any(not row.params.greedy or row.params.penalizes or row.params.logprobs is not None for row in rows):
            sampled = sample(logits.float(), rows)
            tokens = torch.tensor([one.token or 0 for one in sampled], dtype=torch.int32)
            self._chosen[0, :count].copy_(tokens)
            return Ticket(count, sampled=sampled)
        if not count:
            return Ticket(0)
        host = self._host[self._turn][:, :count]
        self._turn = 1 - self._turn
        host.copy_(self._chosen[:, :count], non_blocking=True)
        done = None
        if host.is_pinned():
            done = torch.cuda.Event()
            done.record()
        return Ticket(count, host, done)
