"""The real model, SmolLM2-135M-Instruct, against transformers' own reading of the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runtime.models import GREEDY, assert_greedy, engine_of, logits_of, relative_error
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import convert
from trtx.runtime.llm import LLM
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The three states of matter are",
    "In 1969, humans first", "Water boils at", "The opposite of hot is", "Roses are red,", "1, 2, 3, 4,",
    "The largest planet in the solar system is", "To make bread you need", "import numpy as np", "Dear Sir or Madam,",
    "The mitochondria is", "Q: What is 2 + 2?\nA:", "Shakespeare wrote", "The Pacific Ocean is",
    "She opened the door and", "Photosynthesis is", "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    convert(str(smollm2_gguf), out, dtype="fp32")
    return out


def test_logits_equal_transformers_at_every_position(checkpoint, smollm2_reference):
    tokenizer = Tokenizer.load(checkpoint)
    ids = torch.tensor([tokenizer.encode("".join(PROMPTS[:12]))])
    assert ids.shape[1] > 50
    opened = Checkpoint(checkpoint)
    ours = logits_of(opened, ids, TorchOps(opened.spec, torch.float32))
    with torch.inference_mode():
        theirs = smollm2_reference(ids).logits
    assert relative_error(ours, theirs) < 1e-4


def test_greedy_tokens_equal_transformers(checkpoint, smollm2_reference, tmp_path):
    """64 tokens on 20 prompts, batched in flight, with chunked prefill."""
    llm = LLM(engine_of(checkpoint, tmp_path / "engine", max_num_tokens=24))
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        assert_greedy(smollm2_reference, llm.tokenizer.encode(prompt), completion.token_ids)
    france = llm.generate(PROMPTS[0], GREEDY)[0].text
    assert france.startswith(" Paris")
