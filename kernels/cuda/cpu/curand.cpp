// A libcurand.so.10: uniform and normal numbers from the standard library's generator. Not cuRAND's own numbers.

#include "memory.h"
#include "stream.h"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 101, LENGTH_NOT_MULTIPLE = 105 };

struct Generator {
    std::mt19937_64 numbers;
    CUstream stream = nullptr;
};

// In (0, 1], as cuRAND's.
template <class T>
T uniform(Generator& generator) {
    constexpr int BITS = sizeof(T) == 8 ? 53 : 24;
    return static_cast<T>((generator.numbers() >> (64 - BITS)) + 1) / static_cast<T>(uint64_t(1) << BITS);
}

template <class T, class F>
int fill(Generator* generator, T* out, size_t count, F next) {
    if (!generator) return NOT_INITIALIZED;
    if (count > 0 && !gpu::inside(out, count * sizeof(T))) {
        std::fprintf(stderr, "curand: %zu numbers at %p do not lie in one allocation\n", count, static_cast<void*>(out));
        std::abort();
    }
    gpu::give(generator->stream, [=] {
        for (size_t i = 0; i < count; i++) out[i] = next(*generator);
        return CUDA_SUCCESS;
    });
    return SUCCESS;
}

template <class T>
int normal(Generator* generator, T* out, size_t count, T mean, T deviation) {
    // cuRAND makes them in pairs.
    if (count % 2) return LENGTH_NOT_MULTIPLE;
    return fill(generator, out, count, [=](Generator& g) {
        return mean + deviation * std::normal_distribution<T>()(g.numbers);
    });
}

}  // namespace

extern "C" {

int curandCreateGenerator(Generator** generator, int) {
    *generator = new Generator;
    return SUCCESS;
}

int curandDestroyGenerator(Generator* generator) {
    delete generator;
    return SUCCESS;
}

int curandSetStream(Generator* generator, CUstream stream) {
    if (!generator) return NOT_INITIALIZED;
    generator->stream = stream;
    return SUCCESS;
}

int curandSetPseudoRandomGeneratorSeed(Generator* generator, unsigned long long seed) {
    if (!generator) return NOT_INITIALIZED;
    generator->numbers.seed(seed);
    return SUCCESS;
}

int curandSetGeneratorOffset(Generator* generator, unsigned long long offset) {
    if (!generator) return NOT_INITIALIZED;
    generator->numbers.discard(offset);
    return SUCCESS;
}

int curandGenerateUniform(Generator* generator, float* out, size_t count) {
    return fill(generator, out, count, uniform<float>);
}

int curandGenerateUniformDouble(Generator* generator, double* out, size_t count) {
    return fill(generator, out, count, uniform<double>);
}

int curandGenerateNormal(Generator* generator, float* out, size_t count, float mean, float deviation) {
    return normal(generator, out, count, mean, deviation);
}

int curandGenerateNormalDouble(Generator* generator, double* out, size_t count, double mean, double deviation) {
    return normal(generator, out, count, mean, deviation);
}

}  // extern "C"
