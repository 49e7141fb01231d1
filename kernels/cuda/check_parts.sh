#!/usr/bin/env bash
# What can be seen of the kernels without a GPU: that they assemble for every part from 8.0 on, spill no register, and multiply
# on tensor cores where they are meant to.
#
#   kernels/cuda/check_parts.sh        needs nvcc and cuobjdump: kernels/get_cuda.sh --disassembler .cuda && . .cuda/env.sh
set -euo pipefail
cd "$(dirname "$0")"
parts=(80 86 89 90 100 120)
# Sources whose inner loop is mma.sync.
tensor_cores=(nearest_fused attention)

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
codes=()
for part in "${parts[@]}"; do codes+=(-gencode "arch=compute_$part,code=sm_$part"); done
failed=0
fail() { echo "$*" >&2; failed=1; }

kernels=0
for source in *.cu; do
  name=${source%.cu}
  nvcc -fatbin -std=c++17 -O3 --threads=0 -Xptxas -v "${codes[@]}" -o "$out/$name.fatbin" "$source" 2>"$out/$name.log" ||
    { cat "$out/$name.log" >&2; fail "$source does not assemble"; continue; }
  kernels=$((kernels + $(grep -c "Compiling entry function" "$out/$name.log")))
  # "N bytes stack frame, N bytes spill stores, N bytes spill loads", after the name of the kernel and the part.
  spills=$(awk '/Compiling entry function/ { kernel = $0 } /spill/ && !/ 0 bytes spill stores, 0 bytes spill loads/ { print kernel; print }' "$out/$name.log")
  [ -z "$spills" ] || fail "$source spills registers:
$spills"
done
for name in "${tensor_cores[@]}"; do
  for part in "${parts[@]}"; do
    [ -s "$out/$name.fatbin" ] || continue
    products=$(cuobjdump -sass -arch "sm_$part" "$out/$name.fatbin" | grep -c "HMMA" || true)
    [ "$products" -gt 0 ] || fail "$name.cu has no product on tensor cores for sm_$part"
  done
done
[ "$failed" = 0 ] && echo "$kernels kernels assembled for sm_${parts[*]}: no spill"
exit "$failed"
