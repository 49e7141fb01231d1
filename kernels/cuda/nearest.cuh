// What the kernels of nearest-code search share: the contract's binary64 score, thresholds, what is known of a token.
#pragma once
#include "gpu.cuh"

constexpr int WARP = 32;
/// In the place of a code that screening did not find.
constexpr unsigned REFUSED = 0xffffffffu;

/// What a search reports, summed over its tokens; `first_bad` is the lowest row with a NaN or an infinity. The same words
/// stand in src/cuda/nearest.rs.
struct Report {
    unsigned long long candidates;
    unsigned rescored, refused, first_bad, unused;
};

/// The bound on a screened score's error (src/nearest/bound.rs) as a weighted sum of a token's |z|, r and |w~|, and what the
/// guard against overflow needs.
struct Bound {
    double token, error, rounded, offset;
    double reach, level;
};

/// dot64 of the contract, by a whole warp: lane l sums d = l, l + 32, ... ascending from +0, then a butterfly (`warp_sum`). Products of two f32 values are
/// exact in binary64, so a fused multiply-add rounds as the two operations do.
__device__ inline double dot64(const float* a, const float* b, int d) {
    double sum = 0.0;
    for (int i = threadIdx.x % WARP; i < d; i += WARP) sum = __fma_rn((double)a[i], (double)b[i], sum);
    return warp_sum(sum);
}

/// An f32 not above x: rounding to the nearest is off by half a unit of the last place, at most 2^-24|x| or 2^-150.
__device__ inline float floor_to_f32(double x) {
    return (float)(x - fabs(x) * 0x1p-23 - 0x1p-149);
}

/// The better of two codes: the larger score, of equal ones the lower index.
struct Best {
    double score;
    unsigned code;
    __device__ void meet(double other, unsigned index) {
        if (other > score || (other == score && index < code)) {
            score = other;
            code = index;
        }
    }
};

__device__ inline Best none() {
    return Best{-INFINITY, REFUSED};
}

/// A guard that passes where no partial sum of a score can overflow f32. What is not a number fails.
__device__ inline bool is_safe(const Bound& bound, double rounded) {
    return rounded * bound.reach + bound.level < 0x1p126;
}

/// Adds a token to those that binary64 decides alone. By one thread.
__device__ inline void refuse(unsigned token, unsigned* refused, Report* report) {
    refused[atomicAdd(&report->refused, 1u)] = token;
}
