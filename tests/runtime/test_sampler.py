"""The sampler against closed forms, and against transformers' logits processors."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as hf

from trtx.runtime.sampler import Row, sample, uniform
from trtx.runtime.sampling import SamplingParams

VOCAB = 50


def row(params: SamplingParams, prompt=(1, 2), output=(), seed=0, index=0, forbidden=()) -> Row:
    return Row(params, [*prompt, *output], len(prompt), seed, index, frozenset(forbidden))


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits: torch.Tensor, params: SamplingParams, count: int = 4000) -> Counter:
    rows = [row(params, seed=seed) for seed in range(count)]
    return Counter(s.token for s in sample(logits.expand(count, -1).clone(), rows))


def support_and_probabilities(logits: torch.Tensor, *warpers) -> torch.Tensor:
    """transformers' probabilities after its warpers, [V]."""
    scores = logits[None]
    for warper in warpers:
        scores = warper(torch.tensor([[1, 2]]), scores)
    return scores.softmax(-1)[0]


def test_greedy_takes_the_largest():
    logits = random_logits(5)
    expected = logits.argmax(-1).tolist()
    assert [s.token for s in sample(logits, [row(SamplingParams(temperature=0))] * 5)] == expected


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [hf.TemperatureLogitsWarper(0.5)]),
        ({"top_k": 4}, [hf.TopKLogitsWarper(4)]),
        ({"top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
            [hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9)],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_distribution_equals_transformers(params, warpers):
    """The drawn frequencies fit transformers' probabilities (chi-squared), and nothing outside its support is drawn."""
    logits = random_logits(1)[0]
    expected = support_and_probabilities(logits, *warpers)
    count = 4000
    found = draws(logits, SamplingParams(**params), count)
    assert all(expected[token] > 0 for token in found)
    likely = [token for token in range(VOCAB) if expected[token] * count >= 5]
    statistic = sum((found[t] - count * expected[t].item()) ** 2 / (count * expected[t].item()) for t in likely)
    degrees = len(likely)
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_repetition_penalty_equals_transformers():
    logits, prompt, output = random_logits(1), [1, 2, 3], [4, 4]
    expected = hf.RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([prompt + output]), logits.clone()).argmax(-1)
    params = SamplingParams(temperature=0, repetition_penalty=1.8)
    assert sample(logits, [row(params, prompt, output)])[0].token == expected.item()


def test_presence_and_frequency_penalties():
    logits = torch.zeros(3, VOCAB)
    logits[:, 7], logits[:, 8] = 1.0, 0.5
    rows = [
        row(SamplingParams(temperature=0, presence_penalty=0.6), output=[7]),
        row(SamplingParams(temperature=0, frequency_penalty=0.2), output=[7, 7]),
        row(SamplingParams(temperature=0, frequency_penalty=0.2), output=[7, 7, 7]),
    ]
    assert [s.token for s in sample(logits.clone(), rows)] == [8, 7, 8]
    prompt_only = row(SamplingParams(temperature=0, presence_penalty=2), prompt=[7])
    assert sample(logits[:1].clone(), [prompt_only])[0].token == 7, "the prompt is not penalized"


def test_forbidden_tokens_are_not_drawn():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 10
    assert sample(logits, [row(SamplingParams(temperature=0), forbidden=[3])])[0].token != 3


@pytest.mark.parametrize("params", [{"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.05}, {}], ids=str)
def test_a_draw_depends_on_its_own_row_only(params):
    """The same seed gives the same token whatever else is in the batch, wherever the row stands."""
    logits = random_logits(8)
    mixed = [{"top_p": 0.5}, {"top_k": 3}, {"temperature": 0}, {}, {"min_p": 0.3}, {"top_k": 40}, {"temperature": 2}]
    for seed in range(50):
        mine = row(SamplingParams(**params), seed=seed)
        alone = sample(logits[3:4].clone(), [mine])[0].token
        rows = [row(SamplingParams(**p), seed=1000 + seed) for p in mixed]
        rows.insert(3, mine)
        assert sample(logits.clone(), rows)[3].token == alone


@pytest.mark.parametrize("params", [{"top_p": 0.8}, {"top_k": 9}, {"top_k": 30, "min_p": 0.02}], ids=str)
def test_equal_logits_do_not_make_a_draw_depend_on_the_batch(params):
    """bf16 logits are full of ties, and how `topk` orders them depends on how many the batch asks for."""
    logits = (torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * 2).bfloat16().float()
    for seed in range(20):
        mine = row(SamplingParams(**params), seed=seed)
        alone = sample(logits[:1].clone(), [mine])[0].token
        for other in ({"top_k": 60}, {"top_p": 0.95}, {}):
            assert sample(logits.clone(), [mine, row(SamplingParams(**other))])[0].token == alone


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 1e-60])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_temperature_near_zero_is_greedy(temperature, cut):
    logits = random_logits(5)
    expected = logits.argmax(-1).tolist()
    rows = [row(SamplingParams(temperature=temperature, **cut), seed=seed) for seed in range(5)]
    assert [s.token for s in sample(logits, rows)] == expected


def test_positions_and_continuations_draw_apart():
    values = {uniform(seed, index, position) for seed in range(5) for index in range(5) for position in range(40)}
    assert len(values) == 1000 and all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 1000 - 0.5) < 0.03


def test_logprobs_are_the_model_s_own():
    logits = random_logits(2)
    expected = logits.log_softmax(-1)
    params = SamplingParams(temperature=0.3, repetition_penalty=1.5, logprobs=3, seed=1)
    plain = SamplingParams(temperature=0)
    first, second = sample(logits.clone(), [row(params, prompt=range(9)), row(plain)])
    assert first.logprob == pytest.approx(expected[0, first.token].item())
    assert [item.token for item in first.top_logprobs] == expected[0].topk(3).indices.tolist()
    assert second.logprob is None and second.top_logprobs == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_fails_alone(value):
    logits = random_logits(3)
    expected = logits.argmax(-1).tolist()
    logits[1, 5] = value
    params = SamplingParams(temperature=0)
    assert [s.token for s in sample(logits, [row(params)] * 3)] == [expected[0], None, expected[2]]
    logits = random_logits(3)
    logits[1, 5] = value
    drawn = sample(logits, [row(SamplingParams(top_p=0.5))] * 3)
    assert drawn[1].token is None and drawn[0].token is not None
