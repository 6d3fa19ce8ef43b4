"""Attention over a paged KV cache: what precedes it, decoding tokens, prefill chunks.

A cache is seen as rows of DIM numbers: row (block * KV_HEADS + head) * BLOCK_SIZE + offset. Query heads that share a
key head are rows of one product, GROUP of them in a program (CHUNKS programs where there are more), so that a key is
read once for all of them. The softmax runs online (Milakov & Gimelshein 2018, arXiv:1805.02867), in base 2, over tiles
of BLOCK_N keys, as in FlashAttention-2 (Dao 2023, arXiv:2307.08691).

A cache of latents (DeepSeek-V2, arXiv:2405.04434) is one head whose row is a key of DIM + TAIL features, of which the
first DIM are the value too: `values` is None.
"""

import triton
import triton.language as tl

from trtx.runtime.kernels.elementwise import rounded

LOG2E = tl.constexpr(1.4426950408889634)
UNSEEN = tl.constexpr(-1e30)
"""The largest score of a row that has seen no key yet: finite, so that no difference of two is NaN."""


@triton.jit
def store(
    k, v, cos, sin, k_weight, k_bias, positions, sequence, first, table, keys, values, k_scale, v_scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr, NORM_LAST: tl.constexpr, PER_HEAD: tl.constexpr, EPS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Put the values of tokens, and their keys, normalized and rotated, into the cache.

    A program takes one token and BLOCK_HEADS heads of its keys or its values.

    Args:
        k, v: [T, KV_HEADS, DIM], tokens a stride apart.
        cos, sin: [positions, ROPE / 2] fp32, or None.
        k_weight, k_bias: of the norm, [DIM] or (PER_HEAD) [KV_HEADS, DIM], or None.
        positions, sequence: [T].
        first: the sequence to begin with: nothing is stored for tokens of those before it, nor for padding (-1).
        table: [sequences, WIDTH], the block of each BLOCK_SIZE positions.
        keys, values: the cache; in e4m3 what is stored is divided by its scale.
        NORM: 'none', 'rms', 'layer', or 'unit' (RMSNorm without a weight); NORM_LAST: after the rotation.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    part = tl.program_id(1)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    heads = (part % parts * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    inside = (heads < KV_HEADS) & (dims < DIM)
    position = tl.load(positions + token)
    owner = tl.load(sequence + token)
    wanted = owner >= first
    places = _places(table + owner * WIDTH, position, heads, wanted, KV_HEADS, BLOCK_SIZE, DIM) + dims
    if part < parts:
        x = _normed_and_rotated(
            k + token * K_STRIDE + heads * DIM, k_weight, k_bias, cos, sin, position, heads, dims, inside,
            DIM, ROPE, NORM, NORM_LAST, PER_HEAD, EPS,
        )  # fmt: skip
        tl.store(keys + places, _stored(x, k_scale, keys.dtype.element_ty), inside & wanted)
    else:
        x = tl.load(v + token * V_STRIDE + heads * DIM + dims, inside, other=0.0).to(tl.float32)
        tl.store(values + places, _stored(x, v_scale, values.dtype.element_ty), inside & wanted)


@triton.jit
def _places(
    table, position, heads, known, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Where the cache keeps a position of heads, of a sequence whose blocks `table` points at."""
    block = tl.load(table + position // BLOCK_SIZE, known, other=0)
    return ((block * KV_HEADS + heads) * BLOCK_SIZE + position % BLOCK_SIZE).to(tl.int64) * DIM


@triton.jit
def _normed_and_rotated(
    rows, weight, bias, cos, sin, position, heads, dims, inside,
    DIM: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, NORM_LAST: tl.constexpr, PER_HEAD: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Heads [rows, dims] in fp32. Each feature and the one that it is rotated with are both loaded.

    Args:
        rows: [rows, 1], where each begins.
        position: of all rows, or [rows, 1].
        heads: [rows, 1], which head each is.
    """
    y = tl.load(rows + dims, inside, other=0.0).to(tl.float32)
    shift = 0.0
    factor = 1.0
    if NORM != "none" and not NORM_LAST:
        shift, factor = _statistics(y, inside, DIM, NORM, EPS)
        y = _scaled(y, shift, factor, weight, bias, heads, dims, inside, DIM, PER_HEAD)
    if ROPE:
        half: tl.constexpr = ROPE // 2
        partners = tl.where(dims < half, dims + half, tl.where(dims < ROPE, dims - half, dims))
        other = tl.load(rows + partners, inside, other=0.0).to(tl.float32)
        if NORM != "none" and not NORM_LAST:
            other = _scaled(other, shift, factor, weight, bias, heads, partners, inside, DIM, PER_HEAD)
        angles = position * half + tl.where(dims < half, dims, dims - half)
        c = tl.load(cos + angles, inside & (dims < ROPE), other=1.0)
        s = tl.load(sin + angles, inside & (dims < ROPE), other=0.0)
        y = y * c + other * tl.where(dims < half, -s, s)
    if NORM != "none" and NORM_LAST:
        shift, factor = _statistics(y, inside, DIM, NORM, EPS)
        y = _scaled(y, shift, factor, weight, bias, heads, dims, inside, DIM, PER_HEAD)
    return y


@triton.jit
def _statistics(x, inside, DIM: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """What is subtracted from each row of x, and the factor that follows."""
    if NORM == "layer":
        mean = tl.sum(x, 1, keep_dims=True) / DIM
        rest = tl.where(inside, x - mean, 0.0)
        return mean, tl.rsqrt(tl.sum(rest * rest, 1, keep_dims=True) / DIM + EPS)
    else:
        return tl.zeros([x.shape[0], 1], tl.float32), tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + EPS)


@triton.jit
def _scaled(x, shift, factor, weight, bias, heads, dims, inside, DIM: tl.constexpr, PER_HEAD: tl.constexpr):
    places = heads * (DIM if PER_HEAD else 0) + dims
    y = (x - shift) * factor
    if weight is not None:
        y *= tl.load(weight + places, inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + places, inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _stored(x, scale, dtype: tl.constexpr):
    """As the cache keeps it."""
    if dtype == tl.float8e4nv:
        return tl.clamp(tl.div_rn(x, scale), -448.0, 448.0).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def store_latents(
    latent, k_rope, positions, sequence, table, latents,
    DIM: tl.constexpr, TAIL: tl.constexpr, STRIDE: tl.constexpr, TAIL_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_TAIL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Put the latent [T, DIM] and the rotated key [T, TAIL] of a token, a program each, into the cache."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(sequence + token)
    known = owner >= 0
    position = tl.load(positions + token)
    block = tl.load(table + owner * WIDTH + position // BLOCK_SIZE, known, other=0)
    row = latents + (block * BLOCK_SIZE + position % BLOCK_SIZE).to(tl.int64) * (DIM + TAIL)
    dims, ends = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_TAIL)
    start = tl.load(latent + token * STRIDE + dims, dims < DIM, other=0.0)
    end = tl.load(k_rope + token * TAIL_STRIDE + ends, ends < TAIL, other=0.0)
    tl.store(row + dims, start, known & (dims < DIM))
    tl.store(row + DIM + ends, end, known & (ends < TAIL))


@triton.jit
def decode(
    q, k, v, cos, sin, q_weight, q_bias, k_weight, k_bias, keys, values, table, lengths, sinks, slopes, out,
    code_scales, smooth, partials, extremes, counters, scale, k_scale, v_scale,
    KV_HEADS: tl.constexpr, SHARING: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, NORM_LAST: tl.constexpr, PER_HEAD: tl.constexpr, EPS: tl.constexpr,
    FLOOR: tl.constexpr, SCALE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, CAP: tl.constexpr, ROUNDED: tl.constexpr,
    GROUP: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, AT_LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_TAIL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last token of each sequence attends to all that is cached of it, and to itself.

    A program takes one sequence, GROUP query heads that share a key head, and with SPLIT an equal share of the keys
    (Flash-Decoding: Dao et al. 2023). The share that is ready last adds all of them up, in their order. The first
    share puts the token's own key and value into the cache; programs that share a key head put the same there.

    Args:
        q: [sequences, heads, DIM + TAIL], sequences a stride apart; normalized and rotated here.
        k, v: [sequences, KV_HEADS, DIM], as in `store`, with what follows; None: they are in the cache already.
        table: [sequences, WIDTH]; lengths: [sequences], 0: nothing is there, and the output is 0.
        sinks: [heads] fp32, or None.
        slopes: of ALiBi, [heads] fp32, or None; with a ROUNDED scale of the bias, which is rounded to bf16 first.
        out: [sequences, heads, DIM].
        code_scales: of a linear that multiplies e4m3 codes, 1 / input scale first: `out` are those codes, of what else
            would stand there in q's dtype. Or None.
        smooth: [heads * DIM], multiplied with before; or None.
        partials: [sequences, KV_HEADS * CHUNKS, shares, GROUP, DIM] fp32, not normalized, and `extremes`:
            [sequences, KV_HEADS * CHUNKS, shares, 2, GROUP] fp32, the largest score and the sum; None without SPLIT.
        counters: [sequences * KV_HEADS * CHUNKS], 0 before and after.
        scale: of the scores, the keys' scale included.
        k_scale, v_scale: of the cache.
        SHARING: query heads a key head.
        FLOOR, SCALE: of `converters.spec.QueryScaling`; a floor of 0: none.
        AT_LEAST: tiles in a share; fewer shares than programs are made of short sequences.
        BLOCK_G, AT_ONCE: rows of GROUP, and shares, that are added up at once.
        WINDOW: positions seen; 0: all. CHUNKED: from its last multiple on. CAP: of the scores; 0: none.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(0)
    group = tl.program_id(1)
    head = group // CHUNKS
    within = tl.arange(0, BLOCK_M)
    heads, present = _heads(within, head, group % CHUNKS, SHARING, GROUP)
    length = tl.load(lengths + sequence)
    end = length if k is None else length - 1
    first_seen = _first_seen(length - 1, WINDOW, CHUNKED)
    first_tile = first_seen // BLOCK_N
    tiles = tl.cdiv(end, BLOCK_N) - first_tile
    begin = first_tile * BLOCK_N
    share = 0
    shares = 1
    if SPLIT:
        share = tl.program_id(2)
        share_tiles = tl.maximum(tl.cdiv(tiles, tl.num_programs(2)), AT_LEAST)
        shares = tl.maximum(tl.cdiv(tiles, share_tiles), 1)
        if share >= shares:
            return
        begin += share * share_tiles * BLOCK_N
        end = tl.minimum(begin + share_tiles * BLOCK_N, end)

    if k is not None:
        # Earlier steps wrote what is cached: the first tile is on its way while the kernel before still runs.
        positions = begin + tl.arange(0, BLOCK_N)
        there = (positions >= first_seen) & (positions < end)
        dims = tl.arange(0, BLOCK_DIM)[None, :]
        known = there[:, None] & (dims < DIM)
        places = _places(table + sequence * WIDTH, positions, head, there, KV_HEADS, BLOCK_SIZE, DIM)[:, None] + dims
        first_keys = tl.load(keys + places, known, other=0.0)
        first_values = tl.load(values + places, known, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    query = q + sequence.to(tl.int64) * Q_STRIDE + heads[:, None] * (DIM + TAIL)
    x = _queries(
        query, q_weight, q_bias, cos, sin, tl.maximum(length - 1, 0), heads[:, None], present[:, None],
        keys.dtype.element_ty, DIM, ROPE, NORM, NORM_LAST, PER_HEAD, EPS, FLOOR, SCALE, BLOCK_DIM,
    )  # fmt: skip
    tail = _tails(query + DIM, present[:, None], keys.dtype.element_ty, TAIL, BLOCK_TAIL) if TAIL else None
    slope = tl.load(slopes + heads, present, other=0.0) if slopes is not None else None
    peak = tl.full([BLOCK_M], UNSEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    seen = tl.full([BLOCK_M], 0, tl.int32) + length - 1
    if k is not None:
        # The token itself, whose key and value need not come back from the cache.
        one = tl.full([1, 1], 0, tl.int32) + head
        own = (share == 0) & (length > 0) & (dims < DIM)
        key = _normed_and_rotated(
            k + sequence.to(tl.int64) * K_STRIDE + one * DIM, k_weight, k_bias, cos, sin, tl.maximum(length - 1, 0),
            one, dims, own, DIM, ROPE, NORM, NORM_LAST, PER_HEAD, EPS,
        )  # fmt: skip
        key = _stored(key, k_scale, keys.dtype.element_ty)
        value = tl.load(v + sequence.to(tl.int64) * V_STRIDE + one * DIM + dims, own, other=0.0).to(tl.float32)
        value = _stored(value, v_scale, values.dtype.element_ty)
        place = _places(table + sequence * WIDTH, length - 1, one, length > 0, KV_HEADS, BLOCK_SIZE, DIM) + dims
        tl.store(keys + place, key, own)
        tl.store(values + place, value, own)
        scores = tl.sum(x.to(tl.float32) * key.to(tl.float32), 1, keep_dims=True)
        scores, factor = _biased(scores, tl.full([1], 0, tl.int32) + length - 1, slope, scale, CAP, ROUNDED)
        scores = tl.where((share == 0) & (length > 0), scores, float("-inf"))
        peak, total, weights, _ = _online(peak, total, scores, factor)
        sums = weights * value.to(tl.float32)

        scores = tl.dot(x, first_keys.to(x.dtype).T, input_precision="ieee")
        scores, factor = _biased(scores, positions, slope, scale, CAP, ROUNDED)
        scores = tl.where(there[None, :], scores, float("-inf"))
        peak, total, weights, fading = _online(peak, total, scores, factor)
        sums = tl.dot(weights.to(x.dtype), first_values.to(x.dtype), sums * fading[:, None], input_precision="ieee")
        begin += BLOCK_N
    for start in range(begin, end, BLOCK_N):
        peak, total, sums = _tile(
            peak, total, sums, x, tail, keys, values, table + sequence * WIDTH, head, start, seen, first_seen, end,
            slope, scale,
            KV_HEADS, DIM, TAIL, BLOCK_SIZE, WINDOW, CHUNKED, CAP, ROUNDED,
            BLOCK_N, BLOCK_DIM, BLOCK_TAIL, True,
        )  # fmt: skip

    if not SPLIT or shares == 1:
        result = _normalized(peak, total, sums, sinks, heads, present, v_scale)
        result = _as_input(result, heads, present, code_scales, smooth, q.dtype.element_ty, DIM, BLOCK_DIM)
        _put(out, sequence * (KV_HEADS * SHARING) + heads, result, present, DIM, BLOCK_DIM)
    elif SPLIT:
        ordinal = sequence * (KV_HEADS * CHUNKS) + group
        first_share = ordinal.to(tl.int64) * tl.num_programs(2)
        mine = first_share + share
        inside = within < GROUP
        tl.store(extremes + mine * (2 * GROUP) + within, peak, inside)
        tl.store(extremes + mine * (2 * GROUP) + GROUP + within, total, inside)
        _put(partials, mine * GROUP + within, sums, inside, DIM, BLOCK_DIM)
        tl.debug_barrier()  # every thread has stored before one of them says so
        if tl.atomic_add(counters + ordinal, 1, sem="acq_rel", scope="gpu") == shares - 1:
            tl.store(counters + ordinal, 0)
            few = tl.arange(0, BLOCK_G)
            heads_of_few, some = _heads(few, head, group % CHUNKS, SHARING, GROUP)
            highest, whole, added = _added(
                partials, extremes, first_share, shares, few, DIM, GROUP, BLOCK_G, BLOCK_DIM, AT_ONCE
            )
            result = _normalized(highest, whole, added, sinks, heads_of_few, some, v_scale)
            result = _as_input(result, heads_of_few, some, code_scales, smooth, q.dtype.element_ty, DIM, BLOCK_DIM)
            _put(out, sequence * (KV_HEADS * SHARING) + heads_of_few, result, some, DIM, BLOCK_DIM)


@triton.jit
def prefill(
    q, cos, sin, q_weight, q_bias, keys, values, table, lengths, starts, tiles, sinks, slopes, out,
    code_scales, smooth, scale, v_scale,
    KV_HEADS: tl.constexpr, SHARING: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr,
    Q_STRIDE: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, NORM_LAST: tl.constexpr, PER_HEAD: tl.constexpr, EPS: tl.constexpr,
    FLOOR: tl.constexpr, SCALE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, CAP: tl.constexpr, ROUNDED: tl.constexpr,
    GROUP: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_TAIL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The new tokens of sequences attend to what is cached of them, up to themselves.

    A program takes a tile, TOKENS tokens with GROUP query heads each, whose keys fall into up to three ranges: those
    where some rows see only a part because of the window, those that all rows see, those on the diagonal.

    Args:
        starts: [sequences + 1], the first new token of each among all, [T].
        tiles: [N, 2], a sequence (-1: nothing to do) and the first token of the tile among its new ones.
        q, out: [T, heads, …]; the other arguments are those of `decode`, but all keys are in the cache.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later tokens see more: the longest work begins first
    sequence = tl.load(tiles + tile * 2)
    if sequence < 0:
        return
    first_row = tl.load(tiles + tile * 2 + 1)
    head = group // CHUNKS
    first_token = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first_token
    past = tl.load(lengths + sequence) - count

    rows = tl.arange(0, BLOCK_M)
    token = first_row + rows // GROUP
    heads, present = _heads(rows % GROUP, head, group % CHUNKS, SHARING, GROUP)
    present &= (rows < TOKENS * GROUP) & (token < count)
    seen = past + token
    place = ((first_token + token) * (KV_HEADS * SHARING) + heads).to(tl.int64)
    query = q + ((first_token + token).to(tl.int64) * Q_STRIDE + heads * (DIM + TAIL))[:, None]
    x = _queries(
        query, q_weight, q_bias, cos, sin, seen[:, None], heads[:, None], present[:, None],
        keys.dtype.element_ty, DIM, ROPE, NORM, NORM_LAST, PER_HEAD, EPS, FLOOR, SCALE, BLOCK_DIM,
    )  # fmt: skip
    tail = _tails(query + DIM, present[:, None], keys.dtype.element_ty, TAIL, BLOCK_TAIL) if TAIL else None
    slope = tl.load(slopes + heads, present, other=0.0) if slopes is not None else None
    peak = tl.full([BLOCK_M], UNSEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)

    first = past + first_row
    last = past + tl.minimum(first_row + TOKENS, count) - 1
    since = _first_seen(first, WINDOW, CHUNKED)
    begin = since // BLOCK_N * BLOCK_N
    diagonal = (first + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        whole = tl.cdiv(_first_seen(last, WINDOW, CHUNKED), BLOCK_N) * BLOCK_N
        diagonal = tl.maximum(diagonal, begin)
        for start in range(begin, tl.minimum(whole, diagonal), BLOCK_N):
            peak, total, sums = _tile(
                peak, total, sums, x, tail, keys, values, table + sequence * WIDTH, head, start, seen, since, last + 1,
                slope, scale,
                KV_HEADS, DIM, TAIL, BLOCK_SIZE, WINDOW, CHUNKED, CAP, ROUNDED,
                BLOCK_N, BLOCK_DIM, BLOCK_TAIL, True,
            )  # fmt: skip
        begin = tl.minimum(whole, diagonal)
    for start in range(begin, diagonal, BLOCK_N):
        peak, total, sums = _tile(
            peak, total, sums, x, tail, keys, values, table + sequence * WIDTH, head, start, seen, since, last + 1,
            slope, scale,
            KV_HEADS, DIM, TAIL, BLOCK_SIZE, WINDOW, CHUNKED, CAP, ROUNDED,
            BLOCK_N, BLOCK_DIM, BLOCK_TAIL, False,
        )  # fmt: skip
    for start in range(diagonal, last + 1, BLOCK_N):
        peak, total, sums = _tile(
            peak, total, sums, x, tail, keys, values, table + sequence * WIDTH, head, start, seen, since, last + 1,
            slope, scale,
            KV_HEADS, DIM, TAIL, BLOCK_SIZE, WINDOW, CHUNKED, CAP, ROUNDED,
            BLOCK_N, BLOCK_DIM, BLOCK_TAIL, True,
        )  # fmt: skip

    result = _normalized(peak, total, sums, sinks, heads, present, v_scale)
    result = _as_input(result, heads, present, code_scales, smooth, q.dtype.element_ty, DIM, BLOCK_DIM)
    _put(out, place, result, present, DIM, BLOCK_DIM)


@triton.jit
def _heads(within, head, chunk, SHARING: tl.constexpr, GROUP: tl.constexpr):
    """Query heads with the numbers `within` their group, and which of them there are."""
    member = chunk * GROUP + within
    return head * SHARING + member, (within < GROUP) & (member < SHARING)


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr, CHUNKED: tl.constexpr):
    """The first position that the token at `position` attends to."""
    if CHUNKED:
        return position // WINDOW * WINDOW
    elif WINDOW:
        return tl.maximum(position - (WINDOW - 1), 0)
    else:
        return position * 0


@triton.jit
def _queries(
    rows, weight, bias, cos, sin, position, heads, present, cached: tl.constexpr,
    DIM: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, NORM_LAST: tl.constexpr, PER_HEAD: tl.constexpr, EPS: tl.constexpr,
    FLOOR: tl.constexpr, SCALE: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Queries that begin at `rows`, normalized, rotated and scaled, to multiply `cached` numbers; see `_fit`."""
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    x = _normed_and_rotated(
        rows, weight, bias, cos, sin, position, heads, dims, present & (dims < DIM),
        DIM, ROPE, NORM, NORM_LAST, PER_HEAD, EPS,
    )  # fmt: skip
    if FLOOR > 0:
        x *= 1 + SCALE * tl.log(1 + tl.floor((position + 1).to(tl.float32) / FLOOR))
    return _fit(x.to(rows.dtype.element_ty), cached)


@triton.jit
def _tails(rows, present, cached: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """SIZE numbers from each of `rows` on, as they are, [rows, BLOCK]."""
    dims = tl.arange(0, BLOCK)[None, :]
    return _fit(tl.load(rows + dims, present & (dims < SIZE), other=0.0), cached)


@triton.jit
def _fit(x, cached: tl.constexpr):
    """x in the dtype that it multiplies `cached` numbers in: e4m3 becomes fp16 in one instruction, bf16 in several."""
    return x.to(tl.float16) if cached == tl.float8e4nv and x.dtype == tl.bfloat16 else x


@triton.jit
def _tile(
    peak, total, sums, x, tail, keys, values, table, head, start, seen, since, end, slope, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNKED: tl.constexpr, CAP: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows at positions `seen` attend to the keys of positions `start` … `start` + BLOCK_N - 1.

    Args:
        peak, total, sums: the largest score so far times log2 e, the sum of the exponentials, [rows], and the sum of
            the values weighted with them, [rows, BLOCK_DIM].
        since, end: no row sees positions outside them; what is cached there may be anything, also NaN.
        MASKED: not all rows see all keys.
    """
    positions = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    if MASKED:
        there = (positions >= since) & (positions < end) if WINDOW else positions < end
        known = there[:, None] & (dims < DIM)
        blocks = tl.load(table + positions // BLOCK_SIZE, there, other=0)
    else:
        known = dims < DIM
        blocks = tl.load(table + positions // BLOCK_SIZE)
    rows = (blocks * KV_HEADS + head) * BLOCK_SIZE + positions % BLOCK_SIZE
    places = rows.to(tl.int64)[:, None] * (DIM + TAIL)
    if MASKED or BLOCK_DIM > DIM:
        k = tl.load(keys + places + dims, known, other=0.0).to(x.dtype)
    else:
        k = tl.load(keys + places + dims).to(x.dtype)
    scores = tl.dot(x, k.T, input_precision="ieee")
    if TAIL:
        ends = tl.arange(0, BLOCK_TAIL)[None, :]
        ending_known = there[:, None] & (ends < TAIL) if MASKED else ends < TAIL
        ending = tl.load(keys + places + (DIM + ends), ending_known, other=0.0).to(x.dtype)
        scores = tl.dot(tail, ending.T, scores, input_precision="ieee")

    scores, factor = _biased(scores, positions, slope, scale, CAP, ROUNDED)
    if MASKED:
        visible = there[None, :] & (positions[None, :] <= seen[:, None])
        if WINDOW:
            visible &= positions[None, :] >= _first_seen(seen, WINDOW, CHUNKED)[:, None]
        scores = tl.where(visible, scores, float("-inf"))

    peak, total, weights, fading = _online(peak, total, scores, factor)
    if values is None:
        v = k
    elif MASKED or BLOCK_DIM > DIM:
        v = tl.load(values + places + dims, known, other=0.0).to(x.dtype)
    else:
        v = tl.load(values + places + dims).to(x.dtype)
    sums = tl.dot(weights.to(x.dtype), v, sums * fading[:, None], input_precision="ieee")
    return peak, total, sums


@triton.jit
def _biased(scores, positions, slope, scale, CAP: tl.constexpr, ROUNDED: tl.constexpr):
    """Scores [rows, keys] with the soft cap and ALiBi, but for a factor: times it, they are exponents of 2."""
    factor = scale * LOG2E
    if CAP > 0:
        scores = CAP * (1 - 2 / (tl.exp2(scores * (factor * (2 / CAP))) + 1))
        factor = LOG2E
    if slope is not None:
        bias = slope[:, None] * positions.to(tl.float32)[None, :]
        if ROUNDED > 0:
            near = positions.to(tl.float32).to(tl.bfloat16).to(tl.float32)[None, :]
            bias = (slope[:, None] * near).to(tl.bfloat16).to(tl.float32) * ROUNDED
        scores = scores * (factor / LOG2E) + bias
        factor = LOG2E
    return scores, factor


@triton.jit
def _online(peak, total, scores, factor):
    """The new peak and total, the weights of these scores, and what earlier sums fade by."""
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - higher[:, None])
    fading = tl.exp2(peak - higher)
    return higher, total * fading + tl.sum(weights, 1), weights, fading


@triton.jit
def _added(
    partials, extremes, first, shares, few,
    DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What the shares `first` … `first` + shares - 1 found, as if one program had seen all keys.

    Read past the first-level cache, which may hold what stood there before another program wrote.
    """
    dims = tl.arange(0, BLOCK_DIM)
    peak = tl.full([BLOCK_G], UNSEEN, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_DIM], tl.float32)
    for start in range(0, shares, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        known = (some < shares)[:, None] & (few < GROUP)[None, :]
        places = (first + some)[:, None] * (2 * GROUP) + few[None, :]
        peaks = tl.load(extremes + places, known, other=UNSEEN, cache_modifier=".cg")
        totals = tl.load(extremes + places + GROUP, known, other=0.0, cache_modifier=".cg")
        found = tl.load(
            partials + ((first + some)[:, None] * GROUP + few[None, :])[:, :, None] * DIM + dims[None, None, :],
            known[:, :, None] & (dims < DIM)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(peaks, 0))
        weights = tl.exp2(peaks - higher[None, :])
        fading = tl.exp2(peak - higher)
        total = total * fading + tl.sum(weights * totals, 0)
        sums = sums * fading[:, None] + tl.sum(weights[:, :, None] * found, 0)
        peak = higher
    return peak, total, sums


@triton.jit
def _normalized(peak, total, sums, sinks, heads, present, v_scale):
    """Divided by the sum of the exponentials, that of the head's sink included; 0 where no key was seen."""
    if sinks is not None:
        sink = tl.load(sinks + heads, present, other=UNSEEN) * LOG2E
        higher = tl.maximum(peak, sink)
        fading = tl.exp2(peak - higher)
        total = total * fading + tl.exp2(sink - higher)
        sums *= fading[:, None]
    return sums * (v_scale / tl.where(total == 0, 1.0, total))[:, None]


@triton.jit
def _as_input(
    x, heads, present, code_scales, smooth, dtype: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Heads x [rows, BLOCK_DIM] as codes of their numbers in `dtype`, if the next linear multiplies codes; in fp32."""
    if code_scales is not None:
        x = x.to(dtype).to(tl.float32)
        if smooth is not None:
            dims = tl.arange(0, BLOCK_DIM)[None, :]
            columns = heads[:, None] * DIM + dims
            x *= tl.load(smooth + columns, present[:, None] & (dims < DIM), other=0.0).to(tl.float32)
        x = rounded(x, tl.load(code_scales), "e4m3")
    return x


@triton.jit
def _put(out, rows, x, present, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store x [rows, BLOCK_DIM] as rows of DIM numbers, where `present`."""
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    places = rows.to(tl.int64)[:, None] * DIM + dims
    tl.store(out + places, x.to(out.dtype.element_ty), present[:, None] & (dims < DIM))
