"""A benchmark of one engine, from its folder to the report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtx import __version__
from trtx.builder.engine import Engine
from trtx.converters.artifact import digest_file, now
from trtx.converters.errors import InputError
from trtx.runtime.bench import profile as profiling
from trtx.runtime.bench import roofline
from trtx.runtime.bench.load import Clock, Load, drive
from trtx.runtime.bench.metrics import Metrics, measure
from trtx.runtime.bench.report import EngineIdentity, Machine, Report, RequestRecord
from trtx.runtime.bench.trace import Trace
from trtx.runtime.bench.watch import Watch
from trtx.runtime.bench.workload import RandomPrompts, check_fits, read_dataset, warmup_requests
from trtx.runtime.llm import LLM
from trtx.runtime.request import Request
from trtx.runtime.runner import device_of

Progress = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], None]]]
"""(what is going on, units, their name) → a context that gives `advance(n)`; `trtx.cli.common.progress` is one."""

_FEWEST_REQUESTS = 32
_ROUNDS = 4


@contextmanager
def no_progress(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show nothing."""
    yield lambda count: None


@dataclass(frozen=True)
class Settings:
    """What a benchmark asks of an engine.

    Attributes:
        prompts: random ones, or a JSONL dataset (`workload.read_dataset`).
        num_requests: how many are measured; None: all of a dataset; of random prompts 32, or four for each that may be
            in flight, whichever is more.
        warmup: requests served before and not counted; as long as the first ones measured, of other random tokens.
        prefix_reuse: let equal prompt prefixes share KV blocks.
    """

    prompts: RandomPrompts | Path
    load: Load
    num_requests: int | None = None
    warmup: int = 2
    seed: int = 0
    prefix_reuse: bool = True

    @property
    def shared_prefix(self) -> int:
        return self.prompts.shared_prefix if isinstance(self.prompts, RandomPrompts) else 0

    def describe(self) -> dict[str, Any]:
        """The workload as a report holds it. Equal descriptions ask for the same."""
        if isinstance(self.prompts, RandomPrompts):
            shared = f", {self.shared_prefix} shared" if self.shared_prefix else ""
            prompts = f"random, {self.prompts.isl} in{shared}, {self.prompts.osl} out"
            count: int | None = self._random_count()
        else:
            prompts = f"{self.prompts.name} ({_digest(self.prompts)})"
            count = self.num_requests
        return {
            "prompts": prompts,
            "request_rate": self.load.request_rate,
            "concurrency": self.load.concurrency,
            "num_requests": count,
            "warmup": self.warmup,
            "seed": self.seed,
            "prefix_reuse": self.prefix_reuse,
        }

    def requests(self, llm: LLM) -> list[Request]:
        """The requests that are measured.

        Raises:
            InputError: the dataset is damaged, or a request is too long for the engine.
        """

        def encode(text: str) -> list[int]:
            return llm.tokenizer.encode(text)  # looked up late: an engine without one serves token ids

        vocab_size = llm.config.model.spec.vocab_size
        if isinstance(self.prompts, RandomPrompts):
            requests = self.prompts.requests(self._random_count(), vocab_size, self.seed)
        else:
            requests = read_dataset(self.prompts, encode, vocab_size, self.num_requests)
        check_fits(requests, llm.config.limits.max_seq_len)
        return requests

    def _random_count(self) -> int:
        return self.num_requests or max(_FEWEST_REQUESTS, _ROUNDS * (self.load.concurrency or 0))


def run_benchmark(
    engine: Path,
    settings: Settings,
    *,
    device: str | None = None,
    clock: Clock | None = None,
    token_times: bool = False,
    profile: bool = False,
    progress: Progress = no_progress,
) -> tuple[Report, Trace]:
    """Load an engine, warm it up, serve the requests and measure.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'; what the engine was built for unless given.
        token_times: keep every token's time in the report.
        profile: serve a few requests more, and see what the time of a step goes to.

    Raises:
        TrtxError: the engine can't be loaded, or the workload not be made.
    """
    opened = Engine(engine)
    where = device_of(opened, device)
    with progress("Loading", opened.config.ledger.get("weights"), "B") as advance:
        llm = LLM(engine, device=device, prefix_reuse=settings.prefix_reuse, advance=advance)
    ceiling = roofline.ceiling(opened.config, where)
    requests = settings.requests(llm)
    warmup = warmup_requests(
        requests, settings.warmup, settings.shared_prefix, llm.config.model.spec.vocab_size, settings.seed
    )
    bytes_of = _bytes_of(opened, where) if profile else None
    watch = llm.executor.runner = Watch(llm.executor.runner)
    for description, batch, load in (("Warm-up", warmup, Load()), ("Measuring", requests, settings.load)):
        with progress(description, len(batch), "requests") as advance:
            trace = drive(
                llm.executor, batch, load, seed=settings.seed, clock=clock, advance=advance, chunks=lambda: watch.chunks
            )
    ranks = opened.config.mapping.ranks
    step_cost = roofline.step_cost(opened.config)
    metrics = measure(trace, ranks, step_cost, ceiling)
    profiled = None
    if profile:
        with progress("Profiling", None, ""):
            profiled = profiling.profile(
                llm.executor,
                watch,
                _requests_like(requests, metrics, settings, llm),
                where,
                bytes_of=bytes_of,
                step_cost=step_cost,
                ceiling=ceiling,
            )
    report = Report(
        created=now(),
        versions={"trtx": __version__, "python": platform.python_version(), "torch": torch.__version__},
        engine=_identity(opened),
        machine=_machine(where, ranks),
        workload=settings.describe(),
        metrics=metrics,
        requests=[RequestRecord.of(request, trace.start, token_times) for request in trace.requests],
        profile=profiled,
    )
    return report, trace


def _requests_like(measured: Sequence[Request], metrics: Metrics, settings: Settings, llm: LLM) -> list[Request]:
    """Requests as long as the first ones measured, as many as decoded together on average, of other random tokens."""
    count = round(metrics.mean_batch) or min(len(measured), llm.config.limits.max_batch_size)
    vocab_size = llm.config.model.spec.vocab_size
    return warmup_requests(measured, count, settings.shared_prefix, vocab_size, settings.seed + 1)


def _bytes_of(engine: Engine, device: torch.device) -> profiling.BytesOf | None:
    """What kernels read and write, where it can be told: on the backend `cuda`."""
    if engine.config.backend != "cuda":
        return None
    from trtx.runtime.cuda.traffic import Traffic

    properties: Any = torch.cuda.get_device_properties(device)
    return Traffic(engine.config, properties.shared_memory_per_block_optin).of_step


def _identity(engine: Engine) -> EngineIdentity:
    config = engine.config
    return EngineIdentity(
        path=str(engine.path),
        identity=engine.manifest.identity(),
        family=config.model.spec.family,
        parameters=config.model.spec.parameters,
        backend=config.backend,
        gpu=config.fingerprint.gpu,
        quantization=config.model.quantization.format,
        compute_dtype=config.compute_dtype,
        kv_dtype=config.limits.kv_dtype,
        tp=config.mapping.tp,
        pp=config.mapping.pp,
        random_weights=config.random_seed is not None or config.model.provenance.get("kind") == "random",
    )


def _machine(device: torch.device, count: int) -> Machine:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Machine(device.type, name, count, len(os.sched_getaffinity(0)), torch.get_num_threads())


def _cpu_name() -> str:
    """What Linux calls the CPU; the architecture where it has no name (Arm)."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _digest(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}).", "Give a JSONL file.") from error
