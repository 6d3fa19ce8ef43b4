"""Times the linears on a GPU, candidates of launch shapes side by side, cuBLAS beside them.

    python -m tests.bench.kernels_linear --out FILE.json [--formats none,fp8,int4_awq] [--tokens 1,8,64]
                                         [--models 8B,1B,135M] [--dry]

The shapes are those of Llama-3.1-8B, Llama-3.2-1B and SmolLM2-135M, their MLPs gated. See `kernels_other` for how it is
timed. GB/s count the weight alone, as stored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.kernels_other import SECONDS, Case, compile_all, measured, recorded, report, sets_of, values
from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3, FORMATS
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import JitLaunch, Launch
from trtx.runtime.cuda.linear import CudaLinear, Skinny

SHAPES = {
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "1B": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "135M": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
}

GEMV = [(1, 2048, 8), (2, 2048, 8), (4, 2048, 8), (4, 2048, 4), (8, 2048, 8), (2, 1024, 4), (4, 1024, 4), (1, 4096, 8)]
GEMV4 = [(1, 512, 4), (2, 512, 4), (4, 512, 4), (8, 512, 4), (4, 256, 2), (8, 256, 2), (4, 512, 8), (16, 256, 4)]
"""Rows, elements (words) of K at a time, warps."""

SKINNY = [(64, 64, 4), (64, 128, 3), (64, 128, 4), (64, 256, 2), (128, 64, 4), (128, 128, 3)]
SKINNY4 = [(64, 32, 3), (64, 32, 4), (64, 64, 2), (128, 32, 2), (128, 32, 3)]
"""Rows, elements (words) of K at a time, stages."""


def cases(device: str, formats: list[str], models: list[str], tokens: list[int]) -> Iterator[Case]:
    for model, form, m in itertools.product(models, formats, tokens):
        for kind, (n, k) in SHAPES[model].items():
            one = resident(device, form, n, k)
            size = one.weight.nbytes + (one.groups.nbytes if one.groups is not None else 0)
            sets = sets_of(size)
            weights = [one, *(resident(device, form, n, k) for _ in range(sets - 1))]
            x = values(device, m, k)
            name = f"{form} {model} {kind} M={m}"

            def run(launch: Launch, i: int, x=x, weights=weights, kind=kind) -> object:
                if kind == "gate_up":
                    return linear.gated(launch, x, weights[i], Activation())
                return linear.linear(launch, x, weights[i])

            yield Case(name, "default", run, sets, size)
            for label, settings in candidates(form, m, n, k):
                yield Case(name, label, run, sets, size, settings=settings)
            if form != "none":
                with_library = patch.object(linear, "most_tokens", lambda *_: 0)
                yield Case(name, "library", run, sets, size, settings=lambda it=with_library: it)
            elif device != "meta":
                yield Case(name, "library", lambda _, i, x=x, w=weights: F.linear(x, w[i].weight), sets, size)


def candidates(form: str, m: int, n: int, k: int) -> Iterator[tuple[str, Any]]:
    """Launch shapes other than the default, by name."""
    words = form == "int4_awq"
    if m == 1:
        name = "gemv4_shape" if words else "gemv_shape"
        for rows, block, warps in GEMV4 if words else GEMV:
            if block <= 2 * k // (8 if words else 1):
                shape = (rows, block, warps)
                yield f"{rows}×{block} w{warps}", lambda s=shape, name=name: patch.object(linear, name, lambda *_: s)
        return
    name = "skinny4_shape" if words else "skinny_shape"
    for (rows, block, stages), programs in itertools.product(SKINNY4 if words else SKINNY, (264, 396)):
        tiles, blocks = -(-n // rows), -(-k // (block * (8 if words else 1)))
        with patch.object(linear, "_PROGRAMS", programs):
            splits = linear._splits(tiles, blocks, 1)
        shape = Skinny(rows, max(16, 1 << (m - 1).bit_length()), block, splits, 4, stages)
        label = f"{rows}×{block}/{splits} s{stages}"
        yield label, lambda s=shape, name=name: patch.object(linear, name, lambda *_: s)


def resident(device: str, form: str, n: int, k: int) -> CudaLinear:
    """A random weight in kernel layout."""
    tensors: dict[str, Tensor]
    if form == "none":
        tensors = {"weight": values(device, n, k, scale=k**-0.5)}
    elif form == "fp8":
        scale = torch.tensor(0.01, device=device)
        tensors = {"weight": values(device, n, k).to(E4M3), "weight_scale": scale, "input_scale": scale}
    elif form == "int4_awq":
        words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, device=device)
        group = FORMATS[form].group_size(k)
        scales = torch.rand(n, k // group, device=device)
        tensors = {"weight": words, "weight_scale": scales, "pre_quant_scale": torch.rand(k, device=device)}
    else:
        raise SystemExit(f"No case for {form!r}.")
    return linear.resident("w", FORMATS[form], tensors, (n // 2, n // 2), torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--formats", default="none,fp8,int4_awq")
    parser.add_argument("--tokens", default="1,8,64")
    parser.add_argument("--models", default="8B,1B,135M")
    parser.add_argument("--dry", action="store_true", help="only record what would be launched")
    options = parser.parse_args()
    chosen = options.formats.split(","), options.models.split(","), [int(m) for m in options.tokens.split(",")]
    began = time.monotonic()
    dependent = options.dry or torch.cuda.get_device_capability() >= (9, 0)
    variants = recorded(list(cases("meta", *chosen)), dependent)
    print(f"{len(variants)} variants of kernels")
    if options.dry:
        return
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        compile_all(variants, pool)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    launch = JitLaunch(dependent)
    found: list[dict[str, Any]] = []
    for case in cases("cuda", *chosen):
        if time.monotonic() - began > SECONDS:
            print("! no time left")
            break
        found += measured(case, launch)
    report(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
