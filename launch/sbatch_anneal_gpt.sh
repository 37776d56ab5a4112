#!/usr/bin/env bash
# launch/anneal_gpt.sh as a Slurm job: one torchrun on each node, in a container where one is named.
#
#     CONTAINER_IMAGE=registry#megatron-direct:latest CHECKPOINT_PATH=... RUN_DIR=... DATA_PATH=... \
#     GPUS_PER_NODE=8 sbatch --nodes 4 --gpus-per-node 8 launch/sbatch_anneal_gpt.sh [flags]
#
# Submitted from the repository; sbatch hands on the environment, and its own options come before
# the script's name. Which options ask for GPUs differs between clusters: none does here.
#
#   CONTAINER_IMAGE      an image for pyxis and enroot (default: no container)
#   CONTAINER_MOUNTS     default: the repository, at its own path; add data and checkpoints
#   MASTER_PORT          where the nodes meet (default: a port of this job's own)
#
# and those of anneal_gpt.sh. Before the time limit (see --signal) and on preemption Slurm sends
# SIGTERM: the ranks are ended and the job returns to the queue. There it resumes where it was: from
# finished stages, the parts of sketches that were written, and the last checkpoint of an annealing.
#
#SBATCH --job-name=anneal-gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

export NUM_NODES=${SLURM_JOB_NUM_NODES:?submit this with sbatch}
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${NODES%%$'\n'*}
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID * 31 % 12000))}
export RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

STEP=(srun --ntasks "$NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1)
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    STEP+=(
        --container-image "$CONTAINER_IMAGE"
        --container-mounts "${CONTAINER_MOUNTS:-$PWD:$PWD}"
        --container-workdir "$PWD"
    )
fi
STEP+=(bash launch/anneal_gpt.sh "$@")

if [[ " $* " == *" --dry-run "* ]]; then
    printf 'job %s on %s:\n ' "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST"
    printf ' %q' "${STEP[@]}"
    echo
    exec bash launch/anneal_gpt.sh "$@"
fi

# bash runs a trap only between commands, and during `wait`.
"${STEP[@]}" &
STEP_PID=$!
return_to_the_queue() {
    trap '' TERM
    echo "SIGTERM: the ranks are ended, and the job returns to the queue"
    kill -TERM "$STEP_PID"
    wait "$STEP_PID" || true
    # After a preemption Slurm does so itself.
    scontrol requeue "$SLURM_JOB_ID" || true
    exit 143
}
trap return_to_the_queue TERM
wait "$STEP_PID"
