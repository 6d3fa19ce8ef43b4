"""The parallel planner: every tensor × pipeline split of N GPUs, rated with the roofline of the GPU table.

The ratings are unchecked estimates: no kernel reaches the roofline, but what limits each split shows.

A step of one pipeline stage takes max(FLOPs / peak, bytes / bandwidth) with the work of the model divided by all
ranks, plus its share of the all-reduces, two a layer (Shoeybi et al. 2019, arXiv:1909.08053). A ring all-reduce of n
bytes over t ranks moves 2 n (t - 1) / t through each link (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).

    TTFT         (m + pp - 1) stage steps for a prompt of m chunks: the pipeline's bubble (Huang et al. 2019,
                 arXiv:1811.06965)
    TPOT         pp stage steps; the batch goes round in pp parts, one in each stage
    throughput   batch * OSL output tokens in the time of all prefills and of OSL decode rounds
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trtx.builder import cost
from trtx.builder.backend import Backend
from trtx.builder.engine import ParallelMapping
from trtx.builder.gpus import GPU
from trtx.builder.ledger import Ledger, account
from trtx.builder.shard import Shard, obstacle
from trtx.builder.sizing import Sizing
from trtx.builder.suggest import does_not_fit, mappings
from trtx.converters.errors import UnsupportedError

ALL_REDUCE_LATENCY = 16e-6
"""Seconds an all-reduce takes however small it is: what vLLM 0.26 loses to each on two H200s at batch 1 (measured)."""


@dataclass(frozen=True)
class Workload:
    """What a plan is rated for: prompts of `isl` tokens, outputs of `osl`."""

    isl: int
    osl: int


@dataclass(frozen=True)
class Estimate:
    """An unchecked estimate for a full batch.

    Attributes:
        batch: sequences of the workload's length that run at once.
        ttft: seconds to the first token of a prompt that meets an idle engine.
        tpot: seconds an output token.
        throughput: output tokens a second, of all GPUs.
    """

    batch: int
    ttft: float
    tpot: float
    throughput: float


@dataclass(frozen=True)
class Plan:
    """One way to split the model.

    Attributes:
        ledger: of the rank with the least room; None where the model can't be split so.
        problem: why it can't be used; empty when it can.
        estimate: None where there is a problem or the device's speed is not known.
    """

    mapping: ParallelMapping
    ledger: Ledger | None = None
    problem: str = ""
    estimate: Estimate | None = None


def plans(sizing: Sizing, backend: Backend, gpus: int, workload: Workload) -> list[Plan]:
    """Every tp × pp of `gpus` ranks."""
    return [plan(replace(sizing, mapping=mapping), backend, workload) for mapping in mappings(gpus)]


def plan(sizing: Sizing, backend: Backend, workload: Workload) -> Plan:
    """The plan of one mapping."""
    problem = backend.obstacle(sizing.mapping) or obstacle(sizing.model, sizing.mapping)
    if problem:
        return Plan(sizing.mapping, problem=problem)
    ledger = account(sizing, backend)
    if ledger.missing:
        return Plan(sizing.mapping, ledger, problem="does not fit")
    return Plan(sizing.mapping, ledger, estimate=estimate(sizing, backend, ledger, workload))


def pick(candidates: list[Plan], sizing: Sizing, backend: Backend) -> Plan:
    """The plan with the highest throughput; the first one that can be used where speeds are not known.

    Raises:
        UnsupportedError: the model can't be split over so many GPUs.
        DoesNotFitError: no split fits.
    """
    usable = [candidate for candidate in candidates if not candidate.problem]
    if usable:
        return max(usable, key=lambda candidate: candidate.estimate.throughput if candidate.estimate else 0.0)
    too_large = [(c.ledger.missing, c.mapping.pp, c.mapping) for c in candidates if c.ledger is not None]
    if not too_large:
        reasons = "; ".join(f"tp {c.mapping.tp} × pp {c.mapping.pp}: {c.problem}" for c in candidates)
        raise UnsupportedError(f"The model can't be split like this: {reasons}.", "Use another number of GPUs.")
    *_, closest = min(too_large)
    raise does_not_fit(replace(sizing, mapping=closest), backend)


def estimate(sizing: Sizing, backend: Backend, ledger: Ledger, workload: Workload) -> Estimate | None:
    """Rate a plan; None when the speed of its device is not known."""
    gpu = sizing.target.gpu
    peak = gpu.tflops.get(backend.math_dtype(sizing)) if gpu else None
    if gpu is None or peak is None:
        return None
    spec, pp = sizing.model.spec, sizing.mapping.pp
    roofline = _Roofline(sizing, gpu, peak * 1e12)

    def kv(length: int) -> int:
        return cost.kv_read_bytes(spec, sizing.kv_dtype, length)

    chunks = math.ceil(workload.isl / sizing.max_num_tokens)
    chunk = math.ceil(workload.isl / chunks)
    chunk_flops = cost.flops(spec, tokens=workload.isl) // chunks
    chunk_step = roofline.seconds(chunk, chunk_flops, backend.streamed_bytes(sizing, chunk) + kv(workload.isl))

    batch = _batch(sizing, ledger, workload)
    part, context = math.ceil(batch / pp), workload.isl + workload.osl // 2
    decode_flops = part * cost.flops(spec, tokens=1, before=context)
    decode_bytes = backend.streamed_bytes(sizing, part) + part * kv(context)
    tpot = pp * roofline.seconds(part, decode_flops, decode_bytes)

    prefills = (chunks * batch + pp - 1) * chunk_step
    return Estimate(
        batch=batch,
        ttft=(chunks + pp - 1) * chunk_step,
        tpot=tpot,
        throughput=batch * workload.osl / (prefills + workload.osl * tpot),
    )


@dataclass(frozen=True)
class _Roofline:
    """How long a pipeline stage takes, at best.

    Attributes:
        peak: FLOP/s of one GPU in the dtype that the backend multiplies in.
    """

    sizing: Sizing
    gpu: GPU
    peak: float

    def seconds(self, tokens: int, flops: float, size: float) -> float:
        """A step of `tokens` tokens with the whole model's FLOPs and bytes, shared by all ranks."""
        ranks = self.sizing.mapping.ranks
        return max(flops / self.peak, size / (self.gpu.bandwidth * 1e9)) / ranks + self._all_reduces(tokens)

    def _all_reduces(self, tokens: int) -> float:
        tp, pp = self.sizing.mapping.tp, self.sizing.mapping.pp
        if tp == 1:
            return 0.0
        spec = self.sizing.model.spec
        moved = 2 * (tp - 1) / tp * tokens * spec.hidden_size * cost.ITEMSIZE[self.sizing.compute_dtype]
        return 2 * spec.num_layers / pp * (ALL_REDUCE_LATENCY + moved / self.gpu.link_bytes_per_second)


def _batch(sizing: Sizing, ledger: Ledger, workload: Workload) -> int:
    """Sequences of the workload that run at once: as many as are allowed and the KV cache holds."""
    layout = Shard(sizing.model.spec, sizing.mapping, stage=0).kv_layout(sizing.kv_block_size, itemsize=1)
    held = layout.blocks_for(workload.isl + workload.osl, sizing.max_num_tokens)
    return max(1, min(sizing.max_batch_size, (ledger.kv_blocks - 1) // held))
