"""Every family on the torch op set against transformers on the same weights."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from tests.converters.tiny import VARIANTS, checkpoint_of
from tests.runtime.models import assert_greedy, engine_of, logits_of, random_model, relative_error
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.families import FAMILIES
from trtx.converters.spec import MoE
from trtx.runtime import decoder
from trtx.runtime import ops as op_sets
from trtx.runtime.llm import LLM
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.sampling import SamplingParams

LENGTH = 90
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)

BF16_GAINS = {"exaone4": 4.0}
"""Norms behind the blocks make of a weak block's rounding a strong one's; all others draw weak weights."""


class RecordedOps(TorchOps):
    """Notes the routing, or takes what another run noted: one rounding could send a token elsewhere."""

    routings: list[tuple[Tensor, Tensor]]
    forced: bool = False

    def route(self, x: Tensor, router: Any, correction: Tensor | None, moe: MoE) -> tuple[Tensor, Tensor]:
        if self.forced:
            return self.routings.pop(0)
        self.routings.append(super().route(x, router, correction, moe))
        return self.routings[-1]


def token_ids(batch: int, length: int) -> Tensor:
    """Random ids that no multimodal variant takes for an image."""
    return torch.randint(80, (batch, length), generator=torch.Generator().manual_seed(1))


def converted(name: str, folder: Path, gain: float = 1.5) -> tuple[PreTrainedModel, Checkpoint]:
    """A random model of a variant, and what it was converted to."""
    model = random_model(name, gain=gain)
    return model, Checkpoint(checkpoint_of(model, folder))


def test_every_family_has_a_variant():
    assert {variant.family for variant in VARIANTS.values()} == {family.name for family in FAMILIES}


def test_decoder_and_op_sets_name_no_family():
    """They compute with the spec alone; where a formula comes from may be said beside it."""
    files = [*Path(op_sets.__path__[0]).glob("*.py"), Path(decoder.__file__)]
    for file in files:
        code = re.sub(r'"""(?s:.*?)"""|#.*', "", file.read_text(encoding="utf-8"))
        for name in {family.name.partition("_")[0] for family in FAMILIES}:
            assert not re.search(rf"(\b|_){name}", code, flags=re.IGNORECASE), f"{file} names {name}"


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name, tmp_path):
    """Logits at every position; 48 greedy tokens a prompt, batched in flight with chunked prefill."""
    model, checkpoint = converted(name, tmp_path)
    ids = token_ids(2, LENGTH)
    with torch.inference_mode():
        theirs = model(ids).logits
    ours = logits_of(checkpoint, ids, TorchOps(checkpoint.spec, torch.float32, max_positions=LENGTH))
    # The issue asks for 1e-4; one activation in place of a similar one would pass that.
    assert relative_error(ours, theirs) < 2e-5

    llm = LLM(engine_of(tmp_path / "checkpoint", tmp_path / "engine", max_num_tokens=24))
    rng = random.Random(name)
    prompts = [[rng.randrange(80) for _ in range(rng.randrange(1, 60))] for _ in range(10)]
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert len(completion.token_ids) == 48
        assert_greedy(model, prompt, completion.token_ids)
    assert llm.executor.blocks.pool.used == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_stays_near_fp32(name, tmp_path):
    """In bf16 the logits are within 2% of transformers' in fp32, with the routing of fp32."""
    model, checkpoint = converted(name, tmp_path, gain=BF16_GAINS.get(VARIANTS[name].family, 0.7))
    ids = token_ids(2, LENGTH)
    with torch.inference_mode():
        theirs = model(ids).logits
    exact, rounded = (
        RecordedOps(checkpoint.spec, dtype, max_positions=LENGTH) for dtype in (torch.float32, torch.bfloat16)
    )
    exact.routings = rounded.routings = []
    assert relative_error(logits_of(checkpoint, ids, exact), theirs) < 1e-4
    rounded.forced = True
    ours = logits_of(checkpoint, ids, rounded)
    assert not rounded.routings
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("name", ["phi3-longrope", "phimoe-longrope"])
def test_longrope_of_a_short_engine_has_short_factors(name, tmp_path):
    """An engine that never goes beyond the original length uses what transformers uses up to there."""
    model, checkpoint = converted(name, tmp_path)
    original = checkpoint.spec.rope.original_max_position
    ids = token_ids(2, original)
    with torch.inference_mode():
        theirs = model(ids).logits
    ours = logits_of(checkpoint, ids, TorchOps(checkpoint.spec, torch.float32, max_positions=original))
    assert relative_error(ours, theirs) < 2e-5
