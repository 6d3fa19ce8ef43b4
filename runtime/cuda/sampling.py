"""Choosing tokens on the GPU, without the host. `runtime.sampler` says what each parameter means.

The same random number gives the same token as there, but where the rounding of a sum decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trtx.runtime.cuda.launch import Constant, Launch
from trtx.runtime.sampler import COLDEST, Row, uniform

_FEW_ROWS = 8
"""Up to so many, a row is split into small blocks, so that every multiprocessor has some."""

_BLOCK = 1024
_DIGITS = 16
_SHIFTS = range(24, -1, -4)
"""What `runtime.kernels.sampling` searches by: blocks of a row, and where the digits of its keys stand."""


@dataclass(frozen=True)
class SamplingTensors:
    """The parameters of R rows, on the device.

    Attributes:
        temperature: [R] fp32; 0: the likeliest token.
        top_k: [R] int32, at least 1 and at most the vocabulary.
        top_p: [R] fp32.
        reach: [R] fp32, -ln(min_p).
        uniform: [R] fp64, the random number of each row's draw.
        edits: places whose logits change, E of them, each once: rows and tokens [E] int32, and what their logits are
            divided or multiplied by and then reduced by, [E] fp32; None: there are none.
        draws, cuts_k, cuts_p: whether any row is drawn, and any of these with top-k, with top-p.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    reach: Tensor
    uniform: Tensor
    edits: tuple[Tensor, ...] | None
    draws: bool
    cuts_k: bool
    cuts_p: bool

    @classmethod
    def of(cls, rows: Sequence[Row], vocabulary: int, device: torch.device) -> SamplingTensors:
        """What the sampler needs to know of `rows`, in one copy to the device."""
        params = [row.params for row in rows]
        drawn = [p for p in params if not p.greedy]
        draws = [0.0 if row.params.greedy else uniform(row.seed, row.index, row.position) for row in rows]
        columns: list[np.ndarray] = [
            np.array([0 if p.greedy else max(p.temperature, COLDEST) for p in params], np.float32),
            np.array([min(p.top_k, vocabulary) or vocabulary for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array([-math.log(p.min_p) if p.min_p else math.inf for p in params], np.float32),
            np.array(draws, np.float64),
        ]
        if edits := [_edits(index, row) for index, row in enumerate(rows) if is_edited(row)]:
            columns += [np.concatenate(parts) for parts in zip(*edits, strict=True)]
        temperature, top_k, top_p, reach, uniforms, *changes = _to_device(columns, device)
        return cls(
            temperature,
            top_k,
            top_p,
            reach,
            uniforms,
            edits=tuple(changes) if edits else None,
            draws=bool(drawn),
            cuts_k=any(p.top_k for p in drawn),
            cuts_p=any(p.top_p < 1 for p in drawn),
        )


def choose(launch: Launch, logits: Tensor, parameters: SamplingTensors) -> tuple[Tensor, Tensor]:
    """Choose a token a row of logits [R, V] (any float dtype), as `runtime.sampler.sample` does.

    Returns:
        Tokens, and 0 or 1: whether the row was finite, [R] each, int32.
    """
    peak = logits.new_empty(len(logits), dtype=torch.float32)
    tokens, finite = greedy(launch, logits, peak)
    if parameters.edits:
        logits = _adjusted(launch, logits, parameters.edits)
        tokens, _ = greedy(launch, logits, peak)
    if parameters.draws:
        _draw(launch, logits, peak, parameters, tokens)
    return tokens, finite


def greedy(
    launch: Launch, logits: Tensor, peak: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first largest of each row of logits [R, V] (any float dtype) and whether all of the row are finite.

    Args:
        peak: [R] fp32, where the largest values go.
        out: [2, R or more] int32, where the result goes.

    Returns:
        Tokens and 0 or 1, [R] each, int32.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    block = 1024 if rows <= _FEW_ROWS else 4096
    splits = -(-vocabulary // block)
    values = logits.new_empty(rows, splits, dtype=torch.float32)
    tokens, finite = (logits.new_empty(rows, splits, dtype=torch.int32) for _ in range(2))
    split = {"VOCABULARY": vocabulary, "STRIDE": logits.stride(0), "SPLITS": splits, "BLOCK": block}
    launch("sampling.best", (rows, splits), (logits, values, tokens, finite), split, warps=block // 512, pdl=True)
    token, fine = logits.new_empty(2, rows, dtype=torch.int32) if out is None else out[:, :rows]
    merged = {"SPLITS": splits, "BLOCK": 1 << (splits - 1).bit_length()}
    launch("sampling.settle", (rows,), (values, tokens, finite, token, fine, peak), merged, warps=1, pdl=True)
    return token, fine


def _adjusted(launch: Launch, logits: Tensor, edits: tuple[Tensor, ...]) -> Tensor:
    """A copy in fp32, with penalties and without forbidden tokens."""
    edited = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    count, block = len(edits[0]), 256
    constants = {"VOCABULARY": logits.shape[1], "STRIDE": logits.stride(0), "BLOCK": block}
    launch("sampling.adjust", (-(-count // block),), (logits, edited, *edits, count), constants, warps=4, pdl=True)
    return edited


def _draw(launch: Launch, logits: Tensor, peak: Tensor, parameters: SamplingTensors, tokens: Tensor) -> None:
    """Replace the tokens of rows with a temperature by drawn ones."""
    p, (rows, vocabulary) = parameters, logits.shape
    blocks = 1 if rows <= _FEW_ROWS else 8
    splits = -(-vocabulary // (blocks * _BLOCK))
    constants: dict[str, Constant] = {
        "VOCABULARY": vocabulary,
        "STRIDE": logits.stride(0),
        "SPLITS": splits,
        "BLOCKS": blocks,
    }
    constants["BLOCK_SPLITS"] = 1 << (splits - 1).bit_length()
    grid = (rows, splits)
    state: Tensor | None = None
    sums: Tensor | None = None
    common = (logits, p.temperature, peak)
    for mass in [False] * p.cuts_k + [True] * p.cuts_p:
        for shift in _SHIFTS:
            new_state = logits.new_empty(rows, 5, dtype=torch.int64)
            new_sums = logits.new_empty(rows, splits, _DIGITS, dtype=torch.int64)
            found = (p.top_k, p.top_p, state, sums, new_state, new_sums, shift)
            kind: dict[str, Constant] = {"MASS": mass, "FIRST": shift == _SHIFTS[0]}
            launch("sampling.narrow", grid, (*common, *found), constants | kind, warps=8, pdl=True)
            state, sums = new_state, new_sums
    smallest = logits.new_empty(rows, dtype=torch.int32)
    masses = logits.new_empty(rows, splits, dtype=torch.int64)
    kept = (p.reach, p.top_p, state, sums, smallest, masses)
    launch("sampling.weigh", grid, (*common, *kept), constants, warps=4, pdl=True)
    drawn = (p.reach, smallest, masses, p.uniform, tokens)
    launch("sampling.draw", (rows,), (*common, *drawn), constants, warps=4, pdl=True)


def is_edited(row: Row) -> bool:
    """Whether penalties or forbidden tokens change a row's logits."""
    params = row.params
    return params.repetition_penalty != 1 or _penalized(row) or bool(row.forbidden)


def _penalized(row: Row) -> bool:
    return bool(row.position and (row.params.presence_penalty or row.params.frequency_penalty))


def _edits(index: int, row: Row) -> tuple[np.ndarray, ...]:
    """What changes in one row of logits: its index, each token once, and the repetition and penalty of each."""
    params = row.params
    times = Counter(row.output if _penalized(row) else ())
    seen = set(row.tokens) if params.repetition_penalty != 1 else times.keys()
    tokens = np.array([*seen, *(row.forbidden - seen)], np.int32)
    # Also for forbidden tokens that were not seen: their penalty is infinite anyway.
    repetition = np.full(len(tokens), params.repetition_penalty, np.float32)
    penalty = np.zeros(len(tokens), np.float32)
    if times or row.forbidden:
        counts = np.array([times[token] for token in tokens.tolist()], np.float32)
        added = np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts
        penalty = np.where(counts > 0, added, 0).astype(np.float32)
        penalty[[token in row.forbidden for token in tokens.tolist()]] = math.inf
    return np.full(len(tokens), index, np.int32), tokens, repetition, penalty


def _to_device(columns: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Several arrays as tensors at aligned places of one piece of memory, copied at once."""
    starts = np.cumsum([0] + [-(-column.nbytes // 16) * 16 for column in columns]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for column, start in zip(columns, starts, strict=False):
        packed[start : start + column.nbytes] = torch.from_numpy(column.view(np.uint8))
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + column.nbytes].view(torch.from_numpy(column).dtype)
        for column, start in zip(columns, starts, strict=False)
    ]
