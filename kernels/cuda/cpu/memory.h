// The device's memory: the host's, with a guard on both sides of every allocation, poisoned when new and when freed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpu {

// Bytes of device memory in all: VQRAE_GPU_MEMORY, 8 GiB by default.
size_t memory_total();

// Bytes of it that are not allocated on `device`.
size_t memory_free(int device);

// `bytes` > 0 on a 256-byte boundary, or null where the device has no more.
void* allocate(int device, size_t bytes);

// False where nothing was allocated at `start`. A guard that was written to ends the program.
bool release(void* start);

// Whether `bytes` at `at` are inside of one allocation.
bool inside(const void* at, size_t bytes);

// Ends the program where a guard was written to, and says that `who` was the last that ran.
void check_guards(const char* who);

}  // namespace gpu
