#!/bin/sh
# Cargo for maturin, in a checkout whose workspace is built: CARGO=integrations/python/cargo.sh maturin build …
#
# maturin builds one package, whose dependencies then have other features than in a build of the workspace, and cargo would
# compile half of them again, candle among them. This builds the same package with the workspace instead.
set -eu
[ "${1:-}" = rustc ] || exec cargo "$@"
shift
for word; do
  shift
  case $word in # `cargo build` knows neither of these; the crate's type stands in its manifest
    --crate-type | cdylib) ;;
    *) set -- "$@" "$word" ;;
  esac
done
exec cargo build --workspace "$@"
