#!/usr/bin/env bash
# launch/anneal_gpt.sh under mpirun, which starts the ranks itself: Open MPI's, or MPICH's.
#
#     HOSTS=node-a,node-b GPUS_PER_NODE=8 bash launch/mpirun_anneal_gpt.sh [flags]
#
#   HOSTS             nodes, separated by commas (default: this one)
#   GPUS_PER_NODE     ranks on each (default: TP x PP)
#   MPIRUN            (default: mpirun)
#   MPIRUN_FLAGS      more flags for it, separated by spaces
#
# and those of anneal_gpt.sh's other variables that are flags. Ranks find rank 0 through mpi4py, or at
# MASTER_ADDR and MASTER_PORT where these are set.
set -euo pipefail

# Below, bash computes with these, and so would run a command that is hidden in one of them.
for name in GPUS_PER_NODE TENSOR_MODEL_PARALLEL_SIZE PIPELINE_MODEL_PARALLEL_SIZE; do
    if [[ -n ${!name:-} && ! ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
        printf 'mpirun_anneal_gpt.sh: error: %s is %q: expected a whole number. Correct it.\n' \
            "$name" "${!name}" >&2
        exit 1
    fi
done

TP=${TENSOR_MODEL_PARALLEL_SIZE:-1}
PP=${PIPELINE_MODEL_PARALLEL_SIZE:-1}
MPIRUN=${MPIRUN:-mpirun}
IFS=, read -r -a NODES <<< "${HOSTS:-localhost}"
export GPUS_PER_NODE=${GPUS_PER_NODE:-$((TP * PP))} NUM_NODES=${#NODES[@]}
RANKS=$((NUM_NODES * GPUS_PER_NODE))

if [[ $("$MPIRUN" --version 2>&1) =~ Open\ MPI|OpenRTE|open-mpi ]]; then
    MPI_ARGS=(-np "$RANKS" --bind-to none)
    MPI_ARGS+=(--host "$(printf "%s:$GPUS_PER_NODE," "${NODES[@]}" | sed 's/,$//')")
    # Open MPI hands on its own variables alone; those of networks and of object stores may be
    # needed on all nodes.
    for name in PATH PYTHONPATH LD_LIBRARY_PATH OMP_NUM_THREADS CHECKPOINT_PATH RUN_DIR DATA_PATH \
        VALID_DATA_PATH TEST_DATA_PATH NUM_SELECT LR_WSD_DECAY_ITERS ARMS MASTER_ADDR MASTER_PORT \
        TENSOR_MODEL_PARALLEL_SIZE PIPELINE_MODEL_PARALLEL_SIZE ${!NCCL_*} ${!GLOO_*} \
        ${!AWS_*}; do
        [[ -z ${!name+set} ]] || MPI_ARGS+=(-x "$name")
    done
else
    MPI_ARGS=(-np "$RANKS" -ppn "$GPUS_PER_NODE")
    [[ -z ${HOSTS:-} ]] || MPI_ARGS+=(-hosts "$HOSTS")
fi
# shellcheck disable=SC2206 # flags are meant to be split
MPI_ARGS+=(${MPIRUN_FLAGS:-})

COMMAND=("$MPIRUN" "${MPI_ARGS[@]}" megatron-direct anneal-gpt "$@")
if [[ " $* " == *" --dry-run "* ]]; then
    printf '%q ' "${COMMAND[@]}"; echo
    exec megatron-direct anneal-gpt "$@"
fi
exec "${COMMAND[@]}"
