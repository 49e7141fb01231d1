// A library of kernels: what `build.sh` puts below each .cu file, and what the driver reads from it.
#pragma once

#include "scheduler.h"

#include <type_traits>
#include <utility>

namespace gpu {

// A kernel with its arguments' sizes, in their order.
struct Entry {
    Kernel kernel;
    const size_t* sizes;
    size_t count;
};

// All kernels of one .cu file.
struct Library {
    const char* file;
    const Entry* entries;
    size_t count;
};

template <class... A>
struct Arguments {
    static constexpr size_t count = sizeof...(A);
    static constexpr size_t sizes[count + 1] = {sizeof(A)..., 0};

    template <void (*kernel)(A...), size_t... I>
    static void call_at(void* const* arguments, std::index_sequence<I...>) {
        kernel(*static_cast<const std::remove_cv_t<A>*>(arguments[I])...);
    }

    template <void (*kernel)(A...)>
    static void call(void* const* arguments) {
        call_at<kernel>(arguments, std::index_sequence_for<A...>());
    }
};

template <class... A>
Arguments<A...> arguments_of(void (*)(A...));

// The entry of a kernel: its arguments' types are the function's own, so none is written twice.
template <auto kernel>
constexpr Entry entry(const char* name, const void* (*touch)()) {
    using Types = decltype(arguments_of(kernel));
    return {{name, &Types::template call<kernel>, touch}, Types::sizes, Types::count};
}

}  // namespace gpu
