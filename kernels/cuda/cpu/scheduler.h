// What a kernel's code asks of the machine that plays the GPU: who am I, meet the others, and the block's memory.
// `emulator.h` puts CUDA's names on it; `scheduler.cpp` is the machine.
//
// A thread of a block ("lane") is a fiber of the OS thread that plays its block. A lane runs until it has to wait for
// others, so where a barrier is missing, lanes see memory as it was before or long after the others' writes. Which lane
// is first is a setting: VQRAE_GPU_ORDER=forward (the default), reverse or random:SEED.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gpu {

// A cp.async under way: 16 bytes, or zeros where there is no source.
struct Copy {
    void* shared;
    const void* global;
    unsigned group;
};

struct Block;

// A thread of the block, and what lies in its registers for the machine.
struct Lane {
    uint3 thread;
    unsigned index;               // in the block, x first
    Block* block;
    void* stack_pointer;          // while it waits
    unsigned stack;               // which stack it is on
    enum State { Unstarted, Running, Ready, Waiting, Done } state;
    std::vector<Copy> copies;     // oldest first
    unsigned groups;              // committed so far
};

// What all lanes of a block see. One OS thread plays one block at a time.
struct Block {
    uint3 index;
    dim3 size, grid;
    unsigned char* shared;        // the dynamic shared memory, on a 128-byte boundary
    size_t shared_bytes;
    int voted, voters;            // at the last barrier: lanes that voted yes, lanes that met
};

// The lane that runs on this OS thread. Every access to threadIdx goes through it, hence the fast kind of thread-local.
extern thread_local Lane* lane __attribute__((tls_model("initial-exec")));

// Waits for all lanes of the block that have not returned; `vote` is counted in `Block::voted`.
void meet_block(bool vote);

// What the last lane to come does for all that meet: `arguments[l]` is lane l's where bit l of `present` is set.
using Act = void (*)(void* const* arguments, unsigned present);

// Waits for the lanes of this warp that `mask` names and that have not returned; the last one to come acts. All must
// come with the same act.
void meet_warp(unsigned mask, Act act, void* argument, const char* what);

// As `meet_warp` of all 32 lanes, none of which may be missing.
void meet_full_warp(Act act, void* argument, const char* what);

// Starts a copy of 16 bytes (zeros if `global` is null), ends a group of them, waits until `newest` groups are left.
void copy_start(void* shared, const void* global);
void copy_commit();
void copy_wait(unsigned newest);

// Fails unless 16 bytes at `at` are the block's shared memory.
void check_shared(const void* at, const char* what);

// Ends the program with a message that names the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A kernel as the driver finds it: `call` unpacks the arguments and runs one lane of it.
struct Kernel {
    const char* name;
    void (*call)(void* const* arguments);
    // Touches the thread-local block in which the kernel's static shared memory lies, so that it exists, and returns
    // an address in its library. Null where that block holds other things too.
    const void* (*touch)();
};

// Runs all blocks, on several OS threads where there are many; returns when all are done.
void run(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void* const* arguments);

}  // namespace gpu
