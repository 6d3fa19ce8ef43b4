"""Experts as TensorRT's own layer, which only `tensorrt` compiles, for GPUs that are not here: evaluated, not built."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tensorrt_rtx")

from tests.converters.tiny import checkpoint_of
from tests.runtime.models import random_model, relative_error
from tests.tensorrt.interpreter import evaluate
from tests.tensorrt.models import RTX
from tests.tensorrt.test_linears import BOUNDS
from tests.tensorrt.test_ranks import Ranks, logits_of, torch_logits_of
from trtx.builder.shard import Rank
from trtx.builder.tensorrt import backend
from trtx.builder.tensorrt.modes import TARGETS
from trtx.builder.tensorrt.network import Network
from trtx.builder.tensorrt.plan import network, serialize
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import UnsupportedError
from trtx.runtime.weights import WeightStore


def kinds_of(net: Network) -> set[str]:
    layers = map(net.definition.get_layer, range(net.definition.num_layers))
    return {net.trt.ILayer.type.fget(layer).name for layer in layers}


def store_of(name: str, folder) -> WeightStore:
    return WeightStore.of_checkpoint(Checkpoint(checkpoint_of(random_model(name), folder)))


def networks_of(store: WeightStore, tp: int) -> Ranks:
    spec = store.config.spec
    ranks = [Rank(spec, tp, index) for index in range(tp)]
    return Ranks(spec, [network(store, RTX, torch.float32, BOUNDS, rank=r, expert_layers=True) for r in ranks])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_layer_of_experts_equals_the_torch_op_set(name, tp, tmp_path):
    store = store_of(name, tmp_path)
    nets = networks_of(store, tp)
    assert all("MOE" in kinds_of(net) for net in nets.nets)
    for ours, theirs in zip(logits_of(nets), torch_logits_of(store), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_what_the_layer_has_no_formula_for_stays_in_plain_layers(name, tmp_path):
    """Limits and offsets of gate and up; weights that multiply the input."""
    (net,) = networks_of(store_of(name, tmp_path), 1).nets
    assert "MOE" not in kinds_of(net)


@pytest.mark.parametrize("biased", [False, True])
def test_formula(biased):
    """The layer as the header describes it, token by token and expert by expert."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden, inner, experts, tokens, top_k = 8, 6, 5, 7, 3
    weights = {"gate": rand(experts, hidden, inner), "up": rand(experts, hidden, inner)}
    weights["down"] = rand(experts, inner, hidden)
    biases = {"gate.b": rand(experts, inner), "up.b": rand(experts, inner), "down.b": rand(experts, hidden)}
    biases = biases if biased else {}
    x, scores = rand(tokens, 1, hidden), rand(tokens, 1, top_k)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])[:, None].int()

    net = Network(RTX)
    inputs = (net.input("x", torch.float32, (-1, 1, hidden)), net.input("chosen", torch.int32, (-1, 1, top_k)))
    constants = [[net.constant(n, t) for n, t in tensors.items()] for tensors in (weights, biases)]
    net.output(net.experts(*inputs, net.input("scores", torch.float32, (-1, 1, top_k)), *constants), "y")
    found = evaluate(net.definition, net.constants, {"x": x, "chosen": chosen, "scores": scores})["y"]

    expected = torch.zeros_like(x)
    for token in range(tokens):
        for place in range(top_k):
            expert = int(chosen[token, 0, place])
            outputs = {}
            for name in ("gate", "up"):
                outputs[name] = x[token, 0] @ weights[name][expert] + (biases[f"{name}.b"][expert] if biased else 0)
            gated = outputs["gate"] * torch.sigmoid(outputs["gate"]) * outputs["up"]
            y = gated @ weights["down"][expert] + (biases["down.b"][expert] if biased else 0)
            expected[token, 0] += scores[token, 0, place] * y
    torch.testing.assert_close(found, expected)


def test_where_it_is_used(tmp_path):
    """On some GPUs of `tensorrt`; tensorrt_rtx takes the layer and compiles it for none."""
    assert set(backend.EXPERT_LAYERS) <= set(TARGETS["tensorrt"])
    assert not set(backend.EXPERT_LAYERS) & set(TARGETS["tensorrt-rtx"])
    store = store_of("mixtral", tmp_path)
    (net,) = networks_of(store, 1).nets
    with pytest.raises(UnsupportedError, match="moe"):
        serialize(net, store.config.spec, BOUNDS, "12.0")
