#!/bin/sh
# Builds the played GPU: libcuda.so.1, libcublas.so.13, libcublasLt.so.13 and libcurand.so.10 for LD_LIBRARY_PATH.
#
#   build.sh OUT [--candle DIR] [--no-candle] [--plant barrier|fragment] [--check]
#
# OUT gets the libraries, and one NAME.kernels.so for each .cu file of kernels/cuda and of candle-kernels. DIR is
# candle-kernels' src folder; without it the newest of cargo's registry is taken. --plant builds our kernels with a bug
# that tests must find. --check runs the self-tests.
#
# A program takes the libraries for the real ones. How they play is set by VQRAE_GPU_ORDER and _THREADS (scheduler.h), _MMA
# (tensor.cpp), _COUNT, _CAPABILITY and _MEMORY (driver.cpp).
#
# Needs g++ (CXX) and CUDA's headers under CUDA_HOME, but neither nvcc nor a GPU. JOBS=2 compilers at a time.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out="" candle="" no_candle="" plant="" check=""
while [ $# -gt 0 ]; do
    case $1 in
        --candle) candle=$2; shift ;;
        --no-candle) no_candle=yes ;;
        --plant)
            case $2 in
                barrier) plant=-DPLANT_NO_BARRIER ;;
                fragment) plant=-DPLANT_FRAGMENT ;;
                *) echo "--plant is barrier or fragment, got: $2" >&2; exit 2 ;;
            esac
            shift ;;
        --check) check=yes ;;
        -*) echo "unknown option: $1" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
[ -n "$out" ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ -f "${CUDA_HOME:-}/include/cuda_fp16.h" ] || { echo "CUDA_HOME has no include/cuda_fp16.h: ${CUDA_HOME:-unset}" >&2; exit 2; }
mkdir -p "$out/build"
out=$(cd "$out" && pwd)

if [ -z "$no_candle" ] && [ -z "$candle" ]; then
    candle=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/candle-kernels-*/src 2>/dev/null | sort -V | tail -1)
    [ -n "$candle" ] || { echo "no candle-kernels in cargo's registry: run cargo fetch, or give --candle or --no-candle" >&2; exit 2; }
fi

CXX=${CXX:-g++}
# Like nvcc, the compiler may fuse a * b + c; unlike it, it would assume that a float4 never lies where floats do.
flags="-O2 -std=c++17 -fPIC -fno-strict-aliasing -fno-gnu-unique -fno-extern-tls-init -isystem $CUDA_HOME/include -isystem $CUDA_HOME/include/cccl -I$here"
[ "$(uname -m)" = x86_64 ] && flags="$flags -march=native"
warnings="-Wall -Wextra -Wno-unknown-pragmas"

jobs=0
# Runs a command in the background, at most JOBS of them; `finish` waits for all and fails if one has.
start() {
    if [ "$jobs" -ge "${JOBS:-2}" ]; then finish; fi
    "$@" &
    pids="${pids:-} $!"
    jobs=$((jobs + 1))
}
finish() {
    failed=""
    for pid in ${pids:-}; do wait "$pid" || failed=yes; done
    pids="" jobs=0
    [ -z "$failed" ]
}

# Whether $1 is missing or older than one of the other files.
stale() {
    target=$1; shift
    [ -f "$target" ] || return 0
    for source in "$@"; do [ "$source" -nt "$target" ] && return 0; done
    return 1
}

# library SONAME FILE...: one of the played libraries.
library() {
    name=$1; shift
    $CXX $flags $warnings -O3 -shared -Wl,-soname,"$name" -Wl,-z,defs -Wl,-rpath,'$ORIGIN' "$@" \
        -o "$out/$name.new" -ldl -pthread
    mv "$out/$name.new" "$out/$name"
}

# kernels FILE.cu NAME FLAG...: the file with a table of its kernels, as NAME.kernels.so.
kernels() {
    file=$1 name=$2; shift 2
    table=$out/build/$name.cpp
    names=$($CXX $flags -w "$@" -x c++ -E -P -DGPU_LIST_KERNELS "$file" | tr '\n' ' ' |
        grep -oE 'extern "C" *gpu_kernel_name +void +[A-Za-z_0-9]+ *\(' | sed 's/ *($//; s/.* //' | sort -u)
    [ -n "$names" ] || { echo "$file: no kernel (KERNEL name(...)) in it" >&2; return 1; }
    {
        echo "#include \"$file\""
        echo '#include "kernels.h"'
        [ "$name" != candle-sort ] || echo 'alignas(128) thread_local int dst_row[12288];'
        echo 'static thread_local volatile char first;'
        echo 'static const void* touch() { first = 0; static const char here = 0; return &here; }'
        echo 'static const gpu::Entry entries[] = {'
        for each in $names; do echo "    gpu::entry<$each>(\"$each\", touch),"; done
        echo '};'
        echo 'extern "C" __attribute__((visibility("default"))) const gpu::Library gpu_library;'
        echo "const gpu::Library gpu_library = {\"$file\", entries, sizeof entries / sizeof *entries};"
    } >"$table"
    $CXX $flags -fvisibility=hidden "$@" -shared -Wl,-z,defs -Wl,-rpath,'$ORIGIN' "$table" \
        -o "$out/$name.kernels.so.new" -L"$out" -l:libcuda.so.1
    mv "$out/$name.kernels.so.new" "$out/$name.kernels.so"
}

# As `kernels`, of others' files: what does not compile is left out with a note.
others_kernels() {
    kernels "$@" 2>"$out/build/$2.errors" || echo "note: $1 does not compile here and is left out, see $out/build/$2.errors" >&2
}

headers=$(ls "$here"/*.h "$here"/../*.cuh)
if stale "$out/libcuda.so.1" "$here"/*.cpp $headers; then
    library libcuda.so.1 "$here/scheduler.cpp" "$here/tensor.cpp" "$here/memory.cpp" "$here/driver.cpp"
fi
for each in libcublas.so.13:blas.cpp libcublasLt.so.13:blaslt.cpp libcurand.so.10:curand.cpp; do
    name=${each%%:*} file=$here/${each##*:}
    [ -f "$file" ] || continue
    if stale "$out/$name" "$file" $headers; then start library "$name" "$file" -L"$out" -l:libcuda.so.1; fi
done

# Built with another bug than last time: ours anew.
echo "plant $plant" >"$out/build/plant.new"
cmp -s "$out/build/plant" "$out/build/plant.new" || rm -f "$out"/vqrae-*.kernels.so
mv "$out/build/plant.new" "$out/build/plant"
# A .cu file that is gone: its kernels must not be found any more.
for file in "$out"/vqrae-*.kernels.so; do
    name=$(basename "$file" .kernels.so)
    [ -f "$here/../${name#vqrae-}.cu" ] || rm -f "$file"
done
for file in "$here"/../*.cu; do
    [ -f "$file" ] || continue
    name=vqrae-$(basename "$file" .cu)
    if stale "$out/$name.kernels.so" "$file" "$0" $headers; then start kernels "$(readlink -f "$file")" "$name" $warnings $plant; fi
done
if [ -z "$no_candle" ]; then
    for each in affine binary cast conv fill indexing reduce sort ternary unary; do
        file=$candle/$each.cu
        if stale "$out/candle-$each.kernels.so" "$file" "$0" $headers; then
            start others_kernels "$file" "candle-$each" -w -I"$candle" -include "$here/candle.h"
        fi
    done
fi
finish

if [ -n "$check" ]; then
    mkdir -p "$out/check"
    . "$here/check.sh"
fi
