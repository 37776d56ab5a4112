"""Runs a script of, or around, a Megatron-LM checkout where there is no GPU.

    MEGATRON_LM_PATH=/path/to/Megatron-LM torchrun --nproc-per-node 4 \\
        tests/plugins/megatron_lm_on_cpu.py launch/pretrain_gpt_direct.py <its flags>

megatron_direct.host answers for the CUDA calls of megatron-core; what Megatron-LM's training loop
asks beyond that is answered here. megatron.core is the installed package, which brings its compiled
helpers (and since 0.17 megatron.training); the rest comes from the checkout, which must be of the
same version. With RECORD_BATCHES set to a folder, each rank leaves there what its batches held
(``rank0.npz``: tokens, labels, each [micro-batches, b, s]).
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing.spawn
import os
import runpy
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]


class _Anything:
    """A stream, an event, or a device's properties: whatever is asked of it, it has no effect."""

    total_memory, major, minor = 1 << 34, 9, 0

    def __init__(self, *_args, **_kwargs):
        pass

    def __getattr__(self, _name):
        return lambda *_args, **_kwargs: 0

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return False


def stub_missing_packages() -> None:
    """Imported by Megatron-LM without a condition, and used for nothing that GPT training does."""
    if importlib.util.find_spec("six") is None:
        sys.modules["six"] = types.ModuleType("six")
    if importlib.util.find_spec("triton") is not None:
        return
    kernels = types.ModuleType("batch_invariant_kernels")
    kernels.enable_batch_invariant_mode = kernels.is_batch_invariant_mode_enabled = lambda: False
    sys.modules["megatron.core.transformer.custom_layers.batch_invariant_kernels"] = kernels


def _answer_for_cuda() -> None:
    import torch

    torch.cuda.Stream = torch.cuda.Event = _Anything  # classes: Megatron asks what is one
    for name in ("stream", "current_stream", "default_stream",
                 "get_device_properties"):
        setattr(torch.cuda, name, lambda *_args, **_kwargs: _Anything())
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_args: (9, 0)
    torch.cuda.memory_stats = lambda *_args: dict.fromkeys(
        ("allocated_bytes.all.current", "reserved_bytes.all.current"), 0)
    for name in ("set_device", "empty_cache", "memory_allocated", "max_memory_allocated",
                 "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats",
                 "manual_seed_all", "device_memory_used"):
        setattr(torch.cuda, name, lambda *_args, **_kwargs: 0)
    torch.nn.Module.cuda = lambda self, *_args: self


def _leave_out_of_megatron() -> None:
    """The check for a GPU, and compilers that have nothing to compile."""
    import functools

    import megatron.core.datasets.utils
    from megatron.training import initialize, training

    megatron.core.datasets.utils.compile_helpers = lambda: None
    with contextlib.suppress(ImportError):  # gone since 0.17
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda _args: None
    training.initialize_megatron = functools.partial(initialize.initialize_megatron,
                                                     allow_no_cuda=True)
    training.set_jit_fusion_options = lambda **_keywords: None


def _attend_within_documents() -> None:
    """Samples packed into one row, as --dataloader-inter-document-masking hands them on.

    Only Transformer Engine's attention takes them. Here the local one is called for each.
    """
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    attend = DotProductAttention.forward

    def forward(self, query, key, value, attention_mask, *arguments, packed_seq_params=None,
                **keywords):
        if packed_seq_params is None:
            return attend(self, query, key, value, attention_mask, *arguments, **keywords)
        ends, outputs = packed_seq_params.cu_seqlens_q.tolist(), []
        for first, last in zip(ends, ends[1:]):  # noqa: B905  one shorter
            if first < last:
                future = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
                outputs.append(attend(self, *(part[first:last, None] for part in
                                              (query, key, value)), future[None, None]))
        return torch.cat(outputs)

    DotProductAttention.forward = forward


def _spawn_without_main() -> None:
    """The checkpoint writer starts processes that would import the main script again, unpatched."""
    prepare = multiprocessing.spawn.get_preparation_data

    def prepare_without_main(name):
        data = prepare(name)
        data.pop("init_main_from_path", None)
        data.pop("init_main_from_name", None)
        return data

    multiprocessing.spawn.get_preparation_data = prepare_without_main


def _record_batches(folder: Path) -> None:
    import atexit

    import numpy as np
    from megatron.core import utils

    if not hasattr(utils, "get_batch_on_this_tp_rank"):  # until 0.17
        from megatron.training import utils  # type: ignore[no-redef]

    seen = {"tokens": [], "labels": []}
    get_batch = utils.get_batch_on_this_tp_rank

    def recorded(*args, **kwargs):
        batch = get_batch(*args, **kwargs)
        for name, batches in seen.items():
            if batch[name] is not None:
                batches.append(batch[name].numpy().copy())
        return batch

    utils.get_batch_on_this_tp_rank = recorded
    atexit.register(lambda: np.savez(
        folder / f"rank{os.environ['RANK']}.npz",
        **{name: np.array(batches) for name, batches in seen.items()}))


def on_this_host() -> contextlib.ExitStack:
    """Inside it, Megatron-LM runs on a GPU if there is one, and else on the CPU."""
    from megatron_direct.mcore.without_gpu import megatron_runtime
    from megatron_direct.runtime import host

    stack = contextlib.ExitStack()
    stack.enter_context(megatron_runtime())
    if not host.has_gpu():
        _answer_for_cuda()
        _leave_out_of_megatron()
        _attend_within_documents()
        _spawn_without_main()
    return stack


def main() -> None:
    sys.argv = sys.argv[1:]
    sys.path[0] = str(ROOT)
    sys.path += [os.environ["MEGATRON_LM_PATH"], str(Path(__file__).parent)]
    stub_missing_packages()
    with on_this_host():
        if "RECORD_BATCHES" in os.environ:
            _record_batches(Path(os.environ["RECORD_BATCHES"]))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
