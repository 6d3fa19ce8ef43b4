"""What the scheduler asks a runner to compute. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceSlice:
    """The tokens of one sequence in one step: a prefill chunk, a decode token, or drafts to verify.

    Attributes:
        tokens: token ids, at least one.
        start: position of the first; what stands before is in the KV cache.
        tables: per KV group, the block of each `block_size` positions from 0 on; blocks given back hold 0 (masked).
        logits: how many of the last tokens want logits.
    """

    tokens: Sequence[int]
    start: int
    tables: tuple[Sequence[int], ...]
    logits: int

    @property
    def end(self) -> int:
        """Length of the sequence after this step."""
        return self.start + len(self.tokens)
