#!/usr/bin/env bash
# What a machine with a GPU runs before a release: the methods' tests on it, then the benchmark. Results go to $1.
set -uo pipefail
out=${1:-bench/results}
ATTN_HOOKS_TEST_DEVICE=cuda python3 -m pytest tests/methods -q -n 8 2>&1 | tee "$out/methods-on-gpu.log" | tail -40
python3 -m bench.run --lengths 2048 8192 --repeats 5 --out "$out/pytorch-path-gpu.json"
