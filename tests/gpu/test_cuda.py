"""The cuda backend on a GPU: every family, whole engines, nothing compiled when they run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.converters.tiny import FIRST, checkpoint_of
from tests.runtime.models import GREEDY, assert_greedy, engine_of, random_model
from tests.runtime.test_smollm2 import PROMPTS
from trtx.builder.build import BuildSettings, build
from trtx.converters.convert import convert
from trtx.runtime.cuda import runner
from trtx.runtime.cuda.graphs import Graphs
from trtx.runtime.cuda.step import Shape
from trtx.runtime.llm import LLM
from trtx.runtime.request import FinishReason, Request
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu

SHIPPED = Path(os.environ.get("TRTX_SHIPPED", ".cache/shipped"))
"""An engine that tests/gpu/ship.sh built on a machine without a GPU, and the config.json that it was built from."""

ALONE = """
import json, subprocess, sys
from trtx import LLM, SamplingParams
llm = LLM(sys.argv[1])
assert not any(name.startswith(("trtx.runtime.kernels", "trtx.builder.cuda")) for name in sys.modules)
params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
if "triton" in sys.modules:  # torch looks for it on its own
    import triton
    def refuse(*arguments, **options):
        raise AssertionError("something was compiled")
    triton.compile = triton.runtime.jit.JITFunction.run = triton.compiler.compile = subprocess.Popen.__init__ = refuse
print(json.dumps([completion.token_ids for completion in llm.generate(json.loads(sys.argv[2]), params)]))
"""


def run_alone(engine: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What an engine generates where Triton must not compile and no other compiler is found."""
    environment = {**os.environ, "PATH": "/nonexistent", "CC": "/nonexistent/cc", "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, "-c", ALONE, str(engine), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    convert(str(smollm2_gguf), out, dtype="fp32")
    return out


@pytest.mark.parametrize("family", FIRST)
def test_tokens_of_tiny_models_are_transformers(family: str, tmp_path: Path) -> None:
    """fp32, batched in flight with chunked prefill and scarce blocks, decode steps from graphs."""
    model = random_model(FIRST[family])
    checkpoint = checkpoint_of(model, tmp_path)
    settings = {"gpu": "auto", "backend": "cuda", "max_num_tokens": 24, "kv_cache_memory": 192 << 10}
    llm = LLM(engine_of(checkpoint, tmp_path / "engine", **settings))
    rng = random.Random(family)
    prompts = [[rng.randrange(80) for _ in range(rng.randrange(1, 60))] for _ in range(20)]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert_greedy(model, prompt, completion.token_ids)


def test_engine_runs_without_triton_or_a_compiler(smollm2, smollm2_reference, tmp_path):
    engine = engine_of(smollm2, tmp_path / "engine", gpu="auto", backend="cuda", dtype="fp32")
    prompts = [Tokenizer.load(smollm2).encode(prompt) for prompt in PROMPTS[:4]]
    for prompt, tokens in zip(prompts, run_alone(engine, prompts), strict=True):
        assert_greedy(smollm2_reference, prompt, tokens)


@pytest.mark.skipif(not SHIPPED.exists(), reason="no engine was shipped (tests/gpu/ship.sh)")
def test_engine_of_a_machine_without_a_gpu(tmp_path):
    """Its kernels give the tokens of an engine built here, of the same random weights."""
    settings = json.loads((SHIPPED / "engine" / "manifest.json").read_text())["settings"]
    assert settings["gpu"] == "h100-sxm"
    assert "cuda" not in json.loads((SHIPPED / "engine" / "engine.json").read_text())["fingerprint"]["versions"]
    build(f"random:{SHIPPED / 'config.json'}", tmp_path / "engine", BuildSettings(**{**settings, "gpu": "auto"}))
    prompts = [[1, 2, 3, 4, 5], list(range(100, 140))]
    assert run_alone(SHIPPED / "engine", prompts) == run_alone(tmp_path / "engine", prompts)


def test_smollm2_gives_the_cpu_s_tokens(smollm2, smollm2_reference, tmp_path):
    """fp32: 64 greedy tokens on 20 prompts."""
    engine = engine_of(smollm2, tmp_path / "engine", gpu="auto", backend="cuda", dtype="fp32", max_seq_len=256)
    llm = LLM(engine)
    tokenizer = Tokenizer.load(smollm2)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert_greedy(smollm2_reference, prompt, completion.token_ids)


def test_long_prefills_from_graphs_give_the_same_tokens(smollm2, smollm2_reference, tmp_path):
    """fp32: prompts of 700 to 1900 tokens alone, padded to a captured step, and eight side by side."""
    limits = {"max_batch_size": 8, "max_num_tokens": 2048, "max_seq_len": 2048}
    engine = engine_of(smollm2, tmp_path / "engine", gpu="auto", backend="cuda", dtype="fp32", **limits)
    llm = LLM(engine, prefix_reuse=False)
    text = Tokenizer.load(smollm2).encode(" ".join(PROMPTS))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    repeated = text * (2048 // len(text) + 1)
    together = [repeated[start : start + 200] for start in range(8)]
    for prompts in [[repeated[:length]] for length in (700, 1100, 1300, 1900)] + [together]:
        for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
            assert_greedy(smollm2_reference, prompt, completion.token_ids)


class Watched(Graphs):
    """Counts how often each step is captured, and replayed."""

    captured: ClassVar[Counter[Shape]] = Counter()
    replayed: ClassVar[Counter[Shape]] = Counter()

    def capture(self, compute: Any) -> Callable[[], torch.Tensor]:
        shape, replay = compute.args[-1], super().capture(compute)
        self.captured[shape] += 1

        def watched() -> torch.Tensor:
            self.replayed[shape] += 1
            return replay()

        return watched


@pytest.mark.parametrize("source", ["llama", "gemma2", "deepseek_v3", "qwen3_moe", "smollm2"])
def test_requests_that_come_at_any_time_get_the_same_tokens(source, request, tmp_path, monkeypatch):
    """fp32: a request every few steps, so that prompts are computed beside decodes, in graphs captured meanwhile; then
    one by one."""
    if source == "smollm2":
        checkpoint, model = (request.getfixturevalue(name) for name in ("smollm2", "smollm2_reference"))
    else:
        model = random_model(FIRST[source])
        checkpoint = checkpoint_of(model, tmp_path)
    monkeypatch.setattr(runner, "Graphs", Watched)
    Watched.captured.clear()
    Watched.replayed.clear()
    llm = LLM(engine_of(checkpoint, tmp_path / "engine", gpu="auto", backend="cuda", dtype="fp32"), prefix_reuse=False)
    rng, executor = random.Random(0), llm.executor
    waiting = [
        Request(
            str(number),
            tuple(rng.randrange(80) for _ in range(rng.randrange(1, 60))),
            replace(GREEDY, max_tokens=rng.randrange(2, 30), logprobs=rng.choice([None, 1])),
        )
        for number in range(60)
    ]
    asked = {it.id: it for it in waiting}
    output: dict[str, list[int]] = {name: [] for name in asked}
    best: list[bool] = []
    while waiting or executor.has_work:
        if waiting and rng.random() < 0.4:
            executor.add(waiting.pop())
        for event in executor.step():
            output[event.request].append(event.token)
            best += [event.top_logprobs[0].token == event.token] if event.top_logprobs else []
    mixed = set(executor.runner._steps.shapes.mixed)
    captured = {shape: times for shape, times in Watched.captured.items() if shape in mixed}
    assert len(captured) > 1 and set(captured.values()) == {1}
    assert sum(Watched.replayed[shape] for shape in captured) > 2 * len(captured)
    assert best and all(best)
    same = 0
    for name, it in asked.items():
        assert len(output[name]) == it.params.max_tokens
        assert_greedy(model, it.prompt, output[name])
        (alone,) = llm.generate([list(it.prompt)], replace(it.params, logprobs=None))
        same += alone.token_ids == output[name]
    assert same >= len(asked) - 1, "but where two logits are all but equal"


def test_mixed_requests_with_cancellations_leave_nothing_behind(smollm2, tmp_path):
    """200 requests, greedy and drawn, with penalties, n > 1 and stops, some cancelled: all end, all blocks are free."""
    llm = LLM(engine_of(smollm2, tmp_path / "engine", gpu="auto", backend="cuda", dtype="bf16"))
    rng, ended, open_ids = random.Random(0), set(), []
    executor = llm.executor
    for number in range(200):
        params = SamplingParams(
            max_tokens=rng.randrange(1, 40), temperature=rng.choice([0, 0, 0.8]), top_p=rng.choice([1, 0.9]),
            presence_penalty=rng.choice([0, 0, 0, 0.5]), n=rng.choice([1, 1, 3]), ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice([None, None, 2]), seed=number,
        )  # fmt: skip
        prompt = tuple(rng.randrange(1000) for _ in range(rng.randrange(1, 80)))
        executor.add(Request(str(number), prompt, params))
        open_ids.append(str(number))
        for _ in range(rng.randrange(3)):
            ended |= {(event.request, event.index) for event in executor.step() if event.finish}
        if rng.random() < 0.15:
            executor.cancel(rng.choice(open_ids))
    finishes = []
    while executor.has_work:
        for event in executor.step():
            if event.finish:
                finishes.append(event.finish)
                ended.add((event.request, event.index))
    assert FinishReason.ERROR not in finishes
    assert {request for request, _ in ended} == {str(number) for number in range(200)}
    assert executor.blocks.pool.used == 0
    executor.blocks.pool.check_integrity()


def test_bf16_is_as_near_to_fp32_as_transformers_bf16(smollm2, smollm2_reference, tmp_path, record_property):
    """Teacher-forced: how often the likeliest token in bf16 is that of fp32, on the fp32 model's own continuations."""
    llm = LLM(engine_of(smollm2, tmp_path / "engine", gpu="auto", backend="cuda", dtype="bf16"))
    tokenizer = Tokenizer.load(smollm2)
    reference = smollm2_reference.cuda()
    half = type(reference)(reference.config).to("cuda", torch.bfloat16).eval()
    half.load_state_dict(reference.state_dict())
    mine = theirs = total = 0
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        with torch.inference_mode():
            whole = reference.generate(torch.tensor([ids], device="cuda"), do_sample=False, max_new_tokens=48)[
                0
            ].tolist()
            right = reference(torch.tensor([whole], device="cuda")).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
            other = half(torch.tensor([whole], device="cuda")).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
        prefixes = [whole[:end] for end in range(len(ids), len(whole))]
        ours = [completion.token_ids[0] for completion in llm.generate(prefixes, once)]
        total += len(right)
        mine += sum(a == b for a, b in zip(ours, right, strict=True))
        theirs += sum(a == b for a, b in zip(other, right, strict=True))
    reference.cpu()
    record_property("agreement_percent", round(100 * mine / total, 2))
    record_property("transformers_agreement_percent", round(100 * theirs / total, 2))
    assert mine >= theirs - 0.005 * total
