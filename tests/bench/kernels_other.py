"""Times the elementwise, sampling and expert kernels on a GPU, candidates of configurations side by side.

    python tests/bench/kernels_other.py --out FILE.json [--topics elementwise,sampling,experts] [--dry]

Each case is captured into CUDA graphs that run it on rotating inputs, so that the L2 cache holds none of them, and the
time of one run is the median over replays. Where a case is bound by memory, GB/s and the share of 3.16 TB/s, the best
read seen on an H100, are given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trtx.converters.spec import Activation, MoE, Norm
from trtx.runtime.cuda import elementwise, experts, sampling
from trtx.runtime.cuda.experts import Tiles
from trtx.runtime.cuda.launch import POINTERS, JitLaunch, Launch, RecordLaunch, Variant, kernel_function
from trtx.runtime.cuda.sampling import SamplingTensors
from trtx.runtime.ops.torch_ops import ResidentLinear, ResidentNorm
from trtx.runtime.sampler import Row
from trtx.runtime.sampling import SamplingParams

CEILING = 3.16e12
L2 = 50 << 20
SECONDS = 85


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        run: on input set i, of `sets`.
        bytes: that have to move, at least; 0: not what bounds it.
        flops: likewise.
        settings: in force while it is captured, in place of what the host code would choose.
    """

    name: str
    config: str
    run: Callable[[Launch, int], object]
    sets: int
    bytes: float = 0
    flops: float = 0
    settings: Callable[[], Any] = nullcontext


def norms(device: str) -> Iterator[Case]:
    for (model, width), tokens in itertools.product(
        {"SmolLM2-135M": 576, "Llama-3.2-1B": 2048, "Llama-3.1-8B": 4096}.items(), (1, 8, 64, 256, 2048, 8192)
    ):
        moved = 4 * tokens * width * 2
        sets = sets_of(moved)
        xs, deltas = (values(device, sets, tokens, width) for _ in range(2))
        weight = ResidentNorm(values(device, width), None, Norm(1e-5))
        for elements in (8, 16, 32):

            def run(launch: Launch, i: int, xs=xs, deltas=deltas, weight=weight) -> object:
                return elementwise.add_norm(launch, xs[i], deltas[i], weight)

            def settings(elements=elements) -> Any:
                return patch.object(elementwise, "_ELEMENTS", elements)

            yield Case(f"add_norm {model} T={tokens}", f"{elements} a thread", run, sets, moved, settings=settings)
    for tokens in (1, 256):
        table, ids = values(device, 128256, 4096), torch.randint(0, 128256, (64, tokens), device=device).int()
        moved = 2 * tokens * 4096 * 2
        yield Case(f"embed 8B T={tokens}", "", lambda c, i, t=table, n=ids: elementwise.embed(c, n[i], t), 64, moved)


def samplers(device: str) -> Iterator[Case]:
    drawn_with = {
        "plain": SamplingParams(),
        "top-p": SamplingParams(top_p=0.9),
        "top-k": SamplingParams(top_k=50),
        "top-k, top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    }
    for (model, vocabulary), rows in itertools.product(
        {"SmolLM2-135M": 49152, "Llama": 128256}.items(), (1, 8, 64, 256)
    ):
        moved = rows * vocabulary * 2
        sets = sets_of(moved)
        logits = values(device, sets, rows, vocabulary) * 3
        for few in (0, 64):

            def settings(few=few) -> Any:
                return patch.object(sampling, "_FEW_ROWS", few)

            def run(launch: Launch, i: int, logits=logits) -> object:
                return sampling.greedy(launch, logits[i])

            yield Case(f"greedy {model} R={rows}", f"few={few}", run, sets, moved, settings=settings)
            for name, params in drawn_with.items():
                asked = [Row(params, [1, 2, 3], 2, seed, 0) for seed in range(rows)]
                parameters = SamplingTensors.of(asked, vocabulary, torch.device("cpu" if device == "meta" else device))

                def drawn(launch: Launch, i: int, logits=logits, parameters=parameters) -> object:
                    return sampling.choose(launch, logits[i], parameters)

                yield Case(f"{name} {model} R={rows}", f"few={few}", drawn, sets, moved, settings=settings)


def mixtures(device: str) -> Iterator[Case]:
    shapes = {
        "Qwen3-30B-A3B": (128, 8, 2048, 768, Activation()),
        "gpt-oss-20b": (32, 4, 2880, 2880, Activation("quick_gelu", limit=7.0, offset=1.0)),
    }
    for model, (count, top_k, hidden, inner, activation) in shapes.items():
        gate_up = values(device, count, 2 * inner, hidden, scale=hidden**-0.5)
        down = values(device, count, hidden, inner, scale=inner**-0.5)
        router = ResidentLinear(values(device, count, hidden).float(), None, None, (count,))
        moe = MoE((0,), count, top_k, inner, normalize=True)
        for tokens in (1, 4, 32, 256, 4096):
            sets = 8 if tokens <= 32 else 1
            xs = values(device, sets, tokens, hidden)
            picks = torch.rand(sets, tokens, count, device=device).topk(top_k).indices.int()
            shares = torch.rand(sets, tokens, top_k, device=device)
            used = min(count, tokens * top_k) if tokens > 1 else top_k
            moved = used * 3 * hidden * inner * 2
            flops = 6 * tokens * top_k * hidden * inner

            def routed(launch: Launch, i: int, xs=xs, router=router, moe=moe) -> object:
                return experts.route(launch, xs[i], router, None, moe)

            yield Case(f"route {model} T={tokens}", "", routed, sets, count * hidden * 4)

            def run(
                launch: Launch, i: int, xs=xs, picks=picks, shares=shares, weights=(gate_up, down), kind=activation
            ) -> object:
                return experts.experts(launch, xs[i], picks[i], shares[i], *weights, (None, None), kind, False)

            for label, settings in ways(tokens, top_k, count):
                yield Case(f"experts {model} T={tokens}", label, run, sets, moved, flops, settings)


def ways(tokens: int, top_k: int, count: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Pair by pair, and sorted into tiles of several sizes."""
    if tokens <= 8:
        for n, k in ((2, 1024), (4, 1024), (8, 512)):
            yield f"by pair {n}×{k}", lambda n=n, k=k: forced(True, None, n, k)
    share = tokens * top_k / count
    small = [Tiles(16, 64, 128, 4, 4), Tiles(16, 32, 256, 4, 3), Tiles(16, 128, 64, 4, 4)]
    large = [Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4), Tiles(128, 64, 64, 8, 4), Tiles(128, 128, 64, 8, 3)]
    for tiles in [*(small if share <= 32 else []), *(large if share > 8 else [])]:
        label = f"{tiles.m}×{tiles.n}×{tiles.k} w{tiles.warps} s{tiles.stages}"
        yield label, lambda tiles=tiles: forced(False, tiles)


@contextmanager
def forced(by_pair: bool, tiles: Tiles | None, n: int = 4, k: int = 1024) -> Iterator[None]:
    """Let `experts` take one way."""
    with (
        patch.object(experts, "goes_by_pair", lambda *_: by_pair),
        patch.object(experts, "tiles_for", lambda *_: tiles),
        patch.object(experts, "_PAIR_BLOCKS", (n, k)),
    ):
        yield


TOPICS = {"elementwise": norms, "sampling": samplers, "experts": mixtures}


def values(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    """Random bf16."""
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return x if device == "meta" else x.normal_().mul_(scale)


def sets_of(moved: int) -> int:
    """Input sets that together are twice the L2 cache, as far as that is few."""
    return max(1, min(64, 2 * L2 // moved))


def seconds(case: Case, launch: Launch) -> float:
    """The median time of one run, inside CUDA graphs."""
    with case.settings():
        case.run(launch, 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        runs = max(case.sets, 8)
        with torch.cuda.graph(graph):
            for i in range(runs):
                case.run(launch, i % case.sets)
    times = []
    graph.replay()
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / runs)
    return statistics.median(times)


def recorded(cases: list[Case], dependent: bool) -> list[Variant]:
    """What the cases launch."""
    record = RecordLaunch(dependent)
    for case in cases:
        with case.settings():
            case.run(record, 0)
    return list(record.variants)


def compile_all(variants: list[Variant], pool: ProcessPoolExecutor) -> None:
    """Fill Triton's cache."""
    for variant, future in [(variant, pool.submit(compile_one, variant)) for variant in variants]:
        if error := future.exception():
            print(f"! {variant.kernel} {dict(variant.constants)}: {error!r}"[:300], flush=True)


def compile_one(variant: Variant) -> None:
    dtypes = {name: dtype for dtype, name in POINTERS.items()} | {"none": None, "i32": 3, "fp32": 0.5}
    extra = {"launch_pdl": True} if variant.pdl else {}
    kernel_function(variant.kernel).warmup(
        *(dtypes[name] for name in variant.types),
        **dict(variant.constants),
        num_warps=variant.warps,
        num_stages=variant.stages,
        grid=(1,),
        **extra,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--topics", default=",".join(TOPICS))
    parser.add_argument("--dry", action="store_true", help="only record what would be launched")
    options = parser.parse_args()
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    topics = {name: TOPICS[name] for name in options.topics.split(",")}
    dependent = options.dry or torch.cuda.get_device_capability() >= (9, 0)
    variants = {name: recorded(list(cases("meta")), dependent) for name, cases in topics.items()}
    for name, needed in variants.items():
        print(f"{name}: {len(needed)} variants of kernels")
    if options.dry:
        return
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        compile_all([variant for needed in variants.values() for variant in needed], pool)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    launch = JitLaunch(dependent)
    for cases in topics.values():
        for case in cases("cuda"):
            if time.monotonic() - began > SECONDS:
                print(f"! no time left for {case.name}, {case.config}")
                continue
            found += measured(case, launch)
        torch.cuda.empty_cache()
    report(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


def measured(case: Case, launch: Launch) -> list[dict[str, Any]]:
    """What a case took; nothing, and a line of its own, if it failed."""
    try:
        taken = seconds(case, launch)
    except Exception as error:
        print(f"! {case.name}, {case.config}: {error!r}"[:300], flush=True)
        return []
    return [
        {
            "case": case.name,
            "config": case.config,
            "us": taken * 1e6,
            "GB/s": case.bytes / taken / 1e9,
            "ceiling": case.bytes / taken / CEILING,
            "TFLOP/s": case.flops / taken / 1e12,
        }
    ]


def report(found: list[dict[str, Any]]) -> None:
    """A table, the best configuration of each case first."""
    print(f"{'case':38}{'configuration':22}{'µs':>10}{'GB/s':>8}{'% of ceiling':>14}{'TFLOP/s':>10}")
    for name, rows in itertools.groupby(found, key=lambda row: row["case"]):
        for place, row in enumerate(sorted(rows, key=lambda row: row["us"])):
            label = "" if place else name
            print(
                f"{label:38}{row['config']:22}{row['us']:10.2f}{row['GB/s']:8.0f}{100 * row['ceiling']:14.1f}"
                f"{row['TFLOP/s']:10.1f}"
            )


if __name__ == "__main__":
    main()
