#!/usr/bin/env bash
""":"
# Select, then anneal on the selection and on a random one, then report. Both of these run it:
#
#     bash launch/anneal_gpt.sh [flags]
#     torchrun --nproc-per-node 4 launch/anneal_gpt.sh [flags]
#
# This half is bash: it starts torchrun on this file, which torchrun reads as Python: that is the
# half below (also: `megatron-direct anneal-gpt`). Flags are those of `megatron-direct select` and
# `megatron-direct anneal`; if a flag is left out, these environment variables are read:
#
#   GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_ADDR MASTER_PORT      ranks (bash only)
#   TENSOR_MODEL_PARALLEL_SIZE PIPELINE_MODEL_PARALLEL_SIZE        layout
#   CHECKPOINT_PATH RUN_DIR                                        --load, --run-dir
#   DATA_PATH VALID_DATA_PATH TEST_DATA_PATH                       prefixes, separated by spaces
#   NUM_SELECT LR_WSD_DECAY_ITERS                  --num-select (or auto), --lr-wsd-decay-iters
#   ARMS                          arms to anneal, separated by spaces: direct, random or both
set -euo pipefail

TP=${TENSOR_MODEL_PARALLEL_SIZE:-1}
PP=${PIPELINE_MODEL_PARALLEL_SIZE:-1}

DISTRIBUTED_ARGS=(
    --nproc-per-node "${GPUS_PER_NODE:-$((TP * PP))}"
    --nnodes "${NUM_NODES:-1}"
)
if [[ ${NUM_NODES:-1} -gt 1 ]]; then
    DISTRIBUTED_ARGS+=(
        --node-rank "${NODE_RANK:?the number of this node}"
        --master-addr "${MASTER_ADDR:?the address of node 0}"
        --master-port "${MASTER_PORT:-6000}"
    )
else
    DISTRIBUTED_ARGS+=(--standalone)
fi

exec ${TORCHRUN:-torchrun} "${DISTRIBUTED_ARGS[@]}" "$0" "$@"
":"""

from megatron_direct.cli.anneal_gpt import main

if __name__ == "__main__":
    main()
