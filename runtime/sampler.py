"""Choosing tokens from logits, in torch on whatever device they are on.

The random number of a draw depends only on the request's seed, the continuation's index and the position, and a row's
arithmetic only on its own parameters: a seed gives the same text whatever the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from trtx.runtime.request import Logprob
from trtx.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Row:
    """What the sampler needs to know of the sequence behind one row of logits.

    Attributes:
        seed: of the request.
        index: of the continuation.
        forbidden: tokens that may not be chosen (ends of sequence before `min_tokens`).
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    seed: int
    index: int
    forbidden: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sampled:
    """A chosen token; None when the row's logits were not finite."""

    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[Logprob, ...] = ()


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """Choose one token a row.

    Args:
        logits: [R, V], fp32. Overwritten.
    """
    finite = torch.isfinite(logits.sum(-1)).tolist()
    raw = _wanted_logprobs(logits, rows)
    for position, row in enumerate(rows):
        _adjust(logits[position], row)
    tokens = _choose(logits, rows)
    return [
        _report(token, row, raw.get(position)) if finite[position] else Sampled(None)
        for position, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def uniform(seed: int, index: int, position: int) -> float:
    """The random number in [0, 1) of one draw."""
    text = f"{seed}/{index}/{position}".encode()
    return int.from_bytes(blake2b(text, digest_size=6).digest(), "little") / 2**48


def _wanted_logprobs(logits: Tensor, rows: Sequence[Row]) -> dict[int, Tensor]:
    wanted = [position for position, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return {}
    return dict(zip(wanted, torch.log_softmax(logits[wanted], -1), strict=True))


def _adjust(logits: Tensor, row: Row) -> None:
    """Penalties and forbidden tokens, in place, for one row [V]."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.output}), device=logits.device)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    if row.forbidden:
        logits[torch.tensor(sorted(row.forbidden), device=logits.device)] = float("-inf")


def _choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    tokens = logits.argmax(-1).tolist()
    drawn = [position for position, row in enumerate(rows) if not row.params.greedy]
    ordered = [p for p in drawn if rows[p].params.top_k or rows[p].params.top_p < 1]
    plain = [p for p in drawn if p not in set(ordered)]
    for positions, draw in ((ordered, _draw_ordered), (plain, _draw_plain)):
        if positions:
            chosen = draw(logits[positions], [rows[p] for p in positions])
            for position, token in zip(positions, chosen.tolist(), strict=True):
                tokens[position] = token
    return tokens


def _draw_ordered(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Draw with top-k and top-p (and min-p): cut the probabilities in falling order, invert their running sum."""
    vocabulary = logits.shape[-1]
    limits = [min(row.params.top_k, vocabulary) or vocabulary for row in rows]
    values, ids = torch.topk(logits / _column(logits, [r.params.temperature for r in rows]), max(limits))
    ranks = torch.arange(values.shape[-1], device=logits.device)
    values = values.masked_fill(ranks >= _column(logits, limits), float("-inf"))
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    cut = before >= _column(logits, [r.params.top_p for r in rows])
    cut |= probabilities < _column(logits, [r.params.min_p for r in rows]) * probabilities[:, :1]
    cut[:, 0] = False
    picked = _invert(probabilities.masked_fill(cut, 0), rows)
    return ids.gather(-1, picked).squeeze(-1)


def _draw_plain(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Draw from the whole vocabulary (with min-p): no order needed."""
    probabilities = (logits / _column(logits, [r.params.temperature for r in rows])).softmax(-1)
    largest = probabilities.amax(-1, keepdim=True)
    cut = probabilities < _column(logits, [r.params.min_p for r in rows]) * largest
    return _invert(probabilities.masked_fill_(cut, 0), rows).squeeze(-1)


def _invert(weights: Tensor, rows: Sequence[Row]) -> Tensor:
    """The index at which the running sum of `weights` [R, N] passes each row's random share of the total → [R, 1]."""
    sums = weights.double().cumsum(-1)
    draws = [uniform(row.seed, row.index, len(row.output)) for row in rows]
    targets = _column(sums, draws) * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).clamp_(max=weights.shape[-1] - 1)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _report(token: int, row: Row, logprobs: Tensor | None) -> Sampled:
    if logprobs is None:
        return Sampled(token)
    values, ids = logprobs.topk(row.params.logprobs or 0)
    top = tuple(Logprob(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token, logprobs[token].item(), top)
