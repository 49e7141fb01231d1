// Nearest codes of width 33 to 256 in one pass: a warp holds 16 tokens as operands of mma.sync and meets one tile of codes after
// another, which comes by cp.async while the one before is multiplied. Scores live in registers alone.
#include "nearest.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
/// Tokens of a warp: the rows of one mma.
constexpr int ROWS = 16;
/// Codes of a tile.
constexpr int TILE = 64;
/// Candidates that a token may have at a time.
constexpr int CANDIDATES = 32;
/// Halves that a row of a tile is longer than a code, so that the eight rows of ldmatrix lie in different banks.
constexpr int SKEW = 8;

/// What a block needs of dynamic shared memory; the same expression stands in src/cuda/nearest.rs.
template <int D>
constexpr size_t shared_bytes() {
    return 2 * (TILE * (D + SKEW) * sizeof(__half) + TILE * sizeof(float)) +
           WARPS * ROWS * CANDIDATES * (sizeof(float) + sizeof(unsigned));
}

/// Tokens as they are and as `prepare_tokens` leaves them. The same words stand in src/cuda/nearest.rs, as for Codes.
struct Tokens {
    const float* z;
    const __half* rounded;
    const float* unscale;
    const double* epsilon;
    int count;
};

/// Codes as they are searched and their shadow, in parts of `per_part`.
struct Codes {
    const float* rows;
    const double* bias;
    const __half* shadow;
    const float* centred_bias;
    int count, d, per_part;
};

/// One row's candidates, kept by the four lanes that hold its scores.
struct Candidates {
    float* scores;
    unsigned* codes;
    int count;
};

/// Drops candidates below the threshold, keeping their order. By one lane.
__device__ inline void drop_beaten(Candidates& list, float threshold) {
    int kept = 0;
    for (int i = 0; i < list.count; i++) {
        if (list.scores[i] >= threshold) {
            list.scores[kept] = list.scores[i];
            list.codes[kept] = list.codes[i];
            kept++;
        }
    }
    list.count = kept;
}

/// Each block takes WARPS * ROWS tokens and one of several parts of the codes, and leaves for each token the best code of the part
/// by binary64, or by the screened score in the fast mode. A part without a code of its own
/// (all folded away) scores -inf, one that could not settle a token +inf.
template <int D, bool EXACT>
__device__ void meet_wide_codes(Tokens tokens, Codes codes, Best* bests, Report* report) {
    constexpr int STRIDE = D + SKEW, STEPS = D / 16, COLUMNS = TILE / 8;
    DYNAMIC_SHARED(unsigned char, memory);
    __half* tiles = (__half*)memory;                                          // [2][TILE][STRIDE]
    float* tile_bias = (float*)(tiles + 2 * TILE * STRIDE);                    // [2][TILE]
    float* all_scores = tile_bias + 2 * TILE;                                  // [WARPS][ROWS][CANDIDATES]
    unsigned* all_codes = (unsigned*)(all_scores + WARPS * ROWS * CANDIDATES);  // [WARPS][ROWS][CANDIDATES]
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, quarter = lane % 4;
    int first = (blockIdx.x * WARPS + warp) * ROWS;
    int begin = blockIdx.y * codes.per_part, end = min(codes.count, begin + codes.per_part);

    // The rows of this lane: group and group + 8.
    unsigned a[STEPS][4];
    float scale[2], epsilon_of[2], most[2] = {-INFINITY, -INFINITY};
    Candidates lists[2];
    bool overflow[2] = {false, false};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = group + 8 * half, token = first + row;
        bool there = token < tokens.count;
        scale[half] = there ? tokens.unscale[token] : 1.0f;
        // Rounded up, so that thresholds stay low enough; not a number where the token is not screened.
        double eps = there ? tokens.epsilon[token] : (double)NAN;
        epsilon_of[half] = (float)(eps + eps * 0x1p-22 + 0x1p-149);
        lists[half].scores = all_scores + (warp * ROWS + row) * CANDIDATES;
        lists[half].codes = all_codes + (warp * ROWS + row) * CANDIDATES;
        lists[half].count = 0;
        const unsigned* source = (const unsigned*)(tokens.rounded + (size_t)token * D);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            a[step][half] = there ? source[step * 8 + quarter] : 0;
            a[step][2 + half] = there ? source[step * 8 + quarter + 4] : 0;
        }
    }

    auto fetch = [&](int start, int slot) {
        for (int i = threadIdx.x; i < TILE * (D / 8); i += THREADS) {
            int row = i / (D / 8), part = i % (D / 8);
            bool there = start + row < end;
            const __half* source = there ? codes.shadow + (size_t)(start + row) * D + part * 8 : codes.shadow;
            cp_async_16(tiles + (slot * TILE + row) * STRIDE + part * 8, source, there);
        }
        for (int i = threadIdx.x; i < TILE; i += THREADS) {
            tile_bias[slot * TILE + i] = start + i < end ? codes.centred_bias[start + i] : -INFINITY;
        }
        cp_async_commit();
    };

    if (begin < end) fetch(begin, 0);
    for (int start = begin, slot = 0; start < end; start += TILE, slot ^= 1) {
        bool more = start + TILE < end;
        if (more) fetch(start + TILE, slot ^ 1);
        if (more) cp_async_wait<1>();
        else cp_async_wait<0>();
        __syncthreads();
        const __half* tile = tiles + slot * TILE * STRIDE;
        float c[COLUMNS][4];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) c[j][i] = 0.0f;
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j += 2) {
                // Matrices of ldmatrix: codes 8j.. at columns 0 and 8 of the step, codes 8(j + 1).. at the same.
                unsigned b[4];
                int row = 8 * j + lane % 8 + (lane / 16) * 8, column = step * 16 + (lane / 8 % 2) * 8;
                ldmatrix_x4(b, tile + row * STRIDE + column);
                unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                mma_f16(c[j], a[step], left);
                mma_f16(c[j + 1], a[step], right);
            }
        }
        // Scores in place of products, and the largest of each row.
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float b = tile_bias[slot * TILE + 8 * j + 2 * quarter + i % 2];
                c[j][i] = __fmaf_rn(c[j][i], scale[i / 2], b);
                top[i / 2] = fmaxf(top[i / 2], c[j][i]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[half] = fmaxf(top[half], __shfl_xor_sync(ALL_LANES, top[half], 1));
            top[half] = fmaxf(top[half], __shfl_xor_sync(ALL_LANES, top[half], 2));
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = fmaxf(most[half], top[half]);
            double reach = 2.0 * (double)epsilon_of[half];
            float threshold = EXACT ? floor_to_f32((double)most[half] - reach) : most[half];
            // The list keeps what is at least this; it is not a number where the token is not screened.
            if (!__any_sync(ALL_LANES, top[half] >= threshold)) continue;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
                for (int parity = 0; parity < 2; parity++) {
                    float score = c[j][2 * half + parity];
                    // Codes that are folded away or past the last one score -inf.
                    bool hit = score >= threshold && score > -INFINITY;
                    unsigned hits = __ballot_sync(ALL_LANES, hit);
                    if (hits == 0) continue;
                    unsigned mine = hits >> (4 * group) & 15u;
                    int incoming = __popc(mine);
                    Candidates& list = lists[half];
                    if (__any_sync(ALL_LANES, list.count + incoming > CANDIDATES)) {
                        if (quarter == 0 && list.count + incoming > CANDIDATES) drop_beaten(list, threshold);
                        __syncwarp();
                        list.count = __shfl_sync(ALL_LANES, list.count, 4 * group);
                    }
                    if (list.count + incoming > CANDIDATES) {
                        overflow[half] = true;
                        incoming = 0;
                        hit = false;
                    }
                    if (hit) {
                        int at = list.count + __popc(mine & ((1u << quarter) - 1u));
                        list.scores[at] = score;
                        list.codes[at] = start + 8 * j + 2 * quarter + parity;
                    }
                    list.count += incoming;
                    __syncwarp();
                }
            }
        }
        __syncthreads();
    }

    // Each row's list is whole; the warp settles one row after another.
    for (int row = 0; row < ROWS; row++) {
        int half = row / 8, holder = 4 * (row % 8), token = first + row;
        float largest = __shfl_sync(ALL_LANES, half ? most[1] : most[0], holder);
        float eps = __shfl_sync(ALL_LANES, half ? epsilon_of[1] : epsilon_of[0], holder);
        int n = __shfl_sync(ALL_LANES, half ? lists[1].count : lists[0].count, holder);
        bool lost = __shfl_sync(ALL_LANES, (int)(half ? overflow[1] : overflow[0]), holder);
        if (token >= tokens.count) continue;
        bool settled = eps == eps && !lost;
        Best best = settled ? none() : Best{INFINITY, REFUSED};
        unsigned candidates = 0;
        if (settled) {
            const float* scores = all_scores + (warp * ROWS + row) * CANDIDATES;
            const unsigned* indices = all_codes + (warp * ROWS + row) * CANDIDATES;
            float threshold = EXACT ? floor_to_f32((double)largest - 2.0 * (double)eps) : largest;
            for (int i = 0; i < n; i++) {
                if (!(scores[i] >= threshold)) continue;
                unsigned k = indices[i];
                candidates++;
                const float *z = tokens.z + (size_t)token * codes.d, *code = codes.rows + (size_t)k * codes.d;
                best.meet(EXACT ? dot64(z, code, codes.d) + codes.bias[k] : (double)scores[i], k);
            }
        }
        if (lane == 0) {
            bests[(size_t)blockIdx.y * tokens.count + token] = best;
            // Beyond the first, which every part has; `settle_parts` counts one a token.
            if (candidates > 1) {
                atomicAdd(&report->candidates, candidates - 1ull);
                atomicAdd(&report->rescored, 1u);
            }
        }
    }
}

KERNEL __launch_bounds__(THREADS) meet_codes_exact_64(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<64, true>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_fast_64(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<64, false>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_exact_128(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<128, true>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_fast_128(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<128, false>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_exact_192(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<192, true>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_fast_192(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<192, false>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_exact_256(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<256, true>(tokens, codes, bests, report);
}

KERNEL __launch_bounds__(THREADS) meet_codes_fast_256(Tokens tokens, Codes codes, Best* bests, Report* report) {
    meet_wide_codes<256, false>(tokens, codes, bests, report);
}

/// The best code of each token over all parts of the codes; a token that some part could not settle is refused. A thread a token.
KERNEL settle_parts(const Best* bests, int tokens, int parts, unsigned first, unsigned* out,
                                        unsigned* refused, Report* report) {
    int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    Best best = none();
    bool settled = true;
    for (int part = 0; part < parts; part++) {
        Best next = bests[(size_t)part * tokens + token];
        settled = settled && (next.code != REFUSED || next.score < 0);
        best.meet(next.score, next.code);
    }
    settled = settled && best.code != REFUSED;
    out[token] = settled ? best.code : REFUSED;
    if (settled) atomicAdd(&report->candidates, 1ull);
    else refuse(first + token, refused, report);
}

/// Products of 16 tokens and 8 codes by one warp, to see how the device sums.
KERNEL multiply_by_warp(const __half* tokens, const __half* codes, float* out, int columns, int d) {
    int group = threadIdx.x / 4, quarter = threadIdx.x % 4;
    const unsigned* upper = (const unsigned*)(tokens + (size_t)(blockIdx.x * 16 + group) * d);
    const unsigned* lower = upper + 8 * d / 2;
    const unsigned* code = (const unsigned*)(codes + (size_t)(blockIdx.y * 8 + group) * d);
    float c[4] = {0, 0, 0, 0};
    for (int i = quarter; i < d / 2; i += 8) {
        unsigned a[4] = {upper[i], lower[i], upper[i + 4], lower[i + 4]}, b[2] = {code[i], code[i + 4]};
        mma_f16(c, a, b);
    }
    for (int i = 0; i < 4; i++) {
        int row = blockIdx.x * 16 + group + 8 * (i / 2), column = blockIdx.y * 8 + 2 * quarter + i % 2;
        out[(size_t)row * columns + column] = c[i];
    }
}
