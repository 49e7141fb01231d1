// A codebook as a moving average of features: tokens sorted by their codes, then every code sums its own, in the order of the
// batch. N tokens, D width, K codes. A token whose index names no code belongs to none.
//
// The order within a code is what makes sums reproducible, so the sort is stable: radix, 8 bits a pass, tiles of tokens. All is
// binary64 in the CPU's order (vqrae/src/quantizer/average.rs), so both come to the same bits.
#include "training.cuh"

constexpr int DIGITS = 256;
static_assert(DIGITS == THREADS, "a thread a digit");

/// counts [K], how many tokens have each code.
KERNEL __launch_bounds__(THREADS) count_codes(const unsigned* indices, int tokens, unsigned codes, unsigned* counts) {
    int token = blockIdx.x * THREADS + threadIdx.x;
    if (token < tokens && indices[token] < codes) atomicAdd(&counts[indices[token]], 1u);
}

/// Keys of the sort, K for what names no code, and the tokens in the order of the batch.
KERNEL __launch_bounds__(THREADS)
    begin_sort(const unsigned* indices, int tokens, unsigned codes, unsigned* keys, unsigned* order) {
    int token = blockIdx.x * THREADS + threadIdx.x;
    if (token >= tokens) return;
    keys[token] = min(indices[token], codes);
    order[token] = token;
}

/// counts [tiles, DIGITS], how many of each tile's keys have each digit. A block a tile.
KERNEL __launch_bounds__(THREADS) count_digits(const unsigned* keys, int tokens, int shift, unsigned* counts) {
    __shared__ unsigned own[DIGITS];
    int at = blockIdx.x * THREADS + threadIdx.x;
    own[threadIdx.x] = 0;
    __syncthreads();
    if (at < tokens) atomicAdd(&own[keys[at] >> shift & (DIGITS - 1)], 1u);
    __syncthreads();
    counts[(size_t)blockIdx.x * DIGITS + threadIdx.x] = own[threadIdx.x];
}

/// Turns counts [tiles, DIGITS] into where each tile's keys of each digit go: after all lower digits, and after the same digit
/// of earlier tiles. One block.
KERNEL __launch_bounds__(THREADS) scan_digits(unsigned* counts, int tiles) {
    __shared__ unsigned totals[DIGITS];
    int digit = threadIdx.x;
    unsigned total = 0;
    for (int tile = 0; tile < tiles; tile++) total += counts[(size_t)tile * DIGITS + digit];
    totals[digit] = total;
    __syncthreads();
    unsigned at = 0;
    for (int lower = 0; lower < digit; lower++) at += totals[lower];
    for (int tile = 0; tile < tiles; tile++) {
        unsigned count = counts[(size_t)tile * DIGITS + digit];
        counts[(size_t)tile * DIGITS + digit] = at;
        at += count;
    }
}

/// Moves keys and tokens to where `places` [tiles, DIGITS] says, equal digits in their order. A block a tile.
KERNEL __launch_bounds__(THREADS)
    place_tokens(const unsigned* keys, const unsigned* order, int tokens, int shift, const unsigned* places,
                 unsigned* placed_keys, unsigned* placed_order) {
    __shared__ unsigned digits[THREADS];
    int thread = threadIdx.x, at = blockIdx.x * THREADS + thread;
    unsigned key = at < tokens ? keys[at] : 0, digit = key >> shift & (DIGITS - 1);
    digits[thread] = digit;
    __syncthreads();
    if (at >= tokens) return;
    // All lanes read the same word at a time, which costs no more than one read.
    unsigned before = 0;
    for (int other = 0; other < THREADS; other++) before += other < thread && digits[other] == digit;
    unsigned place = places[(size_t)blockIdx.x * DIGITS + digit] + before;
    placed_keys[place] = key;
    placed_order[place] = order[at];
}

/// starts [K + 1], where each code's tokens begin among sorted keys. A thread a code.
KERNEL __launch_bounds__(THREADS) find_starts(const unsigned* keys, int tokens, unsigned codes, unsigned* starts) {
    unsigned code = blockIdx.x * THREADS + threadIdx.x;
    if (code > codes) return;
    int low = 0, high = tokens;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (keys[middle] < code) low = middle + 1;
        else high = middle;
    }
    starts[code] = low;
}

/// One element of Σ h over a code's tokens, in the order of the batch.
__device__ inline double code_sum(const float* features, const unsigned* order, unsigned start, unsigned end, int d, int i) {
    double sum = 0.0;
#pragma unroll 4
    for (unsigned at = start; at < end; at++) sum += (double)features[(size_t)order[at] * d + i];
    return sum;
}

/// sums [K, D] of features [N, D]. A block a code and 256 columns.
KERNEL __launch_bounds__(THREADS)
    sum_features(const float* features, const unsigned* order, const unsigned* starts, int d, double* sums) {
    unsigned code = blockIdx.x;
    int i = blockIdx.y * THREADS + threadIdx.x;
    if (i < d) sums[(size_t)code * d + i] = code_sum(features, order, starts[code], starts[code + 1], d, i);
}

/// old ← decay old + rest new, in binary64, rounded once.
__device__ inline float moved(float old, double next, double decay, double rest) {
    return (float)__dadd_rn(__dmul_rn(decay, (double)old), __dmul_rn(rest, next));
}

/// sizes [K] and sums [K, D] moved towards those of the batch; `rest` is 1 - decay. A block a code and 256 columns.
KERNEL __launch_bounds__(THREADS)
    follow_features(const float* features, const unsigned* order, const unsigned* starts, int d, double decay, double rest,
                    float* sizes, float* sums) {
    unsigned code = blockIdx.x, start = starts[code], end = starts[code + 1];
    int i = blockIdx.y * THREADS + threadIdx.x;
    if (i == 0) sizes[code] = moved(sizes[code], (double)(end - start), decay, rest);
    if (i >= d) return;
    float* sum = sums + (size_t)code * d + i;
    *sum = moved(*sum, code_sum(features, order, start, end, d, i), decay, rest);
}

/// codes [K, D] of sums [K, D] and sizes [K]: sum / ((size + eps) scale); `unit`: then of length one, or divided by `smallest`
/// if they are shorter. A warp a code.
KERNEL __launch_bounds__(THREADS)
    smooth_codes(const float* sums, const float* sizes, int count, int d, double eps, double scale, int unit,
                 double smallest, float* codes) {
    int code = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (code >= count) return;
    const float* sum = sums + (size_t)code * d;
    float* out = codes + (size_t)code * d;
    double size = __dmul_rn(__dadd_rn((double)sizes[code], eps), scale), square = 0.0;
    for (int start = 0; start < d; start += WARP) {
        int i = start + lane;
        float x = i < d ? (float)__ddiv_rn((double)sum[i], size) : 0.0f;
        if (i < d) out[i] = x;
        if (!unit) continue;
        // The CPU's order is one element after the other: every lane adds them all.
        double own = __dmul_rn((double)x, (double)x);
        for (int l = 0; l < min(WARP, d - start); l++) square = __dadd_rn(square, __shfl_sync(ALL_LANES, own, l));
    }
    if (!unit) return;
    double length = fmax(__dsqrt_rn(square), smallest);
    // Each lane reads what it has written itself.
    for (int i = lane; i < d; i += WARP) out[i] = (float)__ddiv_rn((double)out[i], length);
}

/// The codes dead [M] become rows chosen [M] of features [N, D], with `size` as their size. A warp a code; what is out of range
/// stays as it is.
KERNEL __launch_bounds__(THREADS)
    restart_codes(const float* features, const unsigned* chosen, const unsigned* dead, int restarts, int tokens, int count,
                  int d, float size, float* codes, float* sizes, float* sums) {
    int at = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (at >= restarts || dead[at] >= (unsigned)count || chosen[at] >= (unsigned)tokens) return;
    const float* x = features + (size_t)chosen[at] * d;
    size_t row = (size_t)dead[at] * d;
    for (int i = lane; i < d; i += WARP) {
        codes[row + i] = x[i];
        sums[row + i] = __fmul_rn(x[i], size);
    }
    if (lane == 0) sizes[dead[at]] = size;
}
