"""Weight formats as layers: what they compute, and for which GPUs TensorRT compiles them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

pytest.importorskip("tensorrt_rtx")

from tests.builder.models import spec_of
from tests.tensorrt.interpreter import evaluate
from tests.tensorrt.models import RTX
from trtx.builder.tensorrt.library import FLAVORS, messages
from trtx.builder.tensorrt.linears import Linear
from trtx.builder.tensorrt.modes import TARGETS, refusal_of, require, table
from trtx.builder.tensorrt.network import Network
from trtx.builder.tensorrt.plan import LOGITS, Bounds, cache_names, network, serialize
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.errors import UnsupportedError
from trtx.converters.spec import Kind, ModelSpec, Module
from trtx.quantize.formats import DTYPES, FORMATS, Format, Quantization
from trtx.quantize.weight import LinearWeight
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.slots import slot_inputs
from trtx.runtime.weights import WeightStore, load

DTYPE_BOUNDS = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}
"""What a linear may differ by in any token, relative to its largest output: twice the dtype's rounding, as the product
and the bias are rounded apart."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SPEC = spec_of(LLAMA)
BOUNDS = Bounds(max_batch_size=2, max_num_tokens=32, max_seq_len=64)


def stored(form: Format, weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """A weight in a format, as calibration on inputs of up to ±8 would leave it."""
    given = {
        "pre_quant_scale": torch.linspace(0.5, 1.5, weight.shape[1]),
        "input_scale": torch.tensor(8 / {"int8_sq": 127, "nvfp4": 6 * 448}.get(form.name, 448)),
    }
    given = {suffix: given[suffix] for suffix in form.input_tensors}
    smooth = given.get("pre_quant_scale", torch.ones(()))
    return {**form.pack(weight / smooth, group_size), **given}


def linear_weight(name: str, out: int = 48, into: int = 256) -> LinearWeight:
    """A random linear with a bias."""
    generator = torch.Generator().manual_seed(0)
    form = FORMATS[name]
    weight = torch.randn(out, into, generator=generator) / into**0.5
    tensors = stored(form, weight, form.group_size(into))
    bias = torch.randn(out, generator=generator)
    return LinearWeight("linear", form, {**tensors, "bias": bias}, (("linear", out),))


def linear_network(weight: LinearWeight, dtype: torch.dtype, into: int = 256) -> Network:
    net = Network(RTX)
    net.output(Linear(net, weight, dtype)(net.input("x", dtype, (-1, into))), "y")
    return net


def builds(net: Network, sm: str, into: int = 256) -> bool:
    """Whether TensorRT makes an engine of it."""
    trt, config = net.trt, net.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm.replace('.', '')}"), 0)
    profile = net.builder.create_optimization_profile()
    profile.set_shape("x", (1, into), (8, into), (64, into))
    config.add_optimization_profile(profile)
    plan = net.builder.build_serialized_network(net.definition, config)
    said = messages(RTX).take()
    assert plan is not None or said
    return plan is not None


def largest_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each token, relative to its largest value."""
    return (ours.float() - theirs.float()).abs().amax(-1) / theirs.float().abs().amax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_equals_the_torch_op_set(name, dtype):
    """In every token, with inputs beyond what the static scales reach and a token of zeros."""
    weight = linear_weight(name)
    x = (torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 3).to(DTYPES[dtype])
    x[0] = 0
    ops = TorchOps(SPEC, DTYPES[dtype])
    expected = ops.linear(x, ops.load_linear(weight))

    net = linear_network(weight, DTYPES[dtype])
    found = evaluate(net.definition, net.constants, {"x": x})["y"]

    assert largest_errors(found, expected).max() < DTYPE_BOUNDS[dtype]
    if dtype == "fp32" and name != "none":
        exact = x @ linear_weight("none").dense(torch.float32).T + weight.bias
        assert largest_errors(found, exact)[1:].min() > 1e-3  # the format rounds: the comparison means something


def test_codes_of_a_token_do_not_leave_what_fp16_holds():
    """256 codes of 448 make 114688; fp16 ends at 65504."""
    weight = LinearWeight("linear", FORMATS["fp8_pc_pt"], FORMATS["fp8_pc_pt"].pack(torch.ones(48, 256), 0), ())
    x = torch.ones(3, 256, dtype=torch.float16)
    net = linear_network(weight, torch.float16)
    assert torch.equal(evaluate(net.definition, net.constants, {"x": x})["y"], torch.full((3, 48), 256.0).half())


@pytest.mark.parametrize("name", FORMATS)
def test_table_of_formats_says_what_tensorrt_builds(name):
    found = {sm: builds(linear_network(linear_weight(name), torch.float16), sm) for sm in TARGETS["tensorrt-rtx"]}
    said = {sm: not refusal_of(RTX, sm, name) for sm in TARGETS["tensorrt-rtx"]}
    if name in ("int8_wo", "int8_sq"):
        assert found.pop("7.5")
        assert not said.pop("7.5")  # NVIDIA's support matrix lists none
    assert found == said


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_of_dtypes_says_what_tensorrt_builds(dtype):
    for sm in TARGETS["tensorrt-rtx"]:
        net = linear_network(linear_weight("none"), DTYPES[dtype])
        assert builds(net, sm) == (not refusal_of(RTX, sm, dtype)), sm


def test_targets_are_those_of_the_library():
    known = {name for name in dir(Network(RTX).trt.ComputeCapability) if name.startswith("SM")}
    assert {f"SM{sm.replace('.', '')}" for sm in TARGETS["tensorrt-rtx"]} == known


@pytest.mark.parametrize(
    "sm, form, dtype, kv_dtype, reason",
    [
        ("9.0", "none", "bf16", "bf16", "builds for GPUs of compute capability"),
        ("7.5", "none", "bf16", "bf16", "bf16 needs an Ampere"),
        ("7.5", "none", "fp32", "fp32", "no fp32 products for Turing"),
        ("7.5", "int4_awq", "fp16", "fp16", "INT4 weights need an Ampere"),
        ("8.6", "fp8", "bf16", "bf16", "FP8 needs an Ada"),
        ("8.9", "nvfp4", "bf16", "bf16", "FP4 needs a Blackwell"),
        ("12.0", "fp8", "bf16", "fp8", "takes no 8-bit types"),
        ("12.0", "none", "bf16", "fp16", "stay in the compute dtype"),
    ],
)
def test_require_says_why_not(sm, form, dtype, kv_dtype, reason):
    with pytest.raises(UnsupportedError, match=reason):
        require(RTX, sm, form, dtype, kv_dtype)


def test_require_lets_pass_what_the_table_has():
    for flavor in FLAVORS.values():
        rows = {row.name: row.refusals for row in table(flavor)}
        assert rows.keys() == {*DTYPES, *FORMATS, "fp8 attention", "fp8 KV cache"} - {"none"}
        for sm in TARGETS[flavor.backend]:
            for form in FORMATS.keys() - {"none"}:
                if rows[form][sm]:
                    with pytest.raises(UnsupportedError, match=rows[form][sm]):
                        require(flavor, sm, form, "fp16", "fp16")
                else:
                    require(flavor, sm, form, "fp16", "fp16")
    require(FLAVORS["tensorrt"], "9.0", "fp8", "bf16", "bf16")


def store_of(spec: ModelSpec, name: str, width: int) -> WeightStore:
    """A model with random weights in a format, whose groups divide `width`."""
    generator = torch.Generator().manual_seed(0)
    quantization = Quantization(name, FORMATS[name].group_size(width))

    def tensors_of(module: Module) -> Mapping[str, Tensor]:
        if module.kind is Kind.NORM:
            return {"weight": torch.rand(module.shape, generator=generator) + 0.5}
        scale = 1.0 if module.kind is Kind.EMBEDDING else 1.5 / module.shape[1] ** 0.5
        weight = torch.randn(module.shape, generator=generator) * scale
        return stored(quantization.format_of(module), weight, quantization.group_size)

    tensors = {f"{m.name}.{suffix}": t for m in spec.modules() for suffix, t in tensors_of(m).items()}
    return WeightStore(CheckpointConfig(spec, "fp32", quantization), tensors.__getitem__, tensors.__contains__)


def prefill(net: Network, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of every token of one sequence."""
    inputs = slot_inputs([SequenceSlice(ids.tolist(), 0, ([1],), len(ids))])
    caches = {name: torch.zeros(1, 2, 64, 32, dtype=dtype) for name, _ in cache_names(0)}
    return evaluate(net.definition, net.constants, {**inputs, **caches})[LOGITS]


@pytest.mark.parametrize("name", FORMATS)
def test_model_computes_and_builds(name):
    """In fp32 logits are those of the torch op set, but where a rounding error decides a code of an activation.

    In bf16, their distance from the torch op set in fp32 is at most 1.5 times that op set's own in bf16, in the mean
    over the tokens. Engines for both GPUs of CI, one in fp16 and one in bf16.
    """
    store = store_of(SPEC, name, 128)
    ids = torch.randint(96, (24,), generator=torch.Generator().manual_seed(3))
    theirs, ours, nets = {}, {}, {}
    for dtype in ("fp32", "bf16"):
        ops = TorchOps(SPEC, DTYPES[dtype])
        with torch.inference_mode():
            theirs[dtype] = load(store, ops).forward(ops.uncached_step(ids[None])).float()
        nets[dtype] = network(store, RTX, DTYPES[dtype], BOUNDS)
        ours[dtype] = prefill(nets[dtype], ids, DTYPES[dtype])

    exact = largest_errors(ours["fp32"], theirs["fp32"])
    assert (exact < 1e-5).float().mean() >= (0.9 if FORMATS[name].changes_input else 1)
    rounding = largest_errors(theirs["bf16"], theirs["fp32"]).mean()
    assert largest_errors(ours["bf16"], theirs["fp32"]).mean() < 1.5 * rounding

    serialize(nets["bf16"], SPEC, BOUNDS, "12.0")
    other = "12.0" if refusal_of(RTX, "8.9", name) else "8.9"
    serialize(network(store, RTX, torch.float16, BOUNDS), SPEC, BOUNDS, other)
