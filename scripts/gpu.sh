#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the whole test suite there, and the benchmark of the recipes.
#   scripts/gpu.sh OUT_DIR [CASE ...]     cases as in scripts/bench_recipe.py --list; logs and records.jsonl go to OUT_DIR
# Tests that need no GPU run on the CPU cores that the benchmark leaves idle, with the GPU hidden from them.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: scripts/gpu.sh OUT_DIR [CASE ...]"}
shift
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
CUDA_VISIBLE_DEVICES="" python3 -m pytest -q -n "${TEST_WORKERS:-8}" -p no:cacheprovider tests >"$out/cpu_tests.log" 2>&1 &
for case in "$@"; do
  baseline=()
  [[ $case == lora_* || $case == full_1b_* ]] && baseline=(--baseline hf_peft)
  [[ $case == dpo_* ]] && baseline=(--baseline trl_dpo)
  python3 scripts/bench_recipe.py --case "$case" "${baseline[@]}" --timeout "${CASE_TIMEOUT:-120}" --records "$out/records.jsonl" 2>&1 |
    tee "$out/$case.log" | tail -n 1
done
timeout "${GPU_TEST_TIMEOUT:-400}" python3 -m pytest -q -m gpu -n "${GPU_TEST_WORKERS:-3}" -p no:cacheprovider tests >"$out/gpu_tests.log" 2>&1
wait
tail -n 8 "$out/gpu_tests.log" "$out/cpu_tests.log"
