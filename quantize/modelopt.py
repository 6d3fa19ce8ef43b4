"""Calibration and packing by NVIDIA ModelOpt (0.47), on the decoder of `trtx.quantize.calibrate`.

ModelOpt finds the scales (`mtq.quantize`) and rounds and packs the weights (the functions of its unified export). Its
presets are not used: their lists of layers to leave out go by other models' names and would silently skip
'layers.I.mlp.gate'. What is quantized is what the calibration model watches, all of it.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from trtx.converters.errors import InputError
from trtx.converters.spec import Module
from trtx.quantize.calibrate import Attention, CalibrationModel
from trtx.quantize.formats import Quantization, Stored

log = logging.getLogger(__name__)


class _Log(io.TextIOBase):
    """A text stream whose lines become log messages."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info(text.strip())
        return len(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints on stdout and warns of what is none of a trtx user's business."""
    with redirect_stdout(_Log()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with _quiet():
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import quant_utils as export
    from modelopt.torch.quantization.nn import TensorQuantizer

SMOOTHQUANT_ALPHA = 0.8
"""How much of the activations' range moves into the weights (SmoothQuant, section 4: 0.5, more for models with larger
outliers). Gated MLPs have them: on SmolLM2-135M the perplexity rises by 20% at 0.5, 5% at 0.8 and 12% at 1."""

_PASSES = {"int4_awq": 2}
"""How often an algorithm reads the calibration text, where that is more than once."""


class _QuantAttention(Attention):
    """Attention with quantizers on keys and values: an fp8 KV cache, as ModelOpt sees it."""

    def _setup(self) -> None:
        self.k_bmm_quantizer = TensorQuantizer()
        self.v_bmm_quantizer = TensorQuantizer()

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        return super().forward(queries, self.k_bmm_quantizer(keys), self.v_bmm_quantizer(values), mask, scale)


mtq.register(original_cls=Attention, quantized_cls=_QuantAttention)


def passes(quantization: Quantization) -> int:
    """How often `calibrate` reads its batches."""
    return _PASSES.get(quantization.format, 1)


def calibrate(
    model: CalibrationModel,
    quantization: Quantization,
    batches: Sequence[Tensor],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Calibrate `model` in place; from then on it computes what ModelOpt's fake quantization does.

    Linears that read one input (q, k, v; gate, up) share their pre_quant_scale, their input_scale and, where a format
    has one scale for the whole weight, that, so that an engine can fuse them.

    Args:
        batches: token ids [B, S] each.
        advance: called with 1 after each batch, `passes` × len(batches) times.

    Raises:
        InputError: a linear saw no input, or one that is not finite.
    """

    def read(_: nn.Module) -> None:
        for batch in batches:
            model.observe(batch)
            advance(1)

    with _quiet(), torch.no_grad(), model.watching() as used:
        mtq.quantize(model.tree, _config(quantization), read)
        if unused := sorted(model.watched - used):
            raise InputError(
                f"{unused[0]}: saw no input during calibration.", f"Leave it unquantized: --exclude '{unused[0]}'."
            )
        for linears in model.sharing_input():
            export.preprocess_linear_fusion(linears)


class Packer:
    """The tensors that a calibrated model stores. The last linear packed is kept, so ask for its tensors in a row."""

    def __init__(self, model: CalibrationModel, quantization: Quantization, dtype: torch.dtype) -> None:
        self._model = model
        self._quantization = quantization
        self._dtype = dtype
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, module: Module, suffix: str) -> Tensor:
        """One of the tensors that a quantized linear's format stores, on the CPU.

        Raises:
            InputError: calibration found no positive, finite scale.
        """
        if self._last[0] != module.name:
            stored = self._quantization.stored(module, self._dtype)
            self._last = module.name, _pack(self._model.linear(module.name), stored, module.name)
        return self._last[1][suffix]

    def kv_scale(self, layer: int, which: str) -> Tensor:
        """The 'k_scale' or 'v_scale' of a layer: the largest magnitude that was seen / 448; fp32, [], on the CPU."""
        quantizer = getattr(self._model.ops.attentions[layer], f"{which[0]}_bmm_quantizer")
        return export.get_scaling_factor(quantizer).reshape(()).cpu()


def _pack(linear: nn.Linear, stored: dict[str, Stored], name: str) -> dict[str, Tensor]:
    with _quiet(), torch.no_grad():
        kind = export.get_quantization_format(linear)
        scale, scale_2 = export.get_weight_scaling_factor(linear), export.get_weight_scaling_factor_2(linear)
        block_size = export.get_weight_block_size(linear)
        found = {
            "weight": export.to_quantized_weight(linear.weight, scale, kind, scale_2, block_size),
            "weight_scale": scale,
            "weight_scale_2": scale_2,
            "input_scale": export.get_activation_scaling_factor(linear),
            "pre_quant_scale": export.get_prequant_scaling_factor(linear),
        }
    packed = {}
    for suffix, meaning in stored.items():
        if suffix in found:
            tensor = found[suffix]
            if suffix != "weight" and not _positive(tensor):
                raise InputError(
                    f"{name}: calibration found no usable {suffix}.",
                    f"Calibrate on more text, or leave it unquantized: --exclude '{name}'.",
                )
            packed[suffix] = tensor.detach().reshape(meaning.shape).cpu()
    return packed


def _positive(scale: Tensor | None) -> bool:
    return scale is not None and bool((torch.isfinite(scale.float()) & (scale.float() > 0)).all())


def _config(quantization: Quantization) -> dict[str, Any]:
    """ModelOpt's configuration: the quantizers of weights, inputs and the KV cache, and the algorithm."""
    fp8 = {"num_bits": (4, 3), "axis": None}
    fp8_rows = {**fp8, "axis": 0}
    fp8_tokens = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
    int8 = {"num_bits": 8, "axis": None}
    int4 = {"num_bits": 4, "block_sizes": {-1: quantization.group_size, "type": "static"}}
    nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    smoothquant = {"method": "smoothquant", "alpha": SMOOTHQUANT_ALPHA}
    awq = {"method": "awq_lite", "alpha_step": 0.1}

    weights, inputs, algorithm = {
        "none": (None, None, "max"),
        "fp8": (fp8, fp8, "max"),
        "fp8_wo": (fp8_rows, None, "max"),
        "fp8_pc_pt": (fp8_rows, fp8_tokens, "max"),
        "int8_sq": ({**int8, "axis": 0}, int8, smoothquant),
        "int4_awq": (int4, None, awq),
        "nvfp4": (nvfp4, nvfp4, "max"),
    }[quantization.format]
    kv_cache = fp8 if quantization.kv_cache == "fp8" else None

    quantizers = {"*weight_quantizer": weights, "*input_quantizer": inputs, "*[kv]_bmm_quantizer": kv_cache}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": name, "cfg": cfg} for name, cfg in quantizers.items() if cfg is not None]
    return {"quant_cfg": entries, "algorithm": algorithm}
