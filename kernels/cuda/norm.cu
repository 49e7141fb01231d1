// LayerNorm and RMSNorm of rows, alone or after a residual is added: a warp a row, which lies in shared memory as f32, so that
// global memory is read once. The variance is that of differences from the mean, never of squares.
#include "half.cuh"

/// What a norm reads and writes, [rows, d] each; `residual` and `sum` are both null or neither, and then x + residual is
/// written to `sum` and normed as it was rounded there. `bias` may be null. The same words stand in src/cuda/norm.rs.
template <class T>
struct Rows {
    const T *x, *residual, *weight, *bias;
    T *sum, *out;
    long long rows;
    int d;
    float eps;
    /// Whether all rows, weights and biases can be met 16 bytes at a time.
    int whole;
};

/// The row as the norm sees it, f32, to `kept`; by one warp.
template <class T>
__device__ void keep_row(const Rows<T>& of, long long start, float* kept) {
    const int lane = threadIdx.x % WARP;
    const T* x = of.x + start;
    if (!of.whole) {
        for (int i = lane; i < of.d; i += WARP) {
            float value = to_f32(x[i]);
            if (of.residual) {
                const T rounded = from_f32<T>(value + to_f32(of.residual[start + i]));
                of.sum[start + i] = rounded;
                value = to_f32(rounded);
            }
            kept[i] = value;
        }
        return;
    }
    for (int i = lane * LANES<T>; i < of.d; i += WARP * LANES<T>) {
        float values[LANES<T>];
        load_16(x + i, values);
        if (of.residual) {
            float others[LANES<T>];
            load_16(of.residual + start + i, others);
#pragma unroll
            for (int j = 0; j < LANES<T>; j++) values[j] = to_f32(from_f32<T>(values[j] + others[j]));
            store_16(of.sum + start + i, values);
        }
#pragma unroll
        for (int j = 0; j < LANES<T>; j += 4) {
            *reinterpret_cast<float4*>(kept + i + j) =
                make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
        }
    }
}

/// (x − mean) / √(variance + eps) · weight + bias, or x / √(mean of x² + eps) · weight + bias where not CENTRED.
template <class T, bool CENTRED>
__device__ void norm_rows(const Rows<T>& of) {
    DYNAMIC_SHARED(float, memory);  // [warps][d to a multiple of 4]
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const long long row = (long long)blockIdx.x * (blockDim.x / WARP) + warp;
    if (row >= of.rows) return;
    const long long start = row * of.d;
    float* kept = memory + warp * ((of.d + 3) / 4 * 4);
    keep_row(of, start, kept);
    __syncwarp();
    float mean = 0.0f;
    if (CENTRED) {
        float sum = 0.0f;
        for (int i = lane; i < of.d; i += WARP) sum += kept[i];
        mean = warp_sum(sum) / of.d;
    }
    float squares = 0.0f;
    for (int i = lane; i < of.d; i += WARP) squares += (kept[i] - mean) * (kept[i] - mean);
    const float scale = 1.0f / sqrtf(warp_sum(squares) / of.d + of.eps);
    T* out = of.out + start;
    if (!of.whole) {
        for (int i = lane; i < of.d; i += WARP) {
            const float bias = of.bias ? to_f32(of.bias[i]) : 0.0f;
            out[i] = from_f32<T>((kept[i] - mean) * scale * to_f32(of.weight[i]) + bias);
        }
        return;
    }
    for (int i = lane * LANES<T>; i < of.d; i += WARP * LANES<T>) {
        float values[LANES<T>], weight[LANES<T>], bias[LANES<T>] = {};
        load_16(of.weight + i, weight);
        if (of.bias) load_16(of.bias + i, bias);
#pragma unroll
        for (int j = 0; j < LANES<T>; j++) values[j] = (kept[i + j] - mean) * scale * weight[j] + bias[j];
        store_16(out + i, values);
    }
}

KERNEL layer_norm_f32(Rows<float> of) { norm_rows<float, true>(of); }

KERNEL layer_norm_f16(Rows<__half> of) { norm_rows<__half, true>(of); }

KERNEL layer_norm_bf16(Rows<__nv_bfloat16> of) { norm_rows<__nv_bfloat16, true>(of); }

KERNEL rms_norm_f32(Rows<float> of) { norm_rows<float, false>(of); }

KERNEL rms_norm_f16(Rows<__half> of) { norm_rows<__half, false>(of); }

KERNEL rms_norm_bf16(Rows<__nv_bfloat16> of) { norm_rows<__nv_bfloat16, false>(of); }
