#!/usr/bin/env bash
# `megatron-direct compare` as an array of Slurm jobs: one seed each, in one run directory.
#
#     JOB=$(sbatch --parsable --array 0-4 launch/sbatch_compare.sh --num-seeds 5 [flags])
#     sbatch --dependency afterok:$JOB launch/sbatch_compare.sh --num-seeds 5 [flags]
#
# The second job, which is no array, finds all seeds there and writes the report. Ranks are started
# by srun alone: give --nodes and --ntasks-per-node (one task for each GPU) as for any job.
# CONTAINER_IMAGE and CONTAINER_MOUNTS are those of sbatch_anneal_gpt.sh.
#
#SBATCH --job-name=compare
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail

STEP=(srun --kill-on-bad-exit=1)
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    STEP+=(
        --container-image "$CONTAINER_IMAGE"
        --container-mounts "${CONTAINER_MOUNTS:-$PWD:$PWD}"
        --container-workdir "$PWD"
    )
fi
STEP+=(megatron-direct compare)
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    STEP+=(--only-replicate "$SLURM_ARRAY_TASK_ID")
fi
exec "${STEP[@]}" "$@"
