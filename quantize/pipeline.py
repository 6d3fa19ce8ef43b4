"""`trtx quantize`: calibrate, write, read back, compare, decide.

What is judged is what was written: the draft is opened again before it is put in place, and one that fails its gate is
dropped. Memory: the weights in fp32 (4 bytes a parameter) while calibrating and writing, near 7 for AWQ; packed tensors
go to the disk one linear at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trtx.converters.artifact import Draft, create, identify, refuse_target
from trtx.converters.checkpoint import TOKENIZER_FILES, Checkpoint, CheckpointConfig
from trtx.converters.errors import InputError, QualityError, UnsupportedError
from trtx.converters.shards import Entry, write_shards
from trtx.converters.spec import Kind, ModelSpec, Module
from trtx.quantize.calibrate import CalibrationModel
from trtx.quantize.corpus import CALIBRATION, EVALUATION, Corpus, random_corpus, read_corpus, same_content
from trtx.quantize.formats import DTYPES, FORMATS, Format, Quantization
from trtx.quantize.quality import Comparison, compare
from trtx.runtime.weights import WeightStore

QUALITY = "quality.json"
MAX_PPL_INCREASE = {
    "none": 2.0, "fp8": 5.0, "fp8_wo": 5.0, "fp8_pc_pt": 5.0, "int8_sq": 10.0, "int4_awq": 25.0, "nvfp4": 25.0,
}  # fmt: skip
"""The formats that `quantize` makes, and the gate where none is given: the most that the perplexity may rise, in
percent. Set so that all of fp8 and int8_sq pass on SmolLM2-135M, the hardest model tried."""

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""Given what is done, how much of it there is and its unit, a context that yields `advance(count)`."""


@dataclass(frozen=True)
class QuantizeSettings:
    """What to quantize to, and on what to calibrate and judge it.

    Attributes:
        format: of the linears; one of `MAX_PPL_INCREASE`. 'none' with an fp8 KV cache quantizes that alone.
        kv_cache: 'none' or 'fp8'.
        excluded: canonical names (glob patterns) of linears that stay as they are.
        calib_data, eval_data: text or JSONL files; None: the texts that come with trtx.
        calib_samples, calib_length: how many windows of how many tokens to calibrate on.
        eval_samples, eval_length: the same for the evaluation.
        batch_size: windows in one step.
        max_ppl_increase: the gate, in percent; None: the format's in `MAX_PPL_INCREASE`.
        device: 'auto', 'cpu' or 'cuda'.
    """

    format: str
    kv_cache: Literal["none", "fp8"] = "none"
    excluded: tuple[str, ...] = ("lm_head",)
    calib_data: Path | None = None
    calib_samples: int = 16
    calib_length: int = 256
    eval_data: Path | None = None
    eval_samples: int = 8
    eval_length: int = 256
    batch_size: int = 8
    max_ppl_increase: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.format not in MAX_PPL_INCREASE:
            raise InputError(f"Unknown format {self.format!r}.", f"Use one of {', '.join(MAX_PPL_INCREASE)}.")
        if not math.isfinite(self.gate):
            raise InputError(f"max_ppl_increase is {self.gate}.", "Give a number of percent.")

    @property
    def gate(self) -> float:
        """The most that the perplexity may rise, in percent."""
        return MAX_PPL_INCREASE[self.format] if self.max_ppl_increase is None else self.max_ppl_increase

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        paths = {name: str(path) for name in ("calib_data", "eval_data") if (path := getattr(self, name))}
        return {**asdict(self), **paths}


@dataclass(frozen=True)
class QualityReport:
    """The content of `quality.json`.

    Attributes:
        calibration, evaluation: text, windows and their length.
        source_bytes, bytes: of the tensors of either checkpoint.
        max_ppl_increase: the gate, in percent.
        random_weights: whether the model's weights are random, so that the figures say nothing of accuracy.
    """

    quantization: Quantization
    comparison: Comparison
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    source_bytes: int
    bytes: int
    max_ppl_increase: float
    random_weights: bool

    @property
    def passed(self) -> bool:
        return self.comparison.ppl_increase <= self.max_ppl_increase

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), **self.comparison.to_json(), "passed": self.passed}


class GateError(QualityError):
    """A quantized checkpoint that failed its gate; `report` says how."""

    def __init__(self, report: QualityReport, out: Path, kept: bool) -> None:
        found = report.comparison
        super().__init__(
            f"{out}: perplexity rose by {found.ppl_increase:.2f}% ({found.source_perplexity:.3f} → "
            f"{found.perplexity:.3f}); the gate is {report.max_ppl_increase:g}%. "
            f"{'It was kept.' if kept else 'Nothing was kept.'}",
            f"Exclude the worst layers (--exclude 'layers.{found.worst_layers(1)[0][0]}.*'), take another --format, "
            "calibrate on more text, or allow more with --max-ppl-increase.",
        )
        self.report = report


@contextmanager
def _silent(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def quantize(
    checkpoint: Path,
    out: Path,
    settings: QuantizeSettings,
    *,
    force: bool = False,
    keep: bool = False,
    progress: Progress = _silent,
) -> QualityReport:
    """Quantize a checkpoint to `out`, and compare what was written with the source.

    Args:
        checkpoint: unquantized.
        force: replace `out` if it is a trtx directory.
        keep: keep a checkpoint that fails its gate; the error is raised all the same.

    Raises:
        GateError: the perplexity rose by more than the gate allows.
        InputError: the checkpoint or a text can't be used, or calibration found no usable scale.
        UnsupportedError: the format does not fit the model's shapes, or the device is not there.
        OutputError: `out` exists or can't be written.
    """
    refuse_target(out, force)
    source = Checkpoint(checkpoint)
    quantization = plan(source, settings)
    config = source.config.with_quantization(quantization)
    device = _device(settings.device)
    calibration, evaluation = _corpora(source, settings)
    # Seconds to import, so after the checks. And not where the model is: ModelOpt keeps tracebacks of optional imports
    # that failed, and they keep the importing function's variables alive.
    import trtx.quantize.modelopt  # noqa: F401

    with create(
        out,
        kind="checkpoint",
        command="quantize",
        settings=settings.to_json(),
        inputs=[identify(path) for path in (checkpoint, settings.calib_data, settings.eval_data) if path],
        versions={name: version(name) for name in ("torch", "nvidia-modelopt")},
        force=force,
    ) as draft:
        config.write(draft)
        draft.copy(source.path, TOKENIZER_FILES)
        _write_tensors(draft, source, config, calibration.batches(settings.batch_size), device, progress)
        written = Checkpoint(draft.path, draft=True)
        batches = evaluation.batches(settings.batch_size)
        with progress("Comparing with the source", len(batches), "batches") as advance:
            comparison = compare(source, written, batches, device, advance)
        report = QualityReport(
            quantization=quantization,
            comparison=comparison,
            calibration=calibration.to_json(),
            evaluation=evaluation.to_json(),
            source_bytes=source.config.bytes,
            bytes=config.bytes,
            max_ppl_increase=settings.gate,
            random_weights=_is_random(source),
        )
        draft.write_json(QUALITY, report.to_json())
        draft.describe(ppl_increase_percent=round(comparison.ppl_increase, 3))
        if not report.passed and not keep:
            raise GateError(report, out, kept=False)
    if not report.passed:
        raise GateError(report, out, kept=True)
    return report


def plan(source: Checkpoint, settings: QuantizeSettings) -> Quantization:
    """Which linears get which format, and the group size: the largest that divides every quantized linear's inputs.

    Raises:
        InputError: `source` is quantized already, a pattern of `excluded` matches nothing, or nothing is left.
        UnsupportedError: a linear's shape does not fit the format, or the KV cache of latents can't be quantized.
    """
    if source.quantization != Quantization():
        done = source.quantization
        raise InputError(
            f"{source.path}: is quantized already ({done.format}, KV cache {done.kv_cache}).",
            "Give the unquantized checkpoint that it was made from.",
        )
    if settings.kv_cache == "fp8" and source.spec.latent:
        raise UnsupportedError(
            f"{source.path}: its KV cache holds latents (MLA), which have no fp8 form in trtx.",
            "Leave out --kv-cache fp8: a latent cache is small as it is.",
        )
    chosen = Quantization(settings.format, kv_cache=settings.kv_cache, excluded=settings.excluded)
    linears = [module for module in source.spec.modules() if module.kind is Kind.LINEAR]
    names = {module.name for module in linears} | {"lm_head"}
    for pattern in settings.excluded:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"--exclude {pattern!r} matches no linear.", "Use names like 'layers.0.attn.q' or 'layers.*.mlp.down'."
            )
    quantized = quantized_linears(source.spec, chosen)
    if not quantized and chosen.kv_cache == "none":
        raise InputError("Nothing is left to quantize.", "Choose a --format, or exclude less.")
    return replace(chosen, group_size=_group_size(FORMATS[chosen.format], quantized))


def quantized_linears(spec: ModelSpec, quantization: Quantization) -> list[Module]:
    """The linears that `quantization` quantizes."""
    return [module for module in spec.modules() if quantization.format_of(module) is not FORMATS["none"]]


def _group_size(form: Format, linears: Sequence[Module]) -> int:
    if not form.group_sizes or not linears:
        return 0
    smallest = form.group_sizes[-1]
    for module in linears:
        out, into = module.shape
        if into % smallest or out % 2:
            raise UnsupportedError(
                f"{module.name}: {form.name} can't store a weight of {out} × {into}: outputs have to be even, "
                f"inputs a multiple of {smallest}.",
                f"Use fp8 or int8_sq, or leave it unquantized: --exclude {module.name!r}.",
            )
    return form.group_size(math.gcd(*(module.shape[1] for module in linears)))


def _write_tensors(
    draft: Draft,
    source: Checkpoint,
    config: CheckpointConfig,
    batches: Sequence[Tensor],
    device: torch.device,
    progress: Progress,
) -> None:
    """Calibrate a model of `source` and write its tensors. The model is gone when this returns."""
    from trtx.quantize.modelopt import Packer, calibrate, passes

    quantization = config.quantization
    watched = [module.name for module in quantized_linears(config.spec, quantization)]
    longest = batches[0].shape[1]
    model = CalibrationModel(WeightStore.of_checkpoint(source), watched, device, longest)
    with progress(f"Calibrating {quantization.format}", passes(quantization) * len(batches), "batches") as advance:
        calibrate(model, quantization, batches, advance)
    packer = Packer(model, quantization, DTYPES[config.dtype])
    modules = {module.name: module for module in config.spec.modules()}

    def produce(name: str) -> Tensor:
        owner, _, suffix = name.rpartition(".")
        if owner not in modules:
            return packer.kv_scale(int(owner.split(".")[1]), suffix)
        if owner in model.watched and suffix != "bias":
            return packer.tensor(modules[owner], suffix)
        return source.tensor(name)

    entries = [
        Entry(name, stored.dtype, stored.shape, partial(produce, name)) for name, stored in config.expected().items()
    ]
    with progress("Writing", config.bytes, "B") as advance:
        write_shards(draft, entries, advance=advance)


def _corpora(source: Checkpoint, settings: QuantizeSettings) -> tuple[Corpus, Corpus]:
    """What to calibrate on and what to judge on: never the same text."""
    limit = source.spec.max_positions
    calibration = settings.calib_samples, min(settings.calib_length, limit)
    evaluation = settings.eval_samples, min(settings.eval_length, limit)
    files = settings.calib_data, settings.eval_data
    if not (source.path / "tokenizer.json").is_file():
        if _is_random(source) and files == (None, None):
            vocab = source.spec.vocab_size
            return random_corpus(vocab, *calibration, seed=0), random_corpus(vocab, *evaluation, seed=1)
        if None in files:
            raise InputError(
                f"{source.path}: has no tokenizer.json, so the texts that come with trtx can't be used.",
                'Give --calib-data and --eval-data as JSONL with "input_ids".',
            )
    calib_data, eval_data = settings.calib_data or CALIBRATION, settings.eval_data or EVALUATION
    corpora = read_corpus(calib_data, source, *calibration), read_corpus(eval_data, source, *evaluation)
    if same_content(calib_data, eval_data):
        raise InputError(
            f"{eval_data}: is the calibration text too, and a gate on text that was calibrated on proves nothing.",
            "Give another text to --eval-data or --calib-data.",
        )
    return corpora


def _is_random(source: Checkpoint) -> bool:
    return source.config.provenance.get("kind") == "random"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: torch sees no CUDA GPU.", "Use --device cpu; `trtx doctor` says more.")
    return torch.device(name)
