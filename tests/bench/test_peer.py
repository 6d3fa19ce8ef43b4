"""How vLLM is measured, with a stand-in for it: what it is handed, and what stands beside which row."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from tests.bench.h100 import CASES, Case, Work
from tests.bench.peer import Peer, put_beside


class Engine:
    """Gives each request one token a step, and says it is done when it has all."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.seen: dict[str, tuple[int, int]] = {}
        self.most = 0
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, name, prompt, params):
        self.running[name] = 0
        self.seen[name] = len(prompt["prompt_token_ids"]), params.max_tokens
        self.most = max(self.most, len(self.running))

    def step(self):
        outputs = []
        for name in list(self.running):
            self.running[name] += 1
            finished = self.running[name] == self.seen[name][1]
            tokens = [7] * self.running[name]
            outputs.append(SimpleNamespace(finished=finished, outputs=[SimpleNamespace(token_ids=tokens)]))
            if finished:
                del self.running[name]
        return outputs


@pytest.fixture
def engine(monkeypatch):
    made = Engine()
    vllm, inputs, sampling = (ModuleType(name) for name in ("vllm", "vllm.inputs", "vllm.sampling_params"))
    vllm.LLM = lambda model, **asked: SimpleNamespace(llm_engine=made)
    vllm.SamplingParams = SimpleNamespace
    inputs.tokens_input = lambda tokens: {"prompt_token_ids": tokens}
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)
    for module in (vllm, inputs, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@pytest.mark.parametrize("batch, requests, most", [(2, 7, 2), (4, 9, 9)], ids=["fewer than slots", "all slots"])
def test_requests_in_flight(batch, requests, most, engine, tmp_path):
    """All at once where the engine keeps the limit, else so many that it is kept; every token is waited for."""
    peer = Peer(replace(CASES[0], works=(Work(2, 8, 8, 1), Work(4, 8, 8, 1))), tmp_path, reps=1)
    llm, _ = peer.open(4, 16)
    assert peer.serve(llm, batch, requests, 5, 3) > 0
    assert engine.most == most and list(engine.seen.values()) == [(5, 3)] * requests


def test_rows(engine, tmp_path):
    """The start, then each workload, by the names that trtx's rows have."""
    case = Case("x", "SmolLM2-135M", "none", (Work(1, 4, 3, 2), Work(3, 4, 3, 6)))
    start, one, many = Peer(case, tmp_path, reps=1).run()
    assert start.keys() == {"case", "load_s"}
    assert (one["batch"], one["isl"], one["osl"]) == (1, 4, 3) and one["ttft_ms"] > 0 and "tpot_ms" in one
    assert many["batch"] == 3 and many["out_tok_s"] > 0


def test_put_beside_only_what_the_same_gpu_did():
    row = {"case": "8b-fp8", "batch": 8, "isl": 512, "osl": 256, "out_tok_s": 2.0, "uuid": "a"}
    load = {"case": "8b-fp8", "load_s": 2.0, "uuid": "a"}
    theirs = {**row, "out_tok_s": 1.0, "seconds": [9.0], "start_s": 5.0, "vllm": "0.26.0", "date": "today"}
    beside = {"out_tok_s": 1.0, "vllm": "0.26.0", "date": "today"}
    assert put_beside([load, row], theirs) == [load, row | {"beside": beside}]
    assert put_beside([load, row], theirs | {"uuid": "b"}) == [load, row]
    assert put_beside([load, row], theirs | {"isl": 1}) == [load, row]
    start = {"case": "8b-fp8", "load_s": 50.0, "vllm": "0.26.0", "uuid": "a"}
    assert put_beside([load, row], start) == [load | {"beside": {"load_s": 50.0, "vllm": "0.26.0"}}, row]
