"""cuBLASLt through ctypes, on a GPU: products are what torch computes, in CUDA graphs too, by every algorithm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trtx.builder.cuda.tune import CANDIDATES, measured
from trtx.runtime.cuda.cublaslt import ALIGNMENT, TABLE, CublasError, Problem, Products

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SHAPES = [
    (1, 64, 64),
    (65, 128, 96),
    (77, 200, 136),
    (33, 51, 77),
    (128, 4096, 4096),
    (300, 1536, 576),
    (513, 4096, 1024),
]
"""M, N, K."""
CODES = 4e-3
"""The error of a sum of products of codes, which tensor cores keep in fewer bits than fp32 has."""
SCALED = [(1, 64, 64), (17, 128, 96), (77, 208, 144), (128, 4096, 4096), (300, 1536, 576), (513, 4096, 1024)]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def products(device) -> Products:
    torch.manual_seed(0)
    return Products(device)


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def assert_near(found: Tensor | None, product: Tensor, added: Tensor | float = 0.0, rough: float = 1e-4) -> None:
    """The sum of both, rounded to the output's dtype at most twice, from sums in fp32.

    Args:
        rough: of the largest number: the error of a sum.
    """
    assert found is not None
    exact = product + added
    allowed = torch.finfo(found.dtype).eps * torch.maximum(product.abs(), exact.abs()) + rough * exact.abs().amax()
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_linear(products, m, n, k, dtype):
    x, w, bias, y = (random(*shape, dtype=dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
    exact, held = x.double() @ w.double().T, y.double()
    found = products.linear(x, w)
    if found is None:
        assert (n * dtype.itemsize) % ALIGNMENT or (k * dtype.itemsize) % ALIGNMENT, "only rows that start anywhere"
        return
    assert_near(found, exact)
    assert_near(products.linear(x, w, bias), exact, bias.double())
    out = torch.empty_like(y)
    assert products.linear(x, w, out=out) is out
    assert_near(out, exact)
    assert products.linear(x, w, out=y, add=True) is y
    assert_near(y, exact, held)
    y.copy_(held)
    assert products.linear(x, w, bias, out=y, add=True) is y
    assert_near(y, exact, held + bias.double())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("m, n, k", SCALED)
def test_scaled(products, m, n, k, by_row, dtype):
    """The exact products of codes and scales; torch's own, where it has them, is as near."""
    x, w, bias, y = (
        random(m, k, dtype=E4M3),
        random(n, k, dtype=E4M3),
        random(n, dtype=dtype),
        random(m, n, dtype=dtype),
    )
    shapes = ((m, 1), (1, n)) if by_row else ((), ())
    x_scale, w_scale = (0.5 + torch.rand(shape, device="cuda") for shape in shapes)
    exact, held = (x.double() @ w.double().T) * x_scale.double() * w_scale.double(), y.double()
    found = products.scaled(x, w, x_scale, w_scale, dtype=dtype)
    if found is None:
        assert by_row and (dtype is FP16 or torch.cuda.get_device_capability() != (9, 0))
        return
    assert_near(found, exact, rough=CODES)
    if dtype is BF16:
        assert_near(torch._scaled_mm(x, w.t(), x_scale, w_scale, out_dtype=dtype), exact, rough=CODES)
    biased = products.scaled(x, w, x_scale, w_scale, bias, dtype=dtype)
    if biased is not None or not by_row:
        assert_near(biased, exact, bias.double(), CODES)
    added = products.scaled(x, w, x_scale, w_scale, out=y, add=True, dtype=dtype)
    if added is not None or not by_row:
        assert_near(added, exact, held, CODES)


@pytest.mark.parametrize("input, scales", [(BF16, "none"), (E4M3, "tensor")])
def test_every_candidate_computes_the_product(products, input, scales):
    """In a CUDA graph; what is added to is read anew each time."""
    m, n, k = 192, 1024, 2048
    problem = Problem(input, BF16, m, n, k, add=True, scales=scales)
    x, w, held = random(m, k, dtype=input), random(n, k, dtype=input), random(m, n)
    x_scale, w_scale = torch.rand((), device="cuda"), torch.rand((), device="cuda")
    exact = (x.double() @ w.double().T) * (1 if scales == "none" else (x_scale * w_scale).double()) + held.double()
    y = torch.empty_like(held)

    def compute() -> None:
        y.copy_(held)
        if scales == "none":
            assert products.linear(x, w, out=y, add=True) is y
        else:
            assert products.scaled(x, w, x_scale, w_scale, out=y, add=True) is y

    candidates = products.candidates(problem, CANDIDATES)
    computed = 0
    for algorithm in candidates:
        products.use(problem, algorithm)
        try:
            compute()
        except CublasError:
            continue
        assert_near(y, exact, rough=CODES)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compute()
        y.zero_()
        for _ in range(2):
            graph.replay()
            assert_near(y, exact, rough=CODES)
        computed += 1
    assert computed


def test_products_of_one_graph_share_the_workspace(products):
    """Two in a row, the second of the first's result, each with its own bias and scales, and memory torch allocates."""
    x, first, second = random(96, 512), random(4096, 512), random(512, 4096)
    biases = random(4096), random(512)

    def compute() -> Tensor:
        y = products.linear(x, first, biases[0])
        assert y is not None
        z = products.linear(y, second, biases[1])
        assert z is not None
        return z

    compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = compute()
    x.copy_(random(96, 512))
    graph.replay()
    between = (x.double() @ first.double().T + biases[0].double()).to(BF16)
    torch.testing.assert_close(
        z.double(), between.double() @ second.double().T + biases[1].double(), rtol=2**-6, atol=8.0
    )


def test_measured_algorithms_are_found_again(device, tmp_path: Path, monkeypatch, record_property):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wanted = [
        Problem(BF16, BF16, 128, 1024, 2048),
        Problem(BF16, BF16, 256, 1024, 2048, add=True),
        Problem(E4M3, BF16, 128, 1024, 2048, scales="tensor"),
    ]
    table = measured(wanted)
    assert list(table.entries) == wanted
    for tuned in table.entries.values():
        assert 0 < tuned.us <= tuned.heuristic_us
    record_property("microseconds", [[tuned.heuristic_us, tuned.us] for tuned in table.entries.values()])
    assert measured(wanted) == table, "from the cache"

    file = tmp_path / TABLE
    file.write_text(table.text)
    products = Products(device, file)
    assert products.table == table and not products.note
    for m in (128, 100, 256, 200):  # of the table, and below a size of it
        x, w = random(m, 2048), random(1024, 2048)
        exact = x.double() @ w.double().T
        assert_near(products.linear(x, w), exact)
        y = random(m, 1024)
        exact += y.double()
        assert_near(products.linear(x, w, out=y, add=True), exact)
    plans = products._plans
    for problem, tuned in table.entries.items():
        if problem in plans:
            assert bytes(plans[problem]._algo).hex() == tuned.algorithm
