// Nearest codes of width 32 at most: a thread holds a token in registers and meets every code in f32, so scores never exist in
// memory. What f32 cannot tell apart is settled in binary64.
#include "nearest.cuh"

constexpr int TOKENS = 128;
/// Codes that a block holds at a time.
constexpr int TILE = 128;

/// What a token has met in one part of the codes: the best score and its code, and the best score of all other codes.
struct Met {
    float best, second;
    unsigned code;
};

/// Each block takes TOKENS tokens and one of `parts` parts of the codes. Codes are centred, padded with zeros to rows of D.
template <int D>
__device__ void meet_narrow_codes(const float* z, int tokens, int d, const float* shadow, const float* centred_bias, int codes,
                                  int per_part, Met* met) {
    __shared__ __align__(16) float tile[TILE * D];
    __shared__ float bias[TILE];
    int token = blockIdx.x * TOKENS + threadIdx.x;
    float x[D];
#pragma unroll
    for (int i = 0; i < D; i++) x[i] = token < tokens && i < d ? z[(size_t)token * d + i] : 0.0f;
    Met own{-INFINITY, -INFINITY, REFUSED};
    int begin = blockIdx.y * per_part, end = min(codes, begin + per_part);
    for (int start = begin; start < end; start += TILE) {
        int count = min(TILE, end - start);
        const float4* source = (const float4*)(shadow + (size_t)start * D);
        for (int i = threadIdx.x; i < count * D / 4; i += TOKENS) ((float4*)tile)[i] = source[i];
        for (int i = threadIdx.x; i < count; i += TOKENS) bias[i] = centred_bias[start + i];
        __syncthreads();
        for (int k = 0; k < count; k++) {
            float product = 0.0f;
#pragma unroll
            for (int i = 0; i < D; i += 4) {
                float4 c = *(const float4*)(tile + k * D + i);
                product = __fmaf_rn(x[i], c.x, product);
                product = __fmaf_rn(x[i + 1], c.y, product);
                product = __fmaf_rn(x[i + 2], c.z, product);
                product = __fmaf_rn(x[i + 3], c.w, product);
            }
            // Added last: the bound counts one rounding of the bias.
            float score = product + bias[k];
            own.second = fmaxf(own.second, fminf(own.best, score));
            own.code = score > own.best ? start + k : own.code;
            own.best = fmaxf(own.best, score);
        }
        __syncthreads();
    }
    if (token < tokens) met[(size_t)blockIdx.y * tokens + token] = own;
}

KERNEL __launch_bounds__(TOKENS) meet_codes_4(const float* z, int tokens, int d, const float* shadow,
                                               const float* centred_bias, int codes, int per_part, Met* met) {
    meet_narrow_codes<4>(z, tokens, d, shadow, centred_bias, codes, per_part, met);
}

KERNEL __launch_bounds__(TOKENS) meet_codes_8(const float* z, int tokens, int d, const float* shadow,
                                               const float* centred_bias, int codes, int per_part, Met* met) {
    meet_narrow_codes<8>(z, tokens, d, shadow, centred_bias, codes, per_part, met);
}

KERNEL __launch_bounds__(TOKENS) meet_codes_16(const float* z, int tokens, int d, const float* shadow,
                                               const float* centred_bias, int codes, int per_part, Met* met) {
    meet_narrow_codes<16>(z, tokens, d, shadow, centred_bias, codes, per_part, met);
}

KERNEL __launch_bounds__(TOKENS) meet_codes_32(const float* z, int tokens, int d, const float* shadow,
                                               const float* centred_bias, int codes, int per_part, Met* met) {
    meet_narrow_codes<32>(z, tokens, d, shadow, centred_bias, codes, per_part, met);
}

/// The code of each token from what it has met in all parts, where the second best is out of reach of the bound; the others
/// are refused. In the fast mode (`exact` = 0) the best score is good enough. A thread a token.
KERNEL settle_narrow(const float* z, int tokens, int d, const Met* met, int parts, Bound bound, int exact,
                     unsigned first, unsigned* out, unsigned* refused, Report* report) {
    int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    Met all{-INFINITY, -INFINITY, REFUSED};
    for (int part = 0; part < parts; part++) {
        // Parts stand in the order of their codes, so of equal scores the first is the lowest index.
        Met next = met[(size_t)part * tokens + token];
        all.second = fmaxf(fmaxf(all.second, next.second), fminf(all.best, next.best));
        all.code = next.best > all.best ? next.code : all.code;
        all.best = fmaxf(all.best, next.best);
    }
    double square = 0;
    bool finite = true;
    for (int i = 0; i < d; i++) {
        double x = z[(size_t)token * d + i];
        finite = finite && isfinite(x);
        square += x * x;
    }
    double norm = sqrt(square), eps = norm * bound.token + norm * bound.rounded + bound.offset;
    if (!finite) atomicMin(&report->first_bad, first + token);
    bool screened = finite && is_safe(bound, norm) && all.code != REFUSED;
    bool alone = !exact || all.second < floor_to_f32((double)all.best - 2.0 * eps);
    if (screened && alone) {
        out[token] = all.code;
        atomicAdd(&report->candidates, 1ull);
    } else {
        out[token] = REFUSED;
        refuse(first + token, refused, report);
    }
}
