"""The cuda backend on one GPU, beside what vLLM 0.26.0 reached on an H100 with the same workloads.

    python tests/bench/h100.py --out h100-bench.json
    python tests/bench/h100.py --table h100-bench.json     the table of the README

Weights are random, prompts are random token ids, decoding is greedy and nothing is detokenized. TTFT is the time of a
request for one token, TPOT the rest of a longer one by its tokens; medians. Throughput is output tokens by the time of
the whole run, prefill included, all requests handed in at once and at most B running. "start" is the time from opening
the engine to being ready. The peer's figures were measured with the same definitions on another machine of the same
kind, and hosts differ: they are for orientation.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tests.converters import published
from trtx.builder.build import BuildSettings, build
from trtx.runtime.llm import BURST, LLM
from trtx.runtime.request import Request
from trtx.runtime.sampling import SamplingParams

SMOLLM2_135M = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A workload: batch, prompt and output tokens, requests. Targets and bounds are those of the project."""

    batch: int
    isl: int
    osl: int
    requests: int
    peer: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A model in a format, and what is asked of it."""

    name: str
    model: str
    format: str
    works: tuple[Work, ...]
    peer_start: float | None = None


CASES = (
    Case("8b-bf16", "meta-llama/Llama-3.1-8B", "none", (
        Work(1, 128, 128, 5, {"ttft_ms": 13.5, "tpot_ms": 6.65}),
        Work(1, 2048, 128, 5, {"ttft_ms": 49.8, "tpot_ms": 6.59}),
        Work(8, 512, 256, 32, {"out_tok_s": 1102}), Work(64, 512, 256, 256, {"out_tok_s": 5456}),
        Work(256, 128, 128, 1024, {"out_tok_s": 14596}), Work(256, 1024, 128, 512, {"out_tok_s": 3785}),
        Work(256, 512, 512, 512, {"out_tok_s": 10869}),
    ), 58.6),
    Case("8b-fp8", "meta-llama/Llama-3.1-8B", "fp8", (
        Work(1, 128, 128, 5, {"ttft_ms": 18.7, "tpot_ms": 4.19}),
        Work(1, 2048, 128, 5, {"ttft_ms": 36.4, "tpot_ms": 4.37}),
        Work(8, 512, 256, 32, {"out_tok_s": 1614}), Work(64, 512, 256, 256, {"out_tok_s": 7458}),
        Work(256, 128, 128, 1024, {"out_tok_s": 19056}), Work(256, 1024, 128, 512, {"out_tok_s": 5054}),
        Work(256, 512, 512, 512, {"out_tok_s": 13159}),
    ), 69.5),
    Case("8b-int4", "meta-llama/Llama-3.1-8B", "int4_awq", (Work(1, 128, 128, 5),)),
    Case("1b-bf16", "meta-llama/Llama-3.2-1B", "none", (
        Work(1, 128, 128, 5, {"ttft_ms": 7.7, "tpot_ms": 2.34}), Work(8, 128, 128, 64, {"out_tok_s": 3618}),
        Work(64, 128, 128, 512, {"out_tok_s": 20026}), Work(256, 128, 128, 1024, {"out_tok_s": 38550}),
    ), 41.0),
    Case("135m-bf16", "SmolLM2-135M", "none", (
        Work(1, 128, 128, 5, {"ttft_ms": 14.4, "tpot_ms": 1.46}), Work(8, 128, 128, 64, {"out_tok_s": 4295}),
        Work(64, 128, 128, 512, {"out_tok_s": 14079}), Work(256, 128, 128, 1024, {"out_tok_s": 39550}),
    ), 47.5),
)  # fmt: skip


def config_of(model: str) -> dict[str, Any]:
    """A model's config.json."""
    if model == "SmolLM2-135M":
        return SMOLLM2_135M
    (entry,) = [entry for entry in published.entries() if entry["model"] == model]
    return dict(entry["config"])


class Bench:
    """One case, from its engine to its rows."""

    def __init__(self, case: Case, folder: Path, reps: int) -> None:
        self.case, self.folder, self.reps = case, folder, reps
        self.rng = random.Random(1)
        self.vocab = config_of(case.model)["vocab_size"]
        self.served = 0

    def run(self) -> list[dict[str, Any]]:
        """The rows; engines are sized to each batch, as the peer's were."""
        rows = []
        for batch in dict.fromkeys(work.batch for work in self.case.works):
            works = [work for work in self.case.works if work.batch == batch]
            llm, start = self.open(batch, max(work.isl + work.osl for work in works))
            rows += [self.measure(llm, work, start) for work in works]
            del llm
            gc.collect()
            torch.cuda.empty_cache()
        return rows

    def open(self, batch: int, length: int) -> tuple[LLM, float]:
        """An engine for so many sequences, and the seconds from opening it to being ready."""
        config = self.folder / f"{self.case.name}.json"
        config.write_text(json.dumps(config_of(self.case.model)))
        settings = BuildSettings(
            backend="cuda", gpu="auto", max_batch_size=batch, max_seq_len=length,
            max_num_tokens=max(batch, min(8192, batch * length)), random_format=self.case.format,
        )  # fmt: skip
        engine = self.folder / f"{self.case.name}-{batch}"
        began = time.perf_counter()
        build(f"random:{config}", engine, settings, force=True)
        built = time.perf_counter() - began
        began = time.perf_counter()
        llm = LLM(engine, prefix_reuse=False)
        start = time.perf_counter() - began
        print(f"{engine.name}: built in {built:.1f} s, ready in {start:.1f} s", flush=True)
        return llm, start

    def measure(self, llm: LLM, work: Work, start: float) -> dict[str, Any]:
        """One row."""
        row: dict[str, Any] = {"case": self.case.name, **asdict(work), "start_s": round(start, 2)}
        if work.batch == 1:
            for _ in range(2):
                self.serve(llm, 1, work.isl, min(work.osl, 32))
            first = [self.serve(llm, 1, work.isl, 1) for _ in range(work.requests)]
            whole = [self.serve(llm, 1, work.isl, work.osl) for _ in range(work.requests)]
            ttft, total = statistics.median(first), statistics.median(whole)
            row |= {"ttft_ms": 1e3 * ttft, "tpot_ms": 1e3 * (total - ttft) / (work.osl - 1)}
        else:
            llm.executor.burst = BURST  # nobody waits for each token
            self.serve(llm, min(work.batch, work.requests), work.isl, min(work.osl, 8))
            times = [self.serve(llm, work.requests, work.isl, work.osl) for _ in range(self.reps)]
            row |= {"out_tok_s": work.requests * work.osl / statistics.median(times), "seconds": times}
        found = {name: round(row[name], 3) for name in NAMES if name in row}
        print(self.case.name, work.batch, work.isl, work.osl, found, "vLLM:", work.peer, flush=True)
        return row

    def serve(self, llm: LLM, count: int, isl: int, osl: int) -> float:
        """Seconds that `count` requests take."""
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=osl)
        requests = []
        for _ in range(count):
            prompt = tuple(self.rng.randrange(10, self.vocab) for _ in range(isl))
            requests.append(Request(str(self.served), prompt, params))
            self.served += 1
        tokens = 0
        torch.cuda.synchronize()
        began = time.perf_counter()
        for request in requests:
            llm.executor.add(request)
        while llm.executor.has_work:
            tokens += sum(event.token is not None for event in llm.executor.step())
        seconds = time.perf_counter() - began
        assert tokens == count * osl, (tokens, count * osl)
        return seconds


def read_ceiling() -> float:
    """TB/s at which a sum reads 4 GB of random bf16 numbers: the best of 20."""
    data = torch.randn(1 << 31, dtype=torch.bfloat16, device="cuda").view(1 << 13, -1)
    best = 1e9
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        data.view(torch.int32).amax()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return data.nbytes / best / 1e9


NAMES = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "out_tok_s": "output tokens/s"}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown; better is below 1 for times, above 1 for throughput."""
    lines = [
        "| model | batch | in → out | | vLLM 0.26.0 | trtx | trtx / vLLM |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    cases = {case.name: case for case in CASES}
    for row in report["rows"]:
        case = cases[row["case"]]
        name = f"{case.model.split('/')[-1]} {'bf16' if case.format == 'none' else case.format}"
        for key in (key for key in NAMES if key in row):
            peer, digits = row["peer"].get(key), 0 if row[key] > 100 else 2
            theirs, ratio = (f"{peer:g}", f"{row[key] / peer:.2f}") if peer else ("", "")
            work = row["batch"], f"{row['isl']} → {row['osl']}"
            cells = name, *work, NAMES[key], theirs, f"{row[key]:.{digits}f}", ratio
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--reps", type=int, default=1)
    parser.add_argument("--commit", default="")
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    ceiling = read_ceiling()
    print(f"{torch.cuda.get_device_name()}, read ceiling {ceiling:.2f} TB/s", flush=True)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": args.commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "read_ceiling_tb_s": ceiling, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name not in args.cases:
                continue
            works = tuple(work for work in case.works if not args.batches or work.batch in args.batches)
            try:
                report["rows"] += Bench(Case(case.name, case.model, case.format, works), Path(folder), args.reps).run()
            except Exception as error:
                print(f"{case.name}: {error!r}", flush=True)
                report["rows"].append({"case": case.name, "error": repr(error)})
            if args.out:
                args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
