"""Megatron's process groups, and every message that goes through them.

Ranks form a grid: tensor parallel (tp) by pipeline parallel (pp) ranks hold one copy of the model,
and data-parallel (dp) ranks hold copies of it. With expert parallelism, ep data-parallel ranks
share one set of experts: each sees samples of its own, but they hold one copy of the experts
together, and tokens go to and fro between them. Everything the package asks of these groups is one
of the verbs below; with a group of one rank each of them is the identity. Messages among all ranks
are :mod:`megatron_direct.runtime.parallel`'s.
"""

from __future__ import annotations

import contextlib
import gc

import torch
import torch.distributed as dist

from megatron_direct.config import ParallelConfig
from megatron_direct.errors import UserError
from megatron_direct.runtime import host, parallel
from megatron_direct.runtime.parallel import all_reduce, barrier, stop_is_agreed


@contextlib.contextmanager
def model_parallel(config: ParallelConfig, num_model_chunks: int = 1):
    """Megatron's process groups for a layout, taken down again at the end."""
    from megatron.core import parallel_state

    if config.moe_token_dispatcher_type == "alltoall" and not host.has_gpu():
        raise UserError("--moe-token-dispatcher-type alltoall needs GPUs: Megatron overlaps its "
                        "communication on CUDA streams. Use allgather, which gives the same "
                        "result.")
    # Models and optimizers refer to each other in circles: those of an earlier stage would stay for
    # as long as nothing else makes Python look for circles.
    gc.collect()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks if num_model_chunks > 1 else None,
        expert_model_parallel_size=config.expert_model_parallel_size,
        distributed_timeout_minutes=parallel.collective_timeout_minutes())
    try:
        yield
        # Megatron forgets its groups, torch does not: each keeps threads of its own. After an error
        # other ranks may be in the middle of a message.
        barrier()
        for group in parallel_state._global_process_group_list[1:]:  # the first is the world
            dist.destroy_process_group(group)
    finally:
        parallel_state.destroy_model_parallel()


def _groups():
    from megatron.core import parallel_state

    return parallel_state


def data_rank() -> int:
    return _groups().get_data_parallel_rank()


def data_size() -> int:
    return _groups().get_data_parallel_world_size()


def tensor_rank() -> int:
    return _groups().get_tensor_model_parallel_rank()


def expert_rank() -> int:
    """This rank's number among those that share a set of experts."""
    return _groups().get_expert_model_parallel_rank()


def expert_size() -> int:
    return _groups().get_expert_model_parallel_world_size()


def model_rank() -> int:
    """This rank's number among the tp x pp x ep ranks of one copy of the model."""
    return dist.get_rank(_groups().get_expert_tensor_model_pipeline_parallel_group())


def is_of_first_copy() -> bool:
    """True on the ranks of the first copy of the model."""
    return dist.get_rank(_groups().get_expert_data_parallel_group()) == 0


def own_rows(num_samples: int) -> slice:
    """This rank's samples among those of all ranks that share a set of experts.

    num_samples: of one micro-batch on each of them.
    """
    return slice(expert_rank() * num_samples, (expert_rank() + 1) * num_samples)


def is_first_model_rank() -> bool:
    """True on one rank of those that see the same samples: it speaks for them."""
    return dist.get_rank(_groups().get_model_parallel_group()) == 0


def sum_over_model(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the tp x pp x ep ranks of one copy of the model, in place."""
    return all_reduce(tensor, _groups().get_expert_tensor_model_pipeline_parallel_group())


class SumUnderWay:
    """A sum over a process group, in place, beside which this rank does other work."""

    def __init__(self, tensor: torch.Tensor, group):
        self._tensor, self._work = tensor, None
        if dist.get_world_size(group) > 1:
            self._work = dist.all_reduce(tensor, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """The sum. With NCCL the current stream waits for it, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._tensor


def begin_sum_over_model(tensor: torch.Tensor) -> SumUnderWay:
    """As ``sum_over_model``; nobody may touch the tensor before it has been waited for."""
    return SumUnderWay(tensor, _groups().get_expert_tensor_model_pipeline_parallel_group())


def copy_stops() -> bool:
    """Whether the ranks of this copy of the model, which all ask after the same pass, stop there,
    as one of them was asked to."""
    return stop_is_agreed(_groups().get_expert_tensor_model_pipeline_parallel_group())


def sum_over_tensor_ranks(tensor: torch.Tensor) -> torch.Tensor:
    return all_reduce(tensor, _groups().get_tensor_model_parallel_group())


def sum_over_data(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the data-parallel ranks, in place."""
    return all_reduce(tensor, _groups().get_data_parallel_group())


def sum_over_copies_of_experts(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the data-parallel ranks that hold the same experts, in place."""
    return all_reduce(tensor, _groups().get_expert_data_parallel_group())


def sum_over_embedding_stages(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the first and the last pipeline stage, which hold copies of tied embeddings."""
    return all_reduce(tensor, _groups().get_embedding_group())


def gather_over_tensor_ranks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    group = _groups().get_tensor_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)


def share_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's tensor, on every stage, in place."""
    group = _groups().get_pipeline_model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.broadcast(tensor, _groups().get_pipeline_model_parallel_last_rank(), group=group)
    return tensor
