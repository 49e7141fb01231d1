// softmax(q kᵀ / √H) v for every head, every query seeing every key, forward only: f16 and bf16, sums in f32.
//
// The order of work is FlashAttention's (Dao et al., arXiv 2205.14135): a block holds some queries of one head as operands of
// mma.sync and meets one tile of keys and values after another, which come by cp.async while the tile before is multiplied.
// Scores live in registers; a row's largest score so far, its sum and its weighted values are corrected as tiles come. What
// a query gets depends on its own image alone, and the order of its sums on the number of keys alone.
#include "half.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
/// Keys of a tile.
constexpr int KEYS = 64;
/// Queries of one mma.
constexpr int ROWS = 16;

/// What follows from a head's width H, a multiple of 8. The same figures stand in src/cuda/attention.rs.
template <int H>
struct Head {
    /// Width as the products of q and k have it: zeros follow where H is an odd multiple of 8.
    static constexpr int PADDED = (H + 15) / 16 * 16;
    /// Elements from a key to the next in shared memory: an odd multiple of 16 bytes, so that the eight rows of ldmatrix lie
    /// in different banks.
    static constexpr int STRIDE = PADDED + 8;
    /// Times ROWS queries of a warp: two, so that each fragment of keys and values is multiplied twice, where registers
    /// suffice.
    static constexpr int TILES = H <= 80 ? 2 : 1;
    static constexpr int QUERIES = WARPS * ROWS * TILES;
    /// Keys whose scores a warp holds at a time: as many as registers suffice for.
    static constexpr int PART = H > 64 && TILES == 2 ? 32 : 64;
};

/// Elements from an image to the next and from a token to the next; a token's heads lie side by side.
struct Strides {
    long long image, token;
};

/// What a kernel reads and writes: rows of queries, rows of keys and values, out [images, queries, heads · H]. `scale` is
/// log2(e) / √H. The same words stand in src/cuda/attention.rs.
template <class T>
struct Attention {
    const T *q, *k, *v;
    T* out;
    Strides q_rows, kv_rows;
    int queries, keys, heads;
    float scale;
};

/// 2^x in one instruction: to two units of f32's last place, below 2^-126 zero.
__device__ inline float exp2_flushed(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

/// A block takes QUERIES queries of one head of one image.
template <class T, int H>
__device__ void attend(const Attention<T>& of) {
    constexpr int STRIDE = Head<H>::STRIDE, TILES = Head<H>::TILES, STEPS = Head<H>::PADDED / 16;
    constexpr int COLUMNS = H / 8, PART = Head<H>::PART, KEY_COLUMNS = PART / 8;
    DYNAMIC_SHARED(T, memory);
    T* all_keys = memory;                         // [2][KEYS][STRIDE]
    T* all_values = memory + 2 * KEYS * STRIDE;  // [2][KEYS][STRIDE]
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quarter = lane % 4;
    const unsigned blocks = (of.queries + Head<H>::QUERIES - 1) / Head<H>::QUERIES;
    const unsigned pair = blockIdx.x / blocks, head = pair % of.heads;
    const long long image = pair / of.heads;
    const int first = (blockIdx.x % blocks * WARPS + warp) * ROWS * TILES;
    // A warp without queries only helps to copy.
    const bool busy = first < of.queries;
    const T* q = of.q + image * of.q_rows.image + head * H;
    const T* k = of.k + image * of.kv_rows.image + head * H;
    const T* v = of.v + image * of.kv_rows.image + head * H;
    T* out = of.out + image * of.queries * of.heads * H + head * H;

    auto fetch = [&](int start, int slot) {
#pragma unroll 1
        for (int i = threadIdx.x; i < KEYS * COLUMNS; i += THREADS) {
            const int row = i / COLUMNS, column = i % COLUMNS * 8;
            const bool there = start + row < of.keys;
            const long long from = there ? (start + row) * of.kv_rows.token + column : 0;
            const int to = (slot * KEYS + row) * STRIDE + column;
            cp_async_16(all_keys + to, k + from, there);
            // Zeros past the last value: a weight of zero times what is not a number would be none.
            cp_async_16(all_values + to, v + from, there);
        }
        cp_async_commit();
    };

    fetch(0, 0);
    if (Head<H>::PADDED > H) {
        // No copy comes here.
        for (int row = threadIdx.x; row < 2 * KEYS; row += THREADS) {
            *reinterpret_cast<uint4*>(all_keys + row * STRIDE + H) = make_uint4(0, 0, 0, 0);
        }
    }
    // The rows of this lane in each tile: group and group + 8.
    uint32_t queries[TILES][STEPS][4];
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
        const int tile = i / 2, half = i % 2, row = first + tile * ROWS + half * 8 + group;
        const T* source = q + row * of.q_rows.token + 2 * quarter;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int right = 0; right < 2; right++) {
                const int column = step * 16 + right * 8;
                const bool there = column < H && row < of.queries;
                queries[tile][step][half + 2 * right] = there ? *reinterpret_cast<const uint32_t*>(source + column) : 0;
            }
        }
    }

    float sums[TILES][COLUMNS][4] = {};
    // Of each row: the largest score, and this lane's part of the sum of weights.
    float most[TILES][2], total[TILES][2] = {};
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) most[i / 2][i % 2] = -INFINITY;

    for (int start = 0, slot = 0; start < of.keys; start += KEYS, slot ^= 1) {
        if (start + KEYS < of.keys) {
            fetch(start + KEYS, slot ^ 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        const int end = busy ? min(start + KEYS, of.keys) : start;
#pragma unroll 1
        for (int begin = start; begin < end; begin += PART) {
            const T* keys = all_keys + (slot * KEYS + begin - start) * STRIDE;
            const T* values = all_values + (slot * KEYS + begin - start) * STRIDE;
            float scores[TILES][KEY_COLUMNS][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
#pragma unroll
                for (int j = 0; j < KEY_COLUMNS; j += 2) {
                    // Matrices of ldmatrix: keys 8j.. at columns 0 and 8 of the step, keys 8(j + 1).. at the same.
                    uint32_t b[4];
                    const int row = 8 * j + lane % 8 + lane / 16 * 8, column = step * 16 + lane / 8 % 2 * 8;
                    ldmatrix_x4(b, keys + row * STRIDE + column);
                    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        mma(scores[tile][j], queries[tile][step], left, T());
                        mma(scores[tile][j + 1], queries[tile][step], right, T());
                    }
                }
            }
            if (begin + PART > of.keys) {
#pragma unroll
                for (int i = 0; i < KEY_COLUMNS * 4; i++) {
                    const bool there = begin + i / 4 * 8 + 2 * quarter + i % 2 < of.keys;
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        if (!there) scores[tile][i / 4][i % 4] = -INFINITY;
                    }
                }
            }
            // Weights in place of scores, as the left operands of the products with values.
            uint32_t weights[TILES][KEY_COLUMNS / 2][4];
#pragma unroll
            for (int i = 0; i < TILES * 2; i++) {
                const int tile = i / 2, half = i % 2;
                float largest = most[tile][half];
#pragma unroll
                for (int j = 0; j < KEY_COLUMNS; j++) {
                    largest = fmaxf(largest, fmaxf(scores[tile][j][2 * half], scores[tile][j][2 * half + 1]));
                }
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
                // Scores that are all -inf have no largest to be measured from.
                const float level = largest == -INFINITY ? 0.0f : largest * of.scale;
                const float correction = exp2_flushed(most[tile][half] * of.scale - level);
                most[tile][half] = largest;
                // Few parts have a row with a larger score than all before.
                if (__any_sync(ALL_LANES, correction != 1.0f)) {
                    total[tile][half] *= correction;
#pragma unroll
                    for (int j = 0; j < COLUMNS; j++) {
                        sums[tile][j][2 * half] *= correction;
                        sums[tile][j][2 * half + 1] *= correction;
                    }
                }
#pragma unroll
                for (int j = 0; j < KEY_COLUMNS; j++) {
                    const float left = exp2_flushed(__fmaf_rn(scores[tile][j][2 * half], of.scale, -level));
                    const float right = exp2_flushed(__fmaf_rn(scores[tile][j][2 * half + 1], of.scale, -level));
                    total[tile][half] += left + right;
                    weights[tile][j / 2][half + 2 * (j % 2)] = pack<T>(left, right);
                }
            }
#pragma unroll
            for (int step = 0; step < KEY_COLUMNS / 2; step += 2) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    // Matrices of ldmatrix: 32 values, two steps, at the eight columns from 8j.
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, values + (step * 16 + lane) * STRIDE + 8 * j);
                    const uint32_t upper[2] = {b[0], b[1]}, lower[2] = {b[2], b[3]};
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        mma(sums[tile][j], weights[tile][step], upper, T());
                        mma(sums[tile][j], weights[tile][step + 1], lower, T());
                    }
                }
            }
        }
        __syncthreads();
    }

    if (!busy) return;
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
        const int tile = i / 2, half = i % 2, row = first + tile * ROWS + half * 8 + group;
        float all = total[tile][half];
        all += __shfl_xor_sync(ALL_LANES, all, 1);
        all += __shfl_xor_sync(ALL_LANES, all, 2);
        if (row >= of.queries) continue;
        const float inverse = 1.0f / all;
        T* to = out + (long long)row * of.heads * H + 2 * quarter;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const uint32_t both = pack<T>(sums[tile][j][2 * half] * inverse, sums[tile][j][2 * half + 1] * inverse);
            *reinterpret_cast<uint32_t*>(to + 8 * j) = both;
        }
    }
}

KERNEL __launch_bounds__(THREADS) attention_f16_32(Attention<__half> of) { attend<__half, 32>(of); }

KERNEL __launch_bounds__(THREADS) attention_f16_48(Attention<__half> of) { attend<__half, 48>(of); }

KERNEL __launch_bounds__(THREADS) attention_f16_64(Attention<__half> of) { attend<__half, 64>(of); }

KERNEL __launch_bounds__(THREADS) attention_f16_72(Attention<__half> of) { attend<__half, 72>(of); }

KERNEL __launch_bounds__(THREADS) attention_f16_80(Attention<__half> of) { attend<__half, 80>(of); }

KERNEL __launch_bounds__(THREADS) attention_f16_96(Attention<__half> of) { attend<__half, 96>(of); }

KERNEL __launch_bounds__(THREADS) attention_f16_128(Attention<__half> of) { attend<__half, 128>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_32(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 32>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_48(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 48>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_64(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 64>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_72(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 72>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_80(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 80>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_96(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 96>(of); }

KERNEL __launch_bounds__(THREADS) attention_bf16_128(Attention<__nv_bfloat16> of) { attend<__nv_bfloat16, 128>(of); }
