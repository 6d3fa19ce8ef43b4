"""A step as a TensorRT engine takes it: packed tokens, and where each stands among its slot's queries.

A KV block of max_seq_len tokens is a slot: block b is slot b - 1 of the caches. Slots up to the highest that takes part
are in a step; one without tokens has a length of 1, as a softmax over nothing is undefined, and nobody reads its row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtx.runtime.batch import SequenceSlice


def slot_inputs(batch: Sequence[SequenceSlice]) -> dict[str, Tensor]:
    """The inputs of a step, by name; shapes and meaning as in `builder.tensorrt.ops.TensorRTStep`.

    Where no logits are wanted, `rows` holds the first token: an engine has no empty outputs.
    """
    slots = [piece.tables[0][0] - 1 for piece in batch]
    order = sorted(range(len(batch)), key=lambda index: slots[index])
    count, width = max(slots) + 1, max(len(piece.tokens) for piece in batch)

    token_ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    first_token = dict[int, int]()
    starts, written, lengths = [0] * (count + 1), [0] * count, [1] * count
    index = torch.zeros(count, width, dtype=torch.int32)
    for number in order:
        piece, slot = batch[number], slots[number]
        first, size = len(token_ids), len(piece.tokens)
        first_token[number] = first
        index[slot, width - size :] = torch.arange(first, first + size, dtype=torch.int32)
        places += range(slot * width + width - size, (slot + 1) * width)
        token_ids += piece.tokens
        positions += range(piece.start, piece.end)
        written[slot], lengths[slot] = piece.start, piece.end
        starts[slot + 1] = size
    for slot in range(count):
        starts[slot + 1] += starts[slot]
    rows = [
        first_token[number] + len(piece.tokens) - piece.logits + row
        for number, piece in enumerate(batch)
        for row in range(piece.logits)
    ]
    lists = {
        "token_ids": token_ids, "positions": positions, "rows": rows or [0], "query_place": places, "starts": starts,
        "written": written, "lengths": lengths,
    }  # fmt: skip
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()}
    return {**tensors, "query_index": index}
