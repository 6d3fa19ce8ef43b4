// `skinny` of linear.py for up to TOKENS tokens, x in bf16 or fp16, and a weight of x's dtype or of e4m3: out [M, N] =
// x [M, K] times weight [N, K] (gated: [2N, K]). Weights go from memory to registers to tensor cores, where they are
// mma's A, and each is read once; tokens are the columns of B. Nothing is rearranged: a lane's 16 bytes of a row are
// columns of its own, and it takes the same columns of x.
//
// e4m3 is multiplied as fp16, which holds all of its numbers, and so is x where it is rounded to e4m3 (INPUT).
//
// A program has TILES of 16 rows (gated: half of them up), and its warps share K: each takes every WARPS-th chunk of
// PAIRS lines of 128 bytes a row. Registers that have been multiplied are loaded again, so that a chunk is always on its
// way, the first one while the kernel before still runs.
//
// Defined before this: N, K, BYTES of a weight, INPUT, SCALE, SMOOTH; GATED, KIND, LIMIT (or not), OFFSET, PDL; HALF: x
// and out are fp16; TOKENS: 8 or 16; TILES, PAIRS, WARPS; BLOCKS: programs that a multiprocessor has to hold side by
// side.

#define FETCHED ".L2::256B"  // an H100 was up to 6% faster
#include "mma.cu"
#include "common.cu"

enum Input { plain, e4m3, codes };
enum Scale { one, row, tensor };

constexpr int PARTS = 1 + GATED, SIDE = 16 * TILES, ROWS = SIDE / PARTS, THREADS = 32 * WARPS;
constexpr int EIGHTS = TOKENS / 8;                       // of tokens: mma's B has eight columns
constexpr int WIDE = 16 / BYTES;                         // columns of a lane's 16 bytes
constexpr int LINE = 8 * WIDE, CHUNK = PAIRS * LINE;     // columns
constexpr int CHUNKS = K / CHUNK;
constexpr int X_BYTES = INPUT == codes ? 1 : 2, PIECES = WIDE * X_BYTES / 16;  // of 16 bytes, where x is read
constexpr int STEPS = WIDE / 4;                          // mma's to multiply a lane's 16 bytes
static_assert(TOKENS % 8 == 0 && K % CHUNK == 0 && WARPS <= CHUNKS, "K");
static_assert(TILES % PARTS == 0 && N % ROWS == 0, "N");
static_assert((BYTES == 2) == (INPUT == plain), "INPUT");

__device__ __forceinline__ unsigned word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Columns 4 `step` and up, two and two, of a lane's 16 bytes of a weight.
__device__ __forceinline__ unsigned operand(uint4 v, int step, int upper) {
    return BYTES == 1 ? halves(word(v, step), upper) : word(v, 2 * step + upper);
}

// x, residual and out are not __restrict__: a kernel that may still run when this one starts writes x and residual, and
// residual may be out.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
few(const unsigned char* x, const unsigned char* __restrict__ weight, const float* __restrict__ scale,
    const float* __restrict__ scales, const float* __restrict__ smooth, const float* x_scale,
    const unsigned short* __restrict__ bias, const unsigned short* residual, unsigned short* out, int M) {
    __shared__ float sums[WARPS][TOKENS][SIDE + 4];  // the 4 keep lanes' banks apart
    let_others_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * ROWS, begin = warp * CHUNK;

    const unsigned char* w_at[PARTS];
    uint4 w[PAIRS][TILES][2][2];  // by half of a line, and of a tile's rows
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        w_at[part] = weight + ((long long)(part * N + first + g) * K + begin) * BYTES + 16 * t;
#define LOAD_WEIGHT(p, i)                                                                                          \
    for (int half = 0; half < 2; half++)                                                                           \
        for (int h = 0; h < 2; h++)                                                                                \
            w[p][i][h][half] = streamed((const uint4*)(w_at[i / (TILES / PARTS)] + 128 * p + 64 * h +              \
                                                       (i % (TILES / PARTS) * 16 + 8 * half) * (long long)K * BYTES))
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            LOAD_WEIGHT(p, i);
        }
    const float inverse = INPUT == e4m3 ? *scales : 1;
    wait_for_others();

    const unsigned char* x_at[EIGHTS];
    uint4 v[EIGHTS][2][PIECES];  // of the next line
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
        x_at[e] = x + ((long long)min(8 * e + g, M - 1) * K + begin + WIDE * t) * X_BYTES;
#define LOAD_X(h, column)                                                                                          \
    for (int e = 0; e < EIGHTS; e++)                                                                               \
        for (int i = 0; i < PIECES; i++)                                                                           \
            v[e][h][i] = *(const uint4*)(x_at[e] + ((column) + h * LINE / 2) * X_BYTES + 16 * i)
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        LOAD_X(h, 0);
    }

    float y[TILES][EIGHTS][4] = {};
#pragma unroll 1
    for (int chunk = warp; chunk < CHUNKS; chunk += WARPS) {
        const bool more = chunk + WARPS < CHUNKS;
#pragma unroll
        for (int part = 0; part < PARTS; part++) w_at[part] += WARPS * CHUNK * BYTES;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            const bool within = p + 1 < PAIRS;
            const int next = within ? (p + 1) * LINE : WARPS * CHUNK;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                unsigned b[EIGHTS][STEPS][2];
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int upper = 0; upper < 2; upper++) {
                        const int two = 2 * step + upper;
                        float2 by = {1, 1};
                        if (SMOOTH)
                            by = __ldg((const float2*)(smooth + chunk * CHUNK + p * LINE + h * LINE / 2 + WIDE * t) + two);
#pragma unroll
                        for (int e = 0; e < EIGHTS; e++) {
                            const unsigned bits = word(v[e][h][two / 4 % PIECES], two % 4);
                            b[e][step][upper] = INPUT == plain   ? bits
                                                : INPUT == codes ? halves(word(v[e][h][0], step), upper)
                                                                 : coded(number(bits & 0xFFFF) * by.x * inverse,
                                                                         number(bits >> 16) * by.y * inverse);
                        }
                    }
                if ((within || more) && INPUT != plain) {  // b holds it, converted
#pragma unroll
                    LOAD_X(h, next);
                }
#pragma unroll
                for (int i = 0; i < TILES; i++) {
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
                        const uint4 top = w[p][i][h][0], bottom = w[p][i][h][1];
                        const unsigned a[4] = {operand(top, step, 0), operand(bottom, step, 0), operand(top, step, 1),
                                               operand(bottom, step, 1)};
#pragma unroll
                        for (int e = 0; e < EIGHTS; e++) multiply(y[i][e], a, b[e][step]);
                    }
                    if (more && h == 1) {
#pragma unroll
                        LOAD_WEIGHT(p, i);
                    }
                }
                if ((within || more) && INPUT == plain) {
#pragma unroll
                    LOAD_X(h, next);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) x_at[e] += WARPS * CHUNK * X_BYTES;
    }

#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[warp][8 * e + 2 * t + j % 2][16 * i + 8 * (j / 2) + g] = y[i][e][j];
    __syncthreads();
    constexpr int OUTS = TOKENS * ROWS;
#pragma unroll
    for (int from = 0; from < OUTS; from += THREADS) {
        const int at = from + threadIdx.x, token = at / ROWS, n = first + at % ROWS;
        if (at < OUTS && token < M) {
            float total[PARTS];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const int side = part * ROWS + at % ROWS;
                total[part] = 0;
#pragma unroll
                for (int i = 0; i < WARPS; i++) total[part] += sums[i][token][side];
                if (INPUT == e4m3) total[part] *= scales[1];
                if (INPUT == codes) total[part] *= x_scale[token];
                if (SCALE == row) total[part] *= scale[part * N + n];
                if (SCALE == tensor) total[part] *= *scale;
                if (bias) total[part] += number(bias[part * N + n]);
            }
#if GATED
            total[0] = gate(total[0], total[1]);
#endif
            if (residual) total[0] += number(residual[token * N + n]);
            out[token * N + n] = rounded(total[0]);
        }
    }
}
