#!/usr/bin/env bash
# Exported codes in the hands of real readers, in a fresh environment:
#   VQRAE_CLI=target/release/vqrae-cli tests/readers/check.sh [--all]
# --all adds the readers that need PyTorch (a download of gigabytes).
set -euo pipefail
cd "$(dirname "$0")/../.."
export VQRAE_CLI=${VQRAE_CLI:-target/release/vqrae-cli}
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment" 2>/dev/null || {
  { apt-get update -qq && apt-get install -y -qq python3-venv; } && python3 -m venv --clear "$environment"
}
"$environment/bin/pip" install -q --disable-pip-version-check pytest numpy pyarrow datasets webdataset safetensors blake3 \
  tokenizers transformers
# A tokenizer that people train with, of a package that still brings it along: 65,000 tokens, 0.9 MB.
"$environment/bin/pip" download -q --disable-pip-version-check --no-deps -d "$environment" anthropic==0.21.0
"$environment/bin/python" -m zipfile -e "$environment"/anthropic-0.21.0-*.whl "$environment/anthropic"
export VQRAE_TOKENIZER=$environment/anthropic/anthropic/tokenizer.json
tests=(tests/readers/readers.py tests/readers/readers_lm.py)
if [ "${1:-}" = --all ]; then
  "$environment/bin/pip" install -q --disable-pip-version-check torch megatron-core datatrove
  tests+=(tests/readers/readers_torch.py)
fi
HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 "$environment/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}"
