"""Products of many tokens by cuBLASLt, each with the algorithm that was measured to be the fastest for its shape.

    y [M, N] = x [M, K] · w [N, K]ᵀ (+ bias [N]) (+ what y held before)

x and w are of one dtype: fp32, fp16, bf16, or e4m3 codes with scales. Sums are in fp32; those of codes are as tensor
cores keep them, with fewer bits: on an H100, products of 2048 tokens take 3 to 11% less time so, and are off by 0.2 to
0.3%, less than a tenth of what rounding to codes costs. All is row-major. cuBLAS counts along columns first, so for it
w is A, a K × N matrix to be transposed, x is B, K × M, and y is C and D, N × M.

torch takes the algorithm that cuBLAS's heuristic likes best. `builder.cuda.tune` times others too and keeps a `Table`
beside an engine's kernels; algorithms are numbers that mean something to one version of the library. The library is
the one that torch has loaded, called through ctypes. https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api;
numbers below are those of cublasLt.h 13.10.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtx.converters.errors import InputError, MissingPackageError
from trtx.quantize.formats import E4M3

TABLE = "algorithms.json"
"""The table's file, in the folder of an engine's kernels."""

WORKSPACE = 32 << 20
"""Bytes that all products of a device share: as much as torch gives cuBLAS on Hopper."""

ALIGNMENT = 16
"""Bytes. Matrices and biases start at multiples of it; products of others are left to torch."""

_PLANS = 4096
"""Shapes whose descriptors are kept."""


class Problem(NamedTuple):
    """What a product is to cuBLASLt.

    Attributes:
        input, output: dtypes of x and w, and of y and the bias.
        bias: whether one is added.
        add: whether y is added to what is there.
        scales: of codes: 'tensor', one for x and one for w; 'row', one for each of their rows; else 'none'.
    """

    input: torch.dtype
    output: torch.dtype
    m: int
    n: int
    k: int
    bias: bool = False
    add: bool = False
    scales: str = "none"


# ---------------------------------------------------------------------------------------------------------------------
# The library


class CublasError(RuntimeError):
    """A call of cuBLASLt failed."""


class _Opaque(ctypes.Structure):
    """Memory of the library's own meaning, filled by its `Init`, which refuses too little. It has grown over time."""

    _fields_ = (("data", c_uint64 * 64),)

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class _MatmulDesc(_Opaque):
    pass


class _MatrixLayout(_Opaque):
    pass


class _MatmulPreference(_Opaque):
    pass


class _Algo(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _HeuristicResult(ctypes.Structure):
    _fields_ = (
        ("algo", _Algo), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "Create": (POINTER(pointer),),
    "MatmulDescInit_internal": (pointer, c_size_t, c_int, c_int),
    "MatmulDescSetAttribute": (pointer, c_int, pointer, c_size_t),
    "MatrixLayoutInit_internal": (pointer, c_size_t, c_int, c_uint64, c_uint64, c_int64),
    "MatmulPreferenceInit_internal": (pointer, c_size_t),
    "MatmulPreferenceSetAttribute": (pointer, c_int, pointer, c_size_t),
    "MatmulAlgoGetHeuristic": (*[pointer] * 7, c_int, POINTER(_HeuristicResult), POINTER(c_int)),
    "MatmulAlgoCheck": (*[pointer] * 7, POINTER(_HeuristicResult)),
    "Matmul": (*[pointer] * 14, c_size_t, pointer),
}
"""Arguments of the functions that return a status. `_internal` ones are what the header's inline `Init`s call."""

_COMPUTE_32F = 68
_TYPES = {torch.float32: ("fp32", 0), torch.float16: ("fp16", 2), torch.bfloat16: ("bf16", 14), E4M3: ("e4m3", 28)}
"""By dtype: its name in a table, and its number among CUDA's data types."""

_TRANSPOSE_A = (3, c_int32)
_EPILOGUE = (7, c_uint32)
_BIAS_POINTER = (8, pointer)
_SCALE_POINTERS = ((17, pointer), (18, pointer))
_SCALE_MODES = ((31, c_int32), (32, c_int32))
_FAST_SUMS = (25, c_int8)
"""Attributes of a product: number and type. Those of A first."""

_EPILOGUE_BIAS, _SCALE_BY_ROW = 4, 3

_MOST_WORKSPACE = (1, c_uint64)
_SUMMING = (3, c_uint32)
_ALIGNMENTS = tuple((number, c_uint32) for number in (5, 6, 7, 8))
"""Attributes of a preference."""

SUMMED_IN_FP32 = 2
"""How parts of a sum may be put together: in fp32. torch lets cuBLAS round them to 16 bits on the way (1, 4)."""


class Library:
    """cuBLASLt; a call is checked.

    Args:
        path: of the shared library.
    """

    def __init__(self, path: str) -> None:
        self._dll = ctypes.CDLL(path)
        self._dll.cublasLtGetVersion.restype = c_size_t
        self._dll.cublasLtGetStatusName.restype = c_char_p
        self.version: int = self._dll.cublasLtGetVersion()
        self._handles: dict[torch.device, int] = {}
        self._functions = {name: getattr(self._dll, f"cublasLt{name}") for name in _FUNCTIONS}
        for name, arguments in _FUNCTIONS.items():
            self._functions[name].argtypes = arguments

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call `cublasLt<name>`.

        Raises:
            CublasError: it did not succeed; names the status.
        """
        if status := self._functions[name](*arguments):
            raise CublasError(f"cublasLt{name}: {self._dll.cublasLtGetStatusName(status).decode()}")

    def handle(self, device: torch.device) -> int:
        """The library's state on the current device."""
        if device not in self._handles:
            handle = pointer()
            self("Create", byref(handle))
            assert handle.value is not None
            self._handles[device] = handle.value
        return self._handles[device]

    def init(self, opaque: _Opaque, *arguments: int) -> Any:
        """Fill opaque memory."""
        name = type(opaque).__name__.removeprefix("_")
        self(f"{name}Init_internal", opaque.address, ctypes.sizeof(opaque), *arguments)
        return opaque

    def set(self, opaque: _Opaque, attribute: tuple[int, Any], value: int) -> None:
        """Set an attribute."""
        number, kind = attribute
        held = kind(value)
        name = type(opaque).__name__.removeprefix("_")
        self(f"{name}SetAttribute", opaque.address, number, ctypes.addressof(held), ctypes.sizeof(held))


@cache
def library() -> Library:
    """The cuBLASLt that torch has loaded, or one that is installed beside it.

    Raises:
        MissingPackageError: there is none.
    """
    loaded = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    found = next((path for path in loaded if "/libcublasLt.so" in path), None) or next(_installed(), None)
    if found is None:
        raise MissingPackageError(
            "cuBLASLt is neither loaded nor installed: this torch is made for CPUs.", "Install torch for CUDA."
        )
    return Library(found)


def _installed() -> Iterator[str]:
    """Paths of cuBLASLt in NVIDIA's packages, the newest first."""
    spec = find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    found = (str(path) for folder in folders for path in Path(folder).glob("*/lib/libcublasLt.so.1[23]"))
    return iter(sorted(found, key=lambda path: path[-2:], reverse=True))


# ---------------------------------------------------------------------------------------------------------------------
# What was measured


@dataclass(frozen=True)
class Tuned:
    """The algorithm chosen for a problem.

    Attributes:
        algorithm: the 64 bytes that cuBLASLt calls one, in hex.
        workspace: bytes that it takes.
        us: microseconds that it took.
        heuristic_us: that the heuristic's took; the same where that was chosen.
    """

    algorithm: str
    workspace: int
    us: float
    heuristic_us: float


_SCALES = ("none", "tensor", "row")


@dataclass
class Table:
    """Algorithms chosen on one kind of GPU, with one version of the library.

    Attributes:
        cublas: `cublasLtGetVersion()`.
        gpu: as the driver calls it.
    """

    cublas: int
    gpu: str
    entries: dict[Problem, Tuned] = field(default_factory=dict)

    def find(self, problem: Problem) -> Tuned | None:
        """What is known of a product: of itself, else of the one with the next larger m.

        Where m or what is added differ, an entry counts only if it beat the heuristic, which else is asked itself.
        """
        if problem in self.entries:
            return self.entries[problem]
        alike = (known for known in self.entries if known.m >= problem.m and _matrices(known) == _matrices(problem))
        nearest = min(alike, key=lambda it: (it.m, it[5:7] != problem[5:7]), default=None)
        tuned = None if nearest is None else self.entries[nearest]
        return tuned if tuned and tuned.us < tuned.heuristic_us else None

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        entries = [
            {**problem._asdict(), "input": _name(problem.input), "output": _name(problem.output), **asdict(tuned)}
            for problem, tuned in self.entries.items()
        ]
        return {"cublas": self.cublas, "gpu": self.gpu, "entries": entries}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Table:
        """From a file."""
        dtypes = {name: dtype for dtype, (name, _) in _TYPES.items()}
        entries = {}
        for entry in content["entries"]:
            known = {**entry, "input": dtypes[entry["input"]], "output": dtypes[entry["output"]]}
            problem = Problem(*(known[name] for name in Problem._fields))
            tuned = Tuned(*(known[name] for name in Tuned.__dataclass_fields__))
            whole = isinstance(problem.bias, bool) and isinstance(problem.add, bool)
            whole &= all(isinstance(it, int) for it in (problem.m, problem.n, problem.k, tuned.workspace))
            whole &= all(isinstance(it, (int, float)) for it in (tuned.us, tuned.heuristic_us))
            whole &= isinstance(tuned.algorithm, str) and problem.scales in _SCALES
            if not whole or len(bytes.fromhex(tuned.algorithm)) != ctypes.sizeof(_Algo):
                raise ValueError(f"{entry} is no entry")
            entries[problem] = tuned
        return cls(content["cublas"], content["gpu"], entries)

    @property
    def text(self) -> str:
        """The content of a file: JSON, an entry a line."""
        content = self.to_json()
        lines = ",\n".join(map(json.dumps, content.pop("entries")))
        return f'{json.dumps(content)[:-1]}, "entries": [\n{lines}\n]}}\n'

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a file.

        Raises:
            InputError: it is damaged.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: can't be read ({error!r}).", "Build the engine again.") from error


def _name(dtype: torch.dtype) -> str:
    return _TYPES[dtype][0]


def _matrices(problem: Problem) -> tuple[Any, ...]:
    """A product without its m and what is added."""
    return (problem.input, problem.output, problem.n, problem.k, problem.scales)


# ---------------------------------------------------------------------------------------------------------------------
# Products


@dataclass(frozen=True)
class Algorithm:
    """An algorithm, and the bytes of workspace that it takes."""

    code: bytes
    workspace: int


class _Plan:
    """A product described to cuBLASLt, and what it is computed with.

    Args:
        anywhere: on the device; stands for the bias and the scales until they are known.

    Attributes:
        descriptors: addresses of those of the product, A, B, and both C and D.
        beta, algorithm: addresses.
        workspace: bytes that the algorithm takes.
    """

    def __init__(self, lt: Library, problem: Problem, anywhere: int) -> None:
        number, (n, m, k) = _TYPES[problem.input][1], (problem.n, problem.m, problem.k)
        self.desc = lt.init(_MatmulDesc(), _COMPUTE_32F, _TYPES[torch.float32][1])
        a = lt.init(_MatrixLayout(), number, k, n, k)
        b = lt.init(_MatrixLayout(), number, k, m, k)
        c = lt.init(_MatrixLayout(), _TYPES[problem.output][1], n, m, n)
        beta, self._algo = c_float(1.0 if problem.add else 0.0), _Algo()
        lt.set(self.desc, _TRANSPOSE_A, 1)
        if problem.bias:
            lt.set(self.desc, _EPILOGUE, _EPILOGUE_BIAS)
            lt.set(self.desc, _BIAS_POINTER, anywhere)
        if problem.scales != "none":
            lt.set(self.desc, _FAST_SUMS, 1)
            for mode, scale in zip(_SCALE_MODES, _SCALE_POINTERS, strict=True):
                if problem.scales == "row":
                    lt.set(self.desc, mode, _SCALE_BY_ROW)
                lt.set(self.desc, scale, anywhere)
        self._kept, self._pointer, self._lt = (a, b, c, beta), c_uint64(), lt
        self._pointer_at = ctypes.addressof(self._pointer)
        self.descriptors = self.desc.address, a.address, b.address, c.address
        self.beta, self.algorithm, self.workspace = ctypes.addressof(beta), ctypes.addressof(self._algo), 0

    @property
    def matrices(self) -> tuple[int, ...]:
        """Addresses of the descriptors of the product, A, B, C and D."""
        return (*self.descriptors, self.descriptors[-1])

    def point(self, attribute: tuple[int, Any], tensor: Tensor) -> None:
        """Let an attribute of the product point to a tensor."""
        self._pointer.value = tensor.data_ptr()
        self._lt("MatmulDescSetAttribute", self.descriptors[0], attribute[0], self._pointer_at, 8)

    def use(self, algorithm: Algorithm) -> None:
        """Compute with an algorithm from now on."""
        ctypes.memmove(self.algorithm, algorithm.code, len(algorithm.code))
        self.workspace = algorithm.workspace


class Products:
    """Computes products on one GPU, the current one; those of one stream, since they share their workspace.

    Args:
        table: a `Table`'s file. Where it is missing (the engine was built without the GPU), the heuristic chooses.

    Attributes:
        note: why the table is not used, for people; empty: it is, or there is none.

    Raises:
        MissingPackageError: there is no cuBLASLt.
        InputError: the table is damaged.
    """

    def __init__(self, device: torch.device, table: Path | None = None) -> None:
        self._index = device.index or 0
        self._lt = lt = library()
        self.gpu, self.version, self.note = torch.cuda.get_device_name(device), lt.version, ""
        self.table = self._fitting(Table.read(table)) if table and table.exists() else Table(self.version, self.gpu)
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._handle = lt.handle(device)
        self._alpha = c_float(1.0)
        self._one = ctypes.addressof(self._alpha)
        self._preference = lt.init(_MatmulPreference())
        lt.set(self._preference, _MOST_WORKSPACE, WORKSPACE)
        lt.set(self._preference, _SUMMING, SUMMED_IN_FP32)
        for attribute in _ALIGNMENTS:
            lt.set(self._preference, attribute, ALIGNMENT)
        self._plans: dict[Problem, _Plan | None] = {}

    def linear(
        self, x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
    ) -> Tensor | None:
        """x [M, K] · w [N, K]ᵀ → [M, N] in the dtype of x.

        Args:
            bias: [N].
            out: where to put the result.
            add: add to what `out` holds.

        Returns:
            None where cuBLASLt does not do it, and nothing was done.
        """
        return self._multiply("none", x, w, None, None, bias, out, add, x.dtype)

    def scaled(
        self,
        codes: Tensor,
        w: Tensor,
        x_scale: Tensor,
        w_scale: Tensor,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        add: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor | None:
        """As `linear`, of e4m3 codes [M, K] and [N, K] → [M, N] in `dtype`.

        Args:
            x_scale, w_scale: fp32, both [], or for each row, [M, 1] and [N] or the like.
        """
        scales = "row" if x_scale.dim() else "tensor"
        return self._multiply(scales, codes, w, x_scale, w_scale, bias, out, add, dtype)

    def _multiply(
        self,
        scales: str,
        x: Tensor,
        w: Tensor,
        x_scale: Tensor | None,
        w_scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor | None,
        add: bool,
        dtype: torch.dtype,
    ) -> Tensor | None:
        (m, k), n = x.shape, w.shape[0]
        problem = Problem(x.dtype, dtype, m, n, k, bias is not None, add, scales)
        try:
            plan = self._plans[problem]
        except KeyError:
            plan = self._plan(problem)
        if plan is None or w.dtype is not x.dtype or not (x.is_contiguous() and w.is_contiguous()):
            return None
        if out is not None and (out.dtype is not dtype or not out.is_contiguous()):
            return None
        x_address, w_address = x.data_ptr(), w.data_ptr()
        starts = x_address | w_address
        for given in (bias, out):
            if given is not None:
                starts |= given.data_ptr()
        if starts % ALIGNMENT:
            return None
        if out is None:
            assert not add
            out = torch.empty((m, n), dtype=dtype, device=x.device)
        if bias is not None:
            assert bias.dtype is dtype and bias.shape == (n,)
            plan.point(_BIAS_POINTER, bias)
        if x_scale is not None and w_scale is not None:
            counts = (m, n) if scales == "row" else (1, 1)
            assert (x_scale.numel(), w_scale.numel()) == counts and x_scale.dtype is w_scale.dtype is torch.float32
            plan.point(_SCALE_POINTERS[0], w_scale)
            plan.point(_SCALE_POINTERS[1], x_scale)
        desc, a, b, c = plan.descriptors
        y, stream = out.data_ptr(), torch.cuda.current_stream(self._index).cuda_stream
        self._lt(
            "Matmul", self._handle, desc, self._one, w_address, a, x_address, b, plan.beta, y, c, y, c, plan.algorithm,
            self._workspace.data_ptr(), plan.workspace, stream,
        )  # fmt: skip
        return out

    # Algorithms.

    def candidates(self, problem: Problem, most: int) -> list[Algorithm]:
        """The algorithms that the heuristic likes best, the best first; none where the library can't do it."""
        plan = self._described(problem)
        return [] if plan is None else self._asked(plan, most)

    def use(self, problem: Problem, algorithm: Algorithm) -> None:
        """Compute a product with one of its candidates from now on."""
        plan = self._plans[problem] = self._described(problem)
        assert plan is not None
        plan.use(algorithm)

    def _plan(self, problem: Problem) -> _Plan | None:
        """How a product is computed from now on; None: not here."""
        plan = self._described(problem)
        if plan is not None:
            algorithm = self._tabled(problem, plan) or next(iter(self._asked(plan, 1)), None)
            if algorithm is None:
                plan = None
            else:
                plan.use(algorithm)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        self._plans[problem] = plan
        return plan

    def _described(self, problem: Problem) -> _Plan | None:
        """A product without an algorithm; None where the library does not know its like."""
        if not _plain(problem):
            return None
        try:
            return _Plan(self._lt, problem, self._workspace.data_ptr())
        except CublasError:
            return None

    def _asked(self, plan: _Plan, most: int) -> list[Algorithm]:
        """What the heuristic answers."""
        found, count = (_HeuristicResult * most)(), c_int()
        operands = (self._handle, *plan.matrices, self._preference.address)
        try:
            self._lt("MatmulAlgoGetHeuristic", *operands, most, found, byref(count))
        except CublasError:
            return []
        return [Algorithm(bytes(it.algo), it.workspace) for it in found[: count.value] if not it.state]

    def _tabled(self, problem: Problem, plan: _Plan) -> Algorithm | None:
        """The table's algorithm, where the library can compute the product with it."""
        tuned = self.table.find(problem)
        if tuned is None:
            return None
        algo, result = _Algo.from_buffer_copy(bytes.fromhex(tuned.algorithm)), _HeuristicResult()
        try:
            self._lt("MatmulAlgoCheck", self._handle, *plan.matrices, byref(algo), byref(result))
        except CublasError:
            return None
        return Algorithm(bytes(algo), result.workspace) if result.workspace <= WORKSPACE else None

    def _fitting(self, table: Table) -> Table:
        """The table, or an empty one where it was made for something else."""
        if (table.cublas, table.gpu) == (self.version, self.gpu):
            return table
        self.note = (
            f"The algorithms of large products were chosen for cuBLAS {table.cublas} on {table.gpu}; here is "
            f"{self.version} on {self.gpu}, whose heuristic chooses. Build again on this machine to choose the fastest."
        )
        return Table(self.version, self.gpu)


def _plain(problem: Problem) -> bool:
    """Whether it is a product that this module describes to cuBLASLt."""
    if problem.scales == "none":
        kinds = problem.input in (torch.float32, torch.float16, torch.bfloat16) and problem.output is problem.input
    else:
        kinds = problem.input is E4M3 and problem.output in (torch.float16, torch.bfloat16)
    return kinds and min(problem.m, problem.n, problem.k) > 0
