"""Random weights from a seed: the same tensor for the same name and seed, whatever else is made before it.

For benchmarks without a download. On one kind of device the values repeat exactly; CPU and CUDA generators differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trtx.converters.artifact import Draft, identify
from trtx.converters.checkpoint import Dtype
from trtx.converters.families import find_family
from trtx.converters.hf_config import read_json_object
from trtx.converters.prequantized import unquantized
from trtx.converters.shards import Header
from trtx.converters.spec import Module
from trtx.converters.tokenizer_files import copy_tokenizer
from trtx.quantize.formats import DTYPES, Quantization

STD = 0.02
"""Standard deviation of weights and biases: the usual `initializer_range`."""

NORM_STD = 0.1

_LARGEST_INPUT = 8.0
"""The largest input that the scales of random quantized linears reach."""

_CONFIG_DTYPES: dict[str, Dtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The random tensor that stands under a canonical name.

    Args:
        name: canonical tensor name ('layers.0.attn.q.weight'); with `seed` it seeds the generator (XXH3-64).
        shape: of the result.
        dtype: a floating-point dtype.

    Returns:
        Normal values with a standard deviation of 0.02; for a norm's weight, 1 + 0.1 × normal.
    """
    generator = torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()))
    is_norm = name.endswith("norm.weight")
    mean, std = (1.0, NORM_STD) if is_norm else (0.0, STD)
    return torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator)


def random_module(
    module: Module, quantization: Quantization, dtype: torch.dtype, seed: int, device: torch.device | str
) -> dict[str, Tensor]:
    """What a checkpoint would store for a module with random weights, by suffix.

    A quantized weight is a random one, packed. Scales of a whole tensor are constants, so that linears can be fused;
    those of inputs suit values of about 1.
    """
    stored, form = quantization.stored(module, dtype), quantization.format_of(module)

    def draw(suffix: str, as_dtype: torch.dtype) -> Tensor:
        return random_tensor(f"{module.name}.{suffix}", stored[suffix].shape, as_dtype, seed, device)

    if form.name == "none":
        return {suffix: draw(suffix, tensor.dtype) for suffix, tensor in stored.items()}
    name = f"{module.name}.weight"
    packed = form.pack(random_tensor(name, module.shape, dtype, seed, device), quantization.group_size)
    tensors = {}
    for suffix, tensor in stored.items():
        if suffix == "bias":
            tensors[suffix] = draw(suffix, tensor.dtype)
        elif suffix in packed and tensor.shape:
            tensors[suffix] = packed[suffix]
        elif suffix == "pre_quant_scale":
            tensors[suffix] = torch.ones(tensor.shape, device=device)
        else:
            largest = {"int8_sq": 127.0, "nvfp4": 2688.0, "nvfp4_wo": 2688.0}.get(form.name, 448.0)
            reach = _LARGEST_INPUT if suffix == "input_scale" else 5 * STD
            tensors[suffix] = torch.tensor(reach / largest, device=device)
    return tensors


class RandomSource:
    """A model of a given config.json whose weights are drawn from a seed; see `trtx.converters.sources.Source`."""

    canonical: bool = True
    default_dtype: Dtype | None
    config: Mapping[str, Any]
    headers: Mapping[str, Header]

    def __init__(self, config_path: Path, seed: int) -> None:
        self.config_name = str(config_path)
        self.config = unquantized(read_json_object(config_path), self.config_name)
        named = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        self.default_dtype = dtype_name = _CONFIG_DTYPES.get(named, "bf16")
        self.provenance = {"kind": "random", "config": self.config_name, "seed": seed}
        self.identity = {**identify(config_path), "seed": seed}
        self._seed = seed
        spec = find_family(self.config, self.config_name).spec(self.config, self.config_name)
        dtype = DTYPES[dtype_name]
        self.headers = {
            f"{module.name}.{suffix}": Header(stored.dtype, stored.shape, config_path)
            for module in spec.modules()
            for suffix, stored in Quantization().stored(module, dtype).items()
        }

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        assert index is None, "canonical tensors are never stacked"
        header = self.headers[name]
        return random_tensor(name, header.shape, header.dtype, self._seed)

    def write_tokenizer(self, draft: Draft) -> list[str]:
        return copy_tokenizer(Path(self.config_name).parent, draft, self.config)
