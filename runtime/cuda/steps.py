"""The steps of an engine: decodes, and prefills of a few prompts, as CUDA graphs, others launched kernel by kernel.

A graph is captured for each of a few shapes; a step is padded to the next one. Tokens stay on the GPU: the next step
finds there what this one chose, and the host reads a step's tokens while the next one is computed.
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
from trtx.runtime.cuda.step import MOST_STEPS, BlockTables, Shape, StepInputs, StepMaker, resolve
from trtx.runtime.decoder import Decoder
from trtx.runtime.sampler import Row, Sampled, report, wanted_logprobs


def batch_sizes(most: int) -> list[int]:
    """The batch sizes that decode steps are captured for: all up to 4, then steps of 4, 8, 16 … to `most`."""
    sizes = [1, 2, 3, 4]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(4, 1 << (sizes[-1].bit_length() - 3)))
    return sorted({min(size, most) for size in sizes})


CHUNKS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
"""Tokens of the prefills that are captured: a longer one takes the GPU longer than the host, which takes half a
millisecond a layer, or a whole one (2048 tokens of Llama-3.1-8B in FP8 are 26 ms of kernels)."""

_SEQUENCES = 8
"""The most sequences of such a prefill."""


@dataclass
class Ticket:
    """A step that was launched.

    Attributes:
        chosen: tokens and whether their logits were finite, [2, rows] int32 for each step, on the host once `done` has
            happened.
        logprobs: of the rows that want any, on the device, by their place.
    """

    rows: Sequence[Row]
    chosen: list[Tensor]
    logprobs: dict[int, Tensor]
    done: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Captured:
    """A step in a graph, and where it leaves its logits [rows, V]."""

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
        self.tables = BlockTables(batch, len(cache.layout.groups), width, device)
        chunk, few = min(CHUNKS[-1], tokens), min(_SEQUENCES, batch)
        sizes = {"decodes": (batch, batch), "chunks": (chunk, few), "mixed": (tokens, batch)}
        self._inputs = {name: StepInputs(*size, device) for name, size in sizes.items()}
        shared = self.tables, cache, decoder.spec.num_heads, ops.dtype.itemsize, ops.launch.shared_bytes
        self._makers = {name: StepMaker(inputs, *shared) for name, inputs in self._inputs.items()}
        self._ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(2, batch, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(2, batch, dtype=torch.int32, pin_memory=pinned) for _ in range(2 * MOST_STEPS)]
        self._turn = 0
        self._no_logits = torch.zeros(0, decoder.spec.vocab_size, dtype=ops.dtype, device=device)
        self._graphs: dict[Shape, _Captured] = {}
        self.shapes = [("decodes", Shape.of_decodes(count)) for count in batch_sizes(batch)]
        for count in (count for count in CHUNKS if count <= tokens):
            for sequences in sorted({1, few}):
                tiles = count // self._makers["chunks"].tile + sequences
                self.shapes.append(("chunks", Shape(count, sequences, sequences, tiles, 0)))

    def capture(self) -> None:
        """Capture the steps of all shapes, the largest first: the others fit into its memory."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        for kind, shape in sorted(self.shapes, key=lambda known: known[1].tokens, reverse=True):
            self._makers[kind].fill_nothing(shape)
            with torch.cuda.stream(stream):
                self.compute(kind, shape)  # libraries set themselves up at their first calls
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits = self.compute(kind, shape)
            self._graphs[shape] = _Captured(graph, logits)
        torch.cuda.current_stream().wait_stream(stream)

    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> Ticket:
        """Start a step, or several; see `Runner.launch`."""
        assert steps <= MOST_STEPS
        kind, shape = self._send(batch)
        logits = self._run(kind, shape)[: len(rows)]
        self.choose(logits, rows)
        chosen = [self.publish(kind, len(rows))]
        for _ in range(1, steps):
            self._run(kind, shape)
            chosen.append(self.publish(kind, len(rows)))
        ticket = Ticket(rows, chosen, wanted_logprobs(logits, rows))
        if logits.device.type == "cuda":  # also without rows: whoever waits for a step may use its mailboxes again
            ticket.done = torch.cuda.Event()
            ticket.done.record()
        return ticket

    def logits(self, batch: Sequence[SequenceSlice]) -> Tensor:
        """The logits of a step, [rows, V] and perhaps more rows; the likeliest tokens stay for the next step."""
        return self._run(*self._send(batch))

    def collect(self, ticket: Ticket) -> list[list[Sampled]]:
        """Wait for a launch, and read its tokens, step by step."""
        if ticket.done is not None:
            ticket.done.synchronize()
        return [self._read(chosen, ticket) for chosen in ticket.chosen]

    def compute(self, kind: str, shape: Shape) -> Tensor:
        """Launch the kernels of a step whose numbers have been sent."""
        launch, step = self._ops.launch, self._makers[kind].step(shape, self._ids)
        resolve(launch, self._inputs[kind], shape.tokens, self._chosen[0], self._ids)
        if shape.rows == 0:
            self._decoder.body(step)
            return self._no_logits
        logits = self._decoder.forward(step)
        sampling.greedy(launch, logits, out=self._chosen)
        return logits

    def _shape(self, batch: Sequence[SequenceSlice]) -> tuple[str, Shape]:
        """The smallest captured shape that takes a step; its own where there is none."""
        exact = self._makers["mixed"].shape_of(batch)
        if exact.decodes == exact.tokens == exact.rows:
            exact = Shape.of_decodes(exact.tokens)
        for kind, shape in self.shapes:
            if _fits(exact, shape):
                return kind, shape
        return "mixed", exact

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> None:
        """Where rows do not ask for the likeliest token, put what they ask for in its place."""
        if all(row.params.greedy and not sampling.is_edited(row) for row in rows):
            return
        parameters = sampling.SamplingTensors.of(rows, logits.shape[1], logits.device)
        for place, chosen in zip(self._chosen, sampling.choose(self._ops.launch, logits, parameters), strict=True):
            place[: len(rows)].copy_(chosen)

    def publish(self, kind: str, count: int) -> Tensor:
        """Where the tokens that the first `count` rows have chosen will stand on the host, [2, count]."""
        host = self._host[self._turn]
        self._turn = (self._turn + 1) % len(self._host)
        if count:
            self._makers[kind].publish(self._ops.launch, self._chosen, host, count, kind == "decodes")
        return host[:, :count]

    def _send(self, batch: Sequence[SequenceSlice]) -> tuple[str, Shape]:
        """Send the numbers of a step on their way → what it is to be run as."""
        self.tables.fill(batch)
        kind, shape = self._shape(batch)
        if kind == "decodes":
            self._makers[kind].fill_decodes(batch, shape.tokens)
        else:
            self._makers[kind].fill(batch, shape)
        return kind, shape

    def _run(self, kind: str, shape: Shape) -> Tensor:
        """Logits of a step whose numbers have been sent."""
        if shape not in self._graphs:
            return self.compute(kind, shape)
        captured = self._graphs[shape]
        captured.graph.replay()
        return captured.logits

    def _read(self, chosen: Tensor, ticket: Ticket) -> list[Sampled]:
        tokens, finite = chosen.tolist()
        if not ticket.logprobs and all(finite):
            return list(map(Sampled, tokens))
        return [
            report(token, row, ticket.logprobs.get(place)) if whole else Sampled(None)
            for place, (token, whole, row) in enumerate(zip(tokens, finite, ticket.rows, strict=True))
        ]


def _fits(exact: Shape, shape: Shape) -> bool:
    """Whether a step can be padded to a shape."""
    if (exact.rows is None) != (shape.rows is None) or exact.tokens > shape.tokens:
        return False
    if exact.rows is None or shape.rows is None:
        return True
    return not exact.decodes and exact.sequences <= shape.sequences and exact.rows <= shape.rows
