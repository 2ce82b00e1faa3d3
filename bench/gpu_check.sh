#!/usr/bin/env bash
# What a machine with a GPU runs before a release: tests on it, then the benchmarks. Results go to $1, the commit is $2.
set -uo pipefail
out=${1:-bench/results}
commit=${2:-$(git rev-parse --short HEAD)}
python3 -m pytest tests/kernels tests/behaviour/test_paths_agree.py -q -n 8 2>&1 | tee "$out/kernels-on-gpu.log" | tail -20
ATTN_HOOKS_TEST_DEVICE=cuda python3 -m pytest tests/methods -q -n 8 2>&1 | tee "$out/methods-on-gpu.log" | tail -20
python3 -m bench.edits --precompile 12 --budget-seconds 300 --commit "$commit" --out "$out/edits-h200.json"
python3 -m bench.end_to_end --budget-seconds 300 --commit "$commit" --out "$out/end-to-end-h200.json"
