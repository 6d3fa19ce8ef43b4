"""The steps of an engine, as CUDA graphs where they are captured for a shape that a step can be padded to.

Those shapes are few (`runtime.cuda.shapes`). Decodes and prefills are captured when an engine is loaded, mixed steps
when they come, behind the first of a shape; others are launched kernel by kernel. Tokens stay on the GPU: the next step
finds there what this one chose, and the host reads a step's tokens while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda import sampling
from trtx.runtime.cuda.graphs import Graphs
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.shapes import CHUNKS, MOST_MIXED, PROMPTS, Shapes
from trtx.runtime.cuda.step import MOST_STEPS, BlockTables, Shape, StepInputs, StepMaker, resolve
from trtx.runtime.decoder import Decoder
from trtx.runtime.sampler import Row, Sampled, report, wanted_logprobs


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


class Steps:
    """Computes the steps of a decoder.

    Args:
        batch, tokens, length: the engine's limits.

    Attributes:
        shapes: that steps are padded to.
    """

    def __init__(
        self, decoder: Decoder, ops: CudaOps, cache: CudaKVCache, batch: int, tokens: int, length: int
    ) -> None:
        self._decoder, self._ops = decoder, ops
        device = ops.device
        width = -(-length // cache.layout.block_size)
        most = batch + PROMPTS  # sequences of a padded step
        self.tables = BlockTables(most, len(cache.layout.groups), width, device)
        sizes = {"decodes": (batch, batch), "chunks": (min(CHUNKS[-1], tokens), PROMPTS), "mixed": (tokens, most)}
        self._inputs = {name: StepInputs(*size, device) for name, size in sizes.items()}
        shared = self.tables, cache, decoder.spec.num_heads, ops.dtype.itemsize, ops.launch.shared_bytes
        self._makers = {name: StepMaker(inputs, *shared) for name, inputs in self._inputs.items()}
        self._ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(2, batch, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(2, batch, dtype=torch.int32, pin_memory=pinned) for _ in range(2 * MOST_STEPS)]
        self._turn = 0
        self._logits = torch.empty(batch, decoder.spec.vocab_size, dtype=ops.dtype, device=device)
        self.shapes = Shapes.of(batch, tokens, self._makers["mixed"].tile)
        self._graphs: Graphs | None = None
        self._mixed_left = MOST_MIXED
        self._replays: dict[Shape, Callable[[], Tensor]] = {}

    def capture(self, graphs: Graphs) -> None:
        """Capture decodes and prefills now, the largest first, into whose memory the others fit; mixed ones later."""
        shapes = [(kind, shape) for kind, shape in self.shapes if kind != "mixed"]
        for kind, shape in sorted(shapes, key=lambda known: known[1].tokens, reverse=True):
            self._makers[kind].fill_nothing(shape)
            self.compute(kind, shape)
            self._replays[shape] = graphs.capture(partial(self.compute, kind, shape))
        self._graphs = graphs

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
        logits = self._decoder.forward(step)
        sampling.greedy(launch, logits, out=self._chosen)
        return logits

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
        kind, shape = self.shapes.padded(self._makers["mixed"].shape_of(batch))
        self.tables.fill(batch, shape.numbers(batch))
        if kind == "decodes":
            self._makers[kind].fill_decodes(batch, shape.tokens)
        else:
            self._makers[kind].fill(batch, shape)
        return kind, shape

    def _run(self, kind: str, shape: Shape) -> Tensor:
        """Logits of a step whose numbers have been sent. A mixed one of a new shape is captured behind that."""
        replay = self._replays.get(shape)
        if replay is not None:
            return replay()
        logits = self.compute(kind, shape)
        if self._graphs and self._mixed_left and shape in self.shapes.mixed:
            self._mixed_left -= 1
            try:
                self._replays[shape] = self._graphs.capture(partial(self._compute_mixed, shape))
            except torch.OutOfMemoryError:  # somebody else takes what the ledger counted on
                self._mixed_left = 0
        return logits

    def _compute_mixed(self, shape: Shape) -> Tensor:
        """As `compute`, with logits where those of all mixed steps go: they would take more than all else."""
        logits = self.compute("mixed", shape)
        return self._logits[: len(logits)].copy_(logits)

    def _read(self, chosen: Tensor, ticket: Ticket) -> list[Sampled]:
        tokens, finite = chosen.tolist()
        if not ticket.logprobs and all(finite):
            return list(map(Sampled, tokens))
        return [
            report(token, row, ticket.logprobs.get(place)) if whole else Sampled(None)
            for place, (token, whole, row) in enumerate(zip(tokens, finite, ticket.rows, strict=True))
        ]
