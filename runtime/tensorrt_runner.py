"""Runs an engine of a TensorRT backend: slots instead of blocks, behind the same seam.

`TensorRTRunner` turns a batch into the network's inputs and logits into tokens; what stands between is a `Plan`, on the
GPU or, in tests, an interpreter of the network.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trtx.builder.engine import Engine, EngineConfig
from trtx.builder.tensorrt.caches import RuntimeCache
from trtx.builder.tensorrt.library import FLAVORS, load, messages, refusal
from trtx.builder.tensorrt.plan import LOGITS, Bounds, cache_names, profiles
from trtx.converters.errors import MismatchError, UnsupportedError
from trtx.quantize.formats import DTYPES
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.runner import PlainRunner, device_of, differences, require_memory
from trtx.runtime.sampler import Row, Sampled, sample
from trtx.runtime.slots import slot_inputs


class Plan(Protocol):
    """What computes a step and keeps the KV caches."""

    def run(self, inputs: dict[str, Tensor], profile: int) -> Tensor:
        """Logits [R, V] of a step, fp32; `profile` is the index of the optimization profile to run it with."""
        ...


class TensorRTRunner(PlainRunner):
    """Drives a plan; see `runtime.runner.Runner`."""

    def __init__(self, config: EngineConfig, plan: Plan, notes: Sequence[str] = ()) -> None:
        spec, limits = config.model.spec, config.limits
        self.notes = list(notes)
        itemsize = DTYPES[config.compute_dtype].itemsize
        sizes = spec.num_layers, limits.max_seq_len, spec.num_kv_heads, spec.head_dim, itemsize
        self.layout = KVLayout.linear(*sizes)
        self._plan = plan
        self._profiles = profiles(bounds_of(config))

    @torch.inference_mode()
    def run(self, batch: Sequence[SequenceSlice], rows: Sequence[Row]) -> list[Sampled]:
        inputs = slot_inputs(batch)
        longest = inputs["query_index"].shape[1]
        profile = next(index for index, known in enumerate(self._profiles) if longest <= known.tokens)
        logits = self._plan.run(inputs, profile)
        return sample(logits, rows) if rows else []


def bounds_of(config: EngineConfig) -> Bounds:
    """What the engine was built for."""
    limits = config.limits
    return Bounds(limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len)


def open_runner(engine: Engine, device: str | None) -> TensorRTRunner:
    """The runner of an engine on this machine's GPU.

    Raises:
        UnsupportedError: the engine is for several GPUs.
        MissingPackageError: the TensorRT module is not installed.
        MismatchError: the engine was built for another compute capability or by another TensorRT, or there is no GPU.
        DoesNotFitError: the GPU has less memory free than the engine's ledger asks for.
    """
    config = engine.config
    if config.mapping.ranks > 1:
        raise UnsupportedError(
            f"{engine.path}: built for {config.mapping.ranks} GPUs; this version builds such engines, and runs none.",
            "Build it for one GPU: trtx build without --gpus and --tp.",
        )
    load(FLAVORS[config.backend])
    target = device_of(engine, device)
    _require_match(engine, target)
    require_memory(engine, target)
    return TensorRTRunner(config, GpuPlan(engine, target), differences(engine, target))


def _require_match(engine: Engine, device: torch.device) -> None:
    flavor = FLAVORS[engine.config.backend]
    made, here = engine.config.fingerprint, load(flavor).__version__
    sm = ".".join(map(str, torch.cuda.get_device_capability(device)))
    again = f"Build it again here: trtx build CKPT OUT --backend {flavor.backend} --gpu auto"
    if made.sm != sm:
        raise MismatchError(f"{engine.path}: built for compute capability {made.sm}; {device} has {sm}.", again)
    if made.versions.get(flavor.module) != here:
        raise MismatchError(
            f"{engine.path}: built by {flavor.module} {made.versions.get(flavor.module)}; {here} is installed, and a "
            "plan runs with the version that built it.",
            again,
        )


def kept_kernels(engine: Engine, gpu: str) -> RuntimeCache | None:
    """What was compiled for a plan when it ran before, on a GPU of that name; None where plans hold all they need."""
    flavor = FLAVORS[engine.config.backend]
    if not hasattr(load(flavor), "IRuntimeCache"):
        return None
    name = str(engine.plan.relative_to(engine.path))
    return RuntimeCache(flavor, gpu, engine.manifest.files[name]["xxh3"])


def layers_of(engine: Engine, device: str | None = None) -> list[str]:
    """What TensorRT made of the network: a line for each layer of rank 0's plan.

    Raises:
        MissingPackageError, MismatchError: the plan can't be loaded on this machine.
    """
    flavor = FLAVORS[engine.config.backend]
    trt = load(flavor)
    target = device_of(engine, device)
    _require_match(engine, target)
    with torch.cuda.device(target):
        runtime = trt.Runtime(messages(flavor).logger)
        plan = _deserialized(engine, runtime)
        inspector = plan.create_engine_inspector()
        form = trt.LayerInformationFormat.ONELINE
        return [inspector.get_layer_information(index, form).strip() for index in range(plan.num_layers)]


def _deserialized(engine: Engine, runtime: Any) -> Any:
    """Rank 0's plan as an `ICudaEngine`."""
    said = messages(FLAVORS[engine.config.backend])
    said.take()
    plan = runtime.deserialize_cuda_engine(engine.plan.read_bytes())
    if plan is None:
        raise refusal(f"to load {engine.plan}", said.take())
    return plan


class GpuPlan:
    """A plan on a GPU: one engine, a context for each profile, caches bound in place.

    Not run yet on any GPU: TensorRT for RTX refuses the one that was to be had.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        config = engine.config
        spec, limits = config.model.spec, config.limits
        flavor = FLAVORS[config.backend]
        trt, said = load(flavor), messages(flavor)
        self._device, self._vocab = device, spec.vocab_size
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(said.logger)
            self._engine = _deserialized(engine, self._runtime)
            kept = kept_kernels(engine, torch.cuda.get_device_name(device))
            self._contexts = [self._context(index, kept) for index in range(len(profiles(bounds_of(config))))]
        if kept is not None:
            self._kept = kept  # behind the contexts: attributes go in their order
            weakref.finalize(self, kept.save)  # before they go, or when Python ends
        shape = (limits.max_batch_size, spec.num_kv_heads, limits.max_seq_len, spec.head_dim)
        dtype = DTYPES[config.compute_dtype]
        pairs = [pair for layer in range(spec.num_layers) for pair in cache_names(layer)]
        self._caches = {pair: torch.zeros(shape, dtype=dtype, device=device) for pair in pairs}
        self._said = said

    def _context(self, profile: int, kept: RuntimeCache | None) -> Any:
        if kept is None:
            context = self._engine.create_execution_context()
        else:
            runtime = self._engine.create_runtime_config()
            kept.attach(runtime)
            context = self._engine.create_execution_context(runtime)
        context.set_optimization_profile_async(profile, torch.cuda.current_stream(self._device).cuda_stream)
        return context

    def run(self, inputs: dict[str, Tensor], profile: int) -> Tensor:
        context, stream = self._contexts[profile], torch.cuda.current_stream(self._device)
        slots = len(inputs["written"])
        held = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        for (before, after), cache in self._caches.items():
            context.set_input_shape(before, (slots, *cache.shape[1:]))
            context.set_tensor_address(before, cache.data_ptr())
            context.set_tensor_address(after, cache.data_ptr())
        logits = torch.empty(len(inputs["rows"]), self._vocab, dtype=torch.float32, device=self._device)
        context.set_tensor_address(LOGITS, logits.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise refusal("to run a step", self._said.take())
        stream.synchronize()
        return logits
