"""`trtx build`: from a checkpoint to an engine for one kind of GPU.

`prepare` decides everything and writes nothing: the device, the backend, the parallel plan, the memory ledger. `write`
streams the weights into kernel layout, tensor by tensor. `build` does both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trtx import __version__
from trtx.builder.backend import Backend, choose_backend
from trtx.builder.cost import ITEMSIZE
from trtx.builder.engine import EngineConfig, Fingerprint, Limits, ParallelMapping
from trtx.builder.gpus import Target, cpu_flags, native_dtypes, resolve
from trtx.builder.ledger import Ledger
from trtx.builder.planner import Plan, Workload, pick, plan, plans
from trtx.builder.sizing import Sizing
from trtx.converters.artifact import create, identify
from trtx.converters.checkpoint import TOKENIZER_FILES, Checkpoint, CheckpointConfig
from trtx.converters.convert import Progress, silent
from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.families import find_family
from trtx.converters.random_weights import RandomSource
from trtx.converters.shards import Entry, write_shards
from trtx.converters.sources import RANDOM
from trtx.converters.spec import Kind, ModelSpec, Module
from trtx.quantize.formats import DTYPES, Quantization
from trtx.quantize.weight import fusable
from trtx.runtime.kv_layout import BLOCK_SIZES
from trtx.runtime.weights import WeightStore, fused_groups

DEFAULT_BATCH = {"cpu": 8, "cuda": 64}
DEFAULT_TOKENS = 2048
DEFAULT_LENGTH = 8192
DEFAULT_ISL, DEFAULT_OSL = 1024, 256

MATH_UNITS = {
    "fp8": "fp8", "fp8_pc_pt": "fp8", "int8_sq": "int8", "nvfp4": "fp4", "mxfp8": "fp8", "w4a8_awq": "fp8",
}  # fmt: skip
"""The units that multiply a weight format as it is; the others are dequantized on every GPU."""


@dataclass(frozen=True)
class BuildSettings:
    """The options of `trtx build`. None: chosen from the model and the device.

    Attributes:
        gpu: 'auto', 'cpu' or a name of the GPU table.
        gpus, tp, pp: ranks; all None is one. With `tp` or `pp` given the planner has no choice.
        dtype: to compute in; 'auto': the checkpoint's.
        kv_cache_dtype: 'auto': fp8 where the checkpoint has scales for it, else `dtype`.
        attention: what attention multiplies in; 'auto': `dtype`, or 'fp8'.
        memory_fraction: the part of the device's memory that the engine may take.
        kv_cache_memory: the most bytes for the KV cache.
        isl, osl: prompt and output tokens of the workload that plans are rated for.
        seed, random_format: of random weights.
    """

    backend: str = "auto"
    gpu: str = "auto"
    gpus: int | None = None
    tp: int | None = None
    pp: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    kv_block_size: int = 32
    kv_cache_dtype: str = "auto"
    attention: str = "auto"
    dtype: str = "auto"
    memory_fraction: float = 0.9
    kv_cache_memory: int | None = None
    isl: int | None = None
    osl: int | None = None
    seed: int = 0
    random_format: str = "none"


@dataclass(frozen=True)
class Blueprint:
    """An engine that is decided on and not written yet.

    Attributes:
        checkpoint: where the weights are; None for random weights, which an engine does not store.
        random: the source of random weights.
        plans: every plan that was considered; `chosen` is one of them.
        notes: what the user should know about the decisions.
    """

    settings: BuildSettings
    backend: Backend
    sizing: Sizing
    workload: Workload
    plans: list[Plan]
    chosen: Plan
    checkpoint: Checkpoint | None = None
    random: RandomSource | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        """The memory of the fullest rank."""
        return cast(Ledger, self.chosen.ledger)

    @property
    def identity(self) -> dict[str, Any]:
        """Of the source, for the manifest."""
        if self.random is not None:
            return self.random.identity
        assert self.checkpoint is not None
        return identify(self.checkpoint.path)

    @property
    def store(self) -> WeightStore:
        """The weights, stored or drawn."""
        if self.checkpoint is not None:
            return WeightStore.of_checkpoint(self.checkpoint)
        return WeightStore.of_seed(self.sizing.model, self.settings.seed, torch.device("cpu"))

    @cached_property
    def entries(self) -> list[Entry]:
        """The tensors of the engine, in the order in which the runtime loads them; none for random weights."""
        if self.checkpoint is None:
            return []
        return list(_entries(WeightStore.of_checkpoint(self.checkpoint), self.backend, self.sizing))

    def config(self) -> EngineConfig:
        """The `engine.json` that `write` would write."""
        sizing = self.sizing
        return EngineConfig(
            backend=cast(Any, self.backend.name),
            model=sizing.model,
            compute_dtype=cast(Any, sizing.compute_dtype),
            limits=Limits(
                max_batch_size=sizing.max_batch_size,
                max_num_tokens=sizing.max_num_tokens,
                max_seq_len=sizing.max_seq_len,
                kv_block_size=sizing.kv_block_size,
                kv_blocks=self.ledger.kv_blocks,
                kv_dtype=cast(Any, sizing.kv_dtype),
            ),
            mapping=sizing.mapping,
            fingerprint=_fingerprint(sizing.target, self.backend),
            ledger=self.ledger.rows,
            random_seed=None if self.random is None or self.backend.compiles else self.settings.seed,
        )


def build(
    source: Path | str,
    out: Path,
    settings: BuildSettings | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> EngineConfig:
    """Build an engine from a checkpoint folder or from 'random:CONFIG.json'; see `prepare` and `write`."""
    blueprint = prepare(source, settings or BuildSettings())
    write(blueprint, out, force=force, progress=progress)
    return blueprint.config()


def prepare(source: Path | str, settings: BuildSettings) -> Blueprint:
    """Decide on an engine; reads headers only.

    Raises:
        InputError: no checkpoint, or settings that contradict each other or the model.
        UnsupportedError: an unknown GPU or backend, or a model that can't be split over so many GPUs.
        DoesNotFitError: too little memory; says which settings would fit.
    """
    checkpoint, random = None, None
    if str(source).startswith(RANDOM):
        random = RandomSource(Path(str(source).removeprefix(RANDOM)), settings.seed)
        model = _random_model(random, settings)
    else:
        checkpoint = Checkpoint(source)
        model = checkpoint.config
    target = resolve(settings.gpu)
    backend = choose_backend(settings.backend, target.device)
    notes = [target.warning] if target.warning else []
    sizing = _size(model, target, settings, notes)
    if sizing.fp8_attention and not backend.fp8_attention:
        raise UnsupportedError(
            f"--attention fp8: the {backend.name} backend has no attention in FP8.",
            "Leave it out, or use --backend tensorrt or tensorrt-rtx.",
        )
    sizing = backend.fit(sizing)
    workload = _workload(sizing, settings)
    candidates = _candidates(sizing, backend, settings, workload)
    chosen = pick(candidates, sizing, backend)
    sizing = replace(sizing, mapping=chosen.mapping)
    notes += _remarks(sizing, backend)
    return Blueprint(settings, backend, sizing, workload, candidates, chosen, checkpoint, random, notes)


def write(
    blueprint: Blueprint,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
    kernel_progress: Progress = silent,
    tuning_progress: Progress = silent,
) -> list[str]:
    """Write the engine's directory, whole or not at all.

    Args:
        progress: shows the bytes written.
        kernel_progress, tuning_progress: show the kernels compiled and the products measured, if the backend has any.

    Returns:
        Warnings about tokenizer files that could not be written.

    Raises:
        UnsupportedError: the plan has more than one rank, and the backend builds for one.
        OutputError: `out` exists (without `force`) or can't be written.
    """
    mapping = blueprint.sizing.mapping
    if mapping.ranks > 1 and not blueprint.backend.compiles:
        raise UnsupportedError(
            f"tp {mapping.tp} × pp {mapping.pp}: this version runs engines of one GPU only.",
            "Plan with --plan-only, or build for one GPU.",
        )
    config = blueprint.config()
    with create(
        out,
        kind="engine",
        command="build",
        settings=asdict(blueprint.settings),
        inputs=[blueprint.identity],
        versions=config.fingerprint.versions,
        force=force,
    ) as draft:
        config.write(draft)
        if blueprint.backend.compiles:
            with progress(2 * blueprint.sizing.model.bytes) as advance:
                blueprint.backend.compile(blueprint.store, blueprint.sizing, draft, advance)
        stored = None if blueprint.random is not None else blueprint.store
        blueprint.backend.add_kernels(stored, blueprint.sizing, draft, kernel_progress, tuning_progress)
        if blueprint.random is not None:
            return blueprint.random.write_tokenizer(draft)
        assert blueprint.checkpoint is not None
        draft.copy(blueprint.checkpoint.path, TOKENIZER_FILES)
        if blueprint.backend.compiles:
            return []
        with progress(sum(entry.bytes for entry in blueprint.entries)) as advance:
            write_shards(draft, blueprint.entries, stem="weights", folder="rank0", advance=advance)
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Decisions


def _random_model(source: RandomSource, settings: BuildSettings) -> CheckpointConfig:
    spec = find_family(source.config, source.config_name).spec(source.config, source.config_name)
    quantization = Quantization(settings.random_format)
    linears = [module for module in spec.modules() if quantization.format_of(module).name != "none"]
    sizes = [quantization.format_of(module).group_size(module.shape[1]) for module in linears]
    quantization = replace(quantization, group_size=min(sizes, default=0))
    return CheckpointConfig(spec, cast(Any, source.default_dtype), quantization, source.provenance)


def _size(model: CheckpointConfig, target: Target, settings: BuildSettings, notes: list[str]) -> Sizing:
    compute = _compute_dtype(model, target, settings, notes)
    length = _given(settings.max_seq_len, min(model.spec.max_positions, DEFAULT_LENGTH))
    batch = _given(settings.max_batch_size, DEFAULT_BATCH[target.device])
    sizing = Sizing(
        model=model,
        target=target,
        compute_dtype=compute,
        kv_dtype=_kv_dtype(model, compute, settings, notes),
        max_batch_size=batch,
        max_num_tokens=_given(settings.max_num_tokens, max(batch, min(DEFAULT_TOKENS, batch * length))),
        max_seq_len=length,
        kv_block_size=settings.kv_block_size,
        fp8_attention=_fp8_attention(model, settings, notes),
        memory_fraction=settings.memory_fraction,
        kv_cache_memory=settings.kv_cache_memory,
    )
    _check(sizing)
    return sizing


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _check(sizing: Sizing) -> None:
    sizes = {
        "--max-batch-size": sizing.max_batch_size,
        "--max-num-tokens": sizing.max_num_tokens,
        "--max-seq-len": sizing.max_seq_len,
    }
    for option, value in sizes.items():
        if value < 1:
            raise InputError(f"{option} is {value}.", "Give at least 1.")
    limit = sizing.model.spec.max_positions
    if sizing.max_seq_len > limit:
        raise InputError(
            f"--max-seq-len {sizing.max_seq_len}: the model was made for sequences of at most {limit} tokens.",
            f"Give at most {limit}.",
        )
    if sizing.max_num_tokens < sizing.max_batch_size:
        raise InputError(
            f"--max-num-tokens {sizing.max_num_tokens} is less than --max-batch-size {sizing.max_batch_size}: "
            "a step has to take one token of every sequence.",
            f"Give --max-num-tokens {sizing.max_batch_size} or more.",
        )
    if sizing.kv_block_size not in BLOCK_SIZES:
        raise InputError(
            f"--kv-block-size is {sizing.kv_block_size}.", f"Give one of {', '.join(map(str, BLOCK_SIZES))}."
        )
    if not 0 < sizing.memory_fraction <= 1:
        raise InputError(f"--memory-fraction is {sizing.memory_fraction}.", "Give a number above 0 and at most 1.")


def _compute_dtype(model: CheckpointConfig, target: Target, settings: BuildSettings, notes: list[str]) -> str:
    """The checkpoint's dtype, but fp32 on a CPU that has no instructions for it."""
    if settings.dtype != "auto":
        return _known("--dtype", settings.dtype, tuple(DTYPES))
    if target.device == "cuda" or model.dtype == "fp32" or model.dtype in native_dtypes(cpu_flags()):
        return model.dtype
    notes.append(f"This CPU has no {model.dtype} instructions: computing in fp32 (--dtype {model.dtype} overrides it).")
    return "fp32"


def _kv_dtype(model: CheckpointConfig, compute: str, settings: BuildSettings, notes: list[str]) -> str:
    calibrated = model.quantization.kv_cache == "fp8"
    if settings.kv_cache_dtype == "auto":
        return "fp8" if calibrated else compute
    kv_dtype = _known("--kv-cache-dtype", settings.kv_cache_dtype, tuple(d for d in ITEMSIZE if d != "int8"))
    if kv_dtype == "fp8" and model.spec.latent:
        raise UnsupportedError(
            "--kv-cache-dtype fp8: the model caches latents (MLA), which have no fp8 form in trtx.",
            "Leave it out: a latent cache is small as it is.",
        )
    if kv_dtype == "fp8" and not calibrated:
        notes.append(
            "The checkpoint has no scales for an fp8 KV cache: 1.0 is used, which cuts keys and values above 448. "
            "`trtx quantize --kv-cache fp8` calibrates them."
        )
    return kv_dtype


def _fp8_attention(model: CheckpointConfig, settings: BuildSettings, notes: list[str]) -> bool:
    if settings.attention == "auto":
        return False
    _known("--attention", settings.attention, ("fp8",))
    if model.quantization.kv_cache != "fp8":
        notes.append(
            "The checkpoint has no scales for attention in FP8: 1.0 is used, which cuts keys and values above 448. "
            "`trtx quantize --kv-cache fp8` calibrates them."
        )
    return True


def _known(option: str, value: str, values: tuple[str, ...]) -> str:
    if value not in values:
        raise InputError(f"{option} is {value!r}.", f"Give auto, {', '.join(values)}.")
    return value


def _workload(sizing: Sizing, settings: BuildSettings) -> Workload:
    """What plans are rated for; the default is cut to the engine's length."""
    isl = _given(settings.isl, min(DEFAULT_ISL, max(1, sizing.max_seq_len * 3 // 4)))
    osl = _given(settings.osl, max(1, min(DEFAULT_OSL, sizing.max_seq_len - isl)))
    if min(isl, osl) < 1:
        raise InputError(f"--isl is {isl} and --osl is {osl}.", "Give at least 1 for each.")
    if isl + osl > sizing.max_seq_len:
        raise InputError(
            f"--isl {isl} and --osl {osl} make {isl + osl} tokens, more than --max-seq-len {sizing.max_seq_len}.",
            "Give smaller ones, or a larger --max-seq-len.",
        )
    return Workload(isl, osl)


def _candidates(sizing: Sizing, backend: Backend, settings: BuildSettings, workload: Workload) -> list[Plan]:
    tp, pp = _given(settings.tp, 1), _given(settings.pp, 1)
    fixed = settings.tp is not None or settings.pp is not None
    gpus = _given(settings.gpus, tp * pp)
    if min(tp, pp, gpus) < 1:
        raise InputError("--gpus, --tp and --pp have to be at least 1.", "Give positive numbers.")
    if fixed and gpus != tp * pp:
        raise InputError(
            f"--tp {tp} and --pp {pp} make {tp * pp} ranks, not the {gpus} of --gpus.", f"Give --gpus {tp * pp}."
        )
    if gpus > 1 and sizing.target.device == "cpu":
        raise UnsupportedError("A CPU engine has one rank.", "Name a GPU with --gpu to plan for several.")
    if fixed:
        return [plan(replace(sizing, mapping=ParallelMapping(tp, pp)), backend, workload)]
    return plans(sizing, backend, gpus, workload)


def _remarks(sizing: Sizing, backend: Backend) -> Iterator[str]:
    form, ranks = sizing.model.quantization.format, sizing.mapping.ranks
    if ranks > 1 and backend.compiles:
        yield f"This version builds engines for {ranks} GPUs and does not run them."
    if form != "none" and backend.name == "torch":
        gpu, unit = sizing.target.gpu, MATH_UNITS.get(form)
        lacking = f"{gpu.name} has no {unit} units, and " if gpu and unit and unit not in gpu.tflops else ""
        yield (
            f"{lacking}the torch backend dequantizes {form} weights to {sizing.compute_dtype} when it loads them: "
            f"results are those of {form}, memory and speed those of {sizing.compute_dtype}."
        )
    if backend.name == "cuda" and "nvrtc" not in backend.versions():
        yield "Without NVRTC 12.8 or newer, kernels for few tokens are slower ones (pip install nvidia-cuda-nvrtc)."


def _fingerprint(target: Target, backend: Backend) -> Fingerprint:
    versions = {"trtx": __version__, "torch": torch.__version__, **backend.versions()}
    if target.device == "cuda" and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return Fingerprint(target.device, target.name, target.gpu.sm if target.gpu else "", versions)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _entries(store: WeightStore, backend: Backend, sizing: Sizing) -> Iterator[Entry]:
    """The engine's tensors: those of the checkpoint, linears that read one input fused where that changes nothing."""
    spec = store.config.spec
    for module in spec.modules():
        if module.kind is not Kind.LINEAR:
            yield from joined(store, module.name, [module])
    for name, modules in fused_groups(store.config):
        if fusable([store.linear(module) for module in modules], store.stored(modules[0])):
            yield from backend.linear_entries(store, name, modules, sizing)
        else:
            for module in modules:
                yield from backend.linear_entries(store, module.name, [module], sizing)
    if sizing.kv_dtype == "fp8":
        yield from _kv_scales(store, spec)


def joined(store: WeightStore, name: str, modules: list[Module]) -> Iterator[Entry]:
    """The entries of modules joined along their outputs; nothing is read before an entry's turn comes."""
    for suffix, meaning in store.stored(modules[0]).items():
        joined = modules if meaning.rows else modules[:1]
        heights = [store.stored(module)[suffix].shape[:1] for module in joined]
        shape = (sum(height for (height,) in heights), *meaning.shape[1:]) if meaning.rows else meaning.shape
        names = [f"{module.name}.{suffix}" for module in joined]
        yield Entry(f"{name}.{suffix}", meaning.dtype, shape, partial(_read, store, names))


def _read(store: WeightStore, names: list[str]) -> Tensor:
    tensors = [store.tensor(name) for name in names]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _kv_scales(store: WeightStore, spec: ModelSpec) -> Iterator[Entry]:
    """Scales of the fp8 KV cache, f32 []; 1.0 where the checkpoint has none."""
    for layer in range(spec.num_layers):
        for which in ("k_scale", "v_scale"):
            name = f"layers.{layer}.attn.{which}"
            produce = partial(store.tensor, name) if store.has(name) else partial(torch.ones, ())
            yield Entry(name, torch.float32, (), produce)
