"""`trtx bench --profile` on a GPU: kernels of captured steps are seen, and their times add up."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.builder.models import LLAMA_8B
from trtx.cli.app import app

pytestmark = pytest.mark.gpu

SMALL = {**LLAMA_8B, "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
         "num_attention_heads": 16, "max_position_embeddings": 2048}  # fmt: skip


def trtx(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_profile_of_the_cuda_backend(tmp_path):
    source, engine, picture = tmp_path / "config.json", tmp_path / "engine", tmp_path / "profile.png"
    source.write_text(json.dumps(SMALL))
    limits = ("--max-batch-size", 4, "--max-num-tokens", 2048, "--max-seq-len", 1024)
    trtx("build", f"random:{source}", engine, "--gpu", "auto", "--backend", "cuda", *limits)
    asked = ("--isl", 300, "--osl", 64, "--num-requests", 8, "--profile", picture, "--json")
    report = json.loads(trtx("bench", engine, *asked))
    assert report["profile"]["of"] == "kernels" and picture.stat().st_size > 10_000
    phases = {phase["phase"]: phase for phase in report["profile"]["phases"]}
    assert {"prefill", "decode"} <= phases.keys()
    for phase in phases.values():
        assert sum(row["percent"] for row in phase["rows"]) == pytest.approx(100)
        assert phase["rows"][-1]["kernel"] == "idle"
    decode = {row["kernel"]: row for row in phases["decode"]["rows"]}
    assert {"cu.few", "cu.decode", "sampling.best"} <= decode.keys()
    assert decode["cu.decode"]["calls"] == SMALL["num_hidden_layers"]
    assert decode["cu.few"]["bandwidth_percent"] > 0
    assert phases["decode"]["tokens"] == 4 and 0 < phases["decode"]["roofline_percent"] < 100
