"""What is kept between runs, and the GPU side of a plan: with stand-ins for TensorRT's objects and for the GPU."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("tensorrt_rtx")

from tests.converters import tiny
from tests.converters.families import dense
from tests.tensorrt.models import RTX
from tests.tensorrt.test_build import settings
from trtx.builder.build import build
from trtx.builder.engine import Engine
from trtx.builder.tensorrt import caches
from trtx.builder.tensorrt.caches import RuntimeCache, TimingCache
from trtx.builder.tensorrt.library import FLAVORS
from trtx.builder.tensorrt.network import Network
from trtx.builder.tensorrt.plan import LOGITS
from trtx.converters.errors import UnsupportedError
from trtx.runtime import tensorrt_runner
from trtx.runtime.tensorrt_runner import GpuPlan, layers_of

GPU = "NVIDIA GeForce RTX 5090"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trtx" / "tensorrt"


class Timings:
    """An `ITimingCache`."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class BuilderConfig:
    """The part of an `IBuilderConfig` that caches use; timings of another GPU begin with 'other'."""

    def __init__(self) -> None:
        self.timings: Timings | None = None

    def create_timing_cache(self, content: bytes) -> Timings | None:
        return None if content.startswith(b"damaged") else Timings(content)

    def set_timing_cache(self, timings: Timings, ignore_mismatch: bool) -> bool:
        if timings.content.startswith(b"other") and not ignore_mismatch:
            return False
        self.timings = timings
        return True


def after_a_build(cache: TimingCache, learned: bytes) -> bytes:
    """What the build was given."""
    config = BuilderConfig()
    cache.attach(config)
    assert config.timings is not None
    given = config.timings.content
    config.timings.content += learned
    cache.save()
    return given


def test_timings_go_from_build_to_build(home):
    assert after_a_build(TimingCache(RTX, GPU), b"one ") == b""
    assert after_a_build(TimingCache(RTX, GPU), b"two ") == b"one "
    assert after_a_build(TimingCache(RTX, "another GPU"), b"three") == b""
    assert {path.read_bytes() for path in home.iterdir()} == {b"one two ", b"three"}, "no temporary file is left"


@pytest.mark.parametrize("content", [b"damaged", b"other GPU's"])
def test_timings_that_do_not_fit_are_replaced(content):
    cache = TimingCache(RTX, GPU)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_bytes(content)
    assert after_a_build(cache, b"new") == b""
    assert cache.path.read_bytes() == b"new"


def test_a_version_has_its_own(monkeypatch):
    before = TimingCache(RTX, GPU).path
    monkeypatch.setattr(caches, "load", lambda flavor: SimpleNamespace(__version__="99.0"))
    after = TimingCache(RTX, GPU).path
    assert before != after and "99.0" in after.name and "NVIDIA_GeForce_RTX_5090" in after.name


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert after_a_build(TimingCache(RTX, GPU), b"one") == b""
    assert after_a_build(TimingCache(RTX, GPU), b"one") == b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorrt_rtx has the calls and measures nothing
def test_tensorrt_has_these_calls():
    cache = TimingCache(RTX, GPU)
    cache.attach(Network(RTX).builder.create_builder_config())
    cache.save()
    assert cache.path.stat().st_size > 0


def test_only_tensorrt_measures(monkeypatch):
    """And only the GPU that is here."""
    from trtx.builder.tensorrt import backend

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.TensorRTBackend(RTX)._timings() is None
    monkeypatch.setattr(backend, "targets", lambda flavor: [])
    monkeypatch.setattr(caches, "load", lambda flavor: SimpleNamespace(__version__="11.4"))
    timings = backend.TensorRTBackend(FLAVORS["tensorrt"])._timings()
    assert timings is not None and timings.path.name == "timing-tensorrt-11.4-NVIDIA_GeForce_RTX_5090.bin"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.TensorRTBackend(FLAVORS["tensorrt"])._timings() is None


class Kernels:
    """An `IRuntimeCache`."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        fits = not content.startswith(b"damaged")
        self.content = content if fits else b""
        return fits

    def serialize(self) -> bytes:
        return self.content


class Machine:
    """A GPU with tensorrt_rtx: contexts fill their logits with 7 and compile a kernel at their first step."""

    IRuntimeCache = Kernels
    __version__ = "1.7"
    LayerInformationFormat = SimpleNamespace(ONELINE="oneline")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.loads = True
        self.given: list[bytes] = []
        self.num_layers = 2

    def Runtime(self, logger: Any) -> Machine:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Machine | None:
        return self if self.loads else None

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(create_runtime_cache=Kernels, kernels=None, set_runtime_cache=self._set)

    def _set(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.given.append(kernels.content)

    def create_execution_context(self, config: Any) -> Any:
        return Context(self.kernels)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_layer_information=lambda index, form: f"layer {index} {form}\n")


class Context:
    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert self.addresses["keys.0"] == self.addresses["new_keys.0"], "caches are bound in place"
        assert self.addresses.keys() - self.shapes.keys() == {LOGITS, "new_keys.0", "new_values.0"}
        self.kernels.content += f"kernel of profile {self.profile}. ".encode()
        return True


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    model = tiny.of(dense.llama(num_hidden_layers=1, head_dim=16))
    build(tiny.checkpoint_of(tiny.randomize(model, 0, 1.0), folder), folder / "engine", settings())
    return Engine(folder / "engine")


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """The CPU plays the GPU."""
    found = Machine()
    for module in (tensorrt_runner, caches):
        monkeypatch.setattr(module, "load", lambda flavor: found)
    said = SimpleNamespace(logger=None, take=lambda: ["it is broken"])
    monkeypatch.setattr(tensorrt_runner, "messages", lambda flavor: said)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    return found


def steps(engine: Engine) -> None:
    """A plan's life: a prefill, a decode step, the end."""
    plan = GpuPlan(engine, torch.device("cpu"))
    inputs = {name: torch.zeros(1, dtype=torch.int32) for name in ("token_ids", "rows", "written")}
    for profile in (1, 0):
        assert plan.run(inputs, profile).shape == (1, 96)
    del plan
    gc.collect()


def test_kernels_go_from_run_to_run(engine, machine, home):
    """Saved when the plan goes; one cache for both contexts; the next run begins with it."""
    steps(engine)
    (path,) = home.iterdir()
    assert engine.manifest.files["rank0/model.plan"]["xxh3"] in path.name
    assert path.read_bytes() == b"kernel of profile 1. kernel of profile 0. "
    steps(engine)
    assert machine.given == [b"", b"", path.read_bytes()[:42], path.read_bytes()[:42]]


def test_kernels_that_do_not_fit_are_replaced(engine, machine):
    kept = tensorrt_runner.kept_kernels(engine, GPU)
    assert isinstance(kept, RuntimeCache)
    kept.path.parent.mkdir(parents=True)
    kept.path.write_bytes(b"damaged")
    steps(engine)
    assert kept.path.read_bytes().startswith(b"kernel of profile 1.")


def test_tensorrt_itself_compiles_nothing_at_run_time(engine, machine, monkeypatch):
    monkeypatch.delattr(Machine, "IRuntimeCache")
    assert tensorrt_runner.kept_kernels(engine, GPU) is None


def test_layers(engine, machine, monkeypatch):
    monkeypatch.setattr(tensorrt_runner, "device_of", lambda engine, device: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_runner, "_require_match", lambda engine, device: None)
    assert layers_of(engine) == ["layer 0 oneline", "layer 1 oneline"]
    machine.loads = False
    with pytest.raises(UnsupportedError, match="it is broken"):
        layers_of(engine)
