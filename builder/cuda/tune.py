"""Which algorithm of cuBLASLt is the fastest for each large product of an engine: measured where its GPU is here.

Candidates are what the heuristic likes best. Each is timed in a CUDA graph that multiplies with one weight after the
other, more of them than fit into the L2 cache, of random numbers (zeros take less power, and so less time). What was
found is kept in the user's cache folder too, by GPU and version of the library: a second build measures nothing.

Large products bring a GPU to its power limit, where its favourites may be others. Timing them there (80 s more for
Llama-3.1-8B on an H100) made no whole prefill and no throughput better: they are timed as the others are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trtx.builder.cache import cache_folder, replace_file
from trtx.builder.cuda.nvrtc import has_hopper
from trtx.builder.gpus import Target, resolve
from trtx.builder.sizing import Sizing
from trtx.converters.convert import Progress
from trtx.converters.errors import InputError, MissingPackageError
from trtx.converters.spec import Module
from trtx.quantize.formats import DTYPES, E4M3
from trtx.quantize.weight import LinearWeight, fusable
from trtx.runtime.cuda.cublaslt import TABLE, Algorithm, CublasError, Problem, Products, Table, Tuned
from trtx.runtime.cuda.linear import dense, fits_gated, kernel_layout, most_tokens, resident
from trtx.runtime.cuda.ops import is_expert
from trtx.runtime.cuda.shapes import batch_sizes
from trtx.runtime.weights import WeightStore, fused_groups

SECONDS = 20.0
"""Time for all products of an engine; those that it does not suffice for are left to the heuristic."""

CANDIDATES = 16
"""Algorithms that are timed for a product."""

NEAR = 4
"""The most of them, the fastest, that are timed more than once."""

GAIN = 0.99
"""The heuristic's time, times this, is what another algorithm has to beat."""

METHOD = 3
"""Of timing, and of what is timed: what was found by another one is not taken from the cache."""

POOL = 256 << 20
"""Bytes of weights that are multiplied with in turn: several times an L2 cache."""

_SPAN, _FLOPS, _BYTES = 1.5e-3, 600e12, 3e12
"""Seconds that a graph should take, and what is computed and read in a second, roughly."""


def add_algorithms(store: WeightStore | None, sizing: Sizing, folder: Path, progress: Progress) -> None:
    """Write the table of an engine's large products beside its kernels, if the GPU that it is for is here and free.

    Args:
        store: the weights; None: random ones.
        progress: shows how many products are measured.
    """
    if not is_here(sizing.target):
        return
    wanted = problems(sizing, store)
    with suppress(torch.OutOfMemoryError, CublasError, MissingPackageError):  # an engine can do without
        with progress(len(wanted)) as advance:
            table = measured(wanted, advance)
        (folder / TABLE).write_text(table.text, encoding="utf-8")
    torch.cuda.empty_cache()


def is_here(target: Target) -> bool:
    """Whether this machine's first GPU is of the kind that is built for."""
    here = resolve("auto")
    return target.device == here.device == "cuda" and target.name == here.name


# ---------------------------------------------------------------------------------------------------------------------
# What is multiplied


def problems(sizing: Sizing, checkpoint: WeightStore | None) -> list[Problem]:
    """The products of an engine's linears that are left to cuBLAS, the most telling sizes first.

    Numbers of tokens are those that decodes are captured for, and powers of two up to the most of a step; powers of two
    come first, since sizes between look at the next larger one, and of those the largest.

    Args:
        checkpoint: the weights, as in `trace.required_kernels`.
    """
    config, dtype = sizing.model, DTYPES[sizing.compute_dtype]
    store = checkpoint or WeightStore.of_seed(config, 0, torch.device("cpu"))
    most, batch = sizing.max_num_tokens, sizing.max_batch_size
    decodes, powers = batch_sizes(batch), [1 << i for i in range(most.bit_length())]
    tokens = {*decodes, *powers, most}
    hopper = sizing.target.gpu is not None and has_hopper(sizing.target.gpu.sm)
    found: dict[Problem, None] = {}

    def add(kind: Problem, few: int, counts: Iterable[int]) -> None:
        found.update((kind._replace(m=count), None) for count in counts if count > few)

    for name, modules in fused_groups(config):
        if is_expert(name):
            continue
        whole = checkpoint is None or fusable([store.linear(it) for it in modules], store.stored(modules[0]))
        for members in [modules] if whole else [[module] for module in modules]:
            add(*_problem(store, name, members, dtype, hopper), decodes if name == "lm_head" else tokens)
    if config.spec.tied_embeddings:
        size = config.spec.vocab_size, config.spec.hidden_size
        head = dense("lm_head", torch.empty(size, dtype=dtype, device="meta"), (size[0],))
        add(Problem(dtype, dtype, 0, *size), most_tokens(head, dtype, gated=False), decodes)
    return sorted(found, key=lambda problem: (problem.m not in (most, *powers), -problem.m))


def _problem(
    store: WeightStore, name: str, modules: list[Module], dtype: torch.dtype, hopper: bool
) -> tuple[Problem, int]:
    """How linears that are used as one are multiplied, m left open, and the most tokens for which cuBLAS is not asked.

    Those of blocks that are added to the residual stream are measured so.

    Args:
        hopper: gated.cu is there.
    """
    from trtx.builder.build import joined

    form = store.config.quantization.format_of(modules[0])
    stored = joined(store, name, modules)
    tensors = {
        entry.name.rpartition(".")[2]: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in stored
    }
    weight = LinearWeight(name, form, tensors, tuple((it.name, it.shape[0]) for it in modules), modules[0].split)
    w = resident(name, form, kernel_layout(weight, dtype), weight.rows, dtype)
    n, k, bias = w.out_features, w.in_features, w.bias is not None
    scales = {"e4m3": "tensor", "by token": "row"}.get(w.way.input, "none") if w.weight.dtype == E4M3 else "none"
    if n % 16 or k % 16 or dtype is torch.float32:
        scales = "none"
    add = name.endswith((".o", ".down"))
    problem = Problem(dtype if scales == "none" else E4M3, dtype, 0, n, k, bias, add, scales)
    gated = name.endswith(".gate_up") and len(modules) == 2
    never = hopper and gated and fits_gated(w, dtype)
    return problem, sys.maxsize if never else most_tokens(w, dtype, gated)


# ---------------------------------------------------------------------------------------------------------------------
# What is fastest


def measured(wanted: list[Problem], advance: Callable[[int], None] = lambda count: None) -> Table:
    """The algorithms of products on the current GPU, as many as the time suffices for.

    Args:
        advance: called with the number of products that are done.
    """
    began, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    products = Products(device)
    table = Table(products.version, products.gpu)
    cached = cache_folder("algorithms") / f"{products.gpu.replace(' ', '-')}-{products.version}-{METHOD}.json"
    known = _known(cached, table)
    stopwatch = Stopwatch(products, device)
    for problem in wanted:
        tuned = known.entries.get(problem)
        if tuned is None and time.monotonic() - began < SECONDS:
            with suppress(torch.OutOfMemoryError):
                tuned = choose(stopwatch, problem)
        if tuned is not None:
            table.entries[problem] = known.entries[problem] = tuned
        advance(1)
    with suppress(OSError):  # a cache is no more than that
        replace_file(cached, known.text.encode())
    return table


def _known(file: Path, like: Table) -> Table:
    """What builds before have measured on a GPU with a library."""
    with suppress(InputError):
        table = Table.read(file)
        if (table.cublas, table.gpu) == (like.cublas, like.gpu):
            return table
    return Table(like.cublas, like.gpu)


def choose(stopwatch: Stopwatch, problem: Problem) -> Tuned | None:
    """The fastest algorithm for a product; None where cuBLASLt has none.

    All candidates are timed once. Those that are near the best, and the heuristic's own, are then timed in turns.
    """
    products = stopwatch.products
    runs = stopwatch.runs(problem)
    graphs: dict[Algorithm, torch.cuda.CUDAGraph] = {}
    for algorithm in products.candidates(problem, CANDIDATES):
        products.use(problem, algorithm)
        with suppress(CublasError):
            graphs[algorithm] = stopwatch.captured(runs)
    if not graphs:
        return None
    once = {algorithm: stopwatch.seconds(graph) for algorithm, graph in graphs.items()}
    first, limit = next(iter(graphs)), 1.05 * min(once.values())
    ahead = sorted((algorithm for algorithm in graphs if once[algorithm] < limit), key=lambda it: once[it])[:NEAR]
    near = ahead if first in ahead else [first, *ahead]
    rounds = [[stopwatch.seconds(graphs[algorithm]) for algorithm in near] for _ in range(7)]
    medians = dict(zip(near, map(statistics.median, zip(*rounds, strict=True)), strict=True))
    best = min(near, key=lambda algorithm: medians[algorithm])
    if medians[best] > GAIN * medians[first]:
        best = first
    products.use(problem, best)
    us, heuristic_us = (round(1e6 * medians[algorithm] / len(runs), 3) for algorithm in (best, first))
    return Tuned(best.code.hex(), best.workspace, us, heuristic_us)


class Stopwatch:
    """Times products on the current GPU. Weights are windows of one pool of random numbers.

    Args:
        products: computes them.
    """

    def __init__(self, products: Products, device: torch.device) -> None:
        self.products = products
        self._device = device
        self._pools: dict[torch.dtype, Tensor] = {}
        self._stream = torch.cuda.Stream(device)

    def weights(self, problem: Problem) -> list[Tensor]:
        """Random weights [N, K], one for each run of a graph; they come again where the pool has no room for more."""
        count, dtype = problem.n * problem.k, problem.input
        window = -(-count // 256) * 256  # aligned as torch's allocator does
        pool = self._pools.get(dtype)
        if pool is None or len(pool) < window:
            self._pools.pop(dtype, None)
            del pool
            pool = self._pools[dtype] = self._random((max(POOL // dtype.itemsize, window),), dtype)
        windows = [
            pool[start : start + count].view(problem.n, problem.k)
            for start in range(0, min(len(pool) // window, 128) * window, window)
        ]
        once = max(2 * problem.m * count / _FLOPS, count * dtype.itemsize / _BYTES)
        return [windows[i % len(windows)] for i in range(max(2, min(128, int(_SPAN / once))))]

    def runs(self, problem: Problem) -> list[Callable[[], None]]:
        """Calls that compute a product, each with another weight."""
        m, n, k = problem.m, problem.n, problem.k
        x, out = self._random((m, k), problem.input), self._random((m, n), problem.output)
        bias = self._random((n,), problem.output) if problem.bias else None
        compute = partial(self.products.linear, bias=bias, out=out, add=problem.add)
        if problem.scales != "none":
            shapes: list[tuple[int, ...]] = [(m, 1), (1, n)] if problem.scales == "row" else [(), ()]
            x_scale, w_scale = (torch.rand(shape, device=self._device) for shape in shapes)
            scaled = partial(self.products.scaled, bias=bias, out=out, add=problem.add, dtype=problem.output)
            compute = partial(scaled, x_scale=x_scale, w_scale=w_scale)

        def run(w: Tensor) -> None:
            assert compute(x, w) is not None

        return [partial(run, w) for w in self.weights(problem)]

    def captured(self, runs: Iterable[Callable[[], object]]) -> torch.cuda.CUDAGraph:
        """A graph of calls, replayed once."""
        calls = list(runs)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            calls[0]()  # libraries load their kernels
            self._stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
            graph.replay()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph

    def seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        """Of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype is E4M3:
            return torch.randn(shape, dtype=torch.bfloat16, device=self._device).to(dtype)
        return torch.randn(shape, dtype=dtype, device=self._device)
