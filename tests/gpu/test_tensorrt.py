"""The TensorRT backends on a GPU: run with `make test-tensorrt` where `tensorrt` or `tensorrt_rtx` is installed."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from tests.converters.tiny import FIRST, checkpoint_of
from tests.runtime.models import assert_greedy, engine_of, random_model
from tests.tensorrt.models import UNBUILT
from trtx.builder.engine import Engine
from trtx.builder.tensorrt import library
from trtx.builder.tensorrt.modes import TARGETS
from trtx.runtime.llm import LLM
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.tensorrt_runner import layers_of

pytestmark = pytest.mark.gpu


@pytest.fixture(params=library.FLAVORS)
def backend(request, gpu) -> str:
    """A backend whose module is here and builds for this GPU."""
    sm = ".".join(map(str, torch.cuda.get_device_capability()))
    if not library.is_here(library.FLAVORS[request.param]):
        pytest.skip(f"{library.FLAVORS[request.param].module} is not installed")
    if sm not in TARGETS[request.param]:
        pytest.skip(f"{request.param} builds for no GPU of compute capability {sm}")
    return request.param


@pytest.mark.parametrize("family", [name for name in FIRST if name not in UNBUILT])
def test_tokens_equal_transformers(family, backend, tmp_path, record_property):
    """Greedy tokens in fp32 on ragged prompts, more of them than slots."""
    model = random_model(FIRST[family])
    settings = {"gpu": "auto", "backend": backend, "dtype": "fp32", "max_batch_size": 3, "max_num_tokens": 24}
    llm = LLM(engine_of(checkpoint_of(model, tmp_path), tmp_path / "engine", **settings))
    rng = random.Random(family)
    prompts = [[rng.randrange(80) for _ in range(rng.randrange(1, 60))] for _ in range(8)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        assert_greedy(model, prompt, completion.token_ids)
    record_property("backend", backend)


def test_what_is_kept_and_shown(backend, tmp_path, monkeypatch):
    """Timings of a build or kernels of a run are on the disk afterwards, and change nothing; layers can be listed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"gpu": "auto", "backend": backend, "dtype": "fp16", "max_batch_size": 3, "max_num_tokens": 24}
    path = engine_of(checkpoint_of(random_model("llama"), tmp_path), tmp_path / "engine", **settings)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = []
    for _ in range(2):
        llm = LLM(path)
        tokens.append([completion.token_ids for completion in llm.generate([[1, 2, 3]], params)])
        del llm
        gc.collect()
    assert tokens[0] == tokens[1]
    kept = {file.name.partition("-")[0] for file in (tmp_path / "cache/trtx/tensorrt").iterdir()}
    assert kept == {"timing" if backend == "tensorrt" else "runtime"}
    assert layers_of(Engine(path))
