// A libcuda.so.1 that plays GPUs: what cudarc calls of the driver, on the host's memory and `scheduler.cpp`'s machine.
//
// Kernels are the C++ that `build.sh` compiled from the .cu files, found by name in the libraries beside this one; a
// module's image is only searched for the name, where it is PTX. All work is done when it is given, so a missing
// synchronisation between streams or with the host does not show.
//
//   VQRAE_GPU_COUNT=1           devices
//   VQRAE_GPU_CAPABILITY=8.0    of each, with that part's limits of shared memory
//   VQRAE_GPU_MEMORY=bytes      of each; what does not fit is CUDA_ERROR_OUT_OF_MEMORY

#include "kernels.h"
#include "memory.h"
#include "stream.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// The types behind CUDA's handles.

struct CUctx_st {
    int device;
};

struct CUfunc_st {
    const gpu::Entry* entry;
    std::atomic<int> max_dynamic_shared;
};

struct CUmod_st {
    std::string ptx;  // empty where the image is none
    std::mutex mutex;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

struct CUgraph_st {
    std::vector<gpu::Work> works;
    std::vector<void*> freed;  // by captured work: kept as long as the graph, which uses it again
    ~CUgraph_st() {
        for (void* memory : freed) gpu::release(memory);
    }
};

struct CUgraphExec_st {
    std::shared_ptr<CUgraph_st> graph;
};

struct CUstream_st {
    std::shared_ptr<CUgraph_st> capture;  // while it is captured
};

struct CUevent_st {
    std::chrono::steady_clock::time_point time{};
    bool timed = true, recorded = false;
};

namespace {

constexpr int MAX_DEVICES = 64;
constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;
constexpr int SMS = 4;

int device_count() {
    static const int count = [] {
        const char* text = std::getenv("VQRAE_GPU_COUNT");
        return text && *text ? std::min(std::max(std::atoi(text), 0), MAX_DEVICES) : 1;
    }();
    return count;
}

// Major and minor, as ten times the one and the other.
int capability() {
    static const int both = [] {
        const char* text = std::getenv("VQRAE_GPU_CAPABILITY");
        int major = 8, minor = 0;
        if (text && *text && std::sscanf(text, "%d.%d", &major, &minor) != 2) {
            std::fprintf(stderr, "VQRAE_GPU_CAPABILITY is MAJOR.MINOR, got: %s\n", text);
            std::abort();
        }
        return 10 * major + minor;
    }();
    return both;
}

// Dynamic shared memory that a block may ask for.
size_t shared_limit() {
    switch (capability()) {
        case 70: return 96 << 10;
        case 75: return 64 << 10;
        case 80: case 87: return 163 << 10;
        case 90: case 100: case 103: return 227 << 10;
        default: return 99 << 10;
    }
}

CUctx_st* primary_context(int device) {
    static CUctx_st contexts[MAX_DEVICES];
    contexts[device].device = device;
    return &contexts[device];
}

thread_local CUctx_st* current_context;

// The two streams that have numbers for handles; both are this thread's own here, since nothing is behind them.
thread_local CUstream_st default_stream;

CUstream_st& stream_of(CUstream handle) {
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? default_stream : *handle;
}

// The folder of this library, where the kernels' are too.
std::string own_folder() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(&own_folder), &info) || !info.dli_fname) return ".";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::map<std::string, const gpu::Entry*> load_kernels() {
    std::map<std::string, const gpu::Entry*> found;
    const std::string folder = own_folder(), ending = ".kernels.so";
    DIR* directory = opendir(folder.c_str());
    if (!directory) return found;
    std::vector<std::string> names;
    while (const dirent* file = readdir(directory)) names.push_back(file->d_name);
    closedir(directory);
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
        if (name.size() < ending.size() || name.compare(name.size() - ending.size(), ending.size(), ending)) continue;
        void* library = dlopen((folder + "/" + name).c_str(), RTLD_NOW | RTLD_LOCAL);
        const auto* kernels = library ? static_cast<const gpu::Library*>(dlsym(library, "gpu_library")) : nullptr;
        if (!kernels) {
            std::fprintf(stderr, "kernels of the played GPU: %s\n", dlerror());
            std::abort();
        }
        for (size_t i = 0; i < kernels->count; i++) {
            const bool added = found.emplace(kernels->entries[i].kernel.name, &kernels->entries[i]).second;
            if (added) continue;
            std::fprintf(stderr, "two kernels are called %s, one in %s\n", kernels->entries[i].kernel.name,
                         kernels->file);
            std::abort();
        }
    }
    return found;
}

const gpu::Entry* kernel_called(const std::string& name) {
    static const auto* kernels = new std::map<std::string, const gpu::Entry*>(load_kernels());
    const auto found = kernels->find(name);
    return found == kernels->end() ? nullptr : found->second;
}

// Arguments kept for a graph, which is launched after the caller's are gone.
struct KeptArguments {
    std::vector<std::vector<unsigned char>> values;
    std::vector<void*> pointers;

    KeptArguments(const gpu::Entry& entry, void** from) {
        for (size_t i = 0; i < entry.count; i++) {
            const unsigned char* bytes = static_cast<const unsigned char*>(from[i]);
            values.emplace_back(bytes, bytes + entry.sizes[i]);
        }
        for (auto& value : values) pointers.push_back(value.data());
    }
};

void* host(CUdeviceptr pointer) { return reinterpret_cast<void*>(pointer); }

CUresult allocate(CUdeviceptr* out, size_t bytes) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!out || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    void* memory = gpu::allocate(current_context->device, bytes);
    if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
    *out = reinterpret_cast<CUdeviceptr>(memory);
    return CUDA_SUCCESS;
}

CUresult copy(CUstream stream, void* to, const void* from, size_t bytes) {
    return gpu::give(stream, [=] {
        std::memmove(to, from, bytes);
        return CUDA_SUCCESS;
    });
}

CUresult to_device(CUstream stream, CUdeviceptr to, const void* from, size_t bytes) {
    if (bytes == 0) return CUDA_SUCCESS;
    if (!gpu::inside(host(to), bytes)) return CUDA_ERROR_INVALID_VALUE;
    return copy(stream, host(to), from, bytes);
}

CUresult to_host(CUstream stream, void* to, CUdeviceptr from, size_t bytes) {
    if (bytes == 0) return CUDA_SUCCESS;
    if (!gpu::inside(host(from), bytes)) return CUDA_ERROR_INVALID_VALUE;
    return copy(stream, to, host(from), bytes);
}

CUresult on_device(CUstream stream, CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    if (bytes == 0) return CUDA_SUCCESS;
    if (!gpu::inside(host(to), bytes) || !gpu::inside(host(from), bytes)) return CUDA_ERROR_INVALID_VALUE;
    return copy(stream, host(to), host(from), bytes);
}

template <class T>
CUresult set(CUstream stream, CUdeviceptr at, T value, size_t count) {
    if (count == 0) return CUDA_SUCCESS;
    if (!gpu::inside(host(at), count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
    return gpu::give(stream, [=] {
        std::fill_n(static_cast<T*>(host(at)), count, value);
        return CUDA_SUCCESS;
    });
}

CUresult launch(CUfunction function, dim3 grid, dim3 block, unsigned shared_bytes, CUstream stream, void** arguments) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    const gpu::Entry& entry = *function->entry;
    const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return CUDA_ERROR_INVALID_VALUE;
    if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (shared_bytes > static_cast<unsigned>(function->max_dynamic_shared.load())) return CUDA_ERROR_INVALID_VALUE;
    if (entry.count > 0 && !arguments) return CUDA_ERROR_INVALID_VALUE;
    auto kept = std::make_shared<KeptArguments>(entry, arguments);
    return gpu::give(stream, [=] {
        gpu::run(function->entry->kernel, grid, block, shared_bytes, kept->pointers.data());
        gpu::check_guards(function->entry->kernel.name);
        return CUDA_SUCCESS;
    });
}

struct ErrorName {
    CUresult error;
    const char *name, *text;
};

constexpr ErrorName ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
};

}  // namespace

namespace gpu {

__attribute__((visibility("default"))) CUresult give(CUstream handle, Work work) {
    CUstream_st& stream = stream_of(handle);
    if (!stream.capture) return work();
    stream.capture->works.push_back(std::move(work));
    return CUDA_SUCCESS;
}

}  // namespace gpu

extern "C" {

// ---- the driver and its devices

CUresult CUDAAPI cuInit(unsigned) { return device_count() > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }

CUresult CUDAAPI cuDriverGetVersion(int* version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** name) {
    for (const ErrorName& each : ERRORS) {
        if (each.error == error) return *name = each.name, CUDA_SUCCESS;
    }
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
    for (const ErrorName& each : ERRORS) {
        if (each.error == error) return *text = each.text, CUDA_SUCCESS;
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuDeviceGetCount(int* count) {
    *count = device_count();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
    if (ordinal < 0 || ordinal >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetName(char* name, int bytes, CUdevice) {
    std::snprintf(name, static_cast<size_t>(bytes), "a GPU played by the CPU");
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    std::memset(uuid, 0, sizeof *uuid);
    uuid->bytes[0] = static_cast<char>(device + 1);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceTotalMem(size_t* bytes, CUdevice) {
    *bytes = gpu::memory_total();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 0x7fffffff; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: *value = 65535; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED_WITHOUT_ASKING; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = static_cast<int>(shared_limit()); break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            *value = static_cast<int>(shared_limit()) + 1024;
            break;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = SMS; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 40 << 20; break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1000000; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1000000; break;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 2; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

// ---- contexts

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    if (device < 0 || device >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
    *context = primary_context(device);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
    *context = current_context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
    current_context = context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *device = current_context->device;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxCreate(CUcontext* context, CUctxCreateParams*, unsigned, CUdevice device) {
    if (device < 0 || device >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
    *context = current_context = new CUctx_st{device};
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxDestroy(CUcontext context) {
    if (!context || context == primary_context(context->device)) return CUDA_ERROR_INVALID_CONTEXT;
    if (current_context == context) current_context = nullptr;
    delete context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetLimit(size_t* value, CUlimit) {
    *value = 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCacheConfig(CUfunc_cache* config) {
    *config = CU_FUNC_CACHE_PREFER_NONE;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSynchronize() { return current_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
CUresult CUDAAPI cuCtxSetFlags(unsigned) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxSetCacheConfig(CUfunc_cache) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = 0;
    return CUDA_SUCCESS;
}

// ---- memory

CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *free = gpu::memory_free(current_context->device);
    *total = gpu::memory_total();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* out, size_t bytes) { return allocate(out, bytes); }
// Unlike the synchronous call, nothing may be asked of it.
CUresult CUDAAPI cuMemAllocAsync(CUdeviceptr* out, size_t bytes, CUstream) {
    if (bytes > 0) return allocate(out, bytes);
    *out = 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAllocManaged(CUdeviceptr* out, size_t bytes, unsigned) { return allocate(out, bytes); }

CUresult CUDAAPI cuMemFree(CUdeviceptr pointer) {
    if (pointer == 0) return CUDA_SUCCESS;
    return gpu::release(host(pointer)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
    CUstream_st& stream = stream_of(handle);
    if (!stream.capture) return cuMemFree(pointer);
    if (!gpu::inside(host(pointer), 1)) return CUDA_ERROR_INVALID_VALUE;
    stream.capture->freed.push_back(host(pointer));
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    *out = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult CUDAAPI cuMemFreeHost(void* pointer) {
    std::free(pointer);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemHostRegister(void*, size_t, unsigned) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuMemHostUnregister(void*) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    return to_device(nullptr, to, from, bytes);
}
CUresult CUDAAPI cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) { return to_host(nullptr, to, from, bytes); }
CUresult CUDAAPI cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return on_device(nullptr, to, from, bytes);
}
CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return to_device(stream, to, from, bytes);
}
CUresult CUDAAPI cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return to_host(stream, to, from, bytes);
}
CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return on_device(stream, to, from, bytes);
}
CUresult CUDAAPI cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes,
                                   CUstream stream) {
    return on_device(stream, to, from, bytes);
}

CUresult CUDAAPI cuMemsetD8(CUdeviceptr at, unsigned char value, size_t count) { return set(nullptr, at, value, count); }
CUresult CUDAAPI cuMemsetD32(CUdeviceptr at, unsigned value, size_t count) { return set(nullptr, at, value, count); }
CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t count, CUstream stream) {
    return set(stream, at, value, count);
}
CUresult CUDAAPI cuMemsetD16Async(CUdeviceptr at, unsigned short value, size_t count, CUstream stream) {
    return set(stream, at, value, count);
}
CUresult CUDAAPI cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
    return set(stream, at, value, count);
}

// A pool is nothing here: memory comes and goes at once.
CUresult CUDAAPI cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
    *pool = reinterpret_cast<CUmemoryPool>(primary_context(device));
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) {
    return cuDeviceGetDefaultMemPool(pool, device);
}
CUresult CUDAAPI cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }

// ---- streams, events

CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned) {
    *stream = new CUstream_st;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}
CUresult CUDAAPI cuStreamDestroy(CUstream stream) {
    if (reinterpret_cast<uintptr_t>(stream) <= 2) return CUDA_ERROR_INVALID_HANDLE;
    delete stream;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    return stream_of(stream).capture ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamQuery(CUstream stream) { return cuStreamSynchronize(stream); }
CUresult CUDAAPI cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamAttachMemAsync(CUstream, CUdeviceptr, size_t, unsigned) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    return gpu::give(stream, [=] {
        function(data);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned flags) {
    *event = new CUevent_st;
    (*event)->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventDestroy(CUevent event) {
    delete event;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream) {
    event->time = std::chrono::steady_clock::now();
    event->recorded = true;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventQuery(CUevent) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    if (!start->timed || !end->timed || !start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return CUDA_SUCCESS;
}

// ---- graphs

CUresult CUDAAPI cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode) {
    // As in CUDA, the legacy stream cannot be captured.
    if (reinterpret_cast<uintptr_t>(handle) <= 1) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    CUstream_st& stream = stream_of(handle);
    if (stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
    stream.capture = std::make_shared<CUgraph_st>();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    *status = stream_of(stream).capture ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

// A graph's handle keeps it alive, as does every graph made to run of it.
static std::map<CUgraph, std::shared_ptr<CUgraph_st>>& graphs() {
    static auto* all = new std::map<CUgraph, std::shared_ptr<CUgraph_st>>;
    return *all;
}
static std::mutex graphs_mutex;

CUresult CUDAAPI cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    CUstream_st& stream = stream_of(handle);
    if (!stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
    *graph = stream.capture.get();
    std::lock_guard<std::mutex> guard(graphs_mutex);
    graphs()[*graph] = std::move(stream.capture);
    stream.capture.reset();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGraphInstantiate(CUgraphExec* out, CUgraph graph, unsigned long long) {
    std::lock_guard<std::mutex> guard(graphs_mutex);
    const auto found = graphs().find(graph);
    if (found == graphs().end()) return CUDA_ERROR_INVALID_VALUE;
    *out = new CUgraphExec_st{found->second};
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGraphUpload(CUgraphExec, CUstream) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuGraphLaunch(CUgraphExec graph, CUstream stream) {
    if (stream_of(stream).capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    for (const gpu::Work& work : graph->graph->works) {
        const CUresult result = work();
        if (result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec graph) {
    delete graph;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGraphDestroy(CUgraph graph) {
    std::lock_guard<std::mutex> guard(graphs_mutex);
    return graphs().erase(graph) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// ---- modules and kernels

CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    auto loaded = std::make_unique<CUmod_st>();
    // PTX is text, beginning with a comment or a directive; any other image is taken as it is.
    const char* text = static_cast<const char*>(image);
    const char* first = text + std::strspn(text, " \t\r\n");
    if (!std::strncmp(first, "//", 2) || *first == '.') loaded->ptx = text;
    *module = loaded.release();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}

CUresult CUDAAPI cuModuleLoadFatBinary(CUmodule* module, const void* image) { return cuModuleLoadData(module, image); }

CUresult CUDAAPI cuModuleLoad(CUmodule* module, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    const std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    return cuModuleLoadData(module, image.c_str());
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    delete module;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (!module->ptx.empty() && module->ptx.find(".entry " + std::string(name) + "(") == std::string::npos) {
        return CUDA_ERROR_NOT_FOUND;
    }
    const gpu::Entry* entry = kernel_called(name);
    if (!entry) return CUDA_ERROR_NOT_FOUND;
    std::lock_guard<std::mutex> guard(module->mutex);
    std::unique_ptr<CUfunc_st>& known = module->functions[name];
    if (!known) {
        known.reset(new CUfunc_st);
        known->entry = entry;
        known->max_dynamic_shared = static_cast<int>(SHARED_WITHOUT_ASKING);
    }
    *function = known.get();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetGlobal(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || static_cast<size_t>(value) > shared_limit()) return CUDA_ERROR_INVALID_VALUE;
        function->max_dynamic_shared = value;
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 64; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->max_dynamic_shared; break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = capability(); break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x,
                                unsigned y, unsigned z, unsigned shared_bytes, CUstream stream, void** arguments,
                                void** extra) {
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    return launch(function, dim3(grid_x, grid_y, grid_z), dim3(x, y, z), shared_bytes, stream, arguments);
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    return launch(function, dim3(config->gridDimX, config->gridDimY, config->gridDimZ),
                  dim3(config->blockDimX, config->blockDimY, config->blockDimZ), config->sharedMemBytes,
                  config->hStream, arguments);
}

CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int threads, size_t shared) {
    if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    const size_t by_threads = 2048 / static_cast<size_t>(threads);
    const size_t by_shared = (shared_limit() + 1024) / (shared + 1024);
    *blocks = static_cast<int>(std::min<size_t>({32, by_threads, by_shared}));
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads,
                                                                      size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

CUresult CUDAAPI cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction, CUoccupancyB2DSize, size_t, int limit) {
    *block = limit > 0 ? std::min(limit, 1024) : 1024;
    *grid = SMS * (2048 / *block);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuProfilerStart() { return CUDA_SUCCESS; }
CUresult CUDAAPI cuProfilerStop() { return CUDA_SUCCESS; }

}  // extern "C"
