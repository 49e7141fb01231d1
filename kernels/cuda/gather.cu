// Codes by their indices: straight through with the commitment loss in one pass over memory, its gradient in another, and rows
// alone. N tokens, D width, K codes. An index that names no code gives a row of NaN: it is wrong, and nothing is read outside.
#include "training.cuh"

/// Σ (z - q)² of a row by a warp, in binary64; q goes to `out` on the way unless that is null.
__device__ inline double row_distance(const float* z, const float* q, int d, float* out) {
    double sum = 0.0;
    for (int i = threadIdx.x % WARP; i < d; i += WARP) {
        float c = q[i];
        if (out) out[i] = c;
        double difference = (double)z[i] - (double)c;
        sum = __fma_rn(difference, difference, sum);
    }
    return warp_sum(sum);
}

/// q [N, D] of codes [K, D] and indices [N], and distances [N], each token's Σ (z - q)². A warp a token.
KERNEL __launch_bounds__(THREADS)
    gather_codes(const float* z, const float* codes, const unsigned* indices, int tokens, int count, int d, float* q,
                 double* distances) {
    int token = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token >= tokens) return;
    unsigned index = indices[token];
    float* out = q + (size_t)token * d;
    double sum = NAN;
    if (index < (unsigned)count) {
        sum = row_distance(z + (size_t)token * d, codes + (size_t)index * d, d, out);
    } else {
        for (int i = lane; i < d; i += WARP) out[i] = NAN;
    }
    if (lane == 0) distances[token] = sum;
}

/// distances [N] of rows that are there already, z and q [N, D]. A warp a token.
KERNEL __launch_bounds__(THREADS)
    measure_distances(const float* z, const float* q, int tokens, int d, double* distances) {
    int token = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= tokens) return;
    double sum = row_distance(z + (size_t)token * d, q + (size_t)token * d, d, nullptr);
    if (threadIdx.x % WARP == 0) distances[token] = sum;
}

/// out = scale Σ distances, in f32. One block.
KERNEL __launch_bounds__(THREADS) sum_distances(const double* distances, int tokens, double scale, float* out) {
    __shared__ double parts[WARPS];
    double sum = 0.0;
    for (int i = threadIdx.x; i < tokens; i += THREADS) sum += distances[i];
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) *out = (float)(sum * scale);
}

/// dz = g + weight * loss_gradient * (z - q), elementwise; without `g` where it is null.
KERNEL __launch_bounds__(THREADS)
    straight_through_gradient(const float* g, const float* z, const float* q, const float* loss_gradient, float weight,
                              unsigned long long elements, float* dz) {
    float factor = __fmul_rn(weight, *loss_gradient);
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < elements; i += (size_t)gridDim.x * THREADS) {
        float pull = __fmul_rn(factor, __fsub_rn(z[i], q[i]));
        dz[i] = g ? __fadd_rn(g[i], pull) : pull;
    }
}

/// out [N, D], rows of `rows` [K, D] by indices [N]. A warp a row.
KERNEL __launch_bounds__(THREADS)
    gather_rows(const float* rows, const unsigned* indices, int tokens, int count, int d, float* out) {
    int token = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= tokens) return;
    unsigned index = indices[token];
    const float* row = rows + (size_t)index * d;
    for (int i = threadIdx.x % WARP; i < d; i += WARP) out[(size_t)token * d + i] = index < (unsigned)count ? row[i] : NAN;
}
