"""What tests' ranks have imported when they begin: they are forked from a process that imported
this, as a command imports it (tests/ranks.py)."""
# ruff: noqa: F401

import torch.distributed

from megatron_direct.mcore.without_gpu import megatron_runtime

with megatron_runtime():
    import megatron.core.datasets.gpt_dataset
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.optimizer

    import megatron_direct.mcore.checkpoint
    import megatron_direct.mcore.model
