"""From weights to a serialized TensorRT engine, a plan.

One network, two optimization profiles: decode (one token a sequence) and prefill (chunks). Both contexts share the
weights. KV caches are linear, a slot a sequence, bound in place: `keys.I` in and `new_keys.I` out are one address.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtx.builder.shard import Rank
from trtx.builder.tensorrt.caches import TimingCache
from trtx.builder.tensorrt.library import Flavor, messages, refusal
from trtx.builder.tensorrt.network import Network
from trtx.builder.tensorrt.ops import TensorRTOps, TensorRTStep
from trtx.converters.spec import ModelSpec
from trtx.runtime.weights import WeightStore, kv_scales
from trtx.runtime.weights import load as load_decoder

LOGITS = "logits"


@dataclass(frozen=True)
class Bounds:
    """What an engine is dimensioned for; see `builder.engine.Limits`."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int


@dataclass(frozen=True)
class Profile:
    """Bounds of one optimization profile.

    Attributes:
        tokens: most tokens a sequence gets in a step.
        total: most tokens of a step.
    """

    name: str
    tokens: int
    total: int


def profiles(bounds: Bounds) -> list[Profile]:
    """Decode first."""
    chunk = min(bounds.max_num_tokens, bounds.max_seq_len)
    decode = Profile("decode", 1, bounds.max_batch_size)
    return [decode, Profile("prefill", chunk, bounds.max_num_tokens)] if chunk > 1 else [decode]


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(input, output) names of a layer's keys and values."""
    return (f"keys.{layer}", f"new_keys.{layer}"), (f"values.{layer}", f"new_values.{layer}")


def network(
    store: WeightStore,
    flavor: Flavor,
    dtype: torch.dtype,
    bounds: Bounds,
    advance: Callable[[int], None] = lambda count: None,
    rank: Rank | None = None,
    fp8_attention: bool = False,
    expert_layers: bool = False,
) -> Network:
    """The decoder as a network: its inputs are those of `TensorRTStep`, its output fp32 logits [R, V] and the caches.

    Args:
        store: the whole model's.
        rank: the one whose part it computes; the ranks' logits are the same. None: there is one.
        fp8_attention: round queries, keys, values and probabilities to E4M3.
        expert_layers: use TensorRT's own layer for experts, where it can compute them.

    Raises:
        UnsupportedError: the model has something that no layer computes, or TensorRT refuses one.
    """
    rank = rank or Rank(store.config.spec)
    net = Network(flavor)
    scales = _attention_scales(store) if fp8_attention else None
    ops = TensorRTOps(net, rank, dtype, bounds.max_seq_len, scales, expert_layers)
    decoder = load_decoder(store.of_rank(rank), ops, advance)
    net.output(net.cast(decoder.forward(_inputs(net, rank.part, dtype, bounds)), torch.float32), LOGITS)
    for layer, caches in ops.updated.items():
        for (_, name), cache in zip(cache_names(layer), caches, strict=True):
            net.output(cache, name)
    return net


def _attention_scales(store: WeightStore) -> list[tuple[Tensor, Tensor]]:
    """Per layer those of keys and values: an fp8 KV cache's; 1.0 where the checkpoint has none."""
    if store.config.quantization.kv_cache == "fp8":
        return kv_scales(store, torch.device("cpu"))
    return [(torch.ones(()), torch.ones(()))] * store.config.spec.num_layers


def _inputs(net: Network, spec: ModelSpec, dtype: torch.dtype, bounds: Bounds) -> TensorRTStep:
    def ids(name: str, rank: int = 1) -> Any:
        return net.input(name, torch.int32, (-1,) * rank)

    shape = (-1, spec.num_kv_heads, bounds.max_seq_len, spec.head_dim)
    return TensorRTStep(
        token_ids=ids("token_ids"),
        positions=ids("positions"),
        rows=ids("rows"),
        query_index=ids("query_index", rank=2),
        query_place=ids("query_place"),
        starts=ids("starts"),
        written=ids("written"),
        lengths=ids("lengths"),
        caches=[
            tuple(net.input(name, dtype, shape) for name, _ in cache_names(layer)) for layer in range(spec.num_layers)
        ],
    )


def serialize(
    net: Network,
    spec: ModelSpec,
    bounds: Bounds,
    sm: str,
    total: int = 1,
    advance: Callable[[int], None] = lambda count: None,
    timings: TimingCache | None = None,
) -> memoryview:
    """Build the engine for one compute capability.

    Args:
        spec: what the network computes: of a rank its part.
        sm: '12.0'.
        advance: called with parts of `total` as TensorRT gets on.
        timings: those of the GPU it is built on; None where TensorRT measures nothing.

    Raises:
        UnsupportedError: TensorRT can't build it, with its reasons.
        KeyboardInterrupt: Ctrl-C, once TensorRT has stopped.
    """
    trt, builder = net.trt, net.builder
    config = builder.create_builder_config()
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, sm), 0)
    for profile in profiles(bounds):
        config.add_optimization_profile(_profile(builder, profile, spec, bounds))
    if timings is not None:
        timings.attach(config)
    monitor = _monitor(trt, total, advance)
    config.progress_monitor = monitor
    said = messages(net.flavor)
    said.take()
    plan = _interruptible(lambda: builder.build_serialized_network(net.definition, config), monitor)
    if plan is None:
        raise refusal(f"the engine for compute capability {sm}", said.take())
    if timings is not None:
        timings.save()
    return memoryview(plan)


def _interruptible(build: Callable[[], Any], monitor: Any) -> Any:
    """Run a build in a thread: in the main one, a signal would only be seen when it is over."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(build)
        try:
            return done.result()
        except KeyboardInterrupt:
            monitor.interrupted = True  # TensorRT asks at its next step
            raise


def _monitor(trt: Any, total: int, advance: Callable[[int], None]) -> Any:
    """Passes TensorRT's progress on, and stops it where the user does."""

    class Monitor(trt.IProgressMonitor):
        interrupted = False

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.shares: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.shares[phase] = total // max(1, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            advance(self.shares.get(phase, 0))
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _capability(trt: Any, sm: str) -> Any:
    name = f"SM{sm.replace('.', '')}"
    known = [entry for entry in dir(trt.ComputeCapability) if entry.startswith("SM")]
    if name not in known:
        raise refusal(f"GPUs of compute capability {sm}", [f"it builds for {', '.join(known)}"])
    return getattr(trt.ComputeCapability, name)


def _profile(builder: Any, profile: Profile, spec: ModelSpec, bounds: Bounds) -> Any:
    batch, total, tokens = bounds.max_batch_size, profile.total, profile.tokens
    most: dict[str, tuple[int, ...]] = {
        "token_ids": (total,),
        "positions": (total,),
        "query_place": (total,),
        "rows": (batch,),
        "query_index": (batch, tokens),
        "starts": (batch + 1,),
        "written": (batch,),
        "lengths": (batch,),
    }
    found = builder.create_optimization_profile()
    for name, sizes in most.items():
        least = (2,) if name == "starts" else (1,) * len(sizes)
        found.set_shape(name, least, sizes, sizes)
    slot = (spec.num_kv_heads, bounds.max_seq_len, spec.head_dim)
    for layer in range(spec.num_layers):
        for name, _ in cache_names(layer):
            found.set_shape(name, (1, *slot), (batch, *slot), (batch, *slot))
    return found
