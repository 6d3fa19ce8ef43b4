"""The decoder as a TensorRT network, evaluated on the CPU: equal to transformers, through the whole runtime."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tensorrt_rtx")

from tests.converters.tiny import FIRST, VARIANTS, checkpoint_of
from tests.runtime.models import assert_greedy, random_model, relative_error
from tests.tensorrt.models import RTX, UNBUILT, config_of, interpreted
from trtx.builder.tensorrt.plan import network
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import UnsupportedError
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.request import Request
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.slots import slot_inputs
from trtx.runtime.tensorrt_runner import bounds_of
from trtx.runtime.weights import WeightStore, load

BUILT = [name for name, variant in VARIANTS.items() if variant.family not in UNBUILT]
LENGTH = 64


def batches(seed: int) -> list[list[SequenceSlice]]:
    """Ragged prefill of three sequences, then 16 decode steps; slots out of order, one joining late."""
    rng = random.Random(seed)
    tokens = [[rng.randrange(80) for _ in range(60)] for _ in range(3)]
    slots, lengths = [3, 1, 2], [0, 0, 0]
    steps = []

    def step(counts: dict[int, int]) -> None:
        pieces = []
        for index, count in counts.items():
            start, end = lengths[index], lengths[index] + count
            pieces.append(SequenceSlice(tokens[index][start:end], start, ([slots[index]],), count))
            lengths[index] = end
        steps.append(sorted(pieces, key=lambda piece: len(piece.tokens) > 1))

    step({0: 17, 1: 5})
    step({0: 1, 1: 20})
    step({0: 1, 1: 1, 2: 19})
    for _ in range(16):
        step({0: 1, 1: 1, 2: 1})
    return steps


@pytest.mark.parametrize("name", BUILT)
def test_network_equals_the_torch_op_set(name, tmp_path):
    """Logits of every token within 1e-5 in fp32; of a family's other variants, two decode steps are enough."""
    checkpoint = checkpoint_of(random_model(name), tmp_path)
    _, plan = interpreted(checkpoint, length=LENGTH)
    opened = Checkpoint(checkpoint)
    ops = TorchOps(opened.spec, torch.float32, max_positions=LENGTH)
    decoder = load(WeightStore.of_checkpoint(opened), ops)
    layout = KVLayout.of(opened.spec, LENGTH, 4)
    groups = range(len(layout.groups))
    cache = TorchKVCache(layout, 1 + 3 * len(groups), torch.float32, torch.device("cpu"))

    def paged(piece: SequenceSlice) -> SequenceSlice:
        """The same with a block of its own for each KV group."""
        (slot,) = piece.tables[0]
        return replace(piece, tables=tuple([slot + 3 * group] for group in groups))

    is_first = name in FIRST.values()
    with torch.inference_mode():
        for batch in batches(0)[: None if is_first else 5]:
            theirs = decoder.forward(ops.step([paged(piece) for piece in batch], cache))
            assert relative_error(plan.run(slot_inputs(batch), 0), theirs) < 1e-5


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mixtral", "gpt_oss"])
def test_half_precision_stays_near_fp32(name, dtype, tmp_path):
    """Every token's logits within 5% of the torch op set's in fp32, and within 2% all together (bf16; fp16: a fifth).

    Experts: a rounding may send a token elsewhere; the few tokens that this hits are left out.
    """
    checkpoint = checkpoint_of(random_model(name, gain=0.7), tmp_path)
    _, plan = interpreted(checkpoint, dtype, length=LENGTH)
    batch = batches(0)[0]
    ours = plan.run(slot_inputs(batch), 1)
    opened = Checkpoint(checkpoint)
    ops = TorchOps(opened.spec, torch.float32, max_positions=LENGTH)
    decoder = load(WeightStore.of_checkpoint(opened), ops)
    with torch.inference_mode():
        theirs = torch.cat([decoder.forward(ops.uncached_step(torch.tensor([piece.tokens]))) for piece in batch])
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    if opened.spec.moe:
        errors = errors.sort().values[: int(0.8 * len(errors))]
    scale = {"bf16": 1.0, "fp16": 0.2}[dtype]
    assert errors.max() < 0.05 * scale
    assert errors.square().mean().sqrt() < 0.02 * scale


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon-rw", "gemma2"])
def test_runtime_over_slots_equals_transformers(name, tmp_path):
    """The scheduler drives slots as it drives blocks: more requests than slots, chunked prefill, greedy tokens."""
    model = random_model(name)
    executor, plan = interpreted(checkpoint_of(model, tmp_path))
    rng = random.Random(name)
    prompts = [[rng.randrange(80) for _ in range(rng.randrange(1, 40))] for _ in range(5)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        executor.add(Request(str(number), tuple(prompt), params))
    tokens: dict[str, list[int]] = {}
    most = 0
    while executor.has_work:
        for event in executor.step():
            tokens.setdefault(event.request, []).append(event.token)
        most = max(most, len(executor.scheduler.running))
    assert most == 3, "every slot is used"
    assert set(plan.profiles) == {0, 1}, "decode and prefill have profiles of their own"
    for number, prompt in enumerate(prompts):
        assert_greedy(model, prompt, tokens[str(number)])
    assert executor.blocks.pool.used == 0


def test_inputs_of_a_step():
    """Slots out of order, one of them idle; queries end together."""
    batch = [SequenceSlice([7], 4, ([3],), 1), SequenceSlice([1, 2, 3], 0, ([1],), 1)]
    inputs = {name: tensor.tolist() for name, tensor in slot_inputs(batch).items()}
    assert inputs == {
        "token_ids": [1, 2, 3, 7],
        "positions": [0, 1, 2, 4],
        "query_index": [[0, 1, 2], [0, 0, 0], [0, 0, 3]],
        "query_place": [0, 1, 2, 8],
        "starts": [0, 3, 3, 4],
        "written": [0, 0, 4],
        "lengths": [3, 1, 5],
        "rows": [3, 2],
    }


def test_what_has_no_layers_is_refused_before_anything_is_built(tmp_path):
    opened = Checkpoint(checkpoint_of(random_model("deepseek_v3"), tmp_path))
    with pytest.raises(UnsupportedError, match="do not build"):
        network(WeightStore.of_checkpoint(opened), RTX, torch.float32, bounds_of(config_of(opened.config)))
