"""What the scheduler asks a runner to compute. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PENDING = -1
"""Stands for a token that the step before has chosen and the host does not know yet."""


@dataclass(frozen=True)
class SequenceSlice:
    """The tokens of one sequence in one step: a prefill chunk, a decode token, or drafts to verify.

    Attributes:
        tokens: token ids, at least one; a single one may be `PENDING`.
        start: position of the first; what stands before is in the KV cache.
        tables: per KV group, the block of each `block_size` positions from 0 on; blocks given back hold 0 (masked).
        logits: how many of the last tokens want logits.
        source: the row of logits of the step before that a pending token was chosen from.
    """

    tokens: Sequence[int]
    start: int
    tables: tuple[Sequence[int], ...]
    logits: int
    source: int | None = None

    @property
    def end(self) -> int:
        """Length of the sequence after this step."""
        return self.start + len(self.tokens)
