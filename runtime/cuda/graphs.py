"""CUDA graphs that may be captured while others are replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor


class Graphs:
    """Captures what one stream computes, one graph at a time; all of them work in the same memory.

    So a graph's results last until another one is replayed.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A graph of a call, which must have been called before, so that libraries are set up → what replays it.

        Neither the GPU nor Python's garbage is waited for, as `torch.cuda.graph` does: what was launched before is
        computed meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = compute()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is worth nothing
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
