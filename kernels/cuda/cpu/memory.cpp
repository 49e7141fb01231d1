// See memory.h.

#include "memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace gpu {

namespace {

constexpr size_t GUARD_BYTES = 256;
constexpr unsigned char GUARD = 0xa5;
constexpr unsigned char POISON = 0xff;  // NaN in every floating-point type

struct Allocation {
    size_t bytes;
    int device;
};

struct Memory {
    std::mutex mutex;
    std::map<uintptr_t, Allocation> allocations;
    std::map<int, size_t> used;
};

// Never destroyed: a program's own statics may free device memory as late as they like.
Memory& memory() {
    static Memory* all = new Memory;
    return *all;
}

void check(uintptr_t start, const Allocation& allocation, const char* who) {
    unsigned char untouched[GUARD_BYTES];
    std::memset(untouched, GUARD, GUARD_BYTES);
    const unsigned char* first = reinterpret_cast<const unsigned char*>(start);
    const bool before = std::memcmp(first - GUARD_BYTES, untouched, GUARD_BYTES) != 0;
    const bool after = std::memcmp(first + allocation.bytes, untouched, GUARD_BYTES) != 0;
    if (!before && !after) return;
    std::fprintf(stderr, "device memory was written %s an allocation of %zu bytes, seen after %s\n",
                 before ? "before the start of" : "past the end of", allocation.bytes, who);
    std::abort();
}

}  // namespace

size_t memory_total() {
    static const size_t total = [] {
        const char* text = std::getenv("VQRAE_GPU_MEMORY");
        return text && *text ? static_cast<size_t>(std::strtoull(text, nullptr, 10)) : static_cast<size_t>(8) << 30;
    }();
    return total;
}

size_t memory_free(int device) {
    std::lock_guard<std::mutex> guard(memory().mutex);
    return memory_total() - memory().used[device];
}

void* allocate(int device, size_t bytes) {
    std::lock_guard<std::mutex> guard(memory().mutex);
    size_t& used = memory().used[device];
    if (bytes > memory_total() - used) return nullptr;
    const size_t whole = (bytes + 2 * GUARD_BYTES + 255) / 256 * 256;
    unsigned char* base = static_cast<unsigned char*>(std::aligned_alloc(256, whole));
    if (!base) return nullptr;
    std::memset(base, GUARD, GUARD_BYTES);
    std::memset(base + GUARD_BYTES, POISON, bytes);
    std::memset(base + GUARD_BYTES + bytes, GUARD, GUARD_BYTES);
    used += bytes;
    memory().allocations[reinterpret_cast<uintptr_t>(base + GUARD_BYTES)] = {bytes, device};
    return base + GUARD_BYTES;
}

bool release(void* start) {
    std::lock_guard<std::mutex> guard(memory().mutex);
    const auto found = memory().allocations.find(reinterpret_cast<uintptr_t>(start));
    if (found == memory().allocations.end()) return false;
    check(found->first, found->second, "its release");
    std::memset(start, POISON, found->second.bytes);
    memory().used[found->second.device] -= found->second.bytes;
    memory().allocations.erase(found);
    std::free(static_cast<unsigned char*>(start) - GUARD_BYTES);
    return true;
}

bool inside(const void* at, size_t bytes) {
    std::lock_guard<std::mutex> guard(memory().mutex);
    const uintptr_t first = reinterpret_cast<uintptr_t>(at);
    auto next = memory().allocations.upper_bound(first);
    if (next == memory().allocations.begin()) return false;
    --next;
    const size_t offset = first - next->first;
    return offset <= next->second.bytes && bytes <= next->second.bytes - offset;
}

void check_guards(const char* who) {
    std::lock_guard<std::mutex> guard(memory().mutex);
    for (const auto& [start, allocation] : memory().allocations) check(start, allocation, who);
}

}  // namespace gpu
