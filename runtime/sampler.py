"""Choosing tokens from logits, in torch on whatever device they are on.

The random number of a draw depends only on the request's seed, the continuation's index and the position, and a row's
arithmetic only on its own parameters: a seed gives the same text whatever the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from trtx.runtime.request import Logprob
from trtx.runtime.sampling import SamplingParams

COLDEST = 1e-30
"""A lower temperature takes the likeliest token just as well, and logits divided by it would overflow fp32."""


@dataclass(frozen=True)
class Row:
    """What the sampler needs to know of the sequence behind one row of logits.

    Attributes:
        tokens: prompt and output so far; the sequence's own list, so valid until a token is appended.
        prompt_length: how many of them are the prompt.
        seed: of the request.
        index: of the continuation.
        forbidden: tokens that may not be chosen (ends of sequence before `min_tokens`).
    """

    params: SamplingParams
    tokens: Sequence[int]
    prompt_length: int
    seed: int
    index: int
    forbidden: frozenset[int] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is wanted, and nothing else."""
        params = self.params
        return params.greedy and not params.penalizes and not self.forbidden and params.logprobs is None

    @property
    def output(self) -> Sequence[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def position(self) -> int:
        """Of the token to choose, in the output."""
        return len(self.tokens) - self.prompt_length


class Sampled(NamedTuple):
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
    raw = wanted_logprobs(logits, rows)
    for position, row in enumerate(rows):
        _adjust(logits[position], row)
    tokens = _choose(logits, rows)
    return [
        report(token, row, raw.get(position)) if finite[position] else Sampled(None)
        for position, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def uniform(seed: int, index: int, position: int) -> float:
    """The random number in [0, 1) of one draw."""
    text = f"{seed}/{index}/{position}".encode()
    return int.from_bytes(blake2b(text, digest_size=6).digest(), "little") / 2**48


def wanted_logprobs(logits: Tensor, rows: Sequence[Row]) -> dict[int, Tensor]:
    """Log-probabilities [V], fp32, of the rows that ask for any, by their place."""
    wanted = [position for position, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return {}
    return dict(zip(wanted, torch.log_softmax(logits[wanted].float(), -1), strict=True))


def _adjust(logits: Tensor, row: Row) -> None:
    """Penalties and forbidden tokens, in place, for one row [V]."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.position and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    if row.forbidden:
        logits[torch.tensor(sorted(row.forbidden), device=logits.device)] = float("-inf")


def _choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    tokens = logits.argmax(-1).tolist()
    drawn = [position for position, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = _draw(logits[drawn], [rows[position] for position in drawn])
        for position, token in zip(drawn, chosen.tolist(), strict=True):
            tokens[position] = token
    return tokens


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Draw a token a row, [R], from what temperature, min-p, top-k and top-p leave. Overwrites `logits`."""
    scaled = logits.div_(_column(logits, [max(row.params.temperature, COLDEST) for row in rows]))
    scaled -= scaled.amax(-1, keepdim=True)
    least = _column(logits, [row.params.min_p for row in rows]).log()
    ordered = [i for i, row in enumerate(rows) if row.params.top_k or row.params.top_p < 1]
    if ordered:
        least[ordered] = least[ordered].maximum(_least_likely(scaled[ordered], [rows[i] for i in ordered]))
    cut = scaled < least
    return _invert(scaled.exp_().masked_fill_(cut, 0), rows).squeeze(-1)


def _least_likely(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The smallest logit that top-k and top-p leave, [R, 1]; `logits` are relative to their row's largest.

    A value and not a set of tokens: in which order equal logits are found depends on how many the batch asks for.
    """
    vocabulary = logits.shape[-1]
    limits = [min(row.params.top_k, vocabulary) or vocabulary for row in rows]
    values = torch.topk(logits, max(limits)).values
    beyond = torch.arange(values.shape[-1], device=logits.device) >= _column(logits, limits)
    weights = values.exp().masked_fill_(beyond, 0)
    sums = weights.cumsum(-1)
    kept = (sums - weights < _column(logits, [row.params.top_p for row in rows]) * sums[:, -1:]) & ~beyond
    return values.gather(-1, kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0))


def _invert(weights: Tensor, rows: Sequence[Row]) -> Tensor:
    """The index at which the running sum of `weights` [R, N] passes each row's random share of the total → [R, 1]."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    draws = [uniform(row.seed, row.index, row.position) for row in rows]
    targets = _column(sums, draws) * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).clamp_(max=weights.shape[-1] - 1)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def report(token: int, row: Row, logprobs: Tensor | None) -> Sampled:
    """A chosen token with the log-probabilities that its row asks for."""
    if logprobs is None:
        return Sampled(token)
    values, ids = logprobs.topk(row.params.logprobs or 0)
    top = tuple(Logprob(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token, logprobs[token].item(), top)
