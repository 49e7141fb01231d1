// Photos' bytes to what an encoder reads. A byte's value comes from a table, so that a GPU and a CPU normalise alike, bit for
// bit in f32, whatever the arithmetic behind the table is. A thread a pixel.
#include "half.cuh"

constexpr int CHANNELS = 3;
constexpr int LEVELS = 256;

/// images · height · width pixels of three bytes, and the patches of `patch` · `patch` that they are cut into, or 0.
struct Photos {
    long long images;
    int height, width, patch;
};

/// Bytes [B, H, W, 3] by table [3, 256] to planes [B, 3, H, W], or to patches [B, H/P · W/P, 3 · P · P], patches and their
/// pixels row by row, a patch's channels one after another.
template <class T>
__device__ void normalise(const uint8_t* bytes, const float* table, T* out, Photos of) {
    __shared__ float kept[CHANNELS * LEVELS];
    for (int i = threadIdx.x; i < CHANNELS * LEVELS; i += blockDim.x) kept[i] = table[i];
    __syncthreads();
    // There are fewer than 2^32 pixels.
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, row = index / of.width;
    const int x = index % of.width, y = row % of.height;
    const long long image = row / of.height;
    if (image >= of.images) return;
    long long to, plane;
    if (of.patch) {
        const int across = of.width / of.patch;
        plane = (long long)of.patch * of.patch;
        const long long number = (image * (of.height / of.patch) + y / of.patch) * across + x / of.patch;
        to = number * CHANNELS * plane + y % of.patch * of.patch + x % of.patch;
    } else {
        plane = (long long)of.height * of.width;
        to = image * CHANNELS * plane + (long long)y * of.width + x;
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
        out[to + c * plane] = from_f32<T>(kept[c * LEVELS + bytes[(long long)index * CHANNELS + c]]);
    }
}

KERNEL normalise_f32(const uint8_t* bytes, const float* table, float* out, Photos of) {
    normalise(bytes, table, out, of);
}

KERNEL normalise_f16(const uint8_t* bytes, const float* table, __half* out, Photos of) {
    normalise(bytes, table, out, of);
}

KERNEL normalise_bf16(const uint8_t* bytes, const float* table, __nv_bfloat16* out, Photos of) {
    normalise(bytes, table, out, of);
}
