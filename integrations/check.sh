#!/usr/bin/env bash
# The Python package and what stands on it: builds the wheel, installs it in a fresh virtual environment, and runs the tests of
# integrations/, the lines of its pages among them. The workspace is built already: cargo build --release --workspace.
# --all adds what needs PyTorch (a download of gigabytes).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x target/release/vqrae-cli ] || { echo "target/release/vqrae-cli is missing: cargo build --release --workspace"; exit 1; }
step() { printf '\n-- %s (%s s)\n' "$*" "$SECONDS"; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step "a fresh virtual environment"
python3 -m venv "$work/env" 2>"$work/venv.log" || {
  rm -rf "$work/env"
  { apt-get update -qq && apt-get install -y -qq python3-venv; } && python3 -m venv "$work/env"
} || { cat "$work/venv.log"; exit 1; }
export PATH="$work/env/bin:$PATH"
pip install --no-compile --quiet --disable-pip-version-check maturin numpy pillow pytest mypy pyarrow tokenizers "ray[data]"
[ "${1:-}" != --all ] || pip install --quiet --disable-pip-version-check torch
step "the wheel"
# Beside the program, not in its stead: cargo keeps both builds.
CARGO=$PWD/integrations/python/cargo.sh maturin build --release --quiet -m integrations/python/Cargo.toml --target-dir target \
  -o "$work/wheels"
ls -l "$work/wheels"
pip install --quiet --disable-pip-version-check --no-index "$work"/wheels/vqrae-*.whl
step "the tests of the package"
export VQRAE_CLI=$PWD/target/release/vqrae-cli RAY_USAGE_STATS_ENABLED=0
python -m pytest -q -p no:cacheprovider integrations/python
step "codes in other people's generators"
python -m pytest -q -p no:cacheprovider integrations/generators
step "the tests of Ray and of the templates"
python -m pytest -q -p no:cacheprovider integrations/ray
step "done"
