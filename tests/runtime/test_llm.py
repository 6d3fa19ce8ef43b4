"""The Python API: streams of one LLM side by side."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.converters.tiny import checkpoint_of
from tests.runtime.models import engine_of, random_model
from trtx.converters.errors import InputError, RequestError
from trtx.runtime.llm import LLM
from trtx.runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ([1, 2, 3], [4, 5], [6])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return engine_of(checkpoint_of(random_model("llama"), folder), folder / "engine")


def test_streams_side_by_side_lose_nothing(engine):
    """Steps that one stream takes bring the others' tokens too."""
    alone = [LLM(engine).generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    llm = LLM(engine)
    slow, quick = (llm.stream([llm.request(prompt, GREEDY)]) for prompt in PROMPTS[:2])
    begun = next(slow).event.token
    assert [chunk.event.token for chunk in quick] == alone[1]
    assert llm.generate([PROMPTS[2]], GREEDY)[0].token_ids == alone[2]
    rest = [chunk.event.token for chunk in islice(slow, 20)]
    assert [begun, *rest] == alone[0]


def test_closing_a_stream_cancels_its_requests_only(engine):
    llm = LLM(engine)
    closed, other = (llm.stream([llm.request(prompt, GREEDY)]) for prompt in PROMPTS[:2])
    next(closed)
    next(other)
    closed.close()
    assert len(list(other)) == 11
    assert llm.executor.blocks.pool.used == 0


def test_requests_of_one_id_are_refused(engine):
    llm = LLM(engine)
    request = llm.request([1], GREEDY, id="a")
    with pytest.raises(RequestError, match="'a': the id is given 2 times"):
        llm.complete([request, request])
    assert not llm.executor.has_work


def test_sampling_defaults_out_of_range_name_their_file(engine, monkeypatch):
    llm = LLM(engine)
    monkeypatch.setattr(llm, "_tokenizer", SimpleNamespace(defaults=lambda: {"top_k": -1}))
    with pytest.raises(InputError, match=r"generation_config\.json: top_k is -1"):
        llm.default_params()
