"""Mixture of experts on the GPU: nothing waits for the host, and sums have one order.

A step of few tokens is bound by reading the weights of the experts that it uses, and passes pair by pair; a larger one
sorts its tokens by expert. The grid of the latter is for the worst routing there can be; tiles that are not needed end
at once, so a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.spec import Activation, MoE
from trtx.runtime.cuda.launch import Constant, Launch, power_of_two
from trtx.runtime.ops.torch_ops import ResidentLinear

_FEW_TOKENS = 16
"""Up to so many, the router's logits are computed token by token."""

_FEW_PAIRS = 4096
"""Up to so many, one kernel sorts, in which each program looks at all pairs."""
_PAIR_BLOCKS = 4, 1024
"""Output features and depth of a block of weights that is read for one pair."""


@dataclass(frozen=True)
class Tiles:
    """How a grouped product is cut: rows (pairs), columns (output features) and depth of a tile."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def route(
    launch: Launch, x: Tensor, router: ResidentLinear, correction: Tensor | None, moe: MoE
) -> tuple[Tensor, Tensor]:
    """The experts of each token of x [T, H] and their weights: int32 and fp32, [T, top_k] each.

    Args:
        router: [experts, H], in fp32.
        correction: [experts], fp32.
    """
    logits = _router_logits(launch, x, router)
    tokens = len(x)
    ids = x.new_empty(tokens, moe.top_k, dtype=torch.int32)
    weights = x.new_empty(tokens, moe.top_k, dtype=torch.float32)
    size = moe.experts // moe.groups
    constants: dict[str, Constant] = {
        "SIZE": size,
        "GROUPS": moe.groups,
        "TOP_GROUPS": moe.top_groups,
        "TOP_K": moe.top_k,
        "BLOCK_SIZE": power_of_two(size),
        "BLOCK_GROUPS": power_of_two(moe.groups),
        "BLOCK_TOP": power_of_two(moe.top_k),
        "SCORES": moe.scores,
        "TWO_BEST": moe.group_score == "top2",
        "NORMALIZE": moe.normalize,
        "SCALE": moe.scale,
        "JITTER": moe.jitter,
    }
    launch("experts.choose", (tokens,), (logits, correction, ids, weights), constants, warps=1, pdl=True)
    return ids, weights


def experts(
    launch: Launch,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    weighs_input: bool,
) -> Tensor:
    """Send each token of x [T, H] through its experts → the weighted sum [T, H], added up in fp32.

    Args:
        ids, weights: of `route`.
        gate_up: [experts, 2 * I, H], the gate's rows first; [experts, I, H] where there is no gate.
        down: [experts, H, I].
        biases: of both, [experts, 2 * I or I] and [experts, H].
        weighs_input: the weights multiply what goes into an expert instead.
    """
    tokens, top_k = ids.shape
    if goes_by_pair(tokens, top_k, len(down)):
        return _by_pair(launch, x, ids, weights, gate_up, down, biases, activation, weighs_input)
    return _sorted(launch, x, ids, weights, gate_up, down, biases, activation, weighs_input)


def _router_logits(launch: Launch, x: Tensor, router: ResidentLinear) -> Tensor:
    """[T, experts], in fp32."""
    experts, width = router.weight.shape
    if len(x) > _FEW_TOKENS:
        return F.linear(x.float(), router.weight, router.bias)
    logits = x.new_empty(len(x), experts, dtype=torch.float32)
    constants = {"EXPERTS": experts, "K": width, "BLOCK_N": 2, "BLOCK_K": min(2048, power_of_two(width))}
    grid = (-(-experts // 2), len(x))
    launch("experts.router_logits", grid, (x, router.weight, router.bias, logits), constants, warps=4, pdl=True)
    return logits


def _by_pair(
    launch: Launch,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    weighs_input: bool,
) -> Tensor:
    tokens, top_k = ids.shape
    _, hidden, inner = down.shape
    h = x.new_empty(tokens * top_k, inner)
    out = x.new_empty(tokens, hidden)
    n, k = _PAIR_BLOCKS
    weighs: dict[str, Constant] = {"TOP_K": top_k, "BLOCK_N": n, "WEIGHS_INPUT": weighs_input}
    up = weighs | {"N": inner, "K": hidden, "BLOCK_K": min(k, power_of_two(hidden))} | _activation(activation)
    grid = (-(-inner // n), tokens * top_k)
    launch("experts.pair_up", grid, (x, ids, weights, gate_up, biases[0], h), up, warps=4, pdl=True)
    last = weighs | {"N": hidden, "K": inner, "BLOCK_K": min(k, power_of_two(inner))}
    grid = (-(-hidden // n), tokens)
    launch("experts.pair_down", grid, (h, ids, weights, down, biases[1], out), last, warps=4, pdl=True)
    return out


def _sorted(
    launch: Launch,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    weighs_input: bool,
) -> Tensor:
    tokens, top_k = ids.shape
    count, hidden, inner = down.shape
    pairs = tokens * top_k
    tiles = tiles_for(pairs, count, x.dtype)
    most = (pairs + min(count, pairs) * (tiles.m - 1)) // tiles.m
    slots, owners = _sort(launch, ids, count, tiles.m, most)

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, shared_by: int, **rest: Constant) -> Tensor:
        y = x.new_empty(pairs, n)
        shape = {"N": n, "K": x.shape[1], "SHARED_BY": shared_by}
        cut = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "BAND": 8}
        grid = (most * -(-n // tiles.n),)
        arguments = (x, slots, owners, weights, weight, bias, y, pairs, most)
        launch("experts.grouped", grid, arguments, shape | cut | rest, tiles.warps, tiles.stages, pdl=True)
        return y

    h = multiply(x, gate_up, biases[0], inner, top_k, **_activation(activation), WEIGHS_INPUT=weighs_input)
    none = {"KIND": None, "GATED": False, "LIMIT": None, "OFFSET": 0.0, "WEIGHS_INPUT": False}
    y = multiply(h, down, biases[1], hidden, 1, **none)
    out = x.new_empty(tokens, hidden)
    block = min(1024, power_of_two(hidden))
    grid = (tokens, -(-hidden // block))
    summed = {"WIDTH": hidden, "BLOCK": block, "TOP_K": top_k, "WEIGHS_INPUT": weighs_input}
    launch("experts.combine", grid, (y, weights, out), summed, warps=max(1, block // 256), pdl=True)
    return out


def _sort(launch: Launch, ids: Tensor, experts: int, height: int, tiles: int) -> tuple[Tensor, Tensor]:
    """The pairs of `ids` by expert, in tiles of some height, and the expert of each tile."""
    pairs = ids.numel()
    slots, owners = ids.new_empty(tiles * height), ids.new_empty(tiles)
    bins = power_of_two(experts + 1)
    constants = {"EXPERTS": experts, "BINS": bins, "BLOCK_M": height}
    if pairs <= _FEW_PAIRS:
        constants["BLOCK"] = 128 if pairs <= 128 else 1024
        launch("experts.sort", (experts,), (ids, slots, owners, pairs, tiles), constants, warps=4, pdl=True)
        return slots, owners
    blocks = -(-pairs // 256)
    counts = ids.new_empty(blocks, bins)
    launch("experts.count", (blocks,), (ids, counts, pairs), {"BINS": bins, "BLOCK": 256}, warps=4, pdl=True)
    constants["BLOCK"] = 256
    launch("experts.place", (blocks,), (ids, counts, slots, owners, pairs, tiles), constants, warps=4, pdl=True)
    return slots, owners


def goes_by_pair(tokens: int, top_k: int, experts: int) -> bool:
    """Whether so few pairs hardly share an expert, so that sorting them would save no reading."""
    return tokens == 1 or tokens * top_k <= min(32, experts // 2)


def tiles_for(pairs: int, experts: int, dtype: torch.dtype) -> Tiles:
    """How to cut the grouped products of so many pairs: tiles about as high as an expert has pairs."""
    share = pairs // experts
    if dtype == torch.float32:
        return Tiles(16, 32, 32, 4, 2) if share <= 16 else Tiles(64, 32, 32, 4, 2)
    if share <= 16:
        return Tiles(16, 64, 128, 4, 3)
    if share <= 64:
        return Tiles(64, 64, 64, 4, 4)
    return Tiles(128, 128, 64, 8, 3)


def _activation(activation: Activation) -> dict[str, Constant]:
    return {
        "KIND": activation.kind,
        "GATED": activation.gated,
        "LIMIT": activation.limit,
        "OFFSET": activation.offset,
    }
