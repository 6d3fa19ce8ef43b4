"""The cuda backend on one GPU, beside what vLLM 0.26.0 reached on an H100 with the same workloads.

    python -m tests.bench.h100 --out h100-bench.json
    python -m tests.bench.h100 --load --out h100-bench.json    loading from files
    python -m tests.bench.h100 --table h100-bench.json         the table of the README

Weights are random, prompts are random token ids, decoding is greedy and nothing is detokenized. TTFT is the time of a
request for one token, TPOT the rest of a longer one by its tokens; medians. Throughput is output tokens by the time of
the whole run, prefill included, all requests handed in at once and at most B running. "start" is the time from opening
the engine to being ready, its weights drawn on the GPU. With --load they are read from files, which are in the page
cache, by a fresh process, which has imported trtx and not touched the GPU yet. The peer's figures were measured with
the same definitions on another machine of the same kind, and hosts differ: they are for orientation. peer.py measures
vLLM on the same GPU and puts that beside them.

A report of several calls has the latest row of each, with the commit it was measured at.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.converters import published
from trtx.builder.build import BuildSettings, build, prepare
from trtx.builder.engine import Engine
from trtx.converters.artifact import create, now
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.shards import Entry, write_shards
from trtx.runtime.llm import BURST, LLM
from trtx.runtime.request import Request
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore

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

    @property
    def largest(self) -> int:
        """The largest batch."""
        return max(work.batch for work in self.works)


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


def source_of(case: Case, folder: Path) -> str:
    """What `build` makes an engine of random weights from."""
    config = folder / f"{case.name}.json"
    config.write_text(json.dumps(config_of(case.model)))
    return f"random:{config}"


def settings_of(case: Case, batch: int, length: int, gpu: str = "auto") -> BuildSettings:
    """Of an engine for so many sequences of so many tokens."""
    return BuildSettings(
        backend="cuda", gpu=gpu, max_batch_size=batch, max_seq_len=length,
        max_num_tokens=max(batch, min(8192, batch * length)), random_format=case.format,
    )  # fmt: skip


class Bench:
    """One case, from its engine to its rows."""

    def __init__(self, case: Case, folder: Path, reps: int) -> None:
        self.case, self.folder, self.reps = case, folder, reps
        self.rng = random.Random(1)
        self.vocab = config_of(case.model)["vocab_size"]
        self.served = 0

    def run(self) -> Iterator[dict[str, Any]]:
        """The rows; engines are sized to each batch, as the peer's were."""
        for batch in dict.fromkeys(work.batch for work in self.case.works):
            works = [work for work in self.case.works if work.batch == batch]
            llm, start = self.open(batch, max(work.isl + work.osl for work in works))
            yield from (self.measure(llm, work, start) for work in works)
            del llm
            gc.collect()
            torch.cuda.empty_cache()

    def open(self, batch: int, length: int) -> tuple[LLM, float]:
        """An engine for so many sequences, and the seconds from opening it to being ready."""
        settings = settings_of(self.case, batch, length)
        engine = self.folder / f"{self.case.name}-{batch}"
        began = time.perf_counter()
        build(source_of(self.case, self.folder), engine, settings, force=True)
        built = time.perf_counter() - began
        began = time.perf_counter()
        llm = LLM(engine, prefix_reuse=False)
        start = time.perf_counter() - began
        print(f"{engine.name}: built in {built:.1f} s, ready in {start:.1f} s", flush=True)
        return llm, start

    def measure(self, llm: LLM, work: Work, start: float) -> dict[str, Any]:
        """One row."""
        row: dict[str, Any] = {"case": self.case.name, **asdict(work), "start_s": round(start, 2)}
        serve = partial(self.serve, llm, work.batch)
        if work.batch == 1:
            for _ in range(2):
                serve(1, work.isl, min(work.osl, 32))
            first = [serve(1, work.isl, 1) for _ in range(work.requests)]
            whole = [serve(1, work.isl, work.osl) for _ in range(work.requests)]
            ttft, total = statistics.median(first), statistics.median(whole)
            row |= {"ttft_ms": 1e3 * ttft, "tpot_ms": 1e3 * (total - ttft) / (work.osl - 1)}
        else:
            serve(min(work.batch, work.requests), work.isl, min(work.osl, 8))
            times = [serve(work.requests, work.isl, work.osl) for _ in range(self.reps)]
            row |= {"out_tok_s": work.requests * work.osl / statistics.median(times), "seconds": times}
        found = {name: round(row[name], 3) for name in NAMES if name in row}
        print(self.case.name, work.batch, work.isl, work.osl, found, "vLLM:", work.peer, flush=True)
        return row

    def prompts(self, count: int, isl: int) -> dict[str, list[int]]:
        """So many of random tokens, by the name of a request."""
        self.served += count
        names = map(str, range(self.served - count, self.served))
        return {name: [self.rng.randrange(10, self.vocab) for _ in range(isl)] for name in names}

    def serve(self, llm: LLM, batch: int, count: int, isl: int, osl: int) -> float:
        """Seconds that `count` requests take, of which `batch` run at once: so many the engine is made for."""
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=osl)
        requests = [Request(name, tuple(prompt), params) for name, prompt in self.prompts(count, isl).items()]
        llm.executor.burst = BURST if batch > 1 else 1  # of many, nobody waits for each token
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


LOADED = ("8b-bf16", "8b-fp8")
"""The cases whose loading is timed."""

OPEN = """
import sys, time
from trtx import LLM
began = time.perf_counter()
llm = LLM(sys.argv[1], prefix_reuse=False)
print(time.perf_counter() - began)
"""


def write_checkpoint(model: CheckpointConfig, out: Path, device: torch.device) -> None:
    """A checkpoint of random weights from seed 0, drawn on the device one by one."""
    store = WeightStore.of_seed(model, 0, device)
    entries = [
        Entry(name, stored.dtype, stored.shape, partial(store.tensor, name))
        for name, stored in model.expected().items()
    ]
    with create(out, kind="checkpoint", command="convert", settings={}) as draft:
        model.write(draft)
        write_shards(draft, entries)


def stored_engine(case: Case, folder: Path, device: torch.device, gpu: str = "auto") -> Path:
    """An engine of the case's largest batch that holds its weights. Only a checkpoint stands beside it meanwhile."""
    length = max(it.isl + it.osl for it in case.works if it.batch == case.largest)
    settings = settings_of(case, case.largest, length, gpu)
    checkpoint, engine = folder / "checkpoint", folder / case.name
    began = time.perf_counter()
    write_checkpoint(prepare(source_of(case, folder), settings).sizing.model, checkpoint, device)
    written = time.perf_counter()
    build(checkpoint, engine, settings)
    built = time.perf_counter()
    shutil.rmtree(checkpoint)
    print(f"{case.name}: checkpoint in {written - began:.1f} s, engine in {built - written:.1f} s", flush=True)
    return engine


def read_all(files: list[Path]) -> int:
    """Bring files into the page cache; returns their bytes."""
    total, buffer = 0, memoryview(bytearray(16 << 20))
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total


def load(case: Case, folder: Path, reps: int) -> dict[str, Any]:
    """The row of a case: seconds from opening an engine of files to being ready, the median of fresh processes."""
    engine = stored_engine(case, folder, torch.device("cuda"))
    gc.collect()
    torch.cuda.empty_cache()
    size = read_all(Engine(engine).shards.files)
    times = []
    for _ in range(reps):
        done = subprocess.run([sys.executable, "-c", OPEN, engine], stdout=subprocess.PIPE, text=True, check=True)
        times.append(float(done.stdout.split()[-1]))
    shutil.rmtree(engine)
    seconds = statistics.median(times)
    row = {"case": case.name, "peer": {"load_s": case.peer_start} if case.peer_start else {}}
    row |= {"load_s": seconds, "bytes": size, "gb_s": size / seconds / 1e9, "seconds": times}
    print(f"{case.name}: {size / 1e9:.2f} GB ready in {seconds:.2f} s, {row['gb_s']:.1f} GB/s", times, flush=True)
    return row


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


NAMES = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "out_tok_s": "output tokens/s", "load_s": "start from files, s"}


def number(value: float | None) -> str:
    """With three digits, or all that stand before the point."""
    return "" if value is None else f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown; better is below 1 for times, above 1 for throughput. Where vLLM ran on the same GPU, the
    ratio is to that."""
    lines = [
        "| model | batch | in → out | | vLLM, another H100 | vLLM, same H100 | trtx | trtx / vLLM | commit |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    cases = {case.name: case for case in CASES}
    for row in sorted(report["rows"], key=lambda row: (list(cases).index(row["case"]), row.get("batch", 0))):
        case = cases[row["case"]]
        name = f"{case.model.split('/')[-1]} {'bf16' if case.format == 'none' else case.format}"
        for key in (key for key in NAMES if key in row):
            elsewhere, beside = row["peer"].get(key), row.get("beside", {}).get(key)
            peer = beside or elsewhere
            theirs, ratio = (number(elsewhere), number(beside)), f"{row[key] / peer:.2f}" if peer else ""
            work = f"{row['isl']} → {row['osl']}" if "isl" in row else f"{row['bytes'] / 1e9:.1f} GB"
            cells = name, row.get("batch", ""), work, NAMES[key], *theirs, number(row[key]), ratio, row["commit"][:7]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def measured(cases: list[Case], folder: Path, reps: int) -> Iterator[dict[str, Any]]:
    """The rows of cases, and what kept one from being measured."""
    for case in cases:
        try:
            yield from Bench(case, folder, reps).run()
        except Exception as error:
            print(f"{case.name}: {error!r}", flush=True)
            yield {"case": case.name, "error": repr(error)}


def same_work(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same work."""
    return all(row.get(key) == other.get(key) for key in ("case", "batch", "isl", "osl"))


def joined(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report with one more, in the place of what was measured of the same before, or failed."""

    def gives_way(known: dict[str, Any]) -> bool:
        if "error" in known or "error" in row:
            return "error" in known and known["case"] == row["case"]
        return same_work(known, row)

    return [known for known in rows if not gives_way(known)] + [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a report; what it holds of other work is kept")
    parser.add_argument("--cases", nargs="*", help=f"default: all, or with --load {' and '.join(LOADED)}")
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--reps", type=int, help="default: 1, or with --load 3")
    parser.add_argument("--commit", default="")
    parser.add_argument("--load", action="store_true", help="time loading from files")
    parser.add_argument("--table", type=Path, help="print the table of a report, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    names = args.cases or (LOADED if args.load else [case.name for case in CASES])
    cases = [
        replace(case, works=tuple(work for work in case.works if not args.batches or work.batch in args.batches))
        for case in CASES
        if case.name in names
    ]
    gpu, ceiling, rows = torch.cuda.get_device_name(), read_ceiling(), []
    print(f"{gpu}, read ceiling {ceiling:.2f} TB/s", flush=True)
    if args.out and args.out.exists():
        known = json.loads(args.out.read_text())
        assert known["gpu"] == gpu, f"{args.out} is of {known['gpu']}"
        rows = known["rows"]
    made = {"commit": args.commit, "date": now(), "torch": torch.__version__}
    made |= {"uuid": str(torch.cuda.get_device_properties(0).uuid), "read_ceiling_tb_s": ceiling}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.load:
            found = (load(case, folder, args.reps or 3) for case in cases)
        else:
            found = measured(cases, folder, args.reps or 1)
        for row in found:
            rows = joined(rows, row | made)
            if args.out:
                args.out.write_text(json.dumps({"gpu": gpu, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
