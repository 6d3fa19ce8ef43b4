"""Checkpoints published in MXFP4 and block fp8: their weights, bit for bit as transformers dequantizes them on the CPU.

The files are written by hand: transformers 5.17 saves a model that it dequantized from MXFP4 under wrong names. Its fp8
takes blocks of rows / scale rows, which is the stored block only if that divides the rows: ragged blocks are compared
with the formula.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trtx.converters import sources
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import check, convert
from trtx.converters.errors import InputError, TrtxError, UnsupportedError
from trtx.converters.huggingface import FolderSource, HubHeaders
from trtx.converters.prequantized import PrequantizedSource, dequantized
from trtx.converters.sources import open_source

from . import tiny

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [4, 4]}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def saved(variant: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, in bf16, and the config of a tiny model."""
    model = tiny.randomize(tiny.of(tiny.VARIANTS[variant]), seed=3, gain=1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())


def mxfp4(folder: Path) -> Path:
    """gpt-oss as it is published: experts in MXFP4, the rest in bf16."""
    tensors, config = saved("gpt_oss-wide", folder)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = tensors.pop(name).shape
        shape = (experts, out, into // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(100, 150, shape, generator=generator, dtype=torch.uint8)
    return write(folder, tensors, {**config, "quantization_config": MXFP4})


def fp8(
    folder: Path,
    scale: torch.dtype = torch.float32,
    suffix: str = "weight_scale_inv",
    block: tuple[int, int] | None = (4, 4),
    **settings: Any,
) -> Path:
    """DeepSeek V3 as it is published: linears in fp8, an expert a tensor, the rest in bf16."""
    tensors, config = saved("deepseek_v3", folder)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name, tensor in tensors.items() if is_linear(name, tensor)]:
        tensors[name] = tensors[name].float().clamp(-400, 400).to(torch.float8_e4m3fn)
        grid = [n // b for n, b in zip(tensors[name].shape, block, strict=True)] if block else []
        scales = torch.rand(grid, generator=generator) + 0.01
        tensors[name.removesuffix("weight") + suffix] = exponents(scales) if scale == torch.uint8 else scales.to(scale)
        if settings.get("activation_scheme") == "static":
            tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    quantization = {**FP8, "weight_block_size": block, **settings}
    return write(folder, tensors, {**config, "quantization_config": quantization})


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and ("self_attn" in name or "mlp" in name) and not name.endswith("mlp.gate.weight")


def exponents(scales: Tensor) -> Tensor:
    return (scales.log2().round() + 127).to(torch.uint8)


def edit_tensors(folder: Path, drop: str = "", **tensors: Tensor) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop(drop, None)
    save_file({**state, **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def edit_quantization(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    opened = Checkpoint(checkpoint)
    return {name: opened.tensor(name) for name in opened.shards}


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (mxfp4, {}),
        (fp8, {}),
        (fp8, {"scale": torch.bfloat16}),
        (fp8, {"scale": torch.uint8, "scale_fmt": "ue8m0"}),
        (fp8, {"suffix": "scale"}),
        (fp8, {"block": (4, 2)}),
        (fp8, {"block": None}),
        (fp8, {"block": None, "activation_scheme": "static"}),
    ],
)
def test_converts_to_what_transformers_dequantizes(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = kind(tmp_path / "hf", **settings)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    state = {name: tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in state.values())
    convert(str(write(tmp_path / "plain", state, config)), tmp_path / "expected")
    result = convert(str(folder), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert result.report.dtype == "bf16"
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_mxfp4_tensors_have_the_names_and_layout_of_the_unquantized_checkpoint(tmp_path: Path) -> None:
    folder = mxfp4(tmp_path)
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    source = open_source(str(folder))
    assert set(source.headers) == set(state) - {"lm_head.weight"}
    for name, header in source.headers.items():
        assert (header.dtype, header.shape) == (torch.bfloat16, tuple(state[name].shape)), name
        assert torch.equal(source.tensor(name), state[name]), name
    for expert in (2, 0, 3):
        assert torch.equal(source.tensor(EXPERTS, expert), state[EXPERTS][expert])


def test_every_mxfp4_code(tmp_path: Path) -> None:
    """All pairs of nibbles, and every exponent with which 6 is finite in bf16."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 253, 16, 16)
    exponents = torch.arange(253, dtype=torch.uint8).reshape(1, 253, 1).expand(1, 253, 16)
    tensors = {"w_blocks": blocks, "w_scales": exponents}
    source = open_source(str(write(tmp_path, tensors, {"quantization_config": MXFP4})))
    nibbles = [VALUES[nibble] for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    expected = torch.tensor([[math.ldexp(value, code - 127) for code in range(253)] for value in nibbles])
    found = source.tensor("w", 0)
    assert torch.equal(found.float(), expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("shape", [(10, 7), (12, 4), (3, 2), (9, 9)])
def test_ragged_fp8_blocks(shape: tuple[int, int], tmp_path: Path) -> None:
    """The last block of rows or columns may be short; each weight has the scale of its index // block."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 8), -(-columns // 3), generator=generator)
    config = {"quantization_config": {**FP8, "weight_block_size": [8, 3]}}
    source = open_source(str(write(tmp_path, {"w.weight": weight, "w.weight_scale_inv": scales}, config)))
    factors = torch.tensor([[scales[r // 8, c // 3].item() for c in range(columns)] for r in range(rows)])
    assert torch.equal(source.tensor("w.weight"), (weight.float() * factors).bfloat16())


def test_blocks_of_128_where_the_config_names_none(tmp_path: Path) -> None:
    weight = torch.ones(130, 129).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {"w.weight": weight, "w.weight_scale_inv": scales}
    source = open_source(str(write(tmp_path, tensors, {"quantization_config": {"quant_method": "fp8"}})))
    corners = source.tensor("w.weight")[[127, 127, 128, 128], [127, 128, 127, 128]]
    assert corners.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_e8m0_scales(tmp_path: Path) -> None:
    """As .bin files may hold them."""
    codes = torch.tensor([[0, 100], [127, 200]], dtype=torch.uint8)
    weight = torch.full((8, 8), 1.5).to(torch.float8_e4m3fn)
    config = {"quantization_config": {**FP8, "scale_fmt": "ue8m0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {"w.weight": weight, "w.weight_scale_inv": codes.view(torch.float8_e8m0fnu)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = open_source(str(tmp_path)).tensor("w.weight")
    assert found[::4, ::4].tolist() == [[1.5 * 2.0 ** (code - 127) for code in row] for row in codes.tolist()]


class Spy(FolderSource):
    """A folder that notes what is asked of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[str, int | None]] = []

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        self.asked.append((name, index))
        return super().tensor(name, index)


def test_an_expert_is_dequantized_once_and_alone(tmp_path: Path) -> None:
    spy = Spy(mxfp4(tmp_path))
    source = dequantized(spy)
    for _ in ("gate", "up"):
        source.tensor(EXPERTS, 3)
    assert spy.asked == [(f"{EXPERTS}_blocks", 3), (f"{EXPERTS}_scales", 3)]


@pytest.mark.parametrize(
    ("kind", "described"),
    [(mxfp4, {"method": "mxfp4"}), (fp8, {"method": "fp8", "weight_block_size": [4, 4]})],
)
def test_provenance_says_what_was_dequantized(kind: Any, described: dict[str, Any], tmp_path: Path) -> None:
    folder = kind(tmp_path / "hf")
    convert(str(folder), tmp_path / "out")
    provenance = Checkpoint(tmp_path / "out").config.provenance
    assert provenance == {"kind": "folder", "path": str(folder), "dequantized": described}


@pytest.mark.parametrize("kind", [mxfp4, fp8])
def test_headers_are_enough_for_a_check(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the hub, where no value is fetched."""
    folder = kind(tmp_path)
    opened = open_source(str(folder))
    remote = HubHeaders(
        folder / "config.json", FolderSource(folder).headers, {"kind": "hub", "id": "org/model", "revision": "0"}
    )
    assert isinstance(opened, PrequantizedSource)
    assert dict(dequantized(remote).headers) == dict(opened.headers)
    monkeypatch.setattr(sources, "open_hub", lambda *arguments: remote)
    for source in (str(folder), "org/model"):
        report = check(source)
        assert (report.converts, report.dtype, report.ignored, report.notes) == (True, "bf16", (), ())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

Q = "model.layers.0.self_attn.o_proj.weight"
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("kind", "drop", "add", "error", "words"),
    [
        (mxfp4, f"{EXPERTS}_scales", {}, InputError, [f"'{EXPERTS}_scales' is missing"]),
        (mxfp4, f"{EXPERTS}_blocks", {}, InputError, [f"'{EXPERTS}_blocks' is missing"]),
        (mxfp4, "", {EXPERTS: ONE}, InputError, [f"'{EXPERTS}' is stored beside"]),
        (mxfp4, "", {f"{EXPERTS}_scales": torch.ones(4, 64, 3, dtype=torch.uint8)}, InputError, ["[4, 64, 2]"]),
        (mxfp4, "", {f"{EXPERTS}_blocks": torch.ones(4, 64, 2, dtype=torch.uint8)}, InputError, ["groups, 16"]),
        (mxfp4, "", {f"{EXPERTS}_scales": torch.ones(4, 64, 2)}, UnsupportedError, ["float32", "uint8"]),
        (mxfp4, "", {f"{EXPERTS}_scales": torch.full((4, 64, 2), 255).byte()}, InputError, [EXPERTS, "NaN"]),
        (fp8, f"{Q}_scale_inv", {}, InputError, [f"{Q!r} is float8_e4m3fn and has no scale"]),
        (fp8, Q, {}, InputError, [f"{Q!r} is missing"]),
        (fp8, "", {Q.replace("weight", "scale"): ONE}, InputError, [f"{Q!r} has two scales"]),
        (fp8, "", {f"{Q}_scale_inv": torch.ones(5, 8)}, InputError, ["[5, 8]", "[8, 10]"]),
        (fp8, "", {f"{Q}_scale_inv": torch.tensor(1.0)}, InputError, ["[]", "[8, 10]"]),
        (fp8, "", {f"{Q}_scale_inv": torch.full((8, 10), math.nan)}, InputError, [Q, "NaN"]),
        (fp8, "", {f"{Q}_scale_inv": torch.ones(8, 10, dtype=torch.int32)}, UnsupportedError, ["int32"]),
        (fp8, "", {Q: torch.ones(32, 40, dtype=torch.int8)}, UnsupportedError, [Q, "int8", "float8_e4m3fn"]),
        (fp8, "", {Q: torch.ones(32).to(torch.float8_e4m3fn)}, InputError, [Q, "two dimensions"]),
        (fp8, "", {Q.replace("weight", "activation_scale"): ONE}, InputError, ["activation_scale"]),
    ],
)
def test_damage_is_named(
    kind: Any, drop: str, add: dict[str, Tensor], error: type[TrtxError], words: list[str], tmp_path: Path
) -> None:
    edit_tensors(kind(tmp_path / "hf"), drop, **add)
    with pytest.raises(error) as caught:
        convert(str(tmp_path / "hf"), tmp_path / "out")
    assert all(word in caught.value.cause for word in words), caught.value.cause
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "error", "words"),
    [
        (mxfp4, {"group_size": 32}, UnsupportedError, ["'group_size' (32)", "mxfp4"]),
        (mxfp4, {"modules_to_not_convert": "lm_head"}, InputError, ["modules_to_not_convert", "a list of strings"]),
        (fp8, {"kv_cache_scheme": {}}, UnsupportedError, ["'kv_cache_scheme'", "fp8"]),
        (fp8, {"fmt": "e5m2"}, UnsupportedError, ["'fmt' is 'e5m2'"]),
        (fp8, {"activation_scheme": "block"}, UnsupportedError, ["'activation_scheme' is 'block'"]),
        (fp8, {"scale_fmt": "e3m4"}, UnsupportedError, ["'scale_fmt' is 'e3m4'"]),
        (fp8, {"weight_block_size": [128]}, InputError, ["weight_block_size", "two positive numbers"]),
        (fp8, {"weight_block_size": [0, 4]}, InputError, ["weight_block_size", "two positive numbers"]),
        (fp8, {"weight_block_size": 128}, InputError, ["weight_block_size"]),
        *(
            (kind, {"quant_method": method}, UnsupportedError, [method, "quantized already"])
            for kind in (mxfp4, fp8)
            for method in ("awq", "gptq", "bitsandbytes", "compressed-tensors", "modelopt", "MXFP4")
        ),
    ],
)
def test_other_settings_are_refused(
    kind: Any, settings: dict[str, Any], error: type[TrtxError], words: list[str], tmp_path: Path
) -> None:
    edit_quantization(kind(tmp_path), **settings)
    with pytest.raises(error) as caught:
        check(str(tmp_path))
    assert all(word in caught.value.cause for word in words), caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(("kind", "other"), [(mxfp4, FP8), (fp8, MXFP4)])
def test_the_config_and_the_tensors_must_agree(kind: Any, other: dict[str, Any], tmp_path: Path) -> None:
    folder = kind(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
    with pytest.raises(InputError, match="no tensor is stored that way"):
        check(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# An index without weights


def outline(folder: Path) -> Path:
    """Leave of the weights what an index tells."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (mxfp4, {}),
        (fp8, {}),
        (fp8, {"scale": torch.bfloat16}),
        (fp8, {"scale": torch.uint8}),
        (fp8, {"block": None, "activation_scheme": "static"}),
    ],
)
def test_an_index_is_checked_to_the_byte(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    report = check(str(outline(kind(tmp_path, **settings))))
    assert (report.converts, report.seen, report.dtype) == (True, "names", "bf16"), report.problems
    assert report.provenance["dequantized"]["method"] == kind.__name__
    path = tmp_path / f"{WEIGHTS}.index.json"
    content = json.loads(path.read_text())
    content["metadata"]["total_size"] += 1
    path.write_text(json.dumps(content))
    (problem,) = check(str(tmp_path)).problems
    assert "no choice of dtypes explains" in problem


@pytest.mark.parametrize(("kind", "name"), [(mxfp4, f"{EXPERTS}_scales"), (fp8, Q)])
def test_a_part_is_missing_in_the_index(kind: Any, name: str, tmp_path: Path) -> None:
    edit_tensors(kind(tmp_path), name)
    with pytest.raises(InputError, match=rf"index.json: tensor .* is stored, but '{name}' is missing"):
        check(str(outline(tmp_path)))
