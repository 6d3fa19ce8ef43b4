"""A runner that notes what the steps of an executor compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from trtx.runtime.batch import SequenceSlice
from trtx.runtime.bench.trace import Slice
from trtx.runtime.runner import Runner
from trtx.runtime.sampler import Row, Sampled


class Watch(Runner):
    """Stands between an executor and its runner.

    Attributes:
        overlaps: the runner's; may be turned off while no step is in flight.
    """

    def __init__(self, runner: Runner) -> None:
        self.layout, self.notes, self.overlaps = runner.layout, runner.notes, runner.overlaps
        self._runner = runner
        self._launched: deque[Sequence[SequenceSlice]] = deque()
        self._read: Sequence[SequenceSlice] = ()

    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> Any:
        self._launched.append(batch)
        return self._runner.launch(batch, rows, steps)

    def collect(self, ticket: Any) -> list[list[Sampled]]:
        self._read = self._launched.popleft()
        return self._runner.collect(ticket)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Of the step that was read last."""
        return tuple(Slice(piece.start, len(piece.tokens), piece.logits) for piece in self._read)

    @property
    def chunks(self) -> tuple[Slice, ...]:
        """Those of them that are longer than one token."""
        return tuple(piece for piece in self.slices if piece.tokens > 1)
