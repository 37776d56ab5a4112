"""The sketching stage of ``select``: one sketch for each sample, on disk."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import store
from megatron_direct.gradients.per_sample import sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid
from megatron_direct.mcore.model import ParameterShard
from megatron_direct.runtime import files, parallel


def sketched_shards(shards: Sequence[ParameterShard], patterns: Sequence[str],
                    ) -> list[ParameterShard]:
    """The shards whose names match one of the glob patterns, and none that begins with ``!``.

    All, if there is no pattern; those that begin with ``!`` alone leave out of all. Raises
    UserError, on all ranks, for a pattern that no parameter of the whole model matches, and if
    nothing is left.
    """
    leave_out = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    take = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    names = set().union(*parallel.gather_objects({shard.name for shard in shards}))
    for pattern in (*take, *leave_out):
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--sketch-parameters: no parameter matches {pattern}. They are called "
                            f"{', '.join(sorted(names))}.")
    chosen = {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in take)
              and not any(fnmatch.fnmatchcase(name, p) for p in leave_out)}
    if not chosen:
        raise UserError("--sketch-parameters leaves no parameter to sketch. Leave out less.")
    if len(chosen) < len(names):
        parallel.say(f"sketches are of {len(chosen)} of {len(names)} parameters")
    return [shard for shard in shards if shard.name in chosen]


def write_sketches(folder: Path, identity: dict, layout: dict, chunks: Sequence[torch.nn.Module],
                   shards: Sequence[ParameterShard], sketch: Sketch, samples: Samples,
                   numbers: np.ndarray, micro_batch_size: int, *, dtype: str, sample_loss: str,
                   ) -> None:
    """Sketches of ``numbers`` into ``folder``, unless it holds them already; all ranks call this.

    identity: of the checkpoint and the hashes; that of the samples is added here. layout: all else
    that the order and the last bits of the rows depend on; a run that was killed is carried on
    with in the layout it was begun in, and begun anew in any other.
    """
    identity = {**identity, "samples": files.digest(np.ascontiguousarray(numbers).tobytes())}
    if parallel.on_rank_zero(lambda: store.is_finished(folder, identity)):
        return
    plan = {**identity, **layout, "micro_batch_size": micro_batch_size}
    carried_on = parallel.on_rank_zero(lambda: store.begin(folder, plan))
    done, rows_done = _finished(folder, sketch.size, dtype)
    if carried_on and rows_done:
        parallel.say(f"sketch {folder.name}: {rows_done} of {len(numbers)} samples are there")
    writer = None
    if grid.is_first_model_rank():
        writer = store.SketchWriter(folder, grid.data_rank(), sketch.size, dtype, done)
    begun = time.perf_counter()
    with tqdm(total=len(numbers), initial=rows_done, desc=f"sketch {folder.name}",
              unit="sample", disable=None if parallel.is_rank_zero() else True) as progress:
        for rows, ids, losses in sketch_samples(
                chunks, shards, sketch, samples, numbers, micro_batch_size,
                sample_loss=sample_loss, first_pass=done):
            if writer is not None:
                writer.append(rows, ids, losses)
            # The other data-parallel ranks are about as far.
            progress.update(min(len(ids) * grid.data_size(), len(numbers) - progress.n))
    if writer is not None:
        writer.close()
    parallel.barrier()
    seconds, data_size = time.perf_counter() - begun, grid.data_size()
    parallel.on_rank_zero(lambda: store.finish(folder, identity, sketch.size, data_size, dtype))
    parallel.say(f"sketch {folder.name}: {len(numbers) - rows_done} samples in {seconds:.1f} s "
                 f"({(len(numbers) - rows_done) / seconds:.1f} samples/s)")


def _finished(folder: Path, size: int, dtype: str) -> tuple[int, int]:
    """(passes that this rank's copy of the model has finished, rows that all copies have)."""
    own = grid.data_rank()
    ends = parallel.gather_objects(
        (own, store.finished_passes(folder, own, size, dtype).tolist()))
    of_copies = dict(ends)  # ranks of one copy have read the same file
    passes = {rank: len(rows) for rank, rows in of_copies.items()}
    if grid.expert_size() > 1:  # they go through their passes in step
        passes = dict.fromkeys(passes, min(passes.values()))
    rows_done = sum(rows[passes[rank] - 1] for rank, rows in of_copies.items() if passes[rank])
    return passes[own], rows_done
