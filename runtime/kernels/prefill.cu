// `prefill` of attention.py for heads of 64 or 128 features in bf16 or fp16 and a cache in their dtype, on an H100
// (sm_90a): causal, without windows, soft caps, sinks, ALiBi and latents. Arguments are those of the kernel there but
// for what is for these, and how many `tiles` there are.
//
// A program is three warpgroups, and goes through its share of the work. Of the first, two warps copy keys and values
// into a ring of SLOTS tiles, and two put the queries of the next work, normalized and rotated, beside those of this
// one. The other two multiply 64 rows each (FlashAttention-3: Shah et al. 2024, arXiv:2407.08608): while weights of one
// tile are multiplied with values, the softmax of the next one is computed, and the two warpgroups take turns. Tiles of
// keys are taken from the diagonal backwards, so that only the first two are masked.
//
// Tiles in shared memory are [DIM / 64][rows][64 features], each row's 16-byte pieces exclusive-ored with the row's
// number, as wgmma's 128-byte swizzle wants them: keys and queries are K-major, values N-major.
//
// Work of later tokens is longer and comes first. Programs take it forwards and backwards in turns, so that who had
// the longest of one round has the shortest of the next.
//
// Defined before this: KV_HEADS, SHARING, DIM; Q_STRIDE; ROPE: DIM or 0; NORM, NORM_LAST, PER_HEAD, NORM_BYTES (of a
// number of the norm's weights), EPS, FLOOR, SCALE; WIDTH, BLOCK_SIZE; CODES: out are codes; PDL; HALF: q is fp16;
// SLOTS, TURNS: whether warpgroups wait for each other's turn; SHARED: bytes of shared memory; WARPS: 12.

#define BYTES 2
#include "common.cu"
#include "mma.cu"
#include "hopper.cu"
#include "attention.cu"

constexpr int ROWS = 128, KEYS = 128, TOKENS = ROWS / SHARING;
constexpr int HALF_TILE = 128 * 128, TILE = DIM / 64 * HALF_TILE;  // bytes
constexpr int PAIRS = DIM / 16;   // of 8 features and the 8 that they are rotated with, in a row
constexpr int PIECES = DIM / 8;   // of 8 features in a row
constexpr int COPIERS = 64, RESTING = DIM == 64 ? 120 : 88, WORKING = DIM == 64 ? 192 : 208;  // threads; registers
constexpr int BARRIERS = 2 * SLOTS + 4;
constexpr float SLACK = 8;  // what a score, as a power of two, may be above the peak that is known
static_assert((DIM == 64 || DIM == 128) && (ROPE == 0 || ROPE == DIM) && SHARING <= ROWS && WARPS == 12, "shapes");
static_assert(RESTING + 2 * WORKING <= 3 * 168, "who asks for more registers than 168 * 384 waits forever");
static_assert(BLOCK_SIZE % 8 == 0 && KEYS % BLOCK_SIZE == 0, "a page lies in one tile");

__device__ __forceinline__ bool barrier_passed_now(unsigned at, int parity) {
    unsigned done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
    return done;
}

// 16 bytes into shared memory; of them `present` are read, and the others are 0.
__device__ __forceinline__ void copy(unsigned to, const unsigned char* from, int present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(present) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int PENDING> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// c [64, 128] = or += a [64, 16] times b [128, 16] transposed, both in shared memory.
__device__ __forceinline__ void multiply_queries(float (&c)[64], unsigned long long a, unsigned long long b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " " LIST64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
                 : F64(c) : "l"(a), "l"(b), "r"(add));
}

// c [64, N] += a [64, 16] times b [16, N]; b in shared memory.
__device__ __forceinline__ void multiply_weights(float (&c)[64], const unsigned (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." TYPES " " LIST64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : F64(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_weights(float (&c)[32], const unsigned (&a)[4], unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " " LIST32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : F32(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <int N> __device__ __forceinline__ void settled(unsigned (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < 4 * N; i++) asm volatile("" : "+r"(x[i / 4][i % 4]) : : "memory");
}

// Where a tile has a piece of 8 features of a row, in bytes.
__device__ __forceinline__ int place(int row, int piece) {
    return piece / 8 * HALF_TILE + row * 128 + (piece % 8 ^ row % 8) * 16;
}

// A tile's work for one key head.
struct Work {
    int head, sequence, first_row, first_token, count, past, end;  // end: keys that its last token sees

    // That of a number below `total`.
    __device__ __forceinline__ void find(int index, int total, const int* tiles, const int* starts,
                                         const int* lengths) {
        const int tile = (total - 1 - index) / KV_HEADS;
        head = index % KV_HEADS;
        sequence = tiles[2 * tile];
        first_row = tiles[2 * tile + 1];
        first_token = starts[sequence];
        count = starts[sequence + 1] - first_token;
        past = lengths[sequence] - count;
        end = past + min(first_row + TOKENS, count);
    }
    // The number of the work that this program has in a round; from `total` on, it has none.
    static __device__ __forceinline__ int number(int round) {
        const int across = gridDim.x;
        return round * across + (round % 2 ? across - 1 - (int)blockIdx.x : (int)blockIdx.x);
    }
    __device__ __forceinline__ int tiles_of_keys() const { return (end + KEYS - 1) / KEYS; }
};

static_assert(1024 + (SLOTS + 2) * TILE + 8 * BARRIERS + 16 + 2 * sizeof(Work) <= SHARED, "shared memory");

__device__ __forceinline__ float weight_of(const void* weight, int feature) {
    return NORM_BYTES == 4 ? ((const float*)weight)[feature]
                           : ::number(((const unsigned short*)weight)[feature]);
}

// x of a lane, of PAIRS side by side that have a row: features 8c and up, and DIM / 2 after these.
__device__ __forceinline__ void scale_by_norm(float (&x)[16], const void* weight, int first) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) squares += x[i] * x[i];
#pragma unroll
    for (int far = 1; far < PAIRS; far *= 2) squares += __shfl_xor_sync(~0u, squares, far);
    const float factor = rsqrtf(squares / DIM + EPS);
#pragma unroll
    for (int i = 0; i < 16; i++)
        x[i] *= NORM == rms ? factor * weight_of(weight, first + i / 8 * (DIM / 2) + i % 8) : factor;
}

// Eight numbers of fp32.
struct Eight {
    float4 low, high;
    __device__ __forceinline__ void load(const float* from) { low = *(const float4*)from, high = ((const float4*)from)[1]; }
    __device__ __forceinline__ float operator[](int i) const {
        const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        return all[i];
    }
};

// The queries of a work, normalized and rotated, to shared memory, by MANY threads; zeros where there are none.
// A thread waits once for all that it reads of some rows: of HEADS of a token each.
template <int MANY>
__device__ __forceinline__ void prepare(unsigned char* to, const Work& work, int thread, const unsigned short* q,
                                        const float* cos, const float* sin, const void* weight) {
    constexpr int HEADS = SHARING % 2 ? 1 : SHARING % 4 || NORM != none ? 2 : 4;
    constexpr int ROWS_AT_ONCE = HEADS == 4 || NORM != none ? HEADS : 2 * HEADS;
#pragma unroll 1
    for (int item = thread; item < ROWS / ROWS_AT_ONCE * PAIRS; item += MANY) {
        const int first_row = item / PAIRS * ROWS_AT_ONCE, c = item % PAIRS;
        uint4 words[ROWS_AT_ONCE][2] = {};
        Eight cosines[ROWS_AT_ONCE / HEADS] = {}, sines[ROWS_AT_ONCE / HEADS] = {};
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            const int row = first_row + r, token = work.first_row + row / SHARING;
            const int head = work.head * SHARING + row % SHARING;
            if (row < TOKENS * SHARING && token < work.count) {
                const unsigned short* from = q + (long long)(work.first_token + token) * Q_STRIDE + head * DIM + 8 * c;
                words[r][0] = *(const uint4*)from;
                words[r][1] = *(const uint4*)(from + DIM / 2);
                if (ROPE && r % HEADS == 0) {
                    const long long angles = (long long)(work.past + token) * (DIM / 2) + 8 * c;
                    cosines[r / HEADS].load(cos + angles);
                    sines[r / HEADS].load(sin + angles);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            const int row = first_row + r;
            float x[16];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const unsigned four[4] = {words[r][i].x, words[r][i].y, words[r][i].z, words[r][i].w};
#pragma unroll
                for (int j = 0; j < 8; j++) x[8 * i + j] = ::number(four[j / 2] >> j % 2 * 16 & 0xFFFF);
            }
            const int first = (PER_HEAD ? (work.head * SHARING + row % SHARING) * DIM : 0) + 8 * c;
            if (NORM != none && !NORM_LAST) scale_by_norm(x, weight, first);
            if (ROPE) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float low = x[i], high = x[8 + i], a = cosines[r / HEADS][i], b = sines[r / HEADS][i];
                    x[i] = low * a - high * b;
                    x[8 + i] = high * a + low * b;
                }
            }
            if (NORM != none && NORM_LAST) scale_by_norm(x, weight, first);
            const int position = work.past + work.first_row + row / SHARING;
            const float by = FLOOR > 0 ? 1 + SCALE * logf(1 + floorf((position + 1) / (FLOOR > 0 ? FLOOR : 1))) : 1;
            unsigned y[8];
#pragma unroll
            for (int i = 0; i < 8; i++) y[i] = pair(x[2 * i] * by, x[2 * i + 1] * by);
            *(uint4*)(to + place(row, c)) = make_uint4(y[0], y[1], y[2], y[3]);
            *(uint4*)(to + place(row, c + PAIRS)) = make_uint4(y[4], y[5], y[6], y[7]);
        }
    }
}

// Keys or values of a head from some pages to a tile in shared memory, by COPIERS threads; zeros but for the first
// `present` of them, unless the tile is WHOLE.
template <bool WHOLE>
__device__ __forceinline__ void copy_tile(unsigned to, const unsigned char* cached, const int (&pages)[KEYS / BLOCK_SIZE],
                                          int head, int present, int thread) {
    constexpr int AT_ONCE = COPIERS / PIECES;  // keys
    const int piece = thread % PIECES, key = thread / PIECES;
#pragma unroll
    for (int page = 0; page < KEYS / BLOCK_SIZE; page++) {
        const unsigned char* from =
            cached + (((long long)pages[page] * KV_HEADS + head) * BLOCK_SIZE + key) * (2 * DIM) + 16 * piece;
#pragma unroll
        for (int i = 0; i < BLOCK_SIZE; i += AT_ONCE) {
            const int row = page * BLOCK_SIZE + i + key;
            copy(to + place(row, piece), from + i * (2 * DIM), WHOLE || row < present ? 16 : 0);
        }
    }
}

// A lane's part of 64 rows: of each i there are columns 8 (i / 4) + 2t + i % 2, of row g, and 8 below if i & 2.
struct Rows {
    float peak[2], total[2];

    // Weights are computed ahead of the wait that follows: a store that never happens depends on them all. Without it,
    // ptxas computes them behind the wait, when tensor cores have nothing left to do.
    __device__ __forceinline__ void computed(unsigned unused) const {
        asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %1, 0f00000000;\n@p st.shared.f32 [%0], %1;\n}"
                     : : "r"(unused), "f"(total[0] + total[1]) : "memory");
    }

    // Scores become weights; what earlier sums fade by.
    template <bool MASKED>
    __device__ __forceinline__ void weigh(float (&scores)[64], float (&fading)[2], float factor, int start,
                                          const int (&seen)[2], int t) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = MASKED ? UNSEEN : scores[2 * h];
#pragma unroll
            for (int i = 2 * h; i < 64; i += 4)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (MASKED && start + i / 4 * 8 + 2 * t + j > seen[h]) scores[i + j] = __uint_as_float(0xFF800000);
                    most = fmaxf(most, scores[i + j]);
                }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            // What was summed is scaled anew only where weights would grow: mostly for the first tiles.
            const float higher = most * factor > peak[h] + SLACK ? most * factor : peak[h];
            fading[h] = exp2_of(peak[h] - higher);
            peak[h] = higher;
            float sum = 0;
#pragma unroll
            for (int i = 2 * h; i < 64; i += 4)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    scores[i + j] = exp2_of(fmaf(scores[i + j], factor, -higher));
                    sum += scores[i + j];
                }
            total[h] = total[h] * fading[h] + sum;
        }
    }
};

// Weights of a column and the next, in q's dtype.
__device__ __forceinline__ void pack(unsigned (&weights)[KEYS / 16][4], const float (&scores)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) weights[i / 4][i % 4] = pair(scores[2 * i], scores[2 * i + 1]);
}

// scores = queries times keys, both in shared memory.
__device__ __forceinline__ void multiply_tile(float (&scores)[64], unsigned long long queries, unsigned keys) {
    const unsigned long long b = matrix(keys, HALF_TILE);
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        const int along = (i / 4 * HALF_TILE + i % 4 * 32) >> 4;
        multiply_queries(scores, queries + along, b + along, i > 0);
    }
}

// y += weights times values in shared memory.
__device__ __forceinline__ void multiply_tile(float (&y)[DIM / 2], const unsigned (&weights)[KEYS / 16][4],
                                              unsigned values) {
    const unsigned long long b = matrix(values, HALF_TILE);
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) multiply_weights(y, weights[i], b + (i * 16 * 128 >> 4));
}

// q and the cache are not __restrict__: a kernel that may still run when this one starts writes them.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
prefill(const unsigned short* q, const float* cos, const float* sin, const void* q_weight, const unsigned char* keys,
        const unsigned char* values, const int* table, const int* lengths, const int* starts, const int* tiles,
        unsigned char* out, const float* code_scales, const float* smooth, float scale, float v_scale,
        int tile_count) {
    extern __shared__ unsigned char memory[];
    let_others_start();
    unsigned char* const base = memory + (-shared_address(memory) & 1023);
    unsigned char* const queries = base + SLOTS * TILE;  // of this work, and of the next
    const unsigned ring = shared_address(base), barriers = ring + (SLOTS + 2) * TILE;
    int* const used = (int*)(base + (SLOTS + 2) * TILE + 8 * BARRIERS);
    Work* const prepared = (Work*)(used + 4);  // of the queries in each place
#define FULL(slot) (barriers + 8 * (slot))
#define EMPTY(slot) (barriers + 8 * (SLOTS + (slot)))
#define QUERIES_FULL(which) (barriers + 8 * (2 * SLOTS + (which)))
#define QUERIES_EMPTY(which) (barriers + 8 * (2 * SLOTS + 2 + (which)))
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) {
            barrier_init(FULL(i), COPIERS);
            barrier_init(EMPTY(i), 8);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(QUERIES_FULL(i), 128 - COPIERS);
            barrier_init(QUERIES_EMPTY(i), 8);
        }
        *used = 0;
    }
    __syncthreads();
    int last = 0;  // padding is at the end: it is no work
    for (int i = threadIdx.x; i < tile_count; i += 32 * WARPS)
        if (tiles[2 * i] >= 0) last = i + 1;
    if (last) atomicMax(used, last);
    __syncthreads();
    const int total = *used * KV_HEADS, rounds = (total + (int)gridDim.x - 1) / (int)gridDim.x;
    wait_for_others();

    Work work;
    int ordinal = 0;  // of works that there are: whose queries are in one place and the other in turns
    if (warp < 4) {
        leave_registers<RESTING>();
        if (warp < COPIERS / 32) {
            Turn turn;
            int owed = -1;  // a slot whose copies are on their way
#pragma unroll 1
            for (int round = 0; round < rounds; round++) {
                if (Work::number(round) >= total) continue;
                work.find(Work::number(round), total, tiles, starts, lengths);
                const int* blocks = table + (long long)work.sequence * WIDTH;
                const int count = work.tiles_of_keys(), units = 2 * count;
#pragma unroll 1
                for (int unit = 0; unit < units; unit++) {  // a tile's values come after the keys of the next one
                    const bool is_value = unit == units - 1 || (unit > 0 && unit % 2 == 0);
                    const int back = unit == units - 1 ? count - 1 : is_value ? unit / 2 - 1 : (unit + 1) / 2;
                    const int start = (count - 1 - back) * KEYS, present = work.end - start;
                    int pages[KEYS / BLOCK_SIZE];
#pragma unroll
                    for (int i = 0; i < KEYS / BLOCK_SIZE; i++)
                        pages[i] = blocks[min(start / BLOCK_SIZE + i, (work.end - 1) / BLOCK_SIZE)];
                    const unsigned empty = EMPTY(turn.slot);
                    if (owed >= 0 && !barrier_passed_now(empty, turn.parity ^ 1)) {
                        copies_wait<0>();
                        fence_for_tensor_cores();
                        barrier_arrive(FULL(owed));
                        owed = -1;
                    }
                    barrier_wait(empty, turn.parity ^ 1);
                    const unsigned char* cached = is_value ? values : keys;
                    const unsigned to = ring + turn.slot * TILE;
                    if (present >= KEYS)
                        copy_tile<true>(to, cached, pages, work.head, present, threadIdx.x);
                    else
                        copy_tile<false>(to, cached, pages, work.head, present, threadIdx.x);
                    copies_end();
                    if (owed >= 0) {
                        copies_wait<1>();
                        fence_for_tensor_cores();
                        barrier_arrive(FULL(owed));
                    }
                    owed = turn.slot;
                    turn.next();
                }
            }
            if (owed >= 0) {
                copies_wait<0>();
                fence_for_tensor_cores();
                barrier_arrive(FULL(owed));
            }
        } else {
#pragma unroll 1
            for (int round = 0; round < rounds; round++) {
                if (Work::number(round) >= total) continue;
                const int which = ordinal % 2;
                if (ordinal > 0) {  // the first ones are prepared by those that are waiting for them
                    work.find(Work::number(round), total, tiles, starts, lengths);
                    if (ordinal > 1) barrier_wait(QUERIES_EMPTY(which), (ordinal - 2) / 2 % 2);
                    prepare<128 - COPIERS>(queries + which * TILE, work, threadIdx.x - COPIERS, q, cos, sin, q_weight);
                    if (threadIdx.x == COPIERS) prepared[which] = work;
                    fence_for_tensor_cores();
                    barrier_arrive(QUERIES_FULL(which));
                }
                ordinal++;
            }
        }
    } else {
        take_registers<WORKING>();
        const int group = warp / 4 - 1, g = lane / 4, t = lane % 4;
        const int first_of_warp = 64 * group + warp % 4 * 16;
        const float factor = scale * LOG2E;
        float scores[64] = {}, y[DIM / 2], fading[2];
        unsigned weights[KEYS / 16][4];
        Turn turn;
        if (TURNS && group == 1) announce(2, 256);
#pragma unroll 1
        for (int round = 0; round < rounds; round++) {
            if (Work::number(round) >= total) continue;
            const int which = ordinal % 2;
            unsigned char* const mine = queries + which * TILE;
            if (ordinal == 0) {
                work.find(Work::number(round), total, tiles, starts, lengths);
                prepare<256>(mine, work, threadIdx.x - 128, q, cos, sin, q_weight);
                fence_for_tensor_cores();
                meet(1, 256);
            } else {
                barrier_wait(QUERIES_FULL(which), (ordinal - 1) / 2 % 2);
                work = prepared[which];
            }
            const unsigned long long a = matrix(shared_address(mine) + group * 64 * 128, HALF_TILE);
            const int count = work.tiles_of_keys(), first = work.past + work.first_row;
            const int seen[2] = {first + (first_of_warp + g) / SHARING, first + (first_of_warp + g + 8) / SHARING};
            Rows rows = {{UNSEEN, UNSEEN}, {0, 0}};
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) y[i] = 0;
#define TAKE(turn) barrier_wait(FULL(turn.slot), turn.parity)
#define RELEASE(slot)                                                                                                  \
    if (lane == 0) barrier_arrive(EMPTY(slot))

            int start = (count - 1) * KEYS;
            TAKE(turn);
            if (TURNS) meet(2 + group, 256);
            settled(scores);
            products_begin();
            multiply_tile(scores, a, ring + turn.slot * TILE);
            products_end();
            if (TURNS) announce(3 - group, 256);
            products_wait<0>();
            settled(scores);
            RELEASE(turn.slot);
            turn.next();
            rows.weigh<true>(scores, fading, factor, start, seen, t);
            pack(weights, scores);
#define STEP(MASKED)                                                                                                   \
    {                                                                                                                  \
        start -= KEYS;                                                                                                 \
        const int of_keys = turn.slot;                                                                                 \
        TAKE(turn);                                                                                                    \
        turn.next();                                                                                                   \
        const int of_values = turn.slot;                                                                               \
        if (TURNS) meet(2 + group, 256);                                                                               \
        settled(scores);                                                                                               \
        settled(y);                                                                                                    \
        settled(weights);                                                                                              \
        products_begin();                                                                                              \
        multiply_tile(scores, a, ring + of_keys * TILE);                                                               \
        products_end();                                                                                                \
        TAKE(turn);                                                                                                    \
        turn.next();                                                                                                   \
        multiply_tile(y, weights, ring + of_values * TILE);                                                            \
        products_end();                                                                                                \
        if (TURNS) announce(3 - group, 256);                                                                           \
        products_wait<1>();                                                                                            \
        settled(scores);                                                                                               \
        RELEASE(of_keys);                                                                                              \
        rows.weigh<MASKED>(scores, fading, factor, start, seen, t);                                                    \
        rows.computed(barriers + 8 * BARRIERS);                                                                        \
        products_wait<0>();                                                                                            \
        settled(y);                                                                                                    \
        settled(weights);                                                                                              \
        RELEASE(of_values);                                                                                            \
        if (__any_sync(~0u, fading[0] != 1 || fading[1] != 1))                                                         \
            _Pragma("unroll") for (int i = 0; i < DIM / 2; i++) y[i] *= fading[i / 2 % 2];                             \
        pack(weights, scores);                                                                                         \
    }
            if (start > 0 && start > first + 1) STEP(true);
#pragma unroll 1
            while (start > 0) STEP(false);
            const int of_values = turn.slot;
            TAKE(turn);
            turn.next();
            settled(y);
            settled(weights);
            products_begin();
            multiply_tile(y, weights, ring + of_values * TILE);
            products_end();
            products_wait<0>();
            settled(y);
            RELEASE(of_values);

            // What the warp has found goes where its queries were, and from there, whole pieces at a time, to `out`.
            meet(4 + group, 128);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float sum = rows.total[h];
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                const float by = v_scale / (sum == 0 ? 1 : sum);
                const int row = first_of_warp + 8 * h + g, head = work.head * SHARING + row % SHARING;
#pragma unroll
                for (int i = 2 * h; i < DIM / 2; i += 4) {
                    const int column = i / 4 * 8 + 2 * t;
                    float low = y[i] * by, high = y[i + 1] * by;
                    if (CODES) {
                        low = number(rounded(low)), high = number(rounded(high));
                        if (smooth) low *= smooth[head * DIM + column], high *= smooth[head * DIM + column + 1];
                        *(unsigned short*)(mine + row * 128 + (column / 16 ^ row % 8) * 16 + column % 16) =
                            codes_of(low * *code_scales, high * *code_scales);
                    } else {
                        *(unsigned*)(mine + place(row, i / 4) + 4 * t) = pair(low, high);
                    }
                }
            }
            __syncwarp();
            constexpr int WIDE = CODES ? DIM / 16 : PIECES;  // 16 bytes of a row
#pragma unroll 4
            for (int item = lane; item < 16 * WIDE; item += 32) {
                const int row = first_of_warp + item / WIDE, piece = item % WIDE;
                const int token = work.first_row + row / SHARING;
                if (row < TOKENS * SHARING && token < work.count) {
                    const long long heads = (long long)(work.first_token + token) * (KV_HEADS * SHARING);
                    *(uint4*)(out + (heads + work.head * SHARING + row % SHARING) * (16 * WIDE) + 16 * piece) =
                        *(const uint4*)(mine + place(row, piece));
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(QUERIES_EMPTY(which));
            ordinal++;
        }
    }
}
