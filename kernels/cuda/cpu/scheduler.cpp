// The machine that plays a GPU: lanes as fibers, warps and blocks that meet, blocks on a few OS threads.

#include "scheduler.h"

#include <memory>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace gpu {

thread_local Lane* lane __attribute__((tls_model("initial-exec")));

namespace {

constexpr unsigned MAX_LANES = 1024;
constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t PAGE = 4096;
constexpr size_t MAX_SHARED = 256 << 10;
constexpr size_t SHARED_GUARD = 1024;
constexpr unsigned char POISON = 0xff;  // NaN in every floating-point type
constexpr unsigned char GUARD = 0xa5;

// ---- switching stacks: what a function call must keep, and the stack pointer

#ifdef __x86_64__
extern "C" void gpu_switch(void** from, void* to);
asm(R"(
.text
.type gpu_switch, @function
gpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size gpu_switch, .-gpu_switch
)");

// A stack on which `gpu_switch` enters `entry`.
void* fresh_context(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where `entry` would return to; it also puts the stack where a call would have it
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    return top;
}
#else
// Elsewhere the C library switches; a context lies at the far end of its stack.
void gpu_switch(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* fresh_context(unsigned char* stack, size_t bytes, void (*entry)()) {
    ucontext_t* context = reinterpret_cast<ucontext_t*>(stack);
    const size_t head = (sizeof(ucontext_t) + 63) / 64 * 64;
    getcontext(context);
    context->uc_stack.ss_sp = stack + head;
    context->uc_stack.ss_size = bytes - head;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

// ---- settings

struct Order {
    enum Kind { Forward, Reverse, Random } kind = Forward;
    uint64_t seed = 0;
};

Order order_from_environment() {
    const char* text = std::getenv("VQRAE_GPU_ORDER");
    if (!text || !*text || !std::strcmp(text, "forward")) return {};
    if (!std::strcmp(text, "reverse")) return {Order::Reverse, 0};
    if (!std::strncmp(text, "random:", 7)) return {Order::Random, std::strtoull(text + 7, nullptr, 10)};
    std::fprintf(stderr, "VQRAE_GPU_ORDER is forward, reverse or random:SEED, got: %s\n", text);
    std::abort();
}

unsigned threads_from_environment() {
    const char* text = std::getenv("VQRAE_GPU_THREADS");
    const unsigned wanted = text ? static_cast<unsigned>(std::atoi(text)) : std::thread::hardware_concurrency();
    return std::min(std::max(wanted, 1u), 64u);
}

// A launch, and which of its blocks are still to be played.
struct Launch {
    const Kernel& kernel;
    dim3 grid, block;
    size_t shared_bytes;
    void* const* arguments;
    Order order;
    uint64_t blocks;
    std::atomic<uint64_t> next{0};
};

// ---- one OS thread that plays blocks

// Lanes of a warp that wait for each other under one mask.
struct Meeting {
    unsigned mask = 0, arrived = 0;
    Act act = nullptr;
    const char* what = nullptr;
    void* arguments[WARP];
};

struct Warp {
    unsigned alive = 0;
    std::vector<Meeting> meetings;
};

class Worker {
  public:
    Worker() {
        const size_t bytes = MAX_LANES * STACK_BYTES;
        void* area = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (area == MAP_FAILED) {
            std::perror("the stacks of a block");
            std::abort();
        }
        stacks_ = static_cast<unsigned char*>(area);
        // A stack that overflows hits a page of no access rather than its neighbour.
        for (unsigned i = 0; i < MAX_LANES; i++) mprotect(stacks_ + i * STACK_BYTES, PAGE, PROT_NONE);
        shared_ = static_cast<unsigned char*>(std::aligned_alloc(1024, MAX_SHARED + SHARED_GUARD));
        if (!shared_) std::abort();
        lanes_.resize(MAX_LANES);
        warps_.resize(MAX_LANES / WARP);
    }

    ~Worker() {
        munmap(stacks_, MAX_LANES * STACK_BYTES);
        std::free(shared_);
    }

    void play(Launch& launch) {
        launch_ = &launch;
        find_static_shared();
        for (uint64_t i; (i = launch.next.fetch_add(1, std::memory_order_relaxed)) < launch.blocks;) {
            // Random order of blocks: a stride that shares no factor with their number visits each once.
            uint64_t which = i;
            if (launch.order.kind == Order::Reverse) which = launch.blocks - 1 - i;
            if (launch.order.kind == Order::Random) {
                uint64_t stride = launch.order.seed % launch.blocks | 1;
                while (std::__gcd(stride, launch.blocks) != 1) stride += 2;
                which = static_cast<uint64_t>(static_cast<unsigned __int128>(i) * stride % launch.blocks);
            }
            play_block(which);
        }
        launch_ = nullptr;
    }

    void meet_block(bool vote) {
        voted_ += vote;
        arrived_++;
        current()->state = Lane::Waiting;
        at_barrier_.push_back(current()->index);
        if (arrived_ == alive_) open_barrier();
        run_others();
    }

    void meet_warp(unsigned mask, Act act, void* argument, const char* what) {
        Lane* me = current();
        Warp& warp = warps_[me->index / WARP];
        const unsigned bit = 1u << me->index % WARP;
        if (!(mask & bit)) fail("%s: the mask %08x does not name the lane that calls", what, mask);
        Meeting* meeting = nullptr;
        for (Meeting& open : warp.meetings) {
            if (open.mask == mask && !(open.arrived & bit)) meeting = &open;
        }
        if (!meeting) {
            warp.meetings.emplace_back();
            meeting = &warp.meetings.back();
            meeting->mask = mask;
            meeting->act = act;
            meeting->what = what;
        }
        if (meeting->act != act || std::strcmp(meeting->what, what)) {
            fail("lanes of a warp meet in %s and in %s under one mask %08x", meeting->what, what, mask);
        }
        meeting->arrived |= bit;
        meeting->arguments[me->index % WARP] = argument;
        me->state = Lane::Waiting;
        close_meeting(warp, me->index / WARP);
        run_others();
    }

    unsigned alive_in_warp() { return warps_[current()->index / WARP].alive; }

    // Whether 16 bytes at `at` are memory that the block shares.
    bool is_shared(const void* at) const {
        const unsigned char* p = static_cast<const unsigned char*>(at);
        const auto within = [p](const unsigned char* start, size_t bytes) {
            return p >= start && p + 16 <= start + bytes;
        };
        if (!launch_->kernel.touch) return true;
        return within(shared_, launch_->shared_bytes) || within(static_shared_, static_shared_bytes_);
    }

    [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
        va_list arguments;
        va_start(arguments, format);
        fail_with(format, arguments);
    }

    [[noreturn]] void fail_with(const char* format, va_list arguments) {
        std::fprintf(stderr, "kernel %s, block (%u, %u, %u)", launch_->kernel.name, block_.index.x, block_.index.y,
                     block_.index.z);
        if (lane) std::fprintf(stderr, ", thread (%u, %u, %u)", lane->thread.x, lane->thread.y, lane->thread.z);
        std::fprintf(stderr, ": ");
        std::vfprintf(stderr, format, arguments);
        std::fprintf(stderr, "\n");
        std::abort();
    }

  private:
    Lane* current() { return lane; }

    // The thread-local block of the library that the kernel lies in: nothing else is in it but static shared memory.
    void find_static_shared() {
        static_shared_ = nullptr;
        static_shared_bytes_ = 0;
        if (!launch_->kernel.touch) return;
        struct Search {
            uintptr_t inside;
            unsigned char* start;
            size_t bytes;
        } search{reinterpret_cast<uintptr_t>(launch_->kernel.touch()), nullptr, 0};
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* out) {
                Search& search = *static_cast<Search*>(out);
                bool ours = false;
                size_t bytes = 0;
                for (int i = 0; i < info->dlpi_phnum; i++) {
                    const auto& segment = info->dlpi_phdr[i];
                    const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
                    if (segment.p_type == PT_LOAD) {
                        ours |= search.inside >= start && search.inside < start + segment.p_memsz;
                    }
                    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
                }
                if (!ours) return 0;
                search.start = static_cast<unsigned char*>(info->dlpi_tls_data);
                search.bytes = search.start ? bytes : 0;
                return 1;
            },
            &search);
        static_shared_ = search.start;
        static_shared_bytes_ = search.bytes;
    }

    void play_block(uint64_t which) {
        const dim3 grid = launch_->grid, size = launch_->block;
        block_.index = {static_cast<unsigned>(which % grid.x), static_cast<unsigned>(which / grid.x % grid.y),
                        static_cast<unsigned>(which / grid.x / grid.y)};
        block_.size = size;
        block_.grid = grid;
        block_.shared = shared_;
        block_.shared_bytes = launch_->shared_bytes;
        std::memset(shared_, POISON, launch_->shared_bytes);
        std::memset(shared_ + launch_->shared_bytes, GUARD, SHARED_GUARD);
        if (static_shared_) std::memset(static_shared_, POISON, static_shared_bytes_);

        count_ = size.x * size.y * size.z;
        alive_ = count_;
        arrived_ = 0;
        voted_ = 0;
        at_barrier_.clear();
        random_.seed(launch_->order.seed * 1000003 + which);
        free_stacks_.clear();
        for (unsigned i = count_; i-- > 0;) free_stacks_.push_back(i);
        for (unsigned i = 0; i < count_; i++) {
            Lane& each = lanes_[i];
            each.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
            each.index = i;
            each.block = &block_;
            each.state = Lane::Unstarted;
            each.copies.clear();
            each.groups = 0;
        }
        for (unsigned w = 0; w * WARP < count_; w++) {
            const unsigned lanes = std::min(WARP, count_ - w * WARP);
            warps_[w].alive = lanes == WARP ? ~0u : (1u << lanes) - 1;
            warps_[w].meetings.clear();
        }
        queue_begin_ = queue_end_ = 0;
        std::vector<unsigned>& all = scratch_;
        all.resize(count_);
        for (unsigned i = 0; i < count_; i++) all[i] = i;
        arrange(all);
        for (unsigned i : all) queue_[queue_end_++ % MAX_LANES] = i;

        Lane* first = take();
        start_on_new_stack(first, &outside_);
        lane = nullptr;
        for (size_t i = 0; i < SHARED_GUARD; i++) {
            if (shared_[launch_->shared_bytes + i] == GUARD) continue;
            fail("a write %zu bytes past the %zu bytes of dynamic shared memory", i, launch_->shared_bytes);
        }
    }

    void arrange(std::vector<unsigned>& lanes) {
        if (launch_->order.kind == Order::Reverse) std::reverse(lanes.begin(), lanes.end());
        if (launch_->order.kind == Order::Random) std::shuffle(lanes.begin(), lanes.end(), random_);
    }

    // Makes lanes ready. Those of a warp go first, so that a warp runs far ahead of the others until a barrier stops
    // it: that is what shows where one is missing. In random order it is up to chance.
    void make_ready(std::vector<unsigned>& lanes, bool ahead) {
        std::sort(lanes.begin(), lanes.end());
        arrange(lanes);
        if (launch_->order.kind == Order::Random && random_() % 2) ahead = false;
        if (ahead) {
            for (size_t i = lanes.size(); i-- > 0;) queue_[--queue_begin_ % MAX_LANES] = lanes[i];
        } else {
            for (unsigned i : lanes) queue_[queue_end_++ % MAX_LANES] = i;
        }
        for (unsigned i : lanes) lanes_[i].state = Lane::Ready;
    }

    void open_barrier() {
        block_.voted = voted_;
        block_.voters = static_cast<int>(arrived_);
        voted_ = 0;
        arrived_ = 0;
        make_ready(at_barrier_, false);
        at_barrier_.clear();
    }

    // Ends every meeting of the warp to which all living lanes have come.
    void close_meeting(Warp& warp, unsigned warp_index) {
        for (size_t i = 0; i < warp.meetings.size();) {
            Meeting& meeting = warp.meetings[i];
            if (meeting.arrived != (meeting.mask & warp.alive)) {
                i++;
                continue;
            }
            if (meeting.act) meeting.act(meeting.arguments, meeting.arrived);
            std::vector<unsigned>& lanes = scratch_;
            lanes.clear();
            for (unsigned l = 0; l < WARP; l++) {
                if (meeting.arrived >> l & 1) lanes.push_back(warp_index * WARP + l);
            }
            make_ready(lanes, true);
            warp.meetings.erase(warp.meetings.begin() + i);
        }
    }

    Lane* take() {
        if (queue_begin_ == queue_end_) return nullptr;
        return &lanes_[queue_[queue_begin_++ % MAX_LANES]];
    }

    // Leaves the current lane, which waits, for the next one that can run; returns when the lane is ready and next.
    void run_others() {
        Lane* me = current();
        Lane* next = take();
        if (!next) deadlock();
        if (next == me) {
            me->state = Lane::Running;
            return;
        }
        if (next->state == Lane::Unstarted) {
            start_on_new_stack(next, &me->stack_pointer);
        } else {
            lane = next;
            gpu_switch(&me->stack_pointer, next->stack_pointer);
        }
        lane = me;
        me->state = Lane::Running;
    }

    void start_on_new_stack(Lane* next, void** from) {
        const unsigned stack = free_stacks_.back();
        free_stacks_.pop_back();
        next->stack = stack;
        lane = next;
        unsigned char* start = stacks_ + stack * STACK_BYTES;
        gpu_switch(from, fresh_context(start + PAGE, STACK_BYTES - PAGE, &Worker::enter));
    }

    static void enter();

    // Runs lanes on this stack, one after the other, as long as the next is one that has not begun: a lane that never
    // waits costs a call.
    void run_lanes() {
        for (;;) {
            Lane* me = current();
            me->state = Lane::Running;
            launch_->kernel.call(launch_->arguments);
            finish(me);
            Lane* next = take();
            if (!next && alive_ > 0) deadlock();
            if (next && next->state == Lane::Unstarted) {
                next->stack = me->stack;
                lane = next;
                continue;
            }
            // Nothing starts on this stack before it has been left.
            free_stacks_.push_back(me->stack);
            lane = next;
            void* never;
            gpu_switch(&never, next ? next->stack_pointer : outside_);
        }
    }

    void finish(Lane* me) {
        me->state = Lane::Done;
        alive_--;
        Warp& warp = warps_[me->index / WARP];
        warp.alive &= ~(1u << me->index % WARP);
        if (!warp.meetings.empty()) close_meeting(warp, me->index / WARP);
        if (alive_ > 0 && arrived_ == alive_) open_barrier();
    }

    [[noreturn]] void deadlock() {
        std::string waiting;
        if (arrived_ > 0) waiting += "; " + std::to_string(arrived_) + " in __syncthreads";
        for (unsigned w = 0; w * WARP < count_; w++) {
            for (const Meeting& meeting : warps_[w].meetings) {
                char text[160];
                std::snprintf(text, sizeof text, "; of warp %u, %08x in %s(%08x)", w, meeting.arrived, meeting.what,
                              meeting.mask);
                waiting += text;
            }
        }
        lane = nullptr;
        fail("deadlock: %u threads have not returned and none can run%s", alive_, waiting.c_str());
    }

    unsigned char* stacks_;
    unsigned char* shared_;
    unsigned char* static_shared_ = nullptr;
    size_t static_shared_bytes_ = 0;
    Launch* launch_ = nullptr;
    Block block_;
    std::vector<Lane> lanes_;
    std::vector<Warp> warps_;
    std::vector<unsigned> free_stacks_, at_barrier_, scratch_;
    unsigned queue_[MAX_LANES];
    unsigned queue_begin_ = 0, queue_end_ = 0;  // both modulo 2^32, of which MAX_LANES is a divisor
    unsigned count_ = 0, alive_ = 0, arrived_ = 0;
    int voted_ = 0;
    std::minstd_rand random_;
    void* outside_ = nullptr;
};

thread_local Worker* worker;

void Worker::enter() { worker->run_lanes(); }

// This OS thread's worker; its stacks are kept for the next launch.
Worker& this_worker() {
    // Elsewhere: a library that is opened late has little room for what each thread has of its own.
    static thread_local std::unique_ptr<Worker> owner;
    if (!owner) owner = std::make_unique<Worker>();
    worker = owner.get();
    return *owner;
}

// ---- OS threads that help with a launch of many blocks

class Helpers {
  public:
    explicit Helpers(unsigned count) {
        for (unsigned i = 0; i < count; i++) std::thread([this] { help(); }).detach();
        count_ = count;
    }

    // Plays the launch on all threads. False where another launch has them.
    bool play(Launch& launch) {
        std::unique_lock<std::mutex> taken(one_launch_, std::try_to_lock);
        if (count_ == 0 || !taken.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> guard(mutex_);
            launch_ = &launch;
            round_++;
            busy_ = count_;
        }
        start_.notify_all();
        this_worker().play(launch);
        std::unique_lock<std::mutex> guard(mutex_);
        done_.wait(guard, [this] { return busy_ == 0; });
        return true;
    }

  private:
    void help() {
        uint64_t seen = 0;
        for (;;) {
            Launch* launch;
            {
                std::unique_lock<std::mutex> guard(mutex_);
                start_.wait(guard, [&] { return round_ != seen; });
                seen = round_;
                launch = launch_;
            }
            this_worker().play(*launch);
            {
                std::lock_guard<std::mutex> guard(mutex_);
                busy_--;
            }
            done_.notify_one();
        }
    }

    std::mutex one_launch_, mutex_;
    std::condition_variable start_, done_;
    Launch* launch_ = nullptr;
    uint64_t round_ = 0;
    unsigned count_ = 0, busy_ = 0;
};

// Fewer lanes than this are not worth waking threads for.
constexpr uint64_t FEW_LANES = 4096;

}  // namespace

void run(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void* const* arguments) {
    static const Order order = order_from_environment();
    // Never destroyed: its threads wait in it until the process ends.
    static Helpers* helpers = new Helpers(threads_from_environment() - 1);
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    const uint64_t lanes = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (lanes == 0 || lanes > MAX_LANES || shared_bytes > MAX_SHARED) {
        std::fprintf(stderr, "kernel %s: %llu threads and %zu bytes of shared memory a block\n", kernel.name,
                     static_cast<unsigned long long>(lanes), shared_bytes);
        std::abort();
    }
    Launch launch{kernel, grid, block, shared_bytes, arguments, order, blocks};
    if (blocks > 1 && blocks * lanes > FEW_LANES && helpers->play(launch)) return;
    this_worker().play(launch);
}

void meet_block(bool vote) { worker->meet_block(vote); }

void meet_warp(unsigned mask, Act act, void* argument, const char* what) {
    worker->meet_warp(mask, act, argument, what);
}

void meet_full_warp(Act act, void* argument, const char* what) {
    if (worker->alive_in_warp() != ~0u) fail("%s needs all 32 lanes, alive: %08x", what, worker->alive_in_warp());
    worker->meet_warp(~0u, act, argument, what);
}

void check_shared(const void* at, const char* what) {
    if (!worker->is_shared(at)) fail("%s at %p, which is no shared memory of the block", what, at);
}

void copy_start(void* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % 16) fail("cp_async_16 to %p, which is on no 16-byte boundary", shared);
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("cp_async_16 from %p, which is on no 16-byte boundary", global);
    check_shared(shared, "cp_async_16");
    // The bytes are anything until the wait: who still reads the old ones, or reads the new ones too early, sees
    // poison.
    std::memset(shared, POISON, 16);
    lane->copies.push_back({shared, global, lane->groups});
}

void copy_commit() { lane->groups++; }

void copy_wait(unsigned newest) {
    std::vector<Copy>& copies = lane->copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group + newest < lane->groups; landed++) {
        const Copy& copy = copies[landed];
        if (copy.global) std::memcpy(copy.shared, copy.global, 16);
        else std::memset(copy.shared, 0, 16);
    }
    copies.erase(copies.begin(), copies.begin() + landed);
}

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    worker->fail_with(format, arguments);
}

}  // namespace gpu
