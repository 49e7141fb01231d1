#!/usr/bin/env bash
# CUDA's compiler without root and without a GPU, from Python packages: enough to build with `--features cuda`.
#
#   kernels/get_cuda.sh [FOLDER]      into FOLDER, .cuda by default: 102 MB to download, 270 MB on disk
#   . FOLDER/env.sh                   puts it on the path of this shell
#
# --disassembler   also cuobjdump and nvdisasm, to look at machine code (2 MB more)
#
# A machine that runs the program needs NVIDIA's driver (580 or newer), and cuBLAS and cuRAND of CUDA 13: those of a CUDA
# installation or those that PyTorch brings along are found by themselves.
set -euo pipefail

folder=.cuda
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
for word in "$@"; do
  case "$word" in
    --disassembler) packages+=(nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51) ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
    -*) echo "get_cuda.sh: unknown option $word; see --help" >&2; exit 2 ;;
    *) folder=$word ;;
  esac
done

fail() { echo "get_cuda.sh: $*" >&2; exit 1; }
[ "$(uname -sm)" = "Linux x86_64" ] || fail "only Linux on x86-64 is covered: install CUDA 13 and set CUDA_HOME"
command -v g++ >/dev/null || fail "nvcc needs a host compiler: install g++ (6 to 15)"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 with pip is needed to download the packages"

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if [ "$(cat "$folder/packages" 2>/dev/null)" != "${packages[*]}" ] || ! "$folder/bin/nvcc" --version >/dev/null 2>&1; then
  unpacked=$(mktemp -d "$folder/unpacked.XXXXXX")
  trap 'rm -rf "$unpacked"' EXIT
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
    --only-binary=:all: --target "$unpacked" "${packages[@]}"
  # Side by side the packages are an installation of CUDA, but for lib64 and the names that a linker asks for.
  for part in bin include lib nvvm; do
    rm -rf "${folder:?}/$part"
    mv "$unpacked/nvidia/cu13/$part" "$folder/"
  done
  chmod +x "$folder"/bin/* "$folder"/nvvm/bin/*
  ln -sfn lib "$folder/lib64"
  for library in "$folder"/lib/*.so.*; do
    ln -sf "$(basename "$library")" "${library%%.so.*}.so"
  done
  echo "${packages[*]}" >"$folder/packages"
fi
cat >"$folder/env.sh" <<ENV
export CUDA_HOME="$folder"
export PATH="$folder/bin:\$PATH"
# candle asks nvidia-smi for the part to build for; without a GPU it has to be told. 80 runs on all newer parts too.
command -v nvidia-smi >/dev/null || export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-80}"
ENV
"$folder/bin/nvcc" --version | sed -n 4p
echo "now: . $folder/env.sh"
