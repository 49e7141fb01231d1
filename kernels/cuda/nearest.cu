// Nearest codes of any width: tokens rounded to fp16, scores by cuBLAS, then this scan, which keeps what may be the best code
// and settles it in binary64.
#include "nearest.cuh"

/// Threads of a block, here and in every kernel of a warp a row.
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

/// w~ = fp16(z 2^e) 2^-e with e so that its largest element is below 2^15, what undoes the scales of token and codes, and the
/// bound ε on the token's scores; ε is NaN for a token that cannot be screened. A warp a token.
KERNEL prepare_tokens(const float* z, int tokens, int d, int padded, int code_exponent, Bound bound,
                                          __half* rounded_tokens, float* unscale, double* epsilon, Report* report,
                                          unsigned first) {
    int token = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (token >= tokens) return;
    const float* x = z + (size_t)token * d;
    unsigned most = 0;
    for (int i = lane; i < d; i += WARP) most = max(most, __float_as_uint(fabsf(x[i])));
    for (int distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, distance));
    const unsigned infinity = 0x7f800000u;
    float largest = __uint_as_float(most);
    int exponent = most > 0 && most < infinity ? 14 - ilogbf(largest) : 0;
    double token_square = 0, square = 0, error = 0;
    for (int i = lane; i < padded; i += WARP) {
        double value = i < d && most < infinity ? (double)x[i] : 0.0;
        __half narrow = __double2half(ldexp(value, exponent));
        rounded_tokens[(size_t)token * padded + i] = narrow;
        double rounded = ldexp((double)__half2float(narrow), -exponent);
        token_square += value * value;
        square += rounded * rounded;
        error += (rounded - value) * (rounded - value);
    }
    token_square = warp_sum(token_square), square = warp_sum(square), error = warp_sum(error);
    if (lane != 0) return;
    if (most >= infinity) atomicMin(&report->first_bad, first + token);
    double norm = sqrt(square);
    int total = exponent + code_exponent;
    bool screened = most < infinity && is_safe(bound, norm) && total >= -126 && total <= 126;
    unscale[token] = screened ? ldexpf(1.0f, -total) : 1.0f;
    epsilon[token] = screened ? sqrt(token_square) * bound.token + sqrt(error) * bound.error + norm * bound.rounded + bound.offset
                              : (double)NAN;
}

/// Tokens that share a block's reading of the biases.
constexpr int ROWS = 4;
/// Candidates of one token before it is refused.
constexpr int CANDIDATES = 64;

__device__ inline float screened_score(float product, float unscale, float bias) {
    return __fmaf_rn(product, unscale, bias);
}

/// The code of each token from its products with all codes, `products` [tokens, codes].
///
/// First the largest score of each token, then, from the threads that have met a score close enough to it, the candidates;
/// a single one needs no binary64.
KERNEL __launch_bounds__(THREADS)
    scan_products(const float* products, int tokens, int codes, const float* unscale, const double* epsilon,
                  const float* centred_bias, const float* z, const float* rows, const double* bias, int d, unsigned first,
                  unsigned* out, unsigned* refused, Report* report) {
    __shared__ float maxima[ROWS][WARPS];
    __shared__ unsigned found[ROWS], candidates[ROWS][CANDIDATES];
    __shared__ double scores[ROWS][CANDIDATES];
    int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    int start = blockIdx.x * ROWS, count = min(ROWS, tokens - start);
    float scale[ROWS], most[ROWS];
    for (int r = 0; r < ROWS; r++) {
        scale[r] = r < count ? unscale[start + r] : 1.0f;
        most[r] = -INFINITY;
    }
    // Rows of products start at multiples of 16 bytes only if there are four codes a vector.
    int whole = codes % 4 == 0 ? codes / 4 : 0;
    for (int i = thread; i < whole; i += THREADS) {
        float4 b = ((const float4*)centred_bias)[i];
        for (int r = 0; r < ROWS; r++) {
            if (r >= count) break;
            float4 p = ((const float4*)(products + (size_t)(start + r) * codes))[i];
            float left = fmaxf(screened_score(p.x, scale[r], b.x), screened_score(p.y, scale[r], b.y));
            float right = fmaxf(screened_score(p.z, scale[r], b.z), screened_score(p.w, scale[r], b.w));
            most[r] = fmaxf(most[r], fmaxf(left, right));
        }
    }
    for (int k = 4 * whole + thread; k < codes; k += THREADS) {
        for (int r = 0; r < count; r++) {
            most[r] = fmaxf(most[r], screened_score(products[(size_t)(start + r) * codes + k], scale[r], centred_bias[k]));
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float x = most[r];
        for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
        if (lane == 0) maxima[r][warp] = x;
    }
    if (thread < ROWS) found[thread] = 0;
    __syncthreads();
    for (int r = 0; r < count; r++) {
        float best = maxima[r][0];
        for (int w = 1; w < WARPS; w++) best = fmaxf(best, maxima[r][w]);
        double eps = epsilon[start + r];
        // Not a number where the token is not screened, which no score reaches.
        float threshold = floor_to_f32((double)best - 2.0 * eps);
        if (!(most[r] >= threshold)) continue;
        const float* row = products + (size_t)(start + r) * codes;
        auto meet = [&](int k) {
            if (screened_score(row[k], scale[r], centred_bias[k]) >= threshold) {
                unsigned at = atomicAdd(&found[r], 1u);
                if (at < CANDIDATES) candidates[r][at] = k;
            }
        };
        for (int i = thread; i < whole; i += THREADS) {
            for (int k = 4 * i; k < 4 * i + 4; k++) meet(k);
        }
        for (int k = 4 * whole + thread; k < codes; k += THREADS) meet(k);
    }
    __syncthreads();
    for (int r = 0; r < count; r++) {
        unsigned n = found[r];
        if (n < 2 || n > CANDIDATES) continue;
        const float* x = z + (size_t)(start + r) * d;
        for (unsigned i = warp; i < n; i += WARPS) {
            unsigned k = candidates[r][i];
            double score = dot64(x, rows + (size_t)k * d, d) + bias[k];
            if (lane == 0) scores[r][i] = score;
        }
    }
    __syncthreads();
    if (thread >= count) return;
    unsigned n = found[thread], token = start + thread;
    if (n == 0 || n > CANDIDATES) {
        out[token] = REFUSED;
        refuse(first + token, refused, report);
        return;
    }
    Best best{n == 1 ? 0.0 : scores[thread][0], candidates[thread][0]};
    for (unsigned i = 1; i < n; i++) best.meet(scores[thread][i], candidates[thread][i]);
    out[token] = best.code;
    atomicAdd(&report->candidates, (unsigned long long)n);
    if (n > 1) atomicAdd(&report->rescored, 1u);
}

/// The code with the largest screened score, the lowest of equal ones: the fast mode. A block a token.
KERNEL __launch_bounds__(THREADS)
    largest_products(const float* products, int codes, const float* unscale, const double* epsilon, const float* centred_bias,
                     unsigned first, unsigned* out, unsigned* refused, Report* report) {
    __shared__ float maxima[WARPS];
    __shared__ unsigned indices[WARPS];
    int token = blockIdx.x, thread = threadIdx.x;
    const float* row = products + (size_t)token * codes;
    float most = -INFINITY, scale = unscale[token];
    unsigned code = REFUSED;
    for (int k = thread; k < codes; k += THREADS) {
        float score = screened_score(row[k], scale, centred_bias[k]);
        if (score > most) most = score, code = k;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        float score = __shfl_xor_sync(ALL_LANES, most, distance);
        unsigned other = __shfl_xor_sync(ALL_LANES, code, distance);
        if (score > most || (score == most && other < code)) most = score, code = other;
    }
    if (thread % WARP == 0) maxima[thread / WARP] = most, indices[thread / WARP] = code;
    __syncthreads();
    if (thread > 0) return;
    for (int w = 1; w < WARPS; w++) {
        if (maxima[w] > most || (maxima[w] == most && indices[w] < code)) most = maxima[w], code = indices[w];
    }
    bool screened = epsilon[token] == epsilon[token];
    out[token] = screened ? code : REFUSED;
    if (!screened) refuse(first + token, refused, report);
}

/// Refused tokens by the contract over all codes; as many blocks as there are, each takes tokens until none is left.
KERNEL __launch_bounds__(THREADS)
    settle_refused(const float* z, const float* rows, const double* bias, int codes, int d, const unsigned* refused,
                   const Report* report, unsigned* out) {
    __shared__ Best bests[WARPS];
    int warp = threadIdx.x / WARP;
    for (unsigned i = blockIdx.x; i < report->refused; i += gridDim.x) {
        unsigned token = refused[i];
        const float* x = z + (size_t)token * d;
        Best best = none();
        for (int k = warp; k < codes; k += WARPS) best.meet(dot64(x, rows + (size_t)k * d, d) + bias[k], k);
        if (threadIdx.x % WARP == 0) bests[warp] = best;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < WARPS; w++) best.meet(bests[w].score, bests[w].code);
            out[token] = best.code;
        }
        __syncthreads();
    }
}
