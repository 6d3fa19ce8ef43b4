"""Choosing tokens, against the torch sampler."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.checks import DTYPES, assert_needs_no_values, poisoned  # noqa: F401
from trtx.runtime.cuda import sampling
from trtx.runtime.cuda.sampling import SamplingTensors
from trtx.runtime.sampler import Row, sample
from trtx.runtime.sampling import SamplingParams


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("vocabulary", [17, 1024, 5003])
def test_greedy(launch, device, dtype, rows, vocabulary):
    """Of equal logits, of which bf16 has many, the first."""
    padded = torch.randn(rows, vocabulary + 3, device=device).to(dtype)
    padded[:, vocabulary:] = float("inf")
    logits = padded[:, :vocabulary]
    logits[:, [vocabulary // 3, vocabulary - 1]] = 20.0
    logits[-1, 5] = 25.0
    tokens, finite = sampling.greedy(launch, logits)
    assert tokens.dtype == torch.int32 and tokens.tolist() == [vocabulary // 3] * (rows - 1) + [5]
    assert finite.tolist() == [1] * rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 4000, 4999])
def test_row_that_is_not_finite_is_told(launch, device, value, place):
    logits = torch.randn(3, 5000, device=device).bfloat16()
    logits[1, place] = value
    tokens, finite = sampling.greedy(launch, logits)
    assert finite.tolist() == [1, 0, 1]
    assert tokens[::2].tolist() == logits[::2].float().argmax(-1).tolist() and 0 <= tokens[1] < 5000
    _, finite = sampling.greedy(launch, torch.full((2, 40), value, device=device))
    assert finite.tolist() == [0, 0]


def row(params: dict, seed: int, output=(), forbidden=()) -> Row:
    prompt = [1, 2, 2, 7]
    return Row(SamplingParams(**params), [*prompt, *output], len(prompt), seed, 0, frozenset(forbidden))


def chosen(launch, logits: torch.Tensor, rows: list[Row]) -> list[int]:
    tokens, finite = sampling.choose(launch, logits, SamplingTensors.of(rows, logits.shape[1], logits.device))
    assert finite.tolist() == [1] * len(rows)
    return tokens.tolist()


CUTS = [
    {}, {"temperature": 0.3}, {"min_p": 0.1}, {"top_k": 1}, {"top_k": 40}, {"top_k": 99999}, {"top_p": 0.9},
    {"top_p": 1e-9}, {"top_p": 0.999, "temperature": 2.0}, {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 3, "top_p": 0.99, "min_p": 0.2}, {"temperature": 0}, {"temperature": 1e-40, "top_p": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_are_the_torch_sampler_s(launch, device, dtype):
    """Many rows with all kinds of parameters; bf16 logits are full of ties."""
    logits = (torch.randn(len(CUTS), 1300, device=device) * 2).to(dtype)
    rows = [row(params, seed) for seed, params in enumerate(CUTS)]
    assert chosen(launch, logits, rows) == [s.token for s in sample(logits.float(), rows)]


@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_draws_of_few_rows(launch, device, params):
    """Where a row is split more finely, and there are only the passes that its parameters need."""
    logits = (torch.randn(3, 1300, device=device) * 3).bfloat16()
    rows = [row(params, seed) for seed in range(3)]
    assert chosen(launch, logits, rows) == [s.token for s in sample(logits.float(), rows)]


def test_a_draw_does_not_depend_on_the_batch(launch, device):
    """Nor on how finely rows are split."""
    logits = torch.randn(9, 1300, device=device)
    rows = [row({"top_p": 0.95} if index % 2 else {"top_k": 30}, seed=index) for index in range(9)]
    together = chosen(launch, logits, rows)
    assert [chosen(launch, logits[i : i + 1], rows[i : i + 1])[0] for i in range(4)] == together[:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_penalties(launch, device, dtype):
    logits = (torch.randn(6, 90, device=device) * 2).to(dtype)
    output = [5, 5, 9, 7]
    likeliest = logits.argmax(-1).tolist()
    rows = [
        row({"temperature": 0, "repetition_penalty": 1.7}, 0, likeliest[:1] + output),
        row({"temperature": 0, "presence_penalty": 1.9}, 0, [likeliest[1]] * 3),
        row({"temperature": 0, "frequency_penalty": 0.7}, 0, [likeliest[2]] * 9),
        row({"temperature": 0}, 0, forbidden=[likeliest[3]]),
        row({"temperature": 1.3, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "top_p": 0.8}, 4, output, [3, 5]),
        row({}, 5),
    ]
    found = chosen(launch, logits, rows)
    assert found == [s.token for s in sample(logits.float(), rows)]
    assert all(token != before for token, before in zip(found[1:4], likeliest[1:4], strict=True))


def test_row_that_is_not_finite_is_told_when_drawing(launch, device):
    logits = torch.randn(3, 60, device=device)
    rows = [row({"top_p": 0.9}, seed, forbidden=[4]) for seed in range(3)]
    expected = [s.token for s in sample(logits.clone(), rows)]
    logits[1, 5] = float("nan")
    tokens, finite = sampling.choose(launch, logits, SamplingTensors.of(rows, 60, device))
    assert finite.tolist() == [1, 0, 1], "a forbidden token is no fault"
    assert tokens[::2].tolist() == expected[::2] and 0 <= tokens[1] < 60


@pytest.mark.parametrize("rows", [1, 40])
def test_nothing_depends_on_what_is_computed(device, rows):
    asked = [row({"top_k": 5, "top_p": 0.5, "repetition_penalty": 1.1}, 0)] * rows
    parameters = SamplingTensors.of(asked, 5000, device)
    assert_needs_no_values(lambda launch: sampling.choose(launch, torch.empty(rows, 5000, device="meta"), parameters))


def test_parameters_travel_in_one_aligned_piece(device):
    rows = [row({"top_k": index, "repetition_penalty": 1.5}, index, forbidden=[3]) for index in range(5)]
    tensors = SamplingTensors.of(rows, 90, device)
    parts = [tensors.temperature, tensors.top_k, tensors.top_p, tensors.reach, tensors.uniform, *tensors.edits]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert all(part.data_ptr() % 16 == 0 for part in parts)
    assert tensors.top_k.tolist() == [90, 1, 2, 3, 4]
