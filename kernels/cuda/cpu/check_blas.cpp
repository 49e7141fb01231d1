// Checks the played cuBLAS, cuBLASLt and cuRAND against plain loops. `check_blas outside` asks for a product whose A is
// larger than its allocation, which ends the program.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

// As NVIDIA's headers declare them, which the toolkit's small packages lack.
extern "C" {
int cublasCreate_v2(void**);
int cublasDestroy_v2(void*);
int cublasGemmStridedBatchedEx(void*, int, int, int, int, int, const void*, const void*, int, int, long long,
                               const void*, int, int, long long, const void*, void*, int, int, long long, int, int, int);
int cublasLtCreate(void**);
int cublasLtDestroy(void*);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, CUstream);
int curandCreateGenerator(void**, int);
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long);
int curandGenerateUniform(void*, float*, size_t);
int curandGenerateNormal(void*, float*, size_t, float, float);
}

namespace {

constexpr int F32 = 0, F16 = 2, COMPUTE_32F = 68;
int failures = 0;

void expect(bool right, const char* what, int line) {
    if (right) return;
    std::fprintf(stderr, "check_blas.cpp:%d: not so: %s\n", line, what);
    failures++;
}

#define EXPECT(what) expect((what), #what, __LINE__)

// Device memory is the host's, so it is read and written in place.
template <class T>
T* device(size_t count) {
    CUdeviceptr pointer = 0;
    if (cuMemAlloc(&pointer, count * sizeof(T)) != CUDA_SUCCESS) std::exit(1);
    return reinterpret_cast<T*>(pointer);
}

// Whole numbers and halves: every sum below is exact.
float number(int i) { return static_cast<float>(i * 7 % 23 - 11) / 2; }

// Every transposition, leading dimensions with room, three in a batch, beta: as the definition says.
void products() {
    void* handle = nullptr;
    EXPECT(cublasCreate_v2(&handle) == 0);
    const int m = 37, n = 29, k = 45, room = 3, batches = 3;
    for (int transposed = 0; transposed < 4; transposed++) {
        const int ta = transposed & 1, tb = transposed >> 1;
        const int lda = (ta ? k : m) + room, ldb = (tb ? n : k) + room, ldc = m + room;
        const int stride_a = lda * (ta ? m : k), stride_b = ldb * (tb ? k : n), stride_c = ldc * n;
        __half* a = device<__half>(static_cast<size_t>(batches * stride_a));
        __half* b = device<__half>(static_cast<size_t>(batches * stride_b));
        float* c = device<float>(static_cast<size_t>(batches * stride_c));
        for (int i = 0; i < batches * stride_a; i++) a[i] = __float2half(number(i));
        for (int i = 0; i < batches * stride_b; i++) b[i] = __float2half(number(i + 5));
        for (int i = 0; i < batches * stride_c; i++) c[i] = number(i + 3);
        std::vector<float> expected(c, c + batches * stride_c);
        const float alpha = 2, beta = 0.5f;
        for (int batch = 0; batch < batches; batch++) {
            for (int i = 0; i < m; i++) {
                for (int j = 0; j < n; j++) {
                    float sum = 0;
                    for (int l = 0; l < k; l++) {
                        sum += __half2float(a[batch * stride_a + (ta ? i * lda + l : l * lda + i)]) *
                               __half2float(b[batch * stride_b + (tb ? l * ldb + j : j * ldb + l)]);
                    }
                    float& to = expected[batch * stride_c + j * ldc + i];
                    to = alpha * sum + beta * to;
                }
            }
        }
        EXPECT(cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, &alpha, a, F16, lda, stride_a, b, F16, ldb, stride_b,
                                          &beta, c, F32, ldc, stride_c, batches, COMPUTE_32F, -1) == 0);
        EXPECT(std::vector<float>(c, c + batches * stride_c) == expected);
        EXPECT(cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, &alpha, a, F16, lda - room - 1, stride_a, b, F16, ldb,
                                          stride_b, &beta, c, F32, ldc, stride_c, batches, COMPUTE_32F, -1) == 7);
        cuMemFree(reinterpret_cast<CUdeviceptr>(a));
        cuMemFree(reinterpret_cast<CUdeviceptr>(b));
        cuMemFree(reinterpret_cast<CUdeviceptr>(c));
    }
    cublasDestroy_v2(handle);
}

// A linear layer as it is called: out [n, m] = gelu(x [n, k] w [m, k]^T + bias [m]), with and without GELU and ReLU.
void layers() {
    const int m = 24, n = 18, k = 32;
    float* w = device<float>(m * k);
    float* x = device<float>(n * k);
    float* bias = device<float>(m);
    float* out = device<float>(m * n);
    for (int i = 0; i < m * k; i++) w[i] = number(i) / 16;
    for (int i = 0; i < n * k; i++) x[i] = number(i + 9) / 16;
    for (int i = 0; i < m; i++) bias[i] = number(i + 1);
    void *handle, *wl, *xl, *ol, *description;
    EXPECT(cublasLtCreate(&handle) == 0);
    EXPECT(cublasLtMatrixLayoutCreate(&wl, F32, k, m, k) == 0 && cublasLtMatrixLayoutCreate(&xl, F32, k, n, k) == 0);
    EXPECT(cublasLtMatrixLayoutCreate(&ol, F32, m, n, m) == 0);
    EXPECT(cublasLtMatmulDescCreate(&description, COMPUTE_32F, F32) == 0);
    const int yes = 1;
    const float alpha = 1, beta = 0;
    EXPECT(cublasLtMatmulDescSetAttribute(description, 3, &yes, 4) == 0);
    EXPECT(cublasLtMatmulDescSetAttribute(description, 8, &bias, 8) == 0);
    EXPECT(cublasLtMatmulDescSetAttribute(description, 8, &bias, 4) == 7);
    for (int epilogue : {1, 4, 6, 32, 36}) {
        EXPECT(cublasLtMatmulDescSetAttribute(description, 7, &epilogue, 4) == 0);
        EXPECT(cublasLtMatmul(handle, description, &alpha, w, wl, x, xl, &beta, out, ol, out, ol, nullptr, nullptr, 0,
                              nullptr) == 0);
        float worst = 0;
        for (int j = 0; j < n; j++) {
            for (int i = 0; i < m; i++) {
                double value = epilogue & 4 ? static_cast<double>(bias[i]) : 0;
                for (int l = 0; l < k; l++) {
                    value += static_cast<double>(w[i * k + l]) * static_cast<double>(x[j * k + l]);
                }
                if (epilogue & 2) value = value > 0 ? value : 0;
                if (epilogue & 32) {
                    value *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value)));
                }
                worst = std::max(worst, static_cast<float>(std::fabs(value - static_cast<double>(out[j * m + i]))));
            }
        }
        EXPECT(worst < 1e-5f);
    }
    // A product whose inner sizes differ is none.
    EXPECT(cublasLtMatmul(handle, description, &alpha, w, ol, x, xl, &beta, out, ol, out, ol, nullptr, nullptr, 0,
                          nullptr) == 7);
    cublasLtDestroy(handle);
}

void randoms() {
    const int n = 100000;
    float* out = device<float>(n);
    void* generator = nullptr;
    EXPECT(curandCreateGenerator(&generator, 100) == 0 && curandSetPseudoRandomGeneratorSeed(generator, 5) == 0);
    const auto moments = [&](double* mean, double* variance) {
        double sum = 0, squares = 0;
        for (int i = 0; i < n; i++) {
            sum += static_cast<double>(out[i]);
            squares += static_cast<double>(out[i]) * static_cast<double>(out[i]);
        }
        *mean = sum / n;
        *variance = squares / n - *mean * *mean;
    };
    double mean, variance;
    EXPECT(curandGenerateUniform(generator, out, n) == 0);
    moments(&mean, &variance);
    EXPECT(std::fabs(mean - 0.5) < 0.01 && std::fabs(variance - 1.0 / 12) < 0.01);
    EXPECT(curandGenerateNormal(generator, out, n, 3, 2) == 0);
    moments(&mean, &variance);
    EXPECT(std::fabs(mean - 3) < 0.05 && std::fabs(variance - 4) < 0.1);
    EXPECT(curandGenerateNormal(generator, out, n - 1, 3, 2) == 105);
}

}  // namespace

int main(int count, char**) {
    CUdevice device_0;
    CUcontext context;
    if (cuInit(0) || cuDeviceGet(&device_0, 0) || cuDevicePrimaryCtxRetain(&context, device_0)) return 1;
    cuCtxSetCurrent(context);
    if (count > 1) {
        void* handle;
        const float alpha = 1, beta = 0;
        float *a = device<float>(16 * 16 - 1), *c = device<float>(16 * 16);
        cublasCreate_v2(&handle);
        cublasGemmStridedBatchedEx(handle, 0, 0, 16, 16, 16, &alpha, a, F32, 16, 0, c, F32, 16, 0, &beta, c, F32, 16, 0,
                                   1, COMPUTE_32F, -1);
        return 0;
    }
    products();
    layers();
    randoms();
    std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
    return failures != 0;
}
