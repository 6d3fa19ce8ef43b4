"""Products through cuBLASLt: what is handed to the library, and which algorithm it is handed.

`FakeLibrary` takes the place of the library's functions, not of our calls of them: it reads descriptors by the numbers
of cublasLt.h and multiplies what the pointers point to, in the host's memory. Where the real library is installed,
descriptors are made by it too, which takes no GPU.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.errors import InputError, MissingPackageError
from trtx.runtime.cuda import cublaslt
from trtx.runtime.cuda.cublaslt import ALIGNMENT, TABLE, CublasError, Library, Problem, Products, Table, Tuned

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
CPU = torch.device("cpu")
VERSION, GPU = 130100, "NVIDIA H100 80GB HBM3"

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 7, 15
CUDA_TYPES = {0: FP32, 2: FP16, 14: BF16, 28: E4M3}

MATMUL_ATTRIBUTES = {
    3: ("transa", 4), 7: ("epilogue", 4), 8: ("bias", 8), 17: ("a_scale", 8), 18: ("b_scale", 8),
    25: ("fast_accum", 1), 31: ("a_mode", 4), 32: ("b_mode", 4),
}  # fmt: skip
PREFERENCE_ATTRIBUTES = {1: ("workspace", 8), 3: ("reduction", 4), 5: ("a", 4), 6: ("b", 4), 7: ("c", 4), 8: ("d", 4)}
"""Name and bytes by number, from cublasLt.h 13.10."""


class FakeLibrary(Library):
    """cuBLASLt on host memory. An algorithm is eight words that are all the same; `most` is how many it knows."""

    def __init__(self, most: int = 3) -> None:
        self._handles = {}
        self._dll = SimpleNamespace(cublasLtGetStatusName=lambda status: f"STATUS_{status}".encode())
        self._functions = {name: getattr(self, f"_{name}") for name in cublaslt._FUNCTIONS}
        self.version = VERSION
        self.most = most
        self.refused: set[int] = set()
        self.known: dict[int, dict[str, Any]] = {}
        self.asked: list[int] = []
        self.used: list[int] = []

    def _Create(self, handle: Any) -> int:
        handle._obj.value = 1
        return SUCCESS

    def _MatmulDescInit_internal(self, at: int, size: int, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0), "sums and factors in fp32"
        self.known[at] = {"epilogue": 1, "fast_accum": 0, "a_mode": 0, "b_mode": 0}
        return SUCCESS

    def _MatrixLayoutInit_internal(self, at: int, size: int, kind: int, rows: int, columns: int, lead: int) -> int:
        self.known[at] = {"dtype": CUDA_TYPES[kind], "rows": rows, "columns": columns, "lead": lead}
        return SUCCESS

    def _MatmulPreferenceInit_internal(self, at: int, size: int) -> int:
        self.known[at] = {}
        return SUCCESS

    def _set(self, attributes: dict[int, tuple[str, int]], at: int, number: int, value: int, size: int) -> int:
        name, right = attributes[number]
        if size != right:
            return INVALID_VALUE
        self.known[at][name] = int.from_bytes(ctypes.string_at(value, size), "little")
        return SUCCESS

    def _MatmulDescSetAttribute(self, *arguments: int) -> int:
        return self._set(MATMUL_ATTRIBUTES, *arguments)

    def _MatmulPreferenceSetAttribute(self, *arguments: int) -> int:
        return self._set(PREFERENCE_ATTRIBUTES, *arguments)

    def _MatmulAlgoGetHeuristic(self, handle, desc, a, b, c, d, preference, count, results, returned) -> int:
        if not self.most:
            return NOT_SUPPORTED
        self.asked.append(self.known[b]["columns"])
        returned._obj.value = min(count, self.most)
        for number in range(returned._obj.value):
            results[number].algo.data[:] = [number] * 8
            results[number].workspace = 1000 * number
        return SUCCESS

    def _MatmulAlgoCheck(self, handle, desc, a, b, c, d, algo, result) -> int:
        if algo._obj.data[0] in self.refused:
            return NOT_SUPPORTED
        result._obj.workspace = 77
        return SUCCESS

    def _Matmul(
        self, handle, desc, alpha, a, a_at, b, b_at, beta, c, c_at, d, d_at, algo, workspace, size, stream
    ) -> int:  # fmt: skip
        """D = alpha * Aᵀ · B + beta * C, by columns, and what the epilogue adds."""
        told = self.known[desc]
        assert told["transa"] == 1 and told["fast_accum"] == ("a_scale" in told)
        left, right = self._matrix(a, a_at).T, self._matrix(b, b_at)
        product = left.double() @ right.double()
        if "a_scale" in told:
            by_row = {(0, 0): False, (3, 3): True}[told["a_mode"], told["b_mode"]]
            rows, columns = product.shape if by_row else (1, 1)
            product *= _read(told["a_scale"], FP32, rows)[:, None] * _read(told["b_scale"], FP32, columns)[None]
        y = _read(alpha, FP32, 1) * product
        if weight := _read(beta, FP32, 1).item():  # else C is not read
            y += weight * self._matrix(c, c_at).double()
        if told["epilogue"] == 4:
            y += _read(told["bias"], self.known[d_at]["dtype"], len(y))[:, None]
        else:
            assert told["epilogue"] == 1
        assert len({pointer % ALIGNMENT for pointer in (a, b, c, d)}) == 1
        words = set((ctypes.c_uint64 * 8).from_address(algo))
        assert len(words) == 1
        self.used.append(words.pop())
        out = y.to(self.known[d_at]["dtype"]).T.contiguous()
        ctypes.memmove(d, out.data_ptr(), out.nbytes)
        return SUCCESS

    def _matrix(self, at: int, layout: int) -> Tensor:
        """Columns are `lead` numbers apart."""
        told = self.known[layout]
        assert told["lead"] == told["rows"]
        return _read(at, told["dtype"], told["rows"] * told["columns"]).view(told["columns"], told["rows"]).T


def _read(at: int, dtype: torch.dtype, count: int) -> Tensor:
    return torch.frombuffer(bytearray(ctypes.string_at(at, count * dtype.itemsize)), dtype=dtype)


@pytest.fixture
def lt(monkeypatch) -> FakeLibrary:
    """A library that the products of this test use, on a GPU that is the CPU."""
    fake = FakeLibrary()
    monkeypatch.setattr(cublaslt, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return fake


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random numbers at a multiple of 64 bytes, as torch's allocators give them."""
    return torch.randn(shape).to(dtype)


def assert_near(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)


# What is computed.


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_linear_is_torchs(lt, dtype, add, biased):
    x, w, y = random(5, 16, dtype=dtype), random(24, 16, dtype=dtype), random(5, 24, dtype=dtype)
    bias = random(24, dtype=dtype) if biased else None
    products = Products(CPU)
    assert_near(products.linear(x, w, bias), F.linear(x, w, bias))
    expected = F.linear(x.float(), w.float(), None if bias is None else bias.float()) + (y.float() if add else 0)
    assert products.linear(x, w, bias, out=y, add=add) is y
    assert_near(y, expected.to(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_scaled_is_the_product_of_what_the_codes_mean(lt, dtype, by_row, biased):
    x, w, y = random(3, 32, dtype=E4M3), random(16, 32, dtype=E4M3), random(3, 16, dtype=dtype)
    x_scale, w_scale = (torch.rand(3, 1), torch.rand(1, 16)) if by_row else (torch.rand(()), torch.rand(()))
    bias = random(16, dtype=dtype) if biased else None
    expected = F.linear(x.float() * x_scale, w.float() * (w_scale.T if by_row else w_scale))
    expected += 0 if bias is None else bias.float()
    products = Products(CPU)
    assert_near(products.scaled(x, w, x_scale, w_scale, bias, dtype=dtype), expected.to(dtype))
    expected += y.float()
    assert products.scaled(x, w, x_scale, w_scale, bias, out=y, add=True, dtype=dtype) is y
    assert_near(y, expected.to(dtype))


def test_weights_of_one_shape_have_their_own_bias_and_scales(lt):
    products = Products(CPU)
    x = random(4, 16, dtype=E4M3)
    for _ in range(3):
        w, bias, scales = random(16, 16, dtype=E4M3), random(16), (torch.rand(()), torch.rand(()))
        expected = F.linear(x.float() * scales[0], w.float() * scales[1], bias.float())
        assert_near(products.scaled(x, w, *scales, bias), expected.to(BF16))
    assert lt.asked == [4], "the heuristic is asked once a shape"


def test_what_it_does_not_do_is_left_to_the_caller(lt):
    products = Products(CPU)
    x, w, out = random(4, 16), random(16, 16), random(4, 16)
    one = torch.ones(())
    assert products.linear(x, w.half()) is None
    assert products.linear(x[:, :8], w[:, :8].contiguous()) is None and products.linear(x, w.T) is None
    assert products.linear(x[:0], w) is None
    assert products.linear(x.int(), w.int()) is None
    assert products.linear(x, w, out=out.float()) is None and products.linear(x, w, out=out.T.contiguous().T) is None
    assert products.scaled(x.to(E4M3), w.to(E4M3), one, one, dtype=FP32) is None
    shifted = random(4 * 16 + 1)[1:].view(4, 16)
    assert products.linear(shifted, w) is None and products.linear(x, w, out=shifted) is None
    assert products.linear(x, w, bias=random(17)[1:]) is None
    assert not lt.used
    lt.most = 0
    assert Products(CPU).linear(x, w) is None, "the library knows no algorithm"


def test_sums_are_in_fp32_and_the_workspace_is_bounded(lt):
    products = Products(CPU)
    told = lt.known[products._preference.address]
    assert told["workspace"] == 32 << 20
    assert told["reduction"] == 2, "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE"
    assert {told[name] for name in "abcd"} == {ALIGNMENT}


def test_shapes_without_end_do_not_take_memory_without_end(lt, monkeypatch):
    monkeypatch.setattr(cublaslt, "_PLANS", 4)
    products = Products(CPU)
    for m in range(1, 12):
        products.linear(random(m, 16), random(16, 16))
        assert len(products._plans) <= 4
    assert lt.asked == list(range(1, 12))


# Which algorithm.


def problem(m: int, **changes) -> Problem:
    return Problem(**{"input": BF16, "output": BF16, "m": m, "n": 16, "k": 16, **changes})


def tuned(number: int, us: float = 9, heuristic_us: float = 10) -> Tuned:
    return Tuned((number.to_bytes(8, "little") * 8).hex(), 1000 * number, us, heuristic_us)


def table(**changes) -> Table:
    entries = {problem(8): tuned(1), problem(32): tuned(2), problem(64): tuned(1, 10, 10), problem(64, n=32): tuned(1)}
    return Table(**{"cublas": VERSION, "gpu": GPU, "entries": entries, **changes})


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / TABLE
    path.write_text(table().text)
    return path


def test_table_is_read_as_it_was_written(tmp_path):
    kinds = [(BF16, BF16, "none"), (FP16, FP16, "none"), (FP32, FP32, "none"), (E4M3, BF16, "tensor")]
    kinds += [(E4M3, FP16, "row")]
    entries = {
        Problem(given, output, m, 24, 16, bias, add, scales): tuned(m, m / 7, m / 3)
        for m, (given, output, scales) in enumerate(kinds, 1)
        for bias in (False, True)
        for add in (False, True)
    }
    written = Table(130100, GPU, entries)
    path = tmp_path / TABLE
    path.write_text(written.text)
    assert Table.read(path) == written and len(json.loads(path.read_text())["entries"]) == 20
    path.write_text(Table(1, "", {}).text)
    assert Table.read(path) == Table(1, "", {})


@pytest.mark.parametrize("damage", ["[", "{}", '{"cublas": 1, "gpu": "", "entries": [{"input": "bf16"}]}', "[]"])
def test_damaged_table_is_refused(tmp_path, damage):
    path = tmp_path / TABLE
    path.write_text(damage)
    with pytest.raises(InputError, match=TABLE) as caught:
        Table.read(path)
    assert "Build the engine again" in caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "zz" * 64}, {"algorithm": "00"}, {"algorithm": 5}, {"us": None}, {"m": "128"}, {"workspace": "x"},
        {"scales": "other"}, {"add": 1},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_entry_is_refused(tmp_path, change):
    path, table = tmp_path / TABLE, Table(1, GPU, {Problem(BF16, BF16, 1, 24, 16): tuned(1, 1.0, 2.0)})
    content = table.to_json()
    Table.from_json(content)
    content["entries"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=TABLE):
        Table.read(path)


@pytest.mark.parametrize(
    "m, changes, expected",
    [
        (8, {}, 1),
        (32, {}, 2),
        (5, {}, 1),
        (9, {}, 2),
        (9, {"add": True}, 2),
        (8, {"bias": True}, 1),
        (64, {}, 1),
        (33, {}, None),
        (64, {"add": True}, None),
        (65, {}, None),
        (65, {"n": 32}, None),
        (50, {"n": 32}, 1),
        (8, {"k": 32}, None),
        (8, {"input": FP16, "output": FP16}, None),
        (8, {"scales": "tensor"}, None),
    ],
)
def test_table_knows_what_was_measured_and_sizes_below(m, changes, expected):
    """33 to 64 tokens: there the heuristic was not beaten, so it is asked for the size itself."""
    found = table().find(problem(m, **changes))
    assert found == (None if expected is None else table().entries[problem(64)] if m == 64 else tuned(expected))


def test_entry_that_adds_the_same_is_preferred():
    entries = {problem(8, add=True): tuned(2), problem(8, bias=True): tuned(3), problem(7, k=8): tuned(1)}
    assert Table(1, GPU, entries).find(problem(6, bias=True)) == tuned(3)
    assert Table(1, GPU, entries).find(problem(6, add=True)) == tuned(2)


def test_products_take_the_tables_algorithm(lt, file):
    products = Products(CPU, file)
    for m in (8, 9, 33, 9):
        products.linear(random(m, 16), random(16, 16))
    assert lt.used == [1, 2, 0, 2] and lt.asked == [33] and not products.note


def test_algorithm_that_the_library_refuses_is_replaced_by_the_heuristics(lt, file):
    lt.refused = {2}
    products = Products(CPU, file)
    for m in (8, 9):
        assert_near(products.linear(x := random(m, 16), w := random(16, 16)), F.linear(x, w))
    assert lt.used == [1, 0]


@pytest.mark.parametrize("changes", [{"cublas": 130200}, {"gpu": "NVIDIA H200"}])
def test_table_for_something_else_is_not_used(lt, file, changes):
    file.write_text(table(**changes).text)
    products = Products(CPU, file)
    products.linear(random(8, 16), random(16, 16))
    assert lt.used == [0]
    assert str(next(iter(changes.values()))) in products.note and "Build again" in products.note


def test_engine_without_a_table(lt, tmp_path):
    products = Products(CPU, tmp_path / TABLE)
    products.linear(random(8, 16), random(16, 16))
    assert lt.used == [0] and not products.note


def test_candidates_are_used_when_asked_for(lt):
    products = Products(CPU)
    candidates = products.candidates(problem(8), 16)
    assert [algorithm.workspace for algorithm in candidates] == [0, 1000, 2000]
    products.use(problem(8), candidates[2])
    products.linear(random(8, 16), random(16, 16))
    assert lt.used == [2]
    assert products.candidates(problem(0), 16) == []


# The library.


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(cublaslt, "_installed", lambda: iter(()))
    if "libcublasLt" in Path("/proc/self/maps").read_text():
        pytest.skip("this torch has loaded it")
    with pytest.raises(MissingPackageError, match="cuBLASLt is neither loaded nor installed") as caught:
        cublaslt.library.__wrapped__()
    assert "torch for CUDA" in caught.value.remedy


@pytest.fixture(scope="module")
def real() -> Library:
    """The library of an installed torch for CUDA, or of nvidia-cublas."""
    try:
        return cublaslt.library.__wrapped__()
    except MissingPackageError:
        pytest.skip("cuBLASLt is not installed")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kind", [(BF16, BF16, "none"), (FP32, FP32, "none"), (E4M3, BF16, "tensor"), (E4M3, FP16, "row")]
)
def test_library_takes_the_descriptors(real, bias, kind):
    given, output, scales = kind
    asked = Problem(given, output, 48, 80, 112, bias, True, scales)
    plan = cublaslt._Plan(real, asked, 4096)
    get = real._dll.cublasLtMatmulDescGetAttribute
    get.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    told = {}
    for number, (name, size) in MATMUL_ATTRIBUTES.items():
        value, written = ctypes.c_uint64(), ctypes.c_size_t()
        assert get(plan.desc.address, number, ctypes.addressof(value), size, ctypes.addressof(written)) == SUCCESS
        assert written.value == size
        told[name] = value.value
    pointers = {"bias": 4096 * bias, **dict.fromkeys(("a_scale", "b_scale"), 4096 * (scales != "none"))}
    mode = 3 * (scales == "row")
    expected = {"transa": 1, "epilogue": 4 if bias else 1, "fast_accum": 1, "a_mode": mode, "b_mode": mode, **pointers}
    assert told == expected


def test_library_has_a_version_and_names_what_went_wrong(real):
    assert real.version >= 120000
    desc = real.init(cublaslt._MatmulDesc(), 68, 0)
    with pytest.raises(CublasError, match="cublasLtMatmulDescSetAttribute: CUBLAS_STATUS_INVALID_VALUE"):
        real.set(desc, (25, ctypes.c_int32), 0)
