# The played GPU's self-tests: read by build.sh, whose functions and names it uses.

checks=0
# What is expected to end with status $1 and to say $2 (a pattern; empty for anything).
expect() {
    status=$1 says=$2; shift 2
    checks=$((checks + 1))
    got=0
    "$@" >"$out/check/said" 2>&1 || got=$?
    if [ "$got" != "$status" ] || { [ -n "$says" ] && ! grep -q "$says" "$out/check/said"; }; then
        echo "not as expected: $* (status $got, expected $status, to say: $says)" >&2
        cat "$out/check/said" >&2
        exit 1
    fi
}

# build_check FOLDER FLAG...: the checks' kernels beside a link to the played driver.
build_check() {
    folder=$1; shift
    mkdir -p "$out/$folder/build"
    ln -sf ../libcuda.so.1 "$out/$folder/libcuda.so.1"
    whole=$out
    out=$out/$folder
    kernels "$here/check.cu" check $warnings "$@"
    out=$whole
}

build_check check
build_check check-barrier -DPLANT_NO_BARRIER
build_check check-fragment -DPLANT_FRAGMENT
$CXX $flags -Wall -Wextra "$here/check.cpp" -o "$out/check/check" -L"$out" -l:libcuda.so.1
$CXX $flags -Wall -Wextra "$here/check_blas.cpp" -o "$out/check/check_blas" -L"$out" -l:libcublas.so.13 \
    -l:libcublasLt.so.13 -l:libcurand.so.10 -l:libcuda.so.1
run_check() {
    folder=$1; shift
    env LD_LIBRARY_PATH="$out/$folder" "$@"
}

for order in forward reverse random:1 random:2 random:3; do
    for threads in 1 3; do
        expect 0 passed run_check check VQRAE_GPU_ORDER=$order VQRAE_GPU_THREADS=$threads "$out/check/check"
    done
done
expect 0 passed run_check check VQRAE_GPU_MMA=nearest "$out/check/check"

expect 0 passed env LD_LIBRARY_PATH="$out" "$out/check/check_blas"
expect 134 "cublasGemmStridedBatchedEx: A .* does not lie in one allocation" \
    env LD_LIBRARY_PATH="$out" "$out/check/check_blas" outside

# A missing barrier shows, whichever order is first.
for order in forward reverse random:1; do
    expect 3 "" run_check check VQRAE_GPU_ORDER=$order "$out/check/check" reverse_careless
    expect 3 "" run_check check VQRAE_GPU_ORDER=$order "$out/check/check" reuse_careless
    expect 1 "got == \|host() == " run_check check-barrier VQRAE_GPU_ORDER=$order "$out/check/check"
done
expect 1 "dc.host() == expected" run_check check-fragment "$out/check/check"

# 134 is abort.
expect 134 "kernel never_meets, block (0, 0, 0): deadlock: 32 threads" run_check check "$out/check/check" never_meets
expect 134 "past the end of an allocation of 128 bytes, seen after writes_past_the_end" \
    run_check check "$out/check/check" writes_past_the_end
expect 134 "kernel writes_past_shared.* past the 128 bytes" run_check check "$out/check/check" writes_past_shared
expect 134 "kernel loads_misaligned.*no 16-byte boundary" run_check check "$out/check/check" loads_misaligned
echo "played GPU: $checks checks passed"
