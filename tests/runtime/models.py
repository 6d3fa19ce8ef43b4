"""Tiny random models and what transformers says of them: the oracle of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from tests.converters import tiny
from trtx.builder.build import BuildSettings, build
from trtx.converters.checkpoint import Checkpoint
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore, load

GAP = 1e-4
"""A token counts as the greedy one when its logit is within this of the largest."""


GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def random_model(name: str, seed: int = 0, gain: float = 1.5) -> PreTrainedModel:
    """A tiny model; with the default gain, logits are far enough apart for greedy decoding to mean something."""
    return tiny.randomize(tiny.of(tiny.VARIANTS[name]), seed, gain)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit of its position."""
    return ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max().item()


def logits_of(checkpoint: Checkpoint, ids: torch.Tensor, ops: TorchOps) -> torch.Tensor:
    """Logits of whole sequences [B, S] → [B, S, V], fp32, on the CPU."""
    with torch.inference_mode():
        decoder = load(WeightStore.of_checkpoint(checkpoint), ops)
        return decoder.forward(ops.uncached_step(ids)).view(*ids.shape, -1).float().cpu()


def engine_of(checkpoint: Path, out: Path, **settings: Any) -> Path:
    """An engine with small limits, for the CPU unless asked otherwise."""
    sizes = {"gpu": "cpu", "max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 128, "kv_block_size": 16}
    build(checkpoint, out, BuildSettings(**{**sizes, **settings}))
    return out


def assert_greedy(model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Every token of `output` is transformers' greedy choice after what stands before it, up to `GAP`."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    behind = logits.amax(-1) - chosen
    assert behind.max() < GAP, f"token {int(behind.argmax())} is {behind.max():.2g} below the largest logit"
