"""The decoder on the torch op set against transformers on the same weights."""

from __future__ import annotations

import random

import pytest
import torch

from tests.converters.tiny import checkpoint_of
from tests.runtime.models import GREEDY, assert_greedy, engine_of, random_model, relative_error
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.random_weights import random_tensor
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.llm import LLM
from trtx.runtime.ops.base import Ops
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore, load


@pytest.mark.parametrize("seed", range(6))
def test_tokens_do_not_depend_on_batch_chunk_block_or_reuse(seed, tmp_path):
    """Random limits, arrivals and shared prefixes: every output is what transformers says of that prompt alone."""
    rng = random.Random(seed)
    name = rng.choice(["llama", "mistral-window", "qwen2-some-windows", "qwen3"])
    model = random_model(name, seed)
    settings = {
        "max_batch_size": rng.choice([2, 5, 16]),
        "max_num_tokens": rng.choice([16, 23, 64]),
        "kv_block_size": rng.choice([8, 16, 32]),
        "kv_cache_memory": rng.choice([None, 192 << 10]),
    }
    engine = engine_of(checkpoint_of(model, tmp_path), tmp_path / "engine", **settings)
    llm = LLM(engine, prefix_reuse=rng.random() < 0.7)
    common = [rng.randrange(96) for _ in range(50)]
    prompts = [
        common[: rng.randrange(51)] + [rng.randrange(96) for _ in range(rng.randrange(1, 20))] for _ in range(30)
    ]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 50), ignore_eos=True) for _ in prompts]
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        assert_greedy(model, prompt, completion.token_ids)
    llm.executor.blocks.pool.check_integrity()
    assert llm.executor.blocks.pool.used == 0


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_paged_steps_equal_whole_sequences(block_size, tmp_path):
    """Ragged prefill, then chunks and decodes side by side, from scattered blocks."""
    checkpoint = Checkpoint(checkpoint_of(random_model("qwen2-some-windows"), tmp_path))
    ops = TorchOps(checkpoint.spec, torch.float32)
    layout = KVLayout.of(checkpoint.spec, block_size, 4)
    rng = random.Random(block_size)
    per_sequence = -(-100 // block_size)
    blocks = rng.sample(range(1, 200), 3 * per_sequence * len(layout.groups))
    tables = [
        tuple([blocks.pop() for _ in range(per_sequence)] for _ in layout.groups) for _ in range(3)
    ]  # fmt: skip
    ids = torch.randint(96, (3, 100), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        decoder = load(WeightStore.of_checkpoint(checkpoint), ops)
        whole = decoder.forward(ops.uncached_step(ids)).view(3, 100, -1)
        cache = TorchKVCache(layout, 200, torch.float32, torch.device("cpu"))
        for spans in ([(0, 40), (0, 61), (0, 3)], [(40, 41), (61, 62), (3, 50)], [(41, 42), (62, 100), (50, 99)]):
            batch = [
                SequenceSlice(ids[i, a:b].tolist(), a, tables[i], b - a) for i, (a, b) in enumerate(spans)
            ]  # fmt: skip
            logits = decoder.forward(ops.step(batch, cache))
            expected = torch.cat([whole[i, a:b] for i, (a, b) in enumerate(spans)])
            assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2-some-windows"])
def test_what_an_earlier_request_left_in_the_cache_does_no_harm(name, tmp_path):
    """A request whose keys overflowed fails alone: its blocks, given back, hold what is not finite."""
    model = random_model(name)
    llm = LLM(engine_of(checkpoint_of(model, tmp_path), tmp_path / "engine", max_num_tokens=24))
    with torch.inference_mode():
        for cache in llm.executor.runner.cache.arrays:
            cache[:, 1:] = float("nan")
    prompts = [[7] * length for length in (1, 16, 17, 50)]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert completion.error is None
        assert_greedy(model, prompt, completion.token_ids)


@pytest.mark.parametrize("word", ["linears", "add_norm", "mlp"])
def test_fused_words_equal_their_expansions(word, tmp_path):
    """An op set's fused word means what the vocabulary's default expansion says."""
    checkpoint = Checkpoint(checkpoint_of(random_model("llama-biases"), tmp_path))
    ops = TorchOps(checkpoint.spec, torch.float32)
    decoder = load(WeightStore.of_checkpoint(checkpoint), ops)
    layer = decoder.layers[0]
    x, delta = (random_tensor(name, (5, 32), torch.float32, 3) * 50 for name in ("x", "delta"))
    arguments = {
        "linears": (x, layer["attn.qkv"]),
        "add_norm": (x, delta, layer["attn_norm"]),
        "mlp": (x, layer["mlp"], checkpoint.spec.activation),
    }[word]
    ours, twin = getattr(ops, word)(*arguments), getattr(Ops, word)(ops, *arguments)
    torch.testing.assert_close(ours, twin)


def test_tied_embedding_is_held_once(tmp_path):
    checkpoint = Checkpoint(checkpoint_of(random_model("llama-tied"), tmp_path))
    decoder = load(WeightStore.of_checkpoint(checkpoint), TorchOps(checkpoint.spec, torch.bfloat16))
    assert decoder.top["lm_head"].weight.data_ptr() == decoder.top["embed"].data_ptr()
