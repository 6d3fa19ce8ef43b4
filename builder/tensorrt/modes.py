"""Which weight format and compute dtype the TensorRT backends build for which GPU, and why not.

TensorRT-RTX 1.7 compiles for a GPU that isn't there, so each of its verdicts was built, yes and no, except that INT8
for Turing builds too and is refused because NVIDIA's support matrix has no INT8 products there. Verdicts for
`tensorrt` follow NVIDIA's documentation and were not tried. What a GPU makes of the engines was not seen for either.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtx.builder.tensorrt.library import Flavor
from trtx.converters.errors import UnsupportedError
from trtx.quantize.formats import FORMATS

TARGETS = {
    "tensorrt": ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
    "tensorrt-rtx": ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
}
"""Compute capabilities by backend."""

_FP8_ATTENTION = "fp8 attention"
_INT8 = "8.0", "INT8 products need an Ampere GPU or newer"
_INT4 = "8.0", "INT4 weights need an Ampere GPU or newer"
_FP8 = "8.9", "FP8 needs an Ada GPU or newer"
_FP4 = "10.0", "FP4 needs a Blackwell GPU"
_SINCE = {
    "fp16": ("7.5", "TensorRT needs a Turing GPU or newer"),
    "bf16": ("8.0", "bf16 needs an Ampere GPU or newer"),
    "none": ("7.5", "TensorRT needs a Turing GPU or newer"),
    "int8_wo": _INT8, "int8_sq": _INT8, "int4_awq": _INT4,
    "fp8": _FP8, "fp8_wo": _FP8, "fp8_pc_pt": _FP8, "mxfp8": _FP8, "w4a8_awq": _FP8,
    "nvfp4": _FP4, "nvfp4_wo": _FP4, "mxfp4": _FP4,
    _FP8_ATTENTION: _FP8,
}  # fmt: skip
"""By compute dtype, format or 'fp8 attention': the first compute capability that has it, and why older ones don't."""

_DTYPES = ("fp32", "fp16", "bf16")
_CACHE = "TensorRT's cache update takes no 8-bit types"


@dataclass(frozen=True)
class Mode:
    """A row of the table.

    Attributes:
        name: of a compute dtype, a weight format, 'fp8 attention' or 'fp8 KV cache'.
        refusals: why not, by compute capability; '' where it builds.
    """

    name: str
    refusals: dict[str, str]


def require(flavor: Flavor, sm: str, form: str, dtype: str, kv_dtype: str, fp8_attention: bool = False) -> None:
    """Make sure that TensorRT can build a model, before anything large is read.

    Args:
        sm: compute capability, '12.0'.
        form: the linears' weight format.
        dtype, kv_dtype: of computing and of the KV cache: 'fp32', 'fp16', 'bf16', and 'fp8' for the cache.

    Raises:
        UnsupportedError: it can't, with the reason.
    """
    if sm not in TARGETS[flavor.backend]:
        raise UnsupportedError(
            f"--backend {flavor.backend}: builds for GPUs of compute capability {', '.join(TARGETS[flavor.backend])}; "
            f"this one has {sm}.",
            "Use --backend torch, or another --gpu.",
        )
    wanted = {
        dtype: "Use another --dtype or --gpu.",
        form: "Use another --gpu, a checkpoint in another format, or --backend torch.",
    }
    if fp8_attention:
        wanted[_FP8_ATTENTION] = "Leave out --attention fp8, or use another --gpu."
    for what, hint in wanted.items():
        if reason := refusal_of(flavor, sm, what):
            name = f"format {what}" if what in FORMATS else what
            raise UnsupportedError(f"--backend {flavor.backend}: {name} on compute capability {sm}: {reason}.", hint)
    if kv_dtype != dtype:
        reason = _CACHE if kv_dtype == "fp8" else "keys and values stay in the compute dtype"
        raise UnsupportedError(
            f"--backend {flavor.backend}: a KV cache in {kv_dtype} with {dtype}: {reason}.",
            f"Use --kv-cache-dtype {dtype}, or --backend torch.",
        )


def refusal_of(flavor: Flavor, sm: str, mode: str) -> str:
    """Why a GPU has no such compute dtype, format or 'fp8 attention'; '' where it has."""
    if mode == "fp32":
        is_turing = flavor.backend == "tensorrt-rtx" and sm == "7.5"
        return "TensorRT-RTX has no fp32 products for Turing" if is_turing else ""
    since, reason = _SINCE[mode]
    return "" if float(sm) >= float(since) else reason


def table(flavor: Flavor) -> list[Mode]:
    """All compute dtypes, formats and attention in FP8 on all GPUs."""
    targets = TARGETS[flavor.backend]
    modes = [*_DTYPES, *(name for name in FORMATS if name != "none"), _FP8_ATTENTION]
    rows = [Mode(mode, {sm: refusal_of(flavor, sm, mode) for sm in targets}) for mode in modes]
    return [*rows, Mode("fp8 KV cache", dict.fromkeys(targets, _CACHE))]


def markdown(flavor: Flavor) -> str:
    """The table as Markdown."""
    targets = TARGETS[flavor.backend]
    lines = [[f"`{flavor.backend}`", *targets, "where not"], ["---"] * (2 + len(targets))]
    for mode in table(flavor):
        reasons = dict.fromkeys(reason for reason in mode.refusals.values() if reason)
        lines.append([mode.name, *("–" if mode.refusals[sm] else "✔" for sm in targets), "; ".join(reasons)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
