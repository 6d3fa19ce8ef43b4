"""The family table: the one place that names model families.

A family is data. Its row says which `architectures` it covers, how each field of `ModelSpec` follows from config.json
(`fields`, made of the rules in `families.rules`), and what its tensors are called (`tensors`). A new Llama-like family
is a row; it changes what differs:

    QWEN2 = LLAMA.but("qwen2", "Qwen2ForCausalLM", fields={"qkv_bias": constant(True)})

Tensor rows map a module's name in the checkpoint to its canonical name (see `trtx.converters.spec`); `*` stands for a
number and the suffix (`.weight`, `.bias`) is carried over. A checkpoint's module that holds several of ours, stacked
along its rows, maps to all of them in order; `Packed` says what is less simple:

    "model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate", "layers.*.mlp.up")
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.families.classic import CLASSICS
from trtx.converters.families.family import Family, Packed
from trtx.converters.families.gemma import GEMMAS
from trtx.converters.families.gguf import Gguf, Module
from trtx.converters.families.llama import LLAMA, LLAMAS
from trtx.converters.families.moe import MOES
from trtx.converters.hf_config import Config

FAMILIES: tuple[Family, ...] = (*LLAMAS, *GEMMAS, *MOES, *CLASSICS)

__all__ = ["FAMILIES", "LLAMA", "Family", "Gguf", "Module", "Packed", "find_family", "find_gguf_family"]


def find_family(content: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json: by its `architectures`, or by its `model_type` where that is absent.

    Raises:
        InputError: it has neither, or the two disagree.
        UnsupportedError: no row of the table covers it, or the checkpoint is quantized already.
    """
    config = Config(content, where, "a language model")
    architectures, model_type = config.texts("architectures", []), config.text("model_type", None)
    if not architectures and model_type is None:
        raise InputError(
            f"{where}: neither 'architectures' nor 'model_type' says what model this is.",
            "Give a folder with the config.json of a language model.",
        )
    if "quantization_config" in config:
        method = config.section("quantization_config").text("quant_method", "of an unnamed kind")
        raise UnsupportedError(
            f"{where}: 'quantization_config' is there ({method}): the checkpoint is quantized already.",
            "Convert the unquantized model, or one in mxfp4 or fp8, then use `trtx quantize`.",
        )
    for family in FAMILIES:
        if architectures and not set(architectures) & set(family.architectures):
            continue
        if model_type is None or model_type in family.model_types:
            return family
        if architectures:
            raise InputError(
                f"{where}: 'architectures' is {architectures} but 'model_type' is {model_type!r}.",
                "Correct the one that is wrong.",
            )
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedError(
        f"{where}: architecture {architectures[0] if architectures else model_type!r} is not supported.",
        f"Use one of: {known}.",
    )


def find_gguf_family(architecture: str, stored: Collection[str], where: str) -> tuple[Family, Gguf]:
    """The family of a GGUF file, and how it is stored there.

    Args:
        stored: the file's tensors, and the keys of the architecture's section that are not 0: they tell apart families
            that share an architecture (`Gguf.when`); of several that fit, the last is the most special.

    Raises:
        UnsupportedError: no row of the table covers it.
    """
    rows = [(family, gguf) for family in FAMILIES for gguf in family.gguf or ()]
    named = [row for row in rows if row[1].architecture == architecture]
    fitting = [row for row in named if row[1].when is None or row[1].when in stored]
    if fitting:
        return fitting[-1]
    known = ", ".join(dict.fromkeys(gguf.architecture for _, gguf in rows))
    raise UnsupportedError(f"{where}: GGUF architecture {architecture!r} is not supported.", f"Use one of: {known}.")
