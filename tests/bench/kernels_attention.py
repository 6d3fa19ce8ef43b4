"""Attention kernels on one GPU: candidates of tiles and splits beside each other, as tables.

    python tests/bench/kernels_attention.py [--out FILE.json] [--only decode|prefill|store] [--dry]

A time is that of one launch in a CUDA graph of many, the median of its replays; launches take turns in caches that
together are larger than the L2 cache. What is read or computed at least, over that time, is compared with what the
H100 can do: 3.16 TB/s read, 599 TFLOP/s in causal attention (cuDNN). `--dry` runs all host code on meta tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trtx.runtime.cuda.attention import (
    AttentionStep,
    CachedAttention,
    Rotation,
    Tiling,
    decode_tiling,
    prefill_tiling,
    tiles_of,
)
from trtx.runtime.cuda.launch import Arguments, Constants, How, JitLaunch, Launch, kernel_function

READ, FLOPS = 3.16e12, 599e12
CACHED = 256 << 20
"""Bytes of cache that launches take turns in, at least."""

MODELS = {"8B": (32, 8, 128), "1B": (32, 8, 64), "135M": (9, 3, 64)}
"""Heads, key heads, head_dim of Llama-3.1-8B, Llama-3.2-1B and SmolLM2-135M."""

DECODES = {
    "8B": [(256, 1024, 2048), (64, 768, 1024), (8, 768, 1024), (1, 256, 4096), (1, 2048, 4096)],
    "1B": [(256, 192, 512), (1, 192, 4096)],
    "135M": [(64, 192, 512), (1, 192, 2048)],
}
"""Sequences, KV length, the longest an engine takes."""

PREFILLS = {"8B": [(8192, 0), (2048, 0), (128, 0), (512, 7680)], "1B": [(2048, 0)], "135M": [(512, 0)]}
"""New tokens, and those before them."""

STORES = {"8B": [256, 8192], "135M": [256]}
"""Tokens."""


class WarmLaunch(JitLaunch):
    """Notes down kernels with their arguments, and lets Triton compile all of them at once."""

    def __init__(self, dependent: bool) -> None:
        super().__init__(dependent)
        self._wanted: dict[object, Callable[[], object]] = {}

    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        options = self.options(constants, how)
        kinds = tuple(arg.dtype if isinstance(arg, Tensor) else type(arg) for arg in args)
        key = kernel, kinds, tuple(options.items())
        self._wanted[key] = lambda: kernel_function(kernel).warmup(*args, grid=grid, **options)

    def compile(self, workers: int = 14) -> str:
        """Whatever was noted down; a kernel that fails here fails again, and is reported, when it is timed."""
        start = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            failed = sum(future.exception() is not None for future in [pool.submit(w) for w in self._wanted.values()])
        return f"{len(self._wanted)} kernels compiled in {time.perf_counter() - start:.1f} s, {failed} failed"


@dataclass
class Case:
    """Something to time.

    Attributes:
        run: starts the kernel in the cache of that number.
        caches: how many there are.
        bytes, flops: at least.
    """

    shape: str
    candidate: str
    run: Callable[[Launch, int], object]
    caches: int
    bytes: float = 0.0
    flops: float = 0.0


def ids(values: object, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(device)


def paged(
    device: torch.device, model: str, lengths: list[int], q_lens: list[int], longest: int, size: int, tile: int
) -> tuple[AttentionStep, Tensor, Tensor, Tensor]:
    """A step of one model, its queries, and caches [caches, blocks, kv_heads, size, head_dim] of keys and of values."""
    heads, kv_heads, dim = MODELS[model]
    needed = sum(-(-length // size) for length in lengths)
    caches = max(2, -(-CACHED // (needed * size * kv_heads * dim * 4)))
    shape = (caches, needed + 1, kv_heads, size, dim)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    order = iter((1 + torch.randperm(needed)).tolist())
    tables = torch.zeros(len(lengths), -(-longest // size), dtype=torch.int32)
    for index, length in enumerate(lengths):
        count = -(-length // size)
        tables[index, :count] = torch.tensor([next(order) for _ in range(count)])
    tokens = sum(q_lens)
    decodes = len(q_lens) if max(q_lens) == 1 else 0
    positions = [length - count + i for length, count in zip(lengths, q_lens, strict=True) for i in range(count)]
    step = AttentionStep(
        positions=ids(positions, device),
        sequence=ids([index for index, count in enumerate(q_lens) for _ in range(count)], device),
        starts=ids(torch.tensor([0, *q_lens]).cumsum(0), device),
        lengths=ids(lengths, device),
        tables=[ids(tables, device)],
        tiles=ids(tiles_of(q_lens, lengths, decodes, tile), device).view(-1, 2),
        decodes=decodes,
        counters=torch.zeros(len(lengths) * heads, dtype=torch.int32, device=device),
    )
    q = torch.randn((tokens, heads + 2 * kv_heads, dim), dtype=torch.bfloat16, device=device)
    return step, q, keys, values


@cache
def rotation(dim: int, device: torch.device) -> Rotation:
    angles = torch.rand(16384, dim // 2, device=device)
    return Rotation((angles.cos(), angles.sin()), dim)


def layer(launch: Launch, cached: tuple[Tensor, Tensor], step: AttentionStep) -> CachedAttention:
    keys, values = cached
    dim = keys.shape[-1]
    return CachedAttention(launch, keys, values, step.tables[0], dim, rotation(dim, keys.device))


def decode_cases(device: torch.device) -> Iterator[Case]:
    for model, shapes in DECODES.items():
        heads, kv_heads, dim = MODELS[model]
        for batch, length, longest in shapes:
            step, qkv, keys, values = paged(device, model, [length] * batch, [1] * batch, longest, 32, 1)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
            out = torch.empty(batch, heads * dim, dtype=q.dtype, device=device)
            own = decode_tiling(heads // kv_heads, dim, 2, programs=batch * kv_heads)
            tilings = [own, Tiling(own.rows, 64, 4, 3), Tiling(own.rows, 64, 4, 7), Tiling(own.rows, 32, 4, 5)]
            if batch * kv_heads < 132:
                splits: list[int | None] = [None, *(n for n in (8, 16, 32, 64) if n * batch * kv_heads < 1024)]
                tilings = [own, Tiling(own.rows, 32, 4, 5)]
            else:
                splits, tilings = [None], [*tilings, Tiling(own.rows, 128, 4, 5)]
            for tiling in dict.fromkeys(tilings):
                for split in splits:
                    caches = list(zip(keys, values, strict=True))

                    layers = [layer(JitLaunch(), cached, step) for cached in caches]

                    def run(launch, i, layers=layers, step=step, q=q, new=(k, v), out=out, tiling=tiling, split=split):
                        scale = q.shape[-1] ** -0.5
                        replace(layers[i], launch=launch).decode(q, new, step, scale, out, tiling, split)

                    yield Case(
                        f"decode {model} B={batch} of {length}",
                        f"{tuple(tiling)} splits {split or 'rule'}",
                        run,
                        len(keys),
                        bytes=batch * length * kv_heads * dim * 4,
                    )


def prefill_cases(device: torch.device) -> Iterator[Case]:
    for model, shapes in PREFILLS.items():
        heads, kv_heads, dim = MODELS[model]
        for count, past in shapes:
            flops = 4 * heads * dim * (count * past + count * (count + 1) / 2)
            shape = f"prefill {model} {count} after {past}"
            candidates = [prefill_tiling(dim, 2)]
            if count > 128:
                others = [(128, 64, 8, 2), (128, 64, 8, 5), (128, 128, 8, 2), (128, 128, 8, 5), (64, 64, 4, 5)]
                candidates += [Tiling(*numbers) for numbers in others]
                candidates += [Tiling(128, 64, 8, 2, 128), Tiling(128, 32, 8, 2, 128)]
            for tiling in dict.fromkeys(candidates):
                for size in (32, 128) if (model, count) == ("8B", 8192) else (32,):
                    tile = tiling.rows // (heads // kv_heads)
                    step, qkv, keys, values = paged(device, model, [past + count], [count], 16384, size, tile)
                    q = qkv[:, :heads]
                    out = torch.empty(count, heads * dim, dtype=q.dtype, device=device)
                    layers = [layer(JitLaunch(), cached, step) for cached in zip(keys, values, strict=True)]

                    def run(launch: Launch, i: int, layers=layers, step=step, q=q, out=out, tiling=tiling):
                        replace(layers[i], launch=launch).prefill(q, step, q.shape[-1] ** -0.5, out, tiling)

                    limit = f" ≤ {tiling.registers} registers" if tiling.registers else ""
                    name = f"{tuple(tiling[:4])}{limit}, blocks of {size}"
                    yield Case(shape, name, run, len(keys), flops=flops)
            if past == 0 and device.type == "cuda":
                q, k, v = (torch.randn(1, n, count, dim, device=device).bfloat16() for n in (heads, kv_heads, kv_heads))
                for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

                    def peer(launch: Launch, i: int, q=q, k=k, v=v, backend=backend):
                        with sdpa_kernel(backend):
                            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                    yield Case(shape, f"torch {backend.name}", peer, 1, flops=flops)


def store_cases(device: torch.device) -> Iterator[Case]:
    for model, counts in STORES.items():
        heads, kv_heads, dim = MODELS[model]
        for count in counts:
            step, qkv, keys, values = paged(device, model, [count], [count], 16384, 32, 16)
            _, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
            layers = [layer(JitLaunch(), cached, step) for cached in zip(keys, values, strict=True)]

            def run(launch: Launch, i: int, k=k, v=v, step=step, layers=layers):
                replace(layers[i], launch=launch).store(k, v, step)

            yield Case(f"store {model} T={count}", "", run, len(keys), bytes=count * 2 * kv_heads * dim * 4)


def microseconds(case: Case, launch: Launch) -> float:
    """Of one launch."""
    launches = max(case.caches, 20)
    case.run(launch, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            case.run(launch, i % case.caches)
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("decode", "prefill", "store"))
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = torch.device("meta" if options.dry else "cuda")
    sources = {"decode": decode_cases, "prefill": prefill_cases, "store": store_cases}
    dependent = not options.dry and torch.cuda.get_device_capability() >= (9, 0)
    rows: list[dict[str, object]] = []
    for name, source in sources.items():
        if options.only not in (None, name):
            continue
        cases, warm = list(source(device)), WarmLaunch(dependent)
        for case in cases:
            if not case.candidate.startswith("torch"):
                case.run(warm, 0)
        if options.dry:
            print(f"{len(cases)} cases of {name}")
            continue
        print(warm.compile())
        for case in cases:
            row: dict[str, object] = {"shape": case.shape, "candidate": case.candidate}
            try:
                row["us"] = took = microseconds(case, JitLaunch(dependent))
                row["rate"] = (case.flops or case.bytes) / took * 1e6
                row["of_ceiling"] = float(row["rate"]) / (FLOPS if case.flops else READ)
                rate = f"{row['rate'] / 1e12:7.1f} TFLOP/s" if case.flops else f"{row['rate'] / 1e9:7.0f} GB/s"
                print(f"{case.shape:28} {case.candidate:38} {took:9.1f} µs {rate} {row['of_ceiling']:6.1%}", flush=True)
            except Exception as error:  # one candidate that does not fit must not cost the others
                row["error"] = f"{type(error).__name__}: {error}"[:300]
                print(f"{case.shape:28} {case.candidate:38} {str(error)[:80]!r}", flush=True)
            rows.append(row)
        del cases, case
        torch.cuda.empty_cache()
    timed = [row for row in rows if "us" in row]
    for shape in dict.fromkeys(row["shape"] for row in timed):
        best = min((row for row in timed if row["shape"] == shape), key=lambda row: float(row["us"]))
        print(f"best: {shape:28} {best['candidate']:38} {best['us']:9.1f} µs {best['of_ceiling']:6.1%}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
