#!/usr/bin/env bash
# One job over several nodes of a SLURM cluster: every node runs `tune run`, which starts one process per GPU.
#
#   sbatch --nodes 2 scripts/slurm.sh full_finetune_distributed --config llama3_1/70B_full data.train=my.jsonl model.shard=8
#
# What stands after the script's name goes to `tune run` as it is. The first node of the job is where the processes meet. run.out, the
# model and the data must lie on a file system that all nodes see. docs/many_gpus.md says what happens when a node fails.
#SBATCH --job-name=tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes N $0 RECIPE [--config NAME|FILE] [key=value ...]" >&2
  exit 2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# 300 s before the time limit srun passes SIGTERM on to every node's launcher: the run saves its step and leaves with 143, the job
# is put into the queue again, and run.resume=auto goes on from there; so too after a preemption or a node's failure (--requeue).
code=0
srun --kill-on-bad-exit=1 tune run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  "$@" run.resume=auto || code=$?
[ "$code" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
