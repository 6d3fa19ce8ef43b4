"""Routing and experts against the torch op set's, and against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.checks import assert_needs_no_values, poisoned  # noqa: F401
from trtx.converters.spec import Activation, MoE
from trtx.runtime.cuda import experts
from trtx.runtime.ops.torch_moe import choose, weigh
from trtx.runtime.ops.torch_ops import _ACTIVATIONS, ResidentLinear

ROUTINGS = {
    "mixtral": {"experts": 8, "top_k": 2, "scores": "softmax", "normalize": True},
    "qwen": {"experts": 60, "top_k": 4, "scores": "softmax"},
    "gpt-oss": {"experts": 32, "top_k": 4, "scores": "top_softmax"},
    "llama 4": {"experts": 16, "top_k": 1, "scores": "sigmoid"},
    "deepseek 2": {"experts": 40, "top_k": 6, "scale": 16.0, "groups": 8, "top_groups": 3},
    "deepseek 3": {
        "experts": 32, "top_k": 4, "scores": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "top_groups": 2,
        "group_score": "top2", "correction": True,
    },
    "phi": {"experts": 16, "top_k": 2, "scores": "sparsemixer", "jitter": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("tokens", "dtype"), [(2, torch.bfloat16), (17, torch.float32)], ids=str)
def test_route(launch, device, name, tokens, dtype):
    moe = MoE(layers=(0,), intermediate_size=1, **ROUTINGS[name])
    x = torch.randn(tokens, 72, device=device).to(dtype)
    router = ResidentLinear(torch.randn(moe.experts, 72, device=device) * 0.3, None, None, (moe.experts,))
    if name == "gpt-oss":
        router = ResidentLinear(router.weight, torch.randn(moe.experts, device=device), None, router.rows)
    correction = torch.randn(moe.experts, device=device) * 0.3 if moe.correction else None
    ids, weights = experts.route(launch, x, router, correction, moe)
    logits = F.linear(x.float(), router.weight, router.bias)
    expected = choose(logits, correction, moe)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), expected)
    assert torch.allclose(weights, weigh(logits, expected, moe), rtol=2e-5, atol=1e-7)


def test_routing_of_what_is_not_finite_stays_among_the_experts(launch, device):
    """A bad activation must not send a token to memory that is no expert's."""
    x = torch.full((2, 8), float("nan"), device=device)
    for name, settings in ROUTINGS.items():
        moe = MoE(layers=(0,), intermediate_size=1, **settings)
        router = ResidentLinear(torch.ones(moe.experts, 8, device=device), None, None, (moe.experts,))
        correction = torch.zeros(moe.experts, device=device) if moe.correction else None
        ids, _ = experts.route(launch, x, router, correction, moe)
        assert ((ids >= 0) & (ids < moe.experts)).all(), name


def exactly(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, biases, activation: Activation, inputs: bool
) -> Tensor:
    """Token by token in fp64; only the weighted input is rounded."""
    out = torch.zeros(len(x), down.shape[1], dtype=torch.float64, device=x.device)
    act = _ACTIVATIONS[activation.kind]
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            row = (x[token].float() * share).to(x.dtype).double() if inputs else x[token].double()
            y = gate_up[expert].double() @ row
            if biases[0] is not None:
                y = y + biases[0][expert].double()
            if activation.gated:
                gate, up = y.chunk(2)
                if activation.limit is not None:
                    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
                y = act(gate) * (up + activation.offset)
            else:
                y = act(y)
            y = down[expert].double() @ y
            if biases[1] is not None:
                y = y + biases[1][expert].double()
            out[token] += y if inputs else y * share.double()
    return out


CASES = {
    "silu": (Activation("silu"), False, False),
    "clamped, with biases": (Activation("quick_gelu", limit=1.5, offset=1.0), True, False),
    "weighs input": (Activation("silu"), False, True),
    "not gated": (Activation("relu2", gated=False), True, False),
}


TESTED = [*((case, torch.bfloat16) for case in CASES), ("silu", torch.float16), ("silu", torch.float32)]
TESTED += [("clamped, with biases", torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), TESTED, ids=str)
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(1, 5, 3), (2, 9, 2), (19, 7, 2)])
def test_experts(launch, device, dtype, case, tokens, count, top_k):
    """One token, few, and many that are sorted; sizes that no block divides; experts without any token."""
    activation, has_bias, weighs_input = CASES[case]
    hidden, inner = 40, 24
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    rows = 2 * inner if activation.gated else inner
    gate_up = (torch.randn(count, rows, hidden, device=device) / hidden**0.5).to(dtype)
    down = (torch.randn(count, hidden, inner, device=device) / inner**0.5).to(dtype)
    biases = (None, None)
    if has_bias:
        biases = torch.randn(count, rows, device=device).to(dtype), torch.randn(count, hidden, device=device).to(dtype)
    ids = torch.stack([torch.randperm(count - 1, device=device)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k, device=device)
    found = experts.experts(launch, x, ids, weights, gate_up, down, biases, activation, weighs_input)
    expected = exactly(x, ids, weights, gate_up, down, biases, activation, weighs_input)
    assert found.dtype == dtype and found.shape == x.shape
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype], error


@pytest.mark.parametrize(("tokens", "count"), [(210, 3), (90, 2)])
def test_many_tokens_at_few_experts(launch, device, tokens, count):
    """Tiles of more rows, several an expert, and one expert with them all."""
    x = torch.randn(tokens, 16, device=device).bfloat16()
    gate_up = torch.randn(count, 32, 16, device=device).bfloat16() / 4
    down = torch.randn(count, 16, 16, device=device).bfloat16() / 4
    for ids in (torch.randint(0, count, (tokens, 1), device=device), torch.full((tokens, 1), count - 1, device=device)):
        weights = torch.rand(tokens, 1, device=device)
        arguments = x, ids.int(), weights, gate_up, down, (None, None), Activation("silu"), False
        found, expected = experts.experts(launch, *arguments), exactly(*arguments)
        assert (found.double() - expected).norm() / expected.norm() < 6e-3


@pytest.mark.parametrize("height", [16, 64])
@pytest.mark.parametrize(("pairs", "count"), [(1, 3), (700, 5), (700, 40), (512, 1)])
def test_pairs_are_sorted_in_their_order(launch, device, monkeypatch, pairs, count, height):
    """In one kernel and in two; every slot is written."""
    ids = torch.randint(0, count, (pairs, 1), device=device).int()
    tiles = (pairs + min(count, pairs) * (height - 1)) // height
    expected, names = [], []
    for expert in range(count):
        mine = (ids[:, 0] == expert).nonzero()[:, 0].tolist()
        mine += [pairs] * (-len(mine) % height)
        expected += mine
        names += [expert] * (len(mine) // height)
    for few in (1 << 20, 0):
        monkeypatch.setattr(experts, "_FEW_PAIRS", few)
        slots, owners = experts._sort(launch, ids, count, height, tiles)
        assert slots[: len(expected)].tolist() == expected
        assert owners.tolist() == names + [-1] * (tiles - len(names))


@pytest.mark.parametrize(("tokens", "count"), [(1, 4), (9, 3)])
def test_what_is_not_a_number_is_not_clamped_away(launch, device, tokens, count):
    """A row of logits must tell that something went wrong before it."""
    x = torch.full((tokens, 16), float("nan"), device=device)
    gate_up, down = torch.ones(count, 32, 16, device=device), torch.ones(count, 16, 16, device=device)
    ids, weights = torch.zeros(tokens, 1, dtype=torch.int32, device=device), torch.ones(tokens, 1, device=device)
    activation = Activation("silu", limit=1.0)
    assert experts.experts(launch, x, ids, weights, gate_up, down, (None, None), activation, False).isnan().all()


@pytest.mark.parametrize("tokens", [1, 17, 4096])
def test_nothing_depends_on_what_is_computed(tokens):
    moe = MoE((0,), experts=64, top_k=4, intermediate_size=32)

    def call(launch) -> Tensor:
        x, router, gate_up, down = (
            torch.empty(shape, device="meta", dtype=dtype)
            for shape, dtype in (
                ((tokens, 48), torch.bfloat16), ((64, 48), torch.float32),
                ((64, 64, 48), torch.bfloat16), ((64, 48, 32), torch.bfloat16),
            )
        )  # fmt: skip
        routing = experts.route(launch, x, ResidentLinear(router, None, None, (64,)), None, moe)
        return experts.experts(launch, x, *routing, gate_up, down, (None, None), Activation(), False)

    assert_needs_no_values(call)
