// Runs `check.cu` through the played driver. `check` alone tests what must be right; with a kernel's name it runs one
// that is wrong: a careless one makes it return 3 where the bug shows, the others end the program with a message.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

int failures = 0;

void expect(bool right, const char* what, int line) {
    if (right) return;
    std::fprintf(stderr, "check.cpp:%d: not so: %s\n", line, what);
    failures++;
}

#define EXPECT(what) expect((what), #what, __LINE__)

void must(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    cuGetErrorName(result, &name);
    std::fprintf(stderr, "%s: %s\n", what, name ? name : "?");
    std::exit(1);
}

#define MUST(call) must((call), #call)

CUmodule module;
constexpr CUstream STREAM = nullptr;

// An array on the device.
template <class T>
class Device {
  public:
    explicit Device(size_t count) : count_(count) { MUST(cuMemAlloc(&pointer, count * sizeof(T))); }
    explicit Device(const std::vector<T>& values) : Device(values.size()) {
        MUST(cuMemcpyHtoD(pointer, values.data(), count_ * sizeof(T)));
    }
    Device(const Device&) = delete;
    ~Device() { MUST(cuMemFree(pointer)); }
    std::vector<T> host() const {
        std::vector<T> values(count_);
        MUST(cuMemcpyDtoH(values.data(), pointer, count_ * sizeof(T)));
        return values;
    }
    CUdeviceptr pointer = 0;

  private:
    size_t count_;
};

CUfunction function(const char* name) {
    CUfunction found;
    MUST(cuModuleGetFunction(&found, module, name));
    return found;
}

template <class... A>
CUresult launch(CUfunction kernel, unsigned blocks, unsigned threads, unsigned shared, A... arguments) {
    void* pointers[] = {&arguments..., nullptr};
    return cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared, STREAM, pointers, nullptr);
}

template <class... A>
void run(const char* name, unsigned blocks, unsigned threads, unsigned shared, A... arguments) {
    must(launch(function(name), blocks, threads, shared, arguments...), name);
}

template <class T>
void products(const char* kernel, T (*from)(float)) {
    // Small whole numbers: every sum is exact in any order.
    std::vector<T> a(256), b(128);
    std::vector<float> c(128), expected(128);
    for (int i = 0; i < 256; i++) a[i] = from(static_cast<float>(i * 7 % 23 - 11));
    for (int i = 0; i < 128; i++) b[i] = from(static_cast<float>(i * 5 % 19 - 9));
    for (int i = 0; i < 128; i++) c[i] = static_cast<float>(i);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            int sum = i * 8 + j;
            for (int k = 0; k < 16; k++) sum += ((i * 16 + k) * 7 % 23 - 11) * ((k * 8 + j) * 5 % 19 - 9);
            expected[i * 8 + j] = static_cast<float>(sum);
        }
    }
    Device<T> da(a), db(b);
    Device<float> dc(c);
    run(kernel, 1, 32, 0, da.pointer, db.pointer, dc.pointer);
    EXPECT(dc.host() == expected);
}

// 1 and sixteen times 2^-25: each product is below the last place that a tensor core keeps beside 1, so it sums to 1.
// Beside zero all are kept. Minus 1 and one product of 2^-24: that is the last place, and cut to f32 the sum goes
// towards zero, 1 - 2^-24, whose neighbour further out is 1.
void truncation() {
    const auto one_product = [](float value, float product_a, float product_b, int count) {
        std::vector<__half> a(256, __float2half(0)), b(128, __float2half(0));
        for (int k = 0; k < count; k++) {
            a[k] = __float2half(product_a);
            b[k * 8] = __float2half(product_b);
        }
        Device<__half> da(a), db(b);
        Device<float> dc(std::vector<float>(128, value));
        run("product_f16", 1, 32, 0, da.pointer, db.pointer, dc.pointer);
        return dc.host()[0];
    };
    const bool nearest = std::getenv("VQRAE_GPU_MMA") && !std::strcmp(std::getenv("VQRAE_GPU_MMA"), "nearest");
    const float a = std::ldexp(1.0f, -12), b = std::ldexp(1.0f, -13);
    EXPECT(one_product(1.0f, a, b, 16) == (nearest ? 1.0f + std::ldexp(1.0f, -21) : 1.0f));
    EXPECT(one_product(0.0f, a, b, 16) == std::ldexp(1.0f, -21));
    EXPECT(one_product(-1.0f, a, 2 * b, 1) == -1.0f + std::ldexp(1.0f, -24));
    EXPECT(std::isnan(one_product(NAN, a, b, 1)));
    EXPECT(std::isinf(one_product(INFINITY, a, b, 1)));
}

void matrices() {
    Device<uint32_t> out(256);
    run("load_matrices", 1, 32, 512, out.pointer);
    const std::vector<uint32_t> got = out.host();
    // By hand: lane 0 has elements 0 and 1 of each matrix, 64 numbers apart; transposed, 0 and 8.
    EXPECT(got[0] == (0u | 1u << 16) && got[1] == (64u | 65u << 16) && got[3] == (192u | 193u << 16));
    EXPECT(got[128] == (0u | 8u << 16) && got[129] == (64u | 72u << 16));
    // Lane 13 is of row 3, pair 1: elements 26 and 27; transposed, rows 2 and 3 of column 3: 19 and 27.
    EXPECT(got[13 * 4 + 2] == (154u | 155u << 16));
    EXPECT(got[128 + 13 * 4 + 2] == (147u | 155u << 16));
}

void copies(const char* kernel, bool right) {
    std::vector<float> in(2 * 64 * 4);
    for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i + 1);
    Device<float> din(in), out(in.size());
    run(kernel, 1, 64, 2 * 64 * 16, din.pointer, 120u, out.pointer);
    const std::vector<float> got = out.host();
    int wrong = 0;
    for (unsigned row = 0; row < 128; row++) {
        const unsigned from = row / 64 * 64 + 63 - row % 64;
        for (unsigned i = 0; i < 4; i++) wrong += !(got[row * 4 + i] == (from < 120 ? in[from * 4 + i] : 0.0f));
    }
    EXPECT((wrong == 0) == right);
}

void warps() {
    Device<unsigned> out(9 * 32);
    run("shuffles", 1, 32, 0, out.pointer);
    const std::vector<unsigned> got = out.host();
    for (unsigned l = 0; l < 32; l++) {
        EXPECT(got[l] == 5);
        EXPECT(got[32 + l] == l / 8 * 8 + 3);
        EXPECT(got[64 + l] == (l ^ 1));
        EXPECT(got[96 + l] == (l % 16 < 12 ? l + 4 : l));
        EXPECT(got[128 + l] == (l ? l - 1 : 0));
        EXPECT(got[160 + l] == 0x49249249u);
        EXPECT(got[192 + l] == 2);
        EXPECT(got[224 + l] == 496);
        EXPECT(got[256 + l] == (l < 16 ? 15 - l : 47 - l));
    }
}

void blocks() {
    const unsigned n = 10000, threads = 192;
    std::vector<float> in(n), expected(n);
    for (unsigned i = 0; i < n; i++) in[i] = static_cast<float>(i);
    for (unsigned i = 0; i < n; i++) {
        const unsigned start = i / threads * threads, end = std::min(start + threads, n);
        expected[i] = static_cast<float>(start + end - 1 - i);
    }
    Device<float> din(in), out(n);
    run("reverse_blocks", (n + threads - 1) / threads, threads, 0, din.pointer, out.pointer, n);
    EXPECT(out.host() == expected);

    Device<float> ones(std::vector<float>(32 * 500, 1.0f)), parts(500), sum(1);
    Device<unsigned> arrived(std::vector<unsigned>(1, 0));
    run("sum_blocks", 500, 32, 0, ones.pointer, parts.pointer, arrived.pointer, sum.pointer);
    EXPECT(sum.host()[0] == 16000.0f);

    std::vector<unsigned> values(50000);
    for (unsigned i = 0; i < values.size(); i++) values[i] = i % 16;
    Device<unsigned> dvalues(values), counts(std::vector<unsigned>(17, 0));
    Device<float> weights(std::vector<float>(16, 0.0f));
    run("histogram", 196, 256, 0, dvalues.pointer, counts.pointer, weights.pointer, 50000u);
    std::vector<unsigned> expected_counts(16, 3125);
    expected_counts.push_back(49999);
    EXPECT(counts.host() == expected_counts);
    EXPECT(weights.host() == std::vector<float>(16, 1562.5f));
}

// Shared memory that was never written is NaN, in every block.
void poison() {
    Device<float> out(64);
    for (int round = 0; round < 2; round++) {
        run("read_unwritten", 3, 32, 128, out.pointer);
        for (float value : out.host()) EXPECT(std::isnan(value));
    }
    Device<float> fresh(8);
    for (float value : fresh.host()) EXPECT(std::isnan(value));
}

void limits() {
    CUfunction kernel = function("load_matrices"), nothing;
    Device<uint32_t> out(256);
    EXPECT(cuModuleGetFunction(&nothing, module, "no_such_kernel") == CUDA_ERROR_NOT_FOUND);
    EXPECT(launch(kernel, 1, 1025, 512, out.pointer) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(launch(kernel, 0, 32, 512, out.pointer) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(launch(kernel, 1, 32, 50000, out.pointer) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuFuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 164 << 10) ==
           CUDA_ERROR_INVALID_VALUE);
    MUST(cuFuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 163 << 10));
    EXPECT(launch(kernel, 1, 32, 163 << 10, out.pointer) == CUDA_SUCCESS);
    CUdeviceptr pointer;
    size_t free_before, free_after, total;
    MUST(cuMemGetInfo(&free_before, &total));
    EXPECT(cuMemAlloc(&pointer, free_before + 1) == CUDA_ERROR_OUT_OF_MEMORY);
    MUST(cuMemAlloc(&pointer, 1000));
    MUST(cuMemGetInfo(&free_after, &total));
    EXPECT(free_after == free_before - 1000);
    char bytes[1001] = {};
    EXPECT(cuMemcpyHtoD(pointer, bytes, 1001) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(cuMemcpyHtoD(pointer + 1, bytes, 999) == CUDA_SUCCESS);
    MUST(cuMemFree(pointer));
    EXPECT(cuMemFree(pointer) == CUDA_ERROR_INVALID_VALUE);
    CUmodule other;
    MUST(cuModuleLoadData(&other, "//\n.version 9.0\n.visible .entry shuffles(\n"));
    EXPECT(cuModuleGetFunction(&nothing, other, "shuffles") == CUDA_SUCCESS);
    EXPECT(cuModuleGetFunction(&nothing, other, "load_matrices") == CUDA_ERROR_NOT_FOUND);
    MUST(cuModuleUnload(other));
}

void graphs() {
    Device<unsigned> counts(std::vector<unsigned>(17, 0)), values(std::vector<unsigned>(32, 3));
    Device<float> weights(std::vector<float>(16, 0.0f));
    CUstream stream;
    CUgraph graph;
    CUgraphExec ready;
    MUST(cuStreamCreate(&stream, 0));
    MUST(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    {
        unsigned n = 32;
        void* arguments[] = {&values.pointer, &counts.pointer, &weights.pointer, &n};
        MUST(cuLaunchKernel(function("histogram"), 1, 1, 1, 32, 1, 1, 0, stream, arguments, nullptr));
        n = 0;  // the graph has its own
    }
    EXPECT(cuStreamSynchronize(stream) == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    MUST(cuStreamEndCapture(stream, &graph));
    EXPECT(counts.host()[3] == 0);
    MUST(cuGraphInstantiate(&ready, graph, 0));
    MUST(cuGraphDestroy(graph));
    MUST(cuGraphLaunch(ready, stream));
    MUST(cuGraphLaunch(ready, stream));
    MUST(cuGraphExecDestroy(ready));
    MUST(cuStreamDestroy(stream));
    EXPECT(counts.host()[3] == 64);
}

int wrong_kernel(const std::string& name) {
    if (name == "reverse_careless") {
        std::vector<float> in(256);
        for (unsigned i = 0; i < 256; i++) in[i] = static_cast<float>(i);
        Device<float> din(in), out(256);
        run("reverse_careless", 1, 256, 0, din.pointer, out.pointer);
        const std::vector<float> got = out.host();
        for (unsigned i = 0; i < 256; i++) {
            if (!(got[i] == in[255 - i])) return 3;
        }
        return 0;
    }
    if (name == "reuse_careless") {
        Device<float> out(64);
        run("reuse_careless", 1, 64, 0, out.pointer);
        return out.host() == std::vector<float>(64, 60.0f) ? 0 : 3;
    }
    Device<float> out(32);
    if (name == "never_meets") run("never_meets", 2, 32, 0, out.pointer);
    if (name == "writes_past_the_end") run("writes_past_the_end", 1, 1, 0, out.pointer, 32u);
    if (name == "writes_past_shared") run("writes_past_shared", 1, 32, 128, out.pointer, 32u);
    if (name == "loads_misaligned") run("loads_misaligned", 1, 32, 1024, out.pointer);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    CUdevice device;
    CUcontext context;
    MUST(cuInit(0));
    MUST(cuDeviceGet(&device, 0));
    MUST(cuDevicePrimaryCtxRetain(&context, device));
    MUST(cuCtxSetCurrent(context));
    MUST(cuModuleLoadData(&module, "\177ELF"));
    if (count > 1) return wrong_kernel(arguments[1]);
    products<__half>("product_f16", [](float v) { return __float2half(v); });
    products<__nv_bfloat16>("product_bf16", [](float v) { return __float2bfloat16(v); });
    truncation();
    matrices();
    copies("pipeline_right", true);
    copies("pipeline_early", false);
    warps();
    blocks();
    poison();
    limits();
    graphs();
    std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
    return failures != 0;
}
