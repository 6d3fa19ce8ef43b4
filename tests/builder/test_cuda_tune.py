"""Which products are measured for an engine, which algorithm is chosen, what is kept. Nothing is timed here."""

from __future__ import annotations

from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from tests.builder.models import LLAMA_8B, TINY, llama_8b, sizing, spec_of
from tests.converters import published
from trtx.builder.build import BuildSettings, build, prepare
from trtx.builder.cuda import tune
from trtx.builder.cuda.backend import CudaBackend
from trtx.builder.cuda.trace import required_kernels
from trtx.builder.cuda.tune import GAIN, choose, is_here, measured, problems
from trtx.builder.gpus import Target, table
from trtx.builder.shard import Shard
from trtx.converters.checkpoint import CheckpointConfig
from trtx.quantize.formats import FORMATS, Quantization
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.cublaslt import TABLE, Algorithm, CublasError, Problem, Table, Tuned
from trtx.runtime.weights import WeightStore

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trtx" / "algorithms"


def quantized(form: str) -> CheckpointConfig:
    return llama_8b().with_quantization(Quantization(form, FORMATS[form].group_size(4096)))


def tokens_of(found: list[Problem], n: int, k: int) -> list[int]:
    return [problem.m for problem in found if (problem.n, problem.k) == (n, k)]


# Which products.


def test_products_of_llama(monkeypatch):
    """Of Llama-3.1-8B: powers of two and the most tokens, then captured decodes above 16; the head for decodes only.

    Of its MLPs gated.cu multiplies the first ones, where NVRTC compiles it.
    """
    with_nvrtc = problems(sizing(max_batch_size=128, max_num_tokens=3000), None)
    monkeypatch.setattr(tune, "has_hopper", lambda sm: False)
    found = problems(sizing(max_batch_size=128, max_num_tokens=3000), None)
    more, few = [112, 96, 80], [56, 48, 40, 28, 24, 20]
    whole = [3000, 2048, 1024, 512, 256, 128, 64, 32, *more, *few]
    assert {(p.n, p.k): tokens_of(found, p.n, p.k) for p in found} == {
        (6144, 4096): whole,
        (4096, 4096): whole,
        (28672, 4096): [3000, 2048, 1024, 512, 256, 128, *more],
        (4096, 14336): whole,
        (128256, 4096): [128, 64, 32, *more, *few],
    }
    assert with_nvrtc == [p for p in found if p.n != 28672]
    assert all(p.input is p.output is BF16 and not p.bias and p.scales == "none" for p in found)
    assert {(p.n, p.k) for p in found if p.add} == {(4096, 4096), (4096, 14336)}, "o and down"


@pytest.mark.parametrize("form, scales", [("fp8", "tensor"), ("fp8_pc_pt", "row")])
def test_products_of_codes(form, scales):
    """cuBLAS multiplies codes from 17 tokens on; the head is not quantized."""
    found = problems(sizing(quantized(form), max_batch_size=32, max_num_tokens=64), None)
    kinds = {p[:2] + p[5:] for p in found if p.n != 128256}
    assert kinds == {(E4M3, BF16, False, add, scales) for add in (False, True)}
    assert tokens_of(found, 6144, 4096) == [64, 32, 28, 24, 20]
    assert {p[:2] + p[5:] for p in found if p.n == 128256} == {(BF16, BF16, False, False, "none")}


@pytest.mark.parametrize("form", ["fp8_wo", "int8_sq", "int4_awq", "nvfp4", "mxfp8"])
def test_other_weights_are_multiplied_in_the_compute_dtype(form):
    found = problems(sizing(quantized(form), compute_dtype="fp16", max_batch_size=8, max_num_tokens=256), None)
    assert {p[:2] + p[7:] for p in found} == {(FP16, FP16, "none")}
    assert sum(p.m == 256 for p in found) == (3 if form == "mxfp8" else 4), "gated.cu multiplies what is in 16 bits"


@pytest.mark.parametrize("changes, dtype", [({"compute_dtype": "fp32"}, FP32), ({"inner": 14340}, BF16)])
def test_codes_that_cublas_does_not_multiply(changes, dtype):
    """An output in fp32, or sizes that are no multiple of 16."""
    changes = dict(changes)
    spec = spec_of(LLAMA_8B, intermediate_size=changes.pop("inner", 14336))
    model = CheckpointConfig(spec, "bf16", Quantization("fp8"))
    found = problems(sizing(model, max_batch_size=8, max_num_tokens=128, **changes), None)
    (down,) = [p for p in found if p.k == spec.intermediate_size and p.m == 128]
    assert down[:2] == (dtype, dtype) and down.scales == "none"


def test_tied_head_and_biases():
    model = CheckpointConfig(spec_of(TINY, tie_word_embeddings=True, attention_bias=True), "bf16")
    asked = sizing(model, max_batch_size=128, max_num_tokens=128, max_seq_len=256)
    found = problems(asked, None)
    assert tokens_of(found, TINY["vocab_size"], TINY["hidden_size"]) == [128, 112, 96, 80]
    biased = {(p.n, p.k): p.bias for p in found}
    assert biased == {(128, 64): True, (64, 64): True, (64, 128): False, (96, 64): False}


@pytest.mark.parametrize("shared", [True, False], ids=["fused", "apart"])
def test_linears_that_can_not_be_fused_are_products_of_their_own(write_checkpoint, shared):
    checkpoint = write_checkpoint(spec_of(TINY, intermediate_size=160), "fp8", shared_scales=shared)
    asked = sizing(checkpoint.config, max_batch_size=2, max_num_tokens=128, max_seq_len=256)
    found = problems(asked, WeightStore.of_checkpoint(checkpoint))
    heights = {p.n for p in found if p.k == 64 and not p.add}
    assert heights == ({128, 320} if shared else {64, 32, 160})


@pytest.mark.parametrize("family, layers", [("llama", 2), ("qwen3_moe", 2), ("deepseek_v2", 2), ("bloom", 2)])
@pytest.mark.parametrize("form", ["none", "fp8"])
def test_every_product_of_a_step_has_been_measured_in_its_size_or_a_larger_one(monkeypatch, family, layers, form):
    """Steps are run on meta tensors, as for the list of kernels; what they leave to cuBLAS is noted down."""
    entry = next(entry for entry in published.entries() if entry["family"] == family)
    config = {key: value for key, value in entry["config"].items() if key != "layer_types"}
    spec = spec_of(config, **({"n_layer": layers} if "n_layer" in config else {"num_hidden_layers": layers}))
    model = CheckpointConfig(spec, "bf16", Quantization(form))
    asked = sizing(model, max_batch_size=160, max_num_tokens=300, max_seq_len=512)
    noted: set[tuple[int, int, int]] = set()

    def note(name):
        multiply = getattr(linear, name)

        def noting(*args):
            x, w = args[1], next(arg for arg in args if isinstance(arg, linear.CudaLinear))
            noted.add((len(x), w.out_features, w.in_features))
            return multiply(*args)

        monkeypatch.setattr(linear, name, noting)

    note("_product")
    note("_product_of_codes")
    required_kernels(asked, CudaBackend().kv_layout(asked, Shard(spec, asked.mapping, 0)))
    most: dict[tuple[int, int], int] = {}
    for problem in problems(asked, None):
        most[problem.n, problem.k] = max(problem.m, most.get((problem.n, problem.k), 0))
    assert noted and all(m <= most[n, k] for m, n, k in noted)


# Which algorithm.


class FakeProducts:
    """Knows algorithms that take given times, in seconds; one that takes None fails."""

    version, gpu = 130100, "NVIDIA H100"

    def __init__(self, times: list[float | None]) -> None:
        self.times = times
        self.used = 0
        self.failing = False

    def candidates(self, problem: Problem, most: int) -> list[Algorithm]:
        return [Algorithm(bytes([number]) * 64, 10 * number) for number in range(min(most, len(self.times)))]

    def use(self, problem: Problem, algorithm: Algorithm) -> None:
        self.used = algorithm.code[0]


class FakeStopwatch:
    """A graph of four runs is the number of an algorithm; the clock is off by turns, and wrong once."""

    def __init__(self, products: FakeProducts, device: object = None) -> None:
        self.products = products
        self.noise = cycle([1.0, 1.02, 0.98, 1.0, 1.0])
        self.asked: list[int] = []

    def runs(self, problem: Problem) -> list[int]:
        return [0] * 4

    def captured(self, runs: list[int]) -> int:
        if self.products.times[self.products.used] is None:
            raise CublasError("cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED")
        return self.products.used

    def seconds(self, graph: int) -> float:
        self.asked.append(graph)
        return self.products.times[graph] * next(self.noise)


ASKED = Problem(BF16, BF16, 128, 4096, 4096)


@pytest.mark.parametrize(
    "times, best",
    [
        ([1.0, 2.0, 0.5, 3.0], 2),
        ([1.0, 0.995], 0),
        ([1.0, 0.98], 1),
        ([1.0, 0.98, 0.97], 2),
        ([None, 1.0, 2.0], 1),
        ([1.0], 0),
    ],
)
def test_fastest_is_chosen_where_it_is_worth_it(times, best):
    stopwatch = FakeStopwatch(FakeProducts(times))
    first = next(number for number, time in enumerate(times) if time is not None)
    tuned = choose(stopwatch, ASKED)
    assert tuned.algorithm == bytes([best] * 64).hex() and tuned.workspace == 10 * best
    assert tuned.us == pytest.approx(1e6 * times[best] / 4) and stopwatch.products.used == best
    assert tuned.heuristic_us == pytest.approx(1e6 * times[first] / 4)
    assert (tuned.us < tuned.heuristic_us) == (best != first) and GAIN == 0.99


def test_algorithms_that_are_far_off_are_timed_once():
    stopwatch = FakeStopwatch(FakeProducts([1.0, 5.0, 0.5, 0.51]))
    choose(stopwatch, ASKED)
    assert [stopwatch.asked.count(number) for number in range(4)] == [8, 1, 8, 8]


def test_few_algorithms_are_timed_again():
    """The four fastest, and the heuristic's."""
    stopwatch = FakeStopwatch(FakeProducts([1.04, 1.03, 1.02, 1.01, 1.0, 1.005]))
    choose(stopwatch, ASKED)
    assert [stopwatch.asked.count(number) for number in range(6)] == [8, 1, 8, 8, 8, 8]


@pytest.mark.parametrize("times", [[], [None, None]])
def test_product_without_algorithm(times):
    assert choose(FakeStopwatch(FakeProducts(times)), ASKED) is None


# What is kept.


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, its library, and a clock: a choice takes a second."""
    now = SimpleNamespace(seconds=0.0, chosen=[])

    def chosen(stopwatch, problem):
        now.seconds += 1
        now.chosen.append(problem.m)
        if problem.m == 13:
            raise torch.OutOfMemoryError
        return None if problem.m == 7 else Tuned("00" * 64, 0, problem.m, 2 * problem.m)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "Products", lambda device: FakeProducts([]))
    monkeypatch.setattr(tune, "Stopwatch", FakeStopwatch)
    monkeypatch.setattr(tune, "choose", chosen)
    monkeypatch.setattr(tune.time, "monotonic", lambda: now.seconds)
    return now


def wanted(*tokens: int) -> list[Problem]:
    return [ASKED._replace(m=m) for m in tokens]


def test_measured_once(gpu, cache):
    """What a build has measured, the next one takes from the cache; an engine's table holds its own products."""
    advanced: list[int] = []
    first = measured(wanted(100, 200, 7), advanced.append)
    assert sum(advanced) == 3 and [problem.m for problem in first.entries] == [100, 200]
    second = measured(wanted(200, 300))
    assert gpu.chosen == [100, 200, 7, 300]
    assert second.entries[ASKED._replace(m=200)] == first.entries[ASKED._replace(m=200)]
    assert [problem.m for problem in second.entries] == [200, 300]
    (file,) = cache.iterdir()
    assert len(Table.read(file).entries) == 3 and file.name == f"NVIDIA-H100-130100-{tune.METHOD}.json"


def test_time_is_bounded(gpu):
    found = measured(wanted(*range(100, 150)))
    assert len(found.entries) == 20 and list(found.entries) == wanted(*range(100, 120))
    assert list(measured(wanted(*range(100, 150))).entries) == wanted(*range(100, 140)), "the next build goes on"


def test_too_little_memory_for_one_product(gpu):
    assert list(measured(wanted(13, 14)).entries) == wanted(14)


@pytest.mark.parametrize("content", ["", "{", Table(1, "NVIDIA H100", {ASKED: Tuned("00", 0, 1, 1)}).text])
def test_damaged_cache_counts_for_nothing(gpu, cache, content):
    cache.mkdir(parents=True)
    (cache / f"NVIDIA-H100-130100-{tune.METHOD}.json").write_text(content)
    assert measured(wanted(128)).entries[ASKED].us == 128


def test_cache_that_can_not_be_written(gpu, cache):
    cache.parent.parent.write_text("a file")
    assert len(measured(wanted(128)).entries) == 1


# Where.


def small(**changes) -> BuildSettings:
    limits = {"max_batch_size": 1, "max_num_tokens": 128, "max_seq_len": 128, "kv_block_size": 16}
    return BuildSettings(**{"gpu": "h100-sxm", **limits, **changes})


@pytest.mark.parametrize("here", ["cpu", "h100-sxm", "h200"])
def test_engine_has_a_table_if_it_is_built_where_it_runs(write_checkpoint, tmp_path, monkeypatch, here):
    row = table().get(here)
    present = Target("cuda" if row else "cpu", here, row, 80 << 30)
    monkeypatch.setattr(tune, "resolve", lambda name: {"auto": present}[name])
    monkeypatch.setattr(
        tune, "measured", lambda wanted, advance: Table(1, here, dict.fromkeys(wanted, Tuned("00" * 64, 0, 1, 1)))
    )
    monkeypatch.setattr("trtx.builder.cuda.backend.compile_kernels", lambda *args: args[2].mkdir(parents=True))
    source = write_checkpoint(spec_of(TINY)).path
    blueprint = prepare(source, small())
    assert is_here(blueprint.sizing.target) == (here == "h100-sxm")
    build(source, tmp_path / "engine", small())
    file = tmp_path / "engine" / "rank0" / "kernels" / TABLE
    assert file.exists() == (here == "h100-sxm")
    if file.exists():
        assert list(Table.read(file).entries) == problems(blueprint.sizing, blueprint.store)
