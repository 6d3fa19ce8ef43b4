// out [M, N] = act(x Wg^T) * (x Wu^T + OFFSET) of many tokens, on an H100 (sm_90a): x [M, K], weight [2N, K] (the gate's
// rows, then up's), both of 16 bits or both e4m3; in between, sums are rounded to 16 bits, as two kernels would do it.
//
// A tile is 128 tokens times 128 outputs, that is 256 rows of the weight: of the gate, and the same of up. A program is
// three warpgroups. One thread of the first has tiles of x and of the weight copied, 128 bytes of K at a time, into a
// ring of SLOTS. The other two multiply 64 tokens each, with all 256 rows: what a thread holds of gate and up belongs to
// the same outputs. One of the two runs ahead by LEAD slots, so that tensor cores are busy with the other's products
// while it applies the activation, and with its own while the other does.
//
// Programs are resident, in clusters of two where tiles beside each other share what is copied: tokens beside each
// other (TOKEN_MATES) the weight, each program fetching half of it for both; outputs (OUTPUT_MATES) x. Clusters take
// tiles in turn, GROUP of tokens first, so that x and what is used of the weight stay in the L2 cache.
//
// Defined before this: N, K; BYTES of a number of x and weight; HALF: 16 bits are fp16; GATED, KIND, LIMIT (or not),
// OFFSET; BIAS, BY_ROW: scales are by token and row, or one each; CODES: out are e4m3 codes; SMOOTH: multiplied before;
// SLOTS, LEAD, TOKEN_MATES, OUTPUT_MATES, GROUP; PDL; SHARED: bytes of shared memory; WARPS: 12.

#include "common.cu"
#include "mma.cu"
#include "hopper.cu"

constexpr int TILE = 128, LINE = 128 / BYTES;  // rows; numbers of K that are copied at a time
constexpr int HALF_TILE = TILE * 128, SLOT = 3 * HALF_TILE;  // bytes: of x, of the gate, of up
constexpr int STEPS = K / LINE, MATES = TOKEN_MATES * OUTPUT_MATES;
constexpr int WAITING = LEAD < STEPS ? LEAD : STEPS, AHEAD = SLOTS < STEPS ? SLOTS : STEPS;  // slots
constexpr int BOX = 16 * 128, BOXES = CODES ? 1 : 2;  // bytes of what a warp stores at once; how many it has of a tile
constexpr int COPYING = 40, WORKING = 232;  // registers
static_assert(COPYING + 2 * WORKING <= 3 * 168, "who asks for more registers than 168 * 384 waits forever");
static_assert(N % (TILE * OUTPUT_MATES) == 0 && K % LINE == 0 && MATES <= 2 && LEAD <= SLOTS && WARPS == 12, "shapes");
static_assert(1024 + SLOTS * SLOT + 8 * BOXES * BOX + 16 * SLOTS <= SHARED, "shared memory");

// Where a matrix is in global memory and how it is copied, as the driver encodes it.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
}

// A box, from a column and a row on, to shared memory; the barrier counts its bytes. To several programs of a cluster,
// in the same place of each, if `mates` has their bits.
__device__ __forceinline__ void copy(unsigned to, const TensorMap& map, int column, int row, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 : : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_to(unsigned to, const TensorMap& map, int column, int row, unsigned barrier,
                                        unsigned short mates) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;"
                 : : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(mates) : "memory");
}

// A box from shared memory; what is beyond the matrix's end is left out.
__device__ __forceinline__ void store(const TensorMap& map, unsigned from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 : : "l"(&map), "r"(column), "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void stores_end() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }
__device__ __forceinline__ void stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" : : : "memory"); }
__device__ __forceinline__ void stores_wait() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }

__device__ __forceinline__ void barrier_expect(unsigned at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(at), "r"(bytes) : "memory");
}
// At the same address in a program of the cluster.
__device__ __forceinline__ void barrier_arrive_at(unsigned at, int mate) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                 : : "r"(at), "r"(mate) : "memory");
}
// Barriers that were made are there for copies and for other programs.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
__device__ __forceinline__ void meet_mates() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
}

#define F128(d) F64(d), F8(d, 64), F8(d, 72), F8(d, 80), F8(d, 88), F8(d, 96), F8(d, 104), F8(d, 112), F8(d, 120)
#define LIST128                                                                                                        \
    LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                                         \
           "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                                          \
           "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"                              \
           "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#if BYTES == 1
#define PRODUCT "m64n256k32.f32.e4m3.e4m3 "
#define MAJORS ""
#else
#define PRODUCT "m64n256k16." TYPES " "
#define MAJORS ", 0, 0"
#endif

// c [64, 256] = or += a [64, 32 bytes] times b [256, 32 bytes] transposed, both in shared memory.
__device__ __forceinline__ void multiply_rows(float (&c)[128], unsigned long long a, unsigned long long b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned." PRODUCT LIST128 "}, %128, %129, p, 1, 1" MAJORS ";\n}"
                 : F128(c) : "l"(a), "l"(b), "r"(add));
}

// Where a program's tile begins.
struct Place {
    int token, output;

    // That of the work of a number, for one of the cluster's programs, where x has so many `tiles` of tokens.
    __device__ __forceinline__ void find(int number, int tiles, int mate) {
        const int across = (tiles + TOKEN_MATES - 1) / TOKEN_MATES, of_group = GROUP * (N / TILE / OUTPUT_MATES);
        const int group = number / of_group, rest = number % of_group, size = min(GROUP, across - group * GROUP);
        token = ((group * GROUP + rest % size) * TOKEN_MATES + mate % TOKEN_MATES) * TILE;
        output = (rest / size * OUTPUT_MATES + mate / TOKEN_MATES) * TILE;
    }
};

// The program's share of a tile of the weight, or of x, at a slot.
__device__ __forceinline__ void copy_weight(unsigned slot, const TensorMap& weight, int step, const Place& place,
                                            int mate, unsigned barrier) {
    if (TOKEN_MATES == 2) {
        copy_to(slot + (1 + mate) * HALF_TILE, weight, step * LINE, mate * N + place.output, barrier, 3);
    } else {
        copy(slot + HALF_TILE, weight, step * LINE, place.output, barrier);
        copy(slot + 2 * HALF_TILE, weight, step * LINE, N + place.output, barrier);
    }
}
__device__ __forceinline__ void copy_tokens(unsigned slot, const TensorMap& x, int step, const Place& place, int mate,
                                            unsigned barrier) {
    if (OUTPUT_MATES == 2)
        copy_to(slot + mate * (HALF_TILE / 2), x, step * LINE, place.token + mate * (TILE / 2), barrier, 3);
    else
        copy(slot, x, step * LINE, place.token, barrier);
}

// Two sums of a row, in columns side by side, as they are stored between two kernels.
__device__ __forceinline__ float2 between(float low, float high, float2 scale, float2 bias) {
    if (BYTES == 1) low *= scale.x, high *= scale.y;
    if (BIAS) low += bias.x, high += bias.y;
    const unsigned both = pair(low, high);
    return make_float2(number(both & 0xFFFF), number(both >> 16));
}

// Two of a weight's numbers. They are read with .nc, so that those of all columns are asked for ahead of stores.
__device__ __forceinline__ float2 pair_at(const float* at) { return __ldg((const float2*)at); }
__device__ __forceinline__ float2 pair_at(const unsigned short* at) {
    const unsigned both = __ldg((const unsigned*)at);
    return make_float2(number(both & 0xFFFF), number(both >> 16));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
#if TOKEN_MATES * OUTPUT_MATES > 1
__cluster_dims__(TOKEN_MATES * OUTPUT_MATES, 1, 1)
#endif
gated(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
      const __grid_constant__ TensorMap out, const float* step, const float* scale, const unsigned short* bias,
      const float* code_scales, const float* smooth, int m) {
    extern __shared__ unsigned char memory[];
    let_others_start();
    unsigned char* const base = memory + (-shared_address(memory) & 1023);
    const unsigned ring = shared_address(base), barriers = ring + SLOTS * SLOT + 8 * BOXES * BOX;
#define FULL(slot) (barriers + 8 * (slot))
#define EMPTY(slot) (barriers + 8 * (SLOTS + (slot)))
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int mate = blockIdx.x % MATES, clusters = gridDim.x / MATES;
    const int tiles = (m + TILE - 1) / TILE;
    const int works = (tiles + TOKEN_MATES - 1) / TOKEN_MATES * (N / TILE / OUTPUT_MATES);
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) {
            barrier_init(FULL(i), 1);
            barrier_init(EMPTY(i), 8 * MATES);
        }
        barriers_made();
    }
    __syncwarp();
    meet_mates();

    Place place;
    Turn turn;
    if (warp < 4) {
        leave_registers<COPYING>();
        if (threadIdx.x == 0) {
            prefetch(x);
            prefetch(weight);
            prefetch(out);
            place.find(blockIdx.x / MATES, tiles, mate);
            for (int i = 0; i < AHEAD; i++) {  // what depends on no kernel before
                barrier_expect(FULL(i), SLOT);
                copy_weight(ring + i * SLOT, weight, i, place, mate, FULL(i));
            }
            wait_for_others();
            int begun = AHEAD;
#pragma unroll 1
            for (int work = blockIdx.x / MATES; work < works; work += clusters) {
                place.find(work, tiles, mate);
#pragma unroll 1
                for (int i = 0; i < STEPS; i++) {
                    const unsigned slot = ring + turn.slot * SLOT, full = FULL(turn.slot);
                    if (begun > 0) {
                        begun--;
                    } else {
                        barrier_wait(EMPTY(turn.slot), turn.parity ^ 1);
                        barrier_expect(full, SLOT);
                        copy_weight(slot, weight, i, place, mate, full);
                    }
                    copy_tokens(slot, x, i, place, mate, full);
                    turn.next();
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<WORKING>();
        const int group = warp / 4 - 1, g = lane / 4, t = lane % 4;
        const int first = 64 * group + warp % 4 * 16;  // row of the warp
        unsigned char* const mine = base + SLOTS * SLOT + (warp - 4) * BOXES * BOX;
        float sums[128], steps[2] = {};
        int begun = 0;
        wait_for_others();
        if (BYTES == 1 && !BY_ROW) steps[0] = steps[1] = *step * *scale;
        const float codes_per_one = CODES ? *code_scales : 1;
        if (WAITING && group == 1) meet(1, 256);
#pragma unroll 1
        for (int work = blockIdx.x / MATES; work < works; work += clusters) {
            place.find(work, tiles, mate);
            const int row = place.token + first;
            if (BY_ROW) steps[0] = step[min(row + g, m - 1)], steps[1] = step[min(row + 8 + g, m - 1)];
            settled(sums);
#pragma unroll 1
            for (int i = 0; i < STEPS; i++) {
                const unsigned long long a = matrix(ring + turn.slot * SLOT + group * (HALF_TILE / 2), 16);
                const unsigned long long b = matrix(ring + turn.slot * SLOT + HALF_TILE, 16);
                barrier_wait(FULL(turn.slot), turn.parity);
                products_begin();
#pragma unroll
                for (int j = 0; j < 4; j++) multiply_rows(sums, a + 2 * j, b + 2 * j, i > 0 || j > 0);
                products_end();
                if (WAITING && group == 0 && ++begun == WAITING) announce(1, 256);
                products_wait<1>();
                if (i > 0 && lane < MATES) barrier_arrive_at(EMPTY((turn.slot + SLOTS - 1) % SLOTS), lane);
                turn.next();
            }
            products_wait<0>();
            settled(sums);
            if (lane < MATES) barrier_arrive_at(EMPTY((turn.slot + SLOTS - 1) % SLOTS), lane);

            if (row >= m) continue;
            if (lane == 0) stores_wait_read();
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const int column = place.output + 8 * j + 2 * t;
                float2 by[2] = {make_float2(1, 1), make_float2(1, 1)}, plus[2] = {}, smoothing = make_float2(1, 1);
                if (BY_ROW) by[0] = pair_at(scale + column), by[1] = pair_at(scale + N + column);
                if (BIAS) plus[0] = pair_at(bias + column), plus[1] = pair_at(bias + N + column);
                if (SMOOTH) smoothing = pair_at(smooth + column);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int i = 4 * j + 2 * h;
                    const float2 gates = between(sums[i], sums[i + 1],
                                                 make_float2(by[0].x * steps[h], by[0].y * steps[h]), plus[0]);
                    const float2 ups = between(sums[64 + i], sums[65 + i],
                                               make_float2(by[1].x * steps[h], by[1].y * steps[h]), plus[1]);
                    const unsigned both = pair(gate(gates.x, ups.x), gate(gates.y, ups.y));
                    unsigned char* const line = mine + (8 * h + g) * 128;
                    if (CODES) {
                        const float low = number(both & 0xFFFF) * smoothing.x, high = number(both >> 16) * smoothing.y;
                        *(unsigned short*)(line + (j / 2 ^ g) * 16 + j % 2 * 8 + 2 * t) =
                            codes_of(low * codes_per_one, high * codes_per_one);
                    } else {
                        *(unsigned*)(line + j / 8 * BOX + (j % 8 ^ g) * 16 + 4 * t) = both;
                    }
                }
            }
            fence_for_tensor_cores();
            __syncwarp();
            if (lane == 0) {
#pragma unroll
                for (int i = 0; i < BOXES; i++)
                    store(out, shared_address(mine) + i * BOX, place.output + i * 64, row);
                stores_end();
            }
        }
        if (lane == 0) stores_wait();
        __syncwarp();
    }
    if (MATES > 1) meet_mates();  // neither ends while the other may arrive at its barriers
}
