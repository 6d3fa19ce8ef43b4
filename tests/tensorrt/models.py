"""Tiny models as TensorRT networks, evaluated layer by layer instead of by a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.tensorrt.interpreter import evaluate
from trtx.builder.engine import EngineConfig, Fingerprint, Limits, ParallelMapping
from trtx.builder.tensorrt.library import FLAVORS
from trtx.builder.tensorrt.network import Network
from trtx.builder.tensorrt.plan import LOGITS, cache_names, network
from trtx.converters.checkpoint import Checkpoint, CheckpointConfig
from trtx.converters.families import FAMILIES
from trtx.quantize.formats import DTYPES
from trtx.runtime.executor import Executor
from trtx.runtime.tensorrt_runner import TensorRTRunner, bounds_of
from trtx.runtime.weights import WeightStore

RTX = FLAVORS["tensorrt-rtx"]
UNBUILT = {family.name for family in FAMILIES if "latent" in family.fields} | {"phimoe"}
"""Families with something that has no layers here."""


class InterpretedPlan:
    """A network in place of the engine that would be made of it; see `trtx.runtime.tensorrt_runner.Plan`."""

    def __init__(self, net: Network, config: EngineConfig) -> None:
        self.net = net
        spec, limits = config.model.spec, config.limits
        shape = (limits.max_batch_size, spec.num_kv_heads, limits.max_seq_len, spec.head_dim)
        pairs = [pair for layer in range(spec.num_layers) for pair in cache_names(layer)]
        self.caches = {pair: torch.zeros(shape, dtype=DTYPES[config.compute_dtype]) for pair in pairs}
        self.profiles: list[int] = []
        """The profile of each step."""

    def run(self, inputs: dict[str, Tensor], profile: int) -> Tensor:
        self.profiles.append(profile)
        slots = len(inputs["written"])
        caches = {before: cache[:slots] for (before, _), cache in self.caches.items()}
        found = evaluate(self.net.definition, self.net.constants, {**inputs, **caches})
        for (_, after), cache in self.caches.items():
            cache[:slots] = found[after]
        return found[LOGITS]


def config_of(
    model: CheckpointConfig, dtype: str = "fp32", batch: int = 3, tokens: int = 24, length: int = 128
) -> EngineConfig:
    """An engine of small limits for an RTX 50 GPU."""
    limits = Limits(batch, tokens, length, length, 1 + batch, dtype)
    return EngineConfig(
        "tensorrt-rtx", model, dtype, limits, ParallelMapping(), Fingerprint("cuda", "rtx-5090", "12.0"), {}
    )


def interpreted(checkpoint: Path, dtype: str = "fp32", **limits: int) -> tuple[Executor, InterpretedPlan]:
    """An executor over the network of a checkpoint."""
    opened = Checkpoint(checkpoint)
    config = config_of(opened.config, dtype, **limits)
    net = network(WeightStore.of_checkpoint(opened), RTX, DTYPES[dtype], bounds_of(config))
    plan = InterpretedPlan(net, config)
    return Executor(TensorRTRunner(config, plan), config.limits, opened.spec.vocab_size, prefix_reuse=False), plan
