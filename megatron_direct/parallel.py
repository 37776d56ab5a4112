"""The one place where process groups are named.

Ranks form a grid: tensor parallel (tp) by pipeline parallel (pp) ranks hold one copy of the model,
and data-parallel (dp) ranks hold copies of it. With expert parallelism, ep data-parallel ranks
share one set of experts: each sees samples of its own, but they hold one copy of the experts
together, and tokens go to and fro between them. Everything the package asks of the other ranks is
one of the verbs below; with a group of one rank each of them is the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import pickle
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_direct import host
from megatron_direct.config import ParallelConfig
from megatron_direct.errors import UserError


def world_size() -> int:
    """Ranks that were started: known before anything is initialised."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_rank_zero() -> bool:
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    return rank == 0


def say(text: str) -> None:
    """Prints on rank 0."""
    if is_rank_zero():
        print(text, flush=True)


@contextlib.contextmanager
def process_group(timeout_minutes: int = 10):
    """torch.distributed for the ranks torchrun started, or for this process alone."""
    if dist.is_initialized():
        yield
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(host.collective_backend(), timeout=timeout)
    else:
        dist.init_process_group(host.collective_backend(), store=dist.HashStore(), rank=0,
                                world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel(config: ParallelConfig, num_model_chunks: int = 1):
    """Megatron's process groups for a layout, taken down again at the end."""
    from megatron.core import parallel_state

    if config.moe_token_dispatcher_type == "alltoall" and not host.has_gpu():
        raise UserError("--moe-token-dispatcher-type alltoall needs GPUs: Megatron lets its "
                        "messages overlap on CUDA streams. Use allgather, which does the same.")
    # Models and optimizers refer to each other in circles: those of an earlier stage would stay for
    # as long as nothing else makes Python look for circles.
    gc.collect()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks if num_model_chunks > 1 else None,
        expert_model_parallel_size=config.expert_model_parallel_size)
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
    return _all_reduce(tensor, _groups().get_expert_tensor_model_pipeline_parallel_group())


def sum_over_tensor_ranks(tensor: torch.Tensor) -> torch.Tensor:
    return _all_reduce(tensor, _groups().get_tensor_model_parallel_group())


def sum_over_data(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the data-parallel ranks, in place."""
    return _all_reduce(tensor, _groups().get_data_parallel_group())


def sum_over_copies_of_experts(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the data-parallel ranks that hold the same experts, in place."""
    return _all_reduce(tensor, _groups().get_expert_data_parallel_group())


def sum_over_embedding_stages(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the first and the last pipeline stage, which hold copies of tied embeddings."""
    return _all_reduce(tensor, _groups().get_embedding_group())


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


def sum_over_world(array: np.ndarray) -> np.ndarray:
    """Sum of a float64 array over all ranks."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(host.device())
    return _all_reduce(tensor, dist.group.WORLD).cpu().numpy()


def rank_and_size() -> tuple[int, int]:
    """This rank's number among all ranks, and how many there are."""
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def on_rank_zero(work: Callable):
    """What ``work()`` returns on rank 0, on every rank; what it raises there is raised everywhere.

    So a mistake that only rank 0 can see ends all ranks with the same message, and none waits.
    """
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = _portable(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def kept_on_rank_zero(work: Callable):
    """What ``work()`` returns on rank 0, None elsewhere; what it raises there is raised everywhere.

    For what is too large to be sent, or of no use on the other ranks.
    """
    kept = []
    on_rank_zero(lambda: kept.append(work()))
    return kept[0] if kept else None


def first_to_speak(patience_seconds: float = 3.0) -> bool:
    """True on one rank of those that met an error: rank 0 if it is among them.

    Other ranks give rank 0 some time to speak first; if it does not, the error is theirs alone.
    """
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("error/spoken", "yes")
        return True
    with contextlib.suppress(dist.DistStoreError):
        store.wait(["error/spoken"], datetime.timedelta(seconds=patience_seconds))
        return False
    return store.add("error/speakers", 1) == 1


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way to another rank, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather_objects(value) -> list:
    """What each rank holds, in the order of ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def require_same_on_all_ranks(value: str, what: str) -> None:
    """Raises on every rank where one rank holds another value (replicas must agree)."""
    values = gather_objects(value)
    if len(set(values)) > 1:
        raise UserError(
            f"{what} differs between ranks: {values}. All ranks must read the same files; "
            "check that the paths lie on a file system that all nodes share.")


def _all_reduce(tensor: torch.Tensor, group) -> torch.Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
