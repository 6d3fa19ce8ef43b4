"""Times large products on a GPU: torch's, cuBLASLt's with the heuristic's algorithm, and with the fastest one.

    python -m tests.bench.products [--out FILE.json] [--types bf16,fp8,fp8_row] [--tokens 64,96,…] [--any-sums]

The shapes are those of Llama-3.1-8B; o and down are added to the residual, in torch's case by a kernel of its own
where it has no other way. --any-sums: cuBLAS may round parts of sums to 16 bits, as torch lets it. See
`builder.cuda.tune` for how it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.builder.cuda.tune import Stopwatch, choose
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda import cublaslt
from trtx.runtime.cuda.cublaslt import Problem, Products

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (64, 96, 128, 192, 256, 512, 1024, 2048, 8192)
KINDS = {"bf16": (torch.bfloat16, "none"), "fp8": (E4M3, "tensor"), "fp8_row": (E4M3, "row")}
SECONDS = 52


def by_torch(problem: Problem, weights: list[Tensor]) -> list[Callable[[], Tensor]]:
    """What torch does in a product's place, for each weight."""
    m, n, k = problem.m, problem.n, problem.k
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda").to(problem.input)
    residual = torch.randn(m, n, dtype=problem.output, device="cuda")
    if problem.scales == "none":
        if problem.add:
            return [lambda w=w: residual.addmm_(x, w.t()) for w in weights]
        return [lambda w=w: F.linear(x, w) for w in weights]
    sizes = ((m, 1), (1, n)) if problem.scales == "row" else ((), ())
    x_scale, w_scale = (torch.rand(size, device="cuda") for size in sizes)

    def multiply(w: Tensor) -> Tensor:
        y = torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=problem.output)
        return residual.add_(y) if problem.add else y

    return [lambda w=w: multiply(w) for w in weights]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--types", default="bf16,fp8")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--any-sums", action="store_true")
    options = parser.parse_args()
    began, device, found = time.monotonic(), torch.device("cuda", torch.cuda.current_device()), []
    sums = patch.object(cublaslt, "SUMMED_IN_FP32", 7 if options.any_sums else cublaslt.SUMMED_IN_FP32)
    with sums:
        stopwatch = Stopwatch(Products(device), device)
    print(f"{stopwatch.products.gpu}, cuBLAS {stopwatch.products.version}; µs: torch's, the heuristic's, the fastest's")
    tokens = [int(count) for count in options.tokens.split(",")]
    for kind, m, (name, (n, k)) in itertools.product(options.types.split(","), tokens, SHAPES.items()):
        if time.monotonic() - began > SECONDS:
            print("! no time left")
            break
        dtype, scales = KINDS[kind]
        problem = Problem(dtype, torch.bfloat16, m, n, k, add=name in ("o", "down"), scales=scales)
        weights = stopwatch.weights(problem)
        graph = stopwatch.captured(by_torch(problem, weights))
        torch_us = 1e6 * statistics.median(stopwatch.seconds(graph) for _ in range(7)) / len(weights)
        tuned = choose(stopwatch, problem)
        entry = {"type": kind, "m": m, "shape": name, "n": n, "k": k, "torch_us": round(torch_us, 2)}
        if tuned is not None:
            tflops = 2e-6 * m * n * k / tuned.us
            entry |= {"heuristic_us": tuned.heuristic_us, "us": tuned.us, "tflops": round(tflops, 1)}
            entry["gain"] = round(torch_us / tuned.us, 3)
        found.append(entry)
        figures = [entry.get(key, "-") for key in ("torch_us", "heuristic_us", "us", "tflops", "gain")]
        print(f"{kind:7} M={m:<5} {name:8}" + "".join(f"{figure!s:>10}" for figure in figures), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if options.out:
        content = {"gpu": stopwatch.products.gpu, "cublas": stopwatch.products.version, "torch": torch.__version__}
        options.out.write_text(json.dumps({**content, "any_sums": options.any_sums, "products": found}, indent=1))


if __name__ == "__main__":
    main()
