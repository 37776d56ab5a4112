#!/usr/bin/env bash
""":"
# Select, then anneal on the selection and on a random one, then report. All of these run it:
#
#     bash launch/anneal_gpt.sh [flags]
#     torchrun --nproc-per-node 4 launch/anneal_gpt.sh [flags]
#     NUM_NODES=2 MASTER_ADDR=node-a bash launch/anneal_gpt.sh [flags]      (on each of two nodes)
#
# --dry-run prints what would run, and which rank would hold what. For Slurm see
# sbatch_anneal_gpt.sh, for mpirun mpirun_anneal_gpt.sh, for NeMo-Run nemo_run_anneal_gpt.py.
#
# This half is bash: it starts torchrun on this file, which torchrun reads as Python: that is the
# half below (also: `megatron-direct anneal-gpt`). Flags are those of `megatron-direct select` and
# `megatron-direct anneal`; if a flag is left out, these environment variables are read:
#
#   TENSOR_MODEL_PARALLEL_SIZE PIPELINE_MODEL_PARALLEL_SIZE        layout
#   CHECKPOINT_PATH RUN_DIR                                        --load, --run-dir
#   DATA_PATH VALID_DATA_PATH TEST_DATA_PATH                       prefixes, separated by spaces
#   NUM_SELECT LR_WSD_DECAY_ITERS                  --num-select (or auto), --lr-wsd-decay-iters
#   ARMS                          arms to anneal, separated by spaces: direct, random or both
#
# and by this half alone:
#
#   GPUS_PER_NODE NUM_NODES       ranks on each node (default: TP x PP), nodes (default: 1)
#   MASTER_ADDR MASTER_PORT       where the nodes meet: one of them, by a name that all know
#   RDZV_ID                       a word of this launch, the same on all nodes
#   NODE_RANK                     0 on the node of MASTER_ADDR, if it does not know itself by that
#                                 name (its host name is another), and any other number elsewhere
#   LOCAL_ADDR                    this node's address, if the others do not know its host name
#   MAX_RESTARTS                  how often all ranks are started again after one failed; they
#                                 resume (default: 0, since mistakes in flags are repeated as well)
#   TORCHRUN                      (default: torchrun)
set -euo pipefail

# Below, bash computes with these, and so would run a command that is hidden in one of them.
for name in GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_PORT TENSOR_MODEL_PARALLEL_SIZE \
        PIPELINE_MODEL_PARALLEL_SIZE; do
    if [[ -n ${!name:-} && ! ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
        printf 'anneal_gpt.sh: error: %s is %q: expected a whole number. Correct it.\n' \
            "$name" "${!name}" >&2
        exit 1
    fi
done

TP=${TENSOR_MODEL_PARALLEL_SIZE:-1}
PP=${PIPELINE_MODEL_PARALLEL_SIZE:-1}
export GPUS_PER_NODE=${GPUS_PER_NODE:-$((TP * PP))} NUM_NODES=${NUM_NODES:-1}
TORCHRUN=${TORCHRUN:-torchrun}

DISTRIBUTED_ARGS=(
    --nproc-per-node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --max-restarts "${MAX_RESTARTS:-0}"
)
if [[ $NUM_NODES -gt 1 ]]; then
    : "${MASTER_ADDR:?the address of a node that all nodes know}"
    if [[ " $* " != *" --dry-run "* ]] && ! getent ahosts "$MASTER_ADDR" > /dev/null; then
        echo "anneal_gpt.sh: error: $(hostname) does not know the host MASTER_ADDR, $MASTER_ADDR." \
            "Give a name or an IP address that all nodes know." >&2
        exit 1
    fi
    DISTRIBUTED_ARGS+=(
        --rdzv-backend c10d
        --rdzv-id "${RDZV_ID:-anneal_gpt}"
        --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-6000}"
    )
    if [[ -n ${NODE_RANK:-} ]]; then
        DISTRIBUTED_ARGS+=(--rdzv-conf "is_host=$([[ $NODE_RANK -eq 0 ]] && echo true || echo false)")
    fi
    if [[ -n ${LOCAL_ADDR:-} ]]; then
        DISTRIBUTED_ARGS+=(--local-addr "$LOCAL_ADDR")
    fi
else
    DISTRIBUTED_ARGS+=(--standalone)
fi

if [[ " $* " == *" --dry-run "* ]]; then
    echo "on each of $NUM_NODES nodes:"
    printf '  %s' "$TORCHRUN"
    printf ' %q' "${DISTRIBUTED_ARGS[@]}" "$0" "$@"
    echo
    DISTRIBUTED_ARGS=(--standalone --nproc-per-node 1)
fi
exec $TORCHRUN "${DISTRIBUTED_ARGS[@]}" "$0" "$@"

# bash does not come here, but looks whether it could (`bash -n`): to it, the rest is text.
: <<'# The end of the Python half.'
"""

from megatron_direct.cli.anneal_gpt import main

if __name__ == "__main__":
    main()
# The end of the Python half.
