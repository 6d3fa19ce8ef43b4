import pytest
import torch

from trtx.builder import gpus
from trtx.converters.errors import UnsupportedError

FEATURES = {"8.0": {"int8"}, "8.6": {"int8"}, "8.9": {"int8", "fp8"}, "9.0": {"int8", "fp8"}}
BLACKWELL = {"int8", "fp8", "fp4"}


@pytest.mark.parametrize("gpu", gpus.table().values(), ids=lambda gpu: gpu.name)
def test_rows_are_sane(gpu):
    assert "NVIDIA" in gpu.source
    assert gpu.device_names
    assert 20 <= gpu.memory <= 300
    assert 250 <= gpu.bandwidth <= 10000
    assert set(gpu.tflops) == {"fp32", "tf32", "fp16", "bf16"} | FEATURES.get(gpu.sm, BLACKWELL)
    assert gpu.pcie in (64, 128)
    assert gpu.nvlink in (0, 600, 900, 1800)


@pytest.mark.parametrize("gpu", gpus.table().values(), ids=lambda gpu: gpu.name)
def test_tensor_cores_double_with_each_halving_of_the_dtype(gpu):
    """A sparse figure among dense ones would break these ratios."""
    flops = gpu.tflops
    assert flops["fp16"] == flops["bf16"] > 1.6 * flops["tf32"] >= 1.6 * flops["fp32"]
    for wide, narrow in (("bf16", "int8"), ("bf16", "fp8"), ("fp8", "fp4")):
        if narrow in flops:
            assert flops[narrow] / flops[wide] == pytest.approx(2, rel=0.03) or (
                gpu.name in ("rtx-4090", "rtx-5090") and flops[narrow] / flops[wide] == pytest.approx(4, rel=0.01)
            )  # GeForce: floating point with fp32 accumulation runs at half the rate


@pytest.mark.parametrize(
    "name, device_name, sm, bandwidth, bf16",
    [
        ("h100-sxm", "NVIDIA H100 80GB HBM3", "9.0", 3350, 989),
        ("a100-80-sxm", "NVIDIA A100-SXM4-80GB", "8.0", 2039, 312),
        ("l4", "NVIDIA L4", "8.9", 300, 121),
        ("b200", "NVIDIA B200", "10.0", 8000, 2250),
        ("rtx-5090", "NVIDIA GeForce RTX 5090", "12.0", 1792, 209.5),
    ],
)
def test_known_figures(name, device_name, sm, bandwidth, bf16):
    gpu = gpus.find(device_name)
    assert (gpu.name, gpu.sm, gpu.bandwidth) == (name, sm, bandwidth)
    assert gpu.tflops["bf16"] == pytest.approx(bf16, rel=1e-3)


def test_device_names_belong_to_one_row():
    names = [name for gpu in gpus.table().values() for name in gpu.device_names]
    assert len(names) == len(set(names))


def test_a_named_gpu_need_not_be_here():
    target = gpus.resolve("H100-SXM")
    assert (target.device, target.name, target.memory) == ("cuda", "h100-sxm", 80 * 10**9)


def test_unknown_name_lists_the_table():
    with pytest.raises(UnsupportedError) as caught:
        gpus.resolve("h100")
    assert "h100-sxm" in caught.value.remedy and "rtx-4090" in caught.value.remedy


class Properties:
    major, minor, total_memory = 9, 0, 85_000_000_000

    def __init__(self, name):
        self.name = name


@pytest.fixture
def pretend_gpu(monkeypatch):
    def pretend(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(name))

    return pretend


def test_auto_finds_the_gpu_and_its_real_memory(pretend_gpu):
    pretend_gpu("NVIDIA H100 80GB HBM3")
    for name in ("auto", "h100-sxm"):
        target = gpus.resolve(name)
        assert (target.name, target.memory, target.warning) == ("h100-sxm", 85_000_000_000, "")
    assert gpus.resolve("l4").memory == 24 * 10**9


def test_unknown_gpu_is_used_with_a_warning(pretend_gpu):
    pretend_gpu("NVIDIA X1000 Turbo")
    target = gpus.resolve("auto")
    assert (target.device, target.name, target.gpu.sm) == ("cuda", "x1000-turbo", "9.0")
    assert "X1000" in target.warning


def test_auto_without_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = gpus.resolve("auto")
    assert (target.device, target.name, target.gpu) == ("cpu", "cpu", None)
    assert 0 < target.memory <= 1 << 44


@pytest.mark.parametrize(
    "flags, expected",
    [("sse2 avx2", set()), ("avx512f avx512_bf16", {"bf16"}), ("amx_bf16 avx512_fp16", {"bf16", "fp16"})],
)
def test_native_dtypes(flags, expected):
    assert gpus.native_dtypes(flags) == expected
