// A codebook made ready for searching: rows normalised, biases, what they share taken off, shadows in fp16 and f32, and the
// magnitudes that the error bound is made of.
#include "nearest.cuh"

/// Cosine: every row divided by its norm; a row of zeros stays. A warp a row.
KERNEL normalise_codes(float* rows, int codes, int d) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= codes) return;
    float* c = rows + (size_t)row * d;
    double norm = sqrt(dot64(c, c, d));
    if (norm > 0.0) {
        for (int i = threadIdx.x % WARP; i < d; i += WARP) c[i] = (float)((double)c[i] / norm);
    }
}

/// b_k of the contract, a hash of each row (equal rows have equal ones; -0 counts as 0), and the first row that is not finite.
/// A warp a row.
KERNEL measure_codes(const float* rows, double* bias, unsigned long long* hashes, unsigned* first_bad,
                                         int codes, int d, int euclidean) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= codes) return;
    const float* c = rows + (size_t)row * d;
    unsigned long long hash = 0;
    bool finite = true;
    for (int i = lane; i < d; i += WARP) {
        float x = c[i] + 0.0f;
        finite = finite && isfinite(x);
        // Each element is mixed with its place, so the sum does not depend on the order in which lanes meet it.
        unsigned long long h = ((unsigned long long)i << 32 | __float_as_uint(x)) * 0x9e3779b97f4a7c15ull;
        h = (h ^ h >> 29) * 0xbf58476d1ce4e5b9ull;
        hash += h ^ h >> 32;
    }
    for (int distance = 16; distance > 0; distance /= 2) hash += __shfl_xor_sync(ALL_LANES, hash, distance);
    finite = __all_sync(ALL_LANES, finite);
    double square = euclidean && finite ? dot64(c, c, d) : 0.0;
    if (lane == 0) {
        bias[row] = euclidean ? -square / 2.0 : 0.0;
        hashes[row] = hash;
        if (!finite) atomicMin(first_bad, (unsigned)row);
    }
}

/// Whether the two rows of each pair are equal, -0 and 0 alike. A warp a pair.
KERNEL compare_codes(const float* rows, const unsigned* pairs, unsigned char* equal, int count, int d) {
    int pair = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (pair >= count) return;
    const float* a = rows + (size_t)pairs[2 * pair] * d;
    const float* b = rows + (size_t)pairs[2 * pair + 1] * d;
    bool same = true;
    for (int i = lane; i < d; i += WARP) same = same && a[i] == b[i];
    same = __all_sync(ALL_LANES, same);
    if (lane == 0) equal[pair] = same;
}

constexpr int MEAN_ROWS = 8;

/// m, the mean of the rows that are not folded away, in binary64, and in the last place the mean of their biases. A block for
/// 32 columns.
KERNEL mean_code(const float* rows, const double* bias, const unsigned char* folded, double* mean,
                                     int codes, int distinct, int d) {
    __shared__ double sums[MEAN_ROWS][WARP];
    int column = blockIdx.x * WARP + threadIdx.x % WARP, part = threadIdx.x / WARP;
    double sum = 0.0;
    if (column <= d) {
        for (int k = part; k < codes; k += MEAN_ROWS) {
            if (!folded[k]) sum += column < d ? (double)rows[(size_t)k * d + column] : bias[k];
        }
    }
    sums[part][threadIdx.x % WARP] = sum;
    __syncthreads();
    if (part == 0 && column <= d) {
        for (int i = 1; i < MEAN_ROWS; i++) sum += sums[i][threadIdx.x];
        mean[column] = sum / distinct;
    }
}

/// The largest |c'| of an element, c' = fl32(c - m), as the bits of an f32 (which order as numbers do).
KERNEL largest_element(const float* rows, const double* mean, unsigned* largest, size_t elements, int d) {
    unsigned most = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < elements; i += (size_t)gridDim.x * blockDim.x) {
        float centred = (float)((double)rows[i] - mean[i % d]);
        most = max(most, __float_as_uint(fabsf(centred)));
    }
    for (int distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, distance));
    if (threadIdx.x % WARP == 0) atomicMax(largest, most);
}

/// Magnitudes whose maxima over the codes the bound is made of: squares of |c|, |c'|, |c~| and |e|, then |b| and |b'|. As the
/// bits of doubles, which order as numbers do.
constexpr int EXTENTS = 6;

/// c' in f32 or c~ = fp16(c' 2^exponent) 2^-exponent, b', and the extents. Rows that are folded away get b' = -inf, so that they
/// never win. Shadows are padded with zeros to rows of `padded`; either may be null. A warp a row.
KERNEL shadow_codes(const float* rows, const double* bias, const unsigned char* folded,
                                        const double* mean, __half* half_shadow, float* shadow, float* centred_bias,
                                        unsigned long long* extents, int codes, int d, int padded, int exponent) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= codes) return;
    const float* c = rows + (size_t)row * d;
    double code = 0, centred = 0, rounded = 0, error = 0;
    for (int i = lane; i < padded; i += WARP) {
        double x = i < d ? (double)c[i] : 0.0;
        float moved = i < d ? (float)(x - mean[i]) : 0.0f;
        double screened = moved;
        if (half_shadow) {
            __half narrow = __double2half(ldexp((double)moved, exponent));
            half_shadow[(size_t)row * padded + i] = narrow;
            screened = ldexp((double)__half2float(narrow), -exponent);
        }
        if (shadow) shadow[(size_t)row * padded + i] = moved;
        code += x * x;
        centred += (double)moved * moved;
        rounded += screened * screened;
        error += (screened - moved) * (screened - moved);
    }
    code = warp_sum(code), centred = warp_sum(centred), rounded = warp_sum(rounded), error = warp_sum(error);
    if (lane == 0) {
        float moved = (float)(bias[row] - mean[d]);
        centred_bias[row] = folded[row] ? -INFINITY : moved;
        double values[EXTENTS] = {code, centred, rounded, error, fabs(bias[row]), fabs((double)moved)};
        for (int i = 0; i < EXTENTS; i++) {
            atomicMax(extents + i, (unsigned long long)__double_as_longlong(values[i]));
        }
    }
}
