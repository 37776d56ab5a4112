"""Builds the dataset indices of a Megatron-LM training before it starts, on one process.

    WORLD_SIZE=64 PYTHONPATH=/path/to/Megatron-LM python tools/build_blend_cache.py \\
        <the flags of launch/pretrain_gpt_direct.py> --data-cache-path DIR

It needs no GPU. WORLD_SIZE is the number of ranks of the training; Megatron-LM checks its batch
sizes with it. Masks, blend, epochs and tokenizer are checked as in the training, which then finds
all its indices in DIR. It begins in pretrain_gpt.py, with ``--hybrid-layer-pattern`` in
pretrain_hybrid.py. With ``--load``, iteration and consumed samples are those of the
checkpoint, the newest or that of --ckpt-step, so that the cache fits the training that continues
from it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable

from megatron_direct.config import ParallelConfig
from megatron_direct.mcore import checkpoint, grid, training_folder
from megatron_direct.mcore.checkpoint_formats import iteration_folder
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.plugins import megatron_lm
from megatron_direct.runtime import parallel


def build_instead(pretrain: Callable) -> Callable:
    """A function with the signature of ``pretrain`` that builds the datasets and returns."""
    signature = inspect.signature(pretrain)

    @functools.wraps(pretrain)
    def build(*args, **kwargs):
        from megatron.training import get_args, training

        given = signature.bind(*args, **kwargs).arguments
        if "extra_args_provider" in signature.parameters:  # up to 0.17 pretrain parses
            _parse(given["extra_args_provider"], given.get("args_defaults", {}))
        flags = get_args()
        # They trust the cache that is built here.
        flags.dataloader_fast_cache_load = flags.dataloader_defer_npy_index_mmap = False
        training.update_train_iters(flags)
        _continue_from(flags)
        given["train_valid_test_dataset_provider"](training.get_train_valid_test_num_samples())

    return build


def _parse(extra_args_provider: Callable, defaults: dict) -> None:
    from megatron.training import arguments, checkpointing, global_vars

    flags = arguments.parse_args(extra_args_provider)
    if flags.use_checkpoint_args:
        checkpointing.load_args_from_checkpoint(flags)
    arguments.validate_args(flags, defaults)
    global_vars.set_global_variables(flags)


def _continue_from(flags) -> None:
    """Iteration and consumed samples as a training with these flags would begin with them."""
    flags.iteration = 0
    if flags.load and not flags.finetune and training_folder.latest(flags.load) is not None:
        found = checkpoint.read_checkpoint(flags.load if flags.ckpt_step is None else
                                           iteration_folder(flags.load, flags.ckpt_step))
        flags.iteration = found.iteration
        flags.consumed_train_samples = found.arguments["consumed_train_samples"]


def main() -> None:
    with megatron_runtime(), parallel.process_group(), grid.model_parallel(ParallelConfig()):
        is_hybrid = any(flag.startswith("--hybrid-layer-pattern") for flag in sys.argv)
        megatron_lm.run_script("pretrain_hybrid" if is_hybrid else "pretrain_gpt", build_instead)


if __name__ == "__main__":
    main()
