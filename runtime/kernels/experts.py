"""Kernels of a mixture of experts: routing, grouped matrix products and the weighted sum.

A pair is a token together with one of its TOP_K experts: pair p stands for token p // TOP_K. Few tokens pass through
their experts pair by pair (`pair_up`, `pair_down`). Many are sorted by expert first (`sort`, or `count` and `place`),
in tiles of BLOCK_M pairs of one expert, so that an expert's weights are read once for all of them (`grouped`; Gale et
al. 2022, MegaBlocks, arXiv:2211.15841). Nothing depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trtx.runtime.kernels.elementwise import activate


@triton.jit
def router_logits(
    x, weight, bias, out, EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """x [T, K] times weight [EXPERTS, K] (fp32), in fp32 → [T, EXPERTS]. Grid: (blocks of experts, T)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    rows = weight + expert[:, None] * K + k[None, :]
    known = (expert < EXPERTS)[:, None]
    w = tl.load(rows, mask=known & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = x + token.to(tl.int64) * K + k
    total = w * tl.load(source, mask=k < K, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK_K, K, BLOCK_K):
        inside = k < K - start
        w = tl.load(rows + start, mask=known & inside[None, :], other=0.0)
        total += w * tl.load(source + start, mask=inside, other=0.0).to(tl.float32)[None, :]
    logits = tl.sum(total, 1)
    if bias is not None:
        logits += tl.load(bias + expert, mask=expert < EXPERTS, other=0.0)
    tl.store(out + token * EXPERTS + expert, logits, mask=expert < EXPERTS)


@triton.jit
def choose(
    logits,
    correction,
    ids,
    weights,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    SCORES: tl.constexpr,
    TWO_BEST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    JITTER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Experts and weights of a token, as `runtime.ops.torch_moe` means them; of equal scores the first. Grid: T.

    Args:
        logits: [T, GROUPS * SIZE], fp32: GROUPS groups of SIZE experts.
        correction: [GROUPS * SIZE] or absent.
        ids, weights: [T, TOP_K], int32 and fp32.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.arange(0, BLOCK_GROUPS)[:, None]
    member = tl.arange(0, BLOCK_SIZE)[None, :]
    known = (group < GROUPS) & (member < SIZE)
    expert = group * SIZE + member
    if correction is not None:
        added = tl.load(correction + expert, mask=known, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    logit = tl.load(logits + token * (GROUPS * SIZE) + expert, mask=known, other=float("-inf"))
    if SCORES == "softmax":
        score = tl.exp(logit - tl.max(logit))
        score = score / tl.sum(score)
    elif SCORES == "sigmoid":
        score = tl.sigmoid(logit)
    else:
        score = logit
    rank = score
    if correction is not None:
        rank += added
    rank = tl.where(known & (rank == rank), rank, float("-inf"))
    if GROUPS > 1:
        best = tl.max(rank, 1)
        if TWO_BEST:
            first = tl.argmax(rank, 1)[:, None] == member
            best += tl.max(tl.where(first, float("-inf"), rank), 1)
        number = tl.arange(0, BLOCK_GROUPS)
        kept = number < 0
        for _ in tl.static_range(TOP_GROUPS):
            chosen = number == tl.argmax(best, 0)
            kept = kept | chosen
            best = tl.where(chosen, float("-inf"), best)
        rank = tl.where(kept[:, None], rank, float("-inf"))

    place = tl.arange(0, BLOCK_TOP)
    flat = tl.reshape(rank, BLOCK_GROUPS * BLOCK_SIZE)
    names = tl.reshape(expert + 0 * known.to(tl.int32), BLOCK_GROUPS * BLOCK_SIZE)
    scores = tl.reshape(score, BLOCK_GROUPS * BLOCK_SIZE)
    chosen_ids = tl.zeros([BLOCK_TOP], tl.int32)
    chosen_scores = tl.full([BLOCK_TOP], float("-inf"), tl.float32)
    lane = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)
    for turn in tl.static_range(TOP_K):
        mine = lane == tl.argmax(flat, 0)
        name = tl.sum(tl.where(mine, names, 0), 0)
        value = tl.sum(tl.where(mine, scores, 0.0), 0)
        if SCORES == "sparsemixer":
            far = (value - scores) / tl.maximum(tl.abs(scores), value) > 2 * JITTER
            value = 1 / tl.sum(tl.where(far, 0.0, tl.exp(flat - value)), 0)
        flat = tl.where(mine, float("-inf"), flat)
        chosen_ids = tl.where(place == turn, name, chosen_ids)
        chosen_scores = tl.where(place == turn, value, chosen_scores)

    weight = tl.where(place < TOP_K, chosen_scores, 0.0)
    if SCORES == "top_softmax":
        weight = tl.exp(chosen_scores - tl.max(chosen_scores, 0))
        weight = weight / tl.sum(weight, 0)
    if SCORES != "sparsemixer":
        if NORMALIZE:
            weight = weight / (tl.sum(weight, 0) + 1e-20)
        weight *= SCALE
    tl.store(ids + token * TOP_K + place, chosen_ids, mask=place < TOP_K)
    tl.store(weights + token * TOP_K + place, weight, mask=place < TOP_K)


@triton.jit
def pair_up(
    x,
    ids,
    routing,
    weight,
    bias,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    WEIGHS_INPUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first linears of each pair's expert, and the activation → out [pairs, N]. Grid: (blocks of N, pairs).

    Args:
        x: [T, K].
        weight: [EXPERTS, 2 * N, K], the gate's rows first; [EXPERTS, N, K] if not GATED.
        bias: as weight without K, or absent.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    known = (n < N)[:, None]
    first = tl.load(ids + pair).to(tl.int64) * (2 * N if GATED else N)
    rows = weight + (first + n)[:, None] * K + k[None, :]
    source = x + (pair // TOP_K).to(tl.int64) * K + k
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    other = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        value = tl.load(source + start, mask=inside, other=0.0)
        if WEIGHS_INPUT:
            value = (value.to(tl.float32) * tl.load(routing + pair)).to(x.dtype.element_ty)
        value = value.to(tl.float32)[None, :]
        mask = known & inside[None, :]
        total += tl.load(rows + start, mask=mask, other=0.0).to(tl.float32) * value
        if GATED:
            other += tl.load(rows + N * K + start, mask=mask, other=0.0).to(tl.float32) * value
    gate = tl.sum(total, 1)
    up = tl.sum(other, 1)
    if bias is not None:
        gate += tl.load(bias + first + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + first + N + n, mask=n < N, other=0.0).to(tl.float32)
    y = between(gate, up, KIND, GATED, LIMIT, OFFSET)
    tl.store(out + pair.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def pair_down(
    x,
    ids,
    routing,
    weight,
    bias,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHS_INPUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last linear of each pair's expert, summed over a token's pairs → out [T, N]. Grid: (blocks of N, T).

    Args:
        x: [pairs, K].
        routing: [T, TOP_K], the weights of the sum, unless WEIGHS_INPUT.
        weight, bias: [EXPERTS, N, K] and, or absent, [EXPERTS, N].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    known = (n < N)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)
    for turn in tl.static_range(TOP_K):
        pair = token * TOP_K + turn
        first = tl.load(ids + pair).to(tl.int64) * N
        share = 1.0 if WEIGHS_INPUT else tl.load(routing + pair)
        rows = weight + (first + n)[:, None] * K + k[None, :]
        source = x + pair.to(tl.int64) * K + k
        for start in range(0, K, BLOCK_K):
            inside = k < K - start
            value = tl.load(source + start, mask=inside, other=0.0).to(tl.float32) * share
            w = tl.load(rows + start, mask=known & inside[None, :], other=0.0).to(tl.float32)
            total += w * value[None, :]
        if bias is not None:
            shift += tl.load(bias + first + n, mask=n < N, other=0.0).to(tl.float32) * share
    y = tl.sum(total, 1) + shift
    tl.store(out + token.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def tiles_of(counts, expert, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many pairs an expert has, its first tile, and how many tiles it needs; `counts` [BINS] are those of all."""
    number = tl.arange(0, BINS)
    needed = tl.where(number < EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(number < expert, needed, 0), 0)
    mine = number == expert
    return tl.sum(tl.where(mine, counts, 0), 0), first, tl.sum(tl.where(mine, needed, 0), 0)


@triton.jit
def own(
    slots, owners, expert, count, first, needed, pairs, tiles, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Write an expert's name to its tiles, and `pairs` to slots that it leaves; the last also ends the tiles."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, needed, BLOCK):
        tl.store(owners + first + start + lane, expert, mask=start + lane < needed)
    if expert == EXPERTS - 1:
        for start in range(first + needed, tiles, BLOCK):
            tl.store(owners + start + lane, -1, mask=start + lane < tiles)
    rest = count + tl.arange(0, BLOCK_M)
    tl.store(slots + first * BLOCK_M + rest, pairs, mask=rest < needed * BLOCK_M)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def sort(
    ids,
    slots,
    owners,
    pairs,
    tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sort pairs by expert into whole tiles, in their order. Grid: EXPERTS; each counts all and places its own.

    Args:
        ids: [pairs]; BINS is a power of two above EXPERTS.
        slots: [tiles, BLOCK_M], the pairs; `pairs` where a tile is not full.
        owners: [tiles], the expert of each tile; -1 for those after the last used.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, BLOCK):
        counts += tl.histogram(tl.load(ids + start + lane, mask=start + lane < pairs, other=BINS - 1), BINS)
    count, first, needed = tiles_of(counts, expert, EXPERTS, BINS, BLOCK_M)
    own(slots, owners, expert, count, first, needed, pairs, tiles, EXPERTS, BLOCK_M, BLOCK)
    place = first * BLOCK_M
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        match = (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(slots + place + tl.cumsum(match, 0) - match, pair, mask=match > 0)
        place += tl.sum(match, 0)


@triton.jit(do_not_specialize=["pairs"])
def count(ids, counts, pairs, BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """How often each expert is named in each block of `ids` → counts [blocks, BINS]. Grid: blocks.

    With `place` it does what `sort` does, for so many pairs that each program should look at a part of them only.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.histogram(tl.load(ids + pair, mask=pair < pairs, other=BINS - 1), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def place(
    ids,
    counts,
    slots,
    owners,
    pairs,
    tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`sort`, after `count`. Grid: blocks; each places its own pairs, and shares the rest out by expert."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    number = tl.arange(0, BINS)
    before = tl.zeros([BINS], tl.int32)
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, blocks, 32):
        other = start + tl.arange(0, 32)[:, None]
        found = tl.load(counts + other * BINS + number[None, :], mask=other < blocks, other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where(other < block, found, 0), 0)
    needed = tl.where(number < EXPERTS, (total + BLOCK_M - 1) // BLOCK_M, 0)
    next_slot = (tl.cumsum(needed, 0) - needed) * BLOCK_M + before

    lane = tl.arange(0, BLOCK)
    pair = block * BLOCK + lane
    name = tl.load(ids + pair, mask=pair < pairs, other=BINS - 1)
    rank = tl.zeros([BLOCK], tl.int32)
    for other in range(0, BLOCK, 32):
        earlier = other + tl.arange(0, 32)
        named = tl.load(ids + block * BLOCK + earlier, mask=block * BLOCK + earlier < pairs, other=-1)
        same = (name[:, None] == named[None, :]) & (earlier[None, :] < lane[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    tl.store(slots + tl.gather(next_slot, name, 0) + rank, pair, mask=pair < pairs)
    for expert in range(block, EXPERTS, blocks):
        mine, first, used = tiles_of(total, expert, EXPERTS, BINS, BLOCK_M)
        own(slots, owners, expert, mine, first, used, pairs, tiles, EXPERTS, BLOCK_M, BLOCK)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def grouped(
    x,
    slots,
    owners,
    routing,
    weight,
    bias,
    out,
    pairs,
    tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARED_BY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    WEIGHS_INPUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """A linear of each tile's expert, and the activation → out [pairs, N]. Grid: tiles * blocks of N.

    Programs that run together share tiles and weights: BAND tiles pass through all blocks of N before the next do.

    Args:
        x: [pairs // SHARED_BY, K]: SHARED_BY consecutive pairs read one row.
        slots, owners: of `sort`.
        routing: [pairs], multiplies x if WEIGHS_INPUT.
        weight, bias: as in `pair_up`.
        KIND: of the activation; None: there is none.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    band = program // (BAND * blocks)
    height = tl.minimum(tiles - band * BAND, BAND)
    tile = band * BAND + program % (BAND * blocks) % height
    block = program % (BAND * blocks) // height
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = tl.load(owners + tile)
    if expert < 0:
        return
    pair = tl.load(slots + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    real = (pair < pairs)[:, None]
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    known = (n < N)[None, :]
    first = expert.to(tl.int64) * (2 * N if GATED else N)
    source = x + (pair // SHARED_BY).to(tl.int64)[:, None] * K + k[None, :]
    columns = weight + (first + n)[None, :] * K + k[:, None]
    if WEIGHS_INPUT:
        share = tl.load(routing + pair, mask=pair < pairs, other=0.0)[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        a = tl.load(source + start, mask=real & inside[None, :], other=0.0)
        if WEIGHS_INPUT:
            a = (a.to(tl.float32) * share).to(x.dtype.element_ty)
        mask = known & inside[:, None]
        gate = tl.dot(a, tl.load(columns + start, mask=mask, other=0.0), gate, input_precision="ieee")
        if GATED:
            up = tl.dot(a, tl.load(columns + N * K + start, mask=mask, other=0.0), up, input_precision="ieee")
    if bias is not None:
        gate += tl.load(bias + first + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + first + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = between(gate, up, KIND, GATED, LIMIT, OFFSET) if KIND is not None else gate
    tl.store(out + pair.to(tl.int64)[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=real & known)


@triton.jit
def combine(
    x, routing, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, WEIGHS_INPUT: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """The weighted sum of a token's pairs, x [T * TOP_K, WIDTH] → out [T, WIDTH]. Grid: (T, blocks of WIDTH)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = x + token.to(tl.int64) * (TOP_K * WIDTH) + column
    total = tl.zeros([BLOCK], tl.float32)
    for turn in tl.static_range(TOP_K):
        share = 1.0 if WEIGHS_INPUT else tl.load(routing + token * TOP_K + turn)
        total += tl.load(source + turn * WIDTH, mask=inside, other=0.0).to(tl.float32) * share
    tl.store(out + token.to(tl.int64) * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def between(gate, up, KIND: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """What an MLP does between its linears, see `converters.spec.Activation`; not GATED: `gate` is up."""
    if GATED:
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y = activate(gate, KIND) * (up + OFFSET)
    else:
        y = activate(gate, KIND)
    return y
