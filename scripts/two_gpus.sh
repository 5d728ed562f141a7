#!/usr/bin/env bash
# The records of many GPUs on one host, a group at a time, each within 10 minutes on 2 H200s (model.weights=random throughout).
#   scripts/two_gpus.sh OUT_DIR [GROUP ...]     groups: tests curve one lora qlora full offload; without one, all of them in this order
# Logs and records.jsonl go to OUT_DIR; GPUS (2) is how many. A line of docs/records.jsonl per case, then scripts/render_records.py.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: scripts/two_gpus.sh OUT_DIR [GROUP ...]"}
shift
gpus=${GPUS:-2}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

bench() { # CASE OPTION...: one record, its last line on the screen
  local name="$*"
  python3 scripts/bench_recipe.py --timeout "${CASE_TIMEOUT:-200}" --records "$out/records.jsonl" --case "$@" 2>&1 | tee "$out/${name//[^a-zA-Z0-9]/_}.log" | tail -n 1
}

run_group() {
  case $1 in
    tests) # of weights in CPU memory and of a divided base, on one GPU and on two
      timeout 500 python3 -m pytest -q -m gpu -p no:cacheprovider tests/recipes tests/test_divided_gpu.py 2>&1 | tee "$out/tests.log" | tail -n 8 ;;
    curve) # one YAML, one loss curve: the largest difference between the losses of any step
      for n in 1 "$gpus"; do
        for method in lora full; do
          recipe=${method}_distributed
          [[ $method == full ]] && recipe=full_finetune_distributed
          python3 -m torchft run --nproc_per_node "$n" "$recipe" --config "tiny/$method" run.out="$out/curve_${method}_$n" run.max_steps="${STEPS:-50}" run.exact_match_rows=0 >"$out/curve_${method}_$n.log" 2>&1
        done
      done
      python3 - "$out" "$gpus" <<'PY' ;;
import json, sys
out, gpus = sys.argv[1:]
for method in ("lora", "full"):
    one, many = ([r["loss"] for r in map(json.loads, open(f"{out}/curve_{method}_{n}/log.jsonl")) if "loss" in r] for n in (1, gpus))
    assert len(one) == len(many)
    print(f"{method}: {len(one)} steps, losses differ by at most {max(abs(a / b - 1) for a, b in zip(many, one)):.1e} (relative)")
PY
    one) # on one GPU each, two at a time: what the rates per GPU below are held against
      CUDA_VISIBLE_DEVICES=0 bench lora_8b_bf16_2048x4_noac &
      CUDA_VISIBLE_DEVICES=1 bench qlora_8b_nf4_2048x4_ac
      wait
      CUDA_VISIBLE_DEVICES=0 bench full_8b_bf16_2048x4_ac ;; # 16 bytes a parameter are 120 GiB
    lora) # targets: 98% per GPU with the base on each, 95% divided
      bench lora_8b_bf16_2048x4_noac --gpus "$gpus" --baseline hf_peft
      bench lora_8b_bf16_2048x4_noac --gpus "$gpus" --option model.shard=all ;;
    qlora)
      bench qlora_8b_nf4_2048x4_ac --gpus "$gpus"
      bench qlora_8b_nf4_2048x4_ac --gpus "$gpus" --option model.shard=all ;;
    full) # target: 90% per GPU
      bench full_8b_bf16_2048x4_ac --gpus "$gpus" --baseline hf_peft ;;
    offload) # 51 GiB of host memory; the same on the device, to see what it costs
      for n in 1 "$gpus"; do
        bench full_3b_fp32master_2048x4_ac --gpus "$n"
        bench full_3b_fp32master_2048x4_ac --gpus "$n" --option "model.offload=[weights]"
      done ;;
    *) echo "no group $1" && exit 2 ;;
  esac
}

[[ $# -eq 0 ]] && set -- tests curve one lora qlora full offload
for group in "$@"; do
  echo "== $group"
  run_group "$group"
done
