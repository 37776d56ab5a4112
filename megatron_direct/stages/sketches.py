"""The sketching stage of ``select``: one sketch for each sample, on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct import files, parallel
from megatron_direct.data.samples import Samples
from megatron_direct.gradients import store
from megatron_direct.gradients.compute import sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.model import ParameterShard


def write_sketches(folder: Path, identity: dict, chunks: Sequence[torch.nn.Module],
                   shards: Sequence[ParameterShard], sketch: Sketch, samples: Samples,
                   numbers: np.ndarray, micro_batch_size: int) -> None:
    """Sketches of ``numbers`` into ``folder``, unless it holds them already; all ranks call this.

    identity: of the checkpoint and the hashes; that of the samples is added here.
    """
    identity = {**identity, "samples": files.digest(np.ascontiguousarray(numbers).tobytes())}
    if parallel.on_rank_zero(lambda: store.is_finished(folder, identity)):
        return
    writer = None
    if parallel.is_first_model_rank():
        writer = store.SketchWriter(folder, parallel.data_rank())
    with tqdm(total=-(-len(numbers) // parallel.data_size()), desc=f"sketch {folder.name}",
              unit="sample", disable=None if parallel.is_rank_zero() else True) as progress:
        for rows, ids, losses in sketch_samples(chunks, shards, sketch, samples, numbers,
                                                micro_batch_size):
            if writer is not None:
                writer.append(rows, ids, losses)
            progress.update(len(ids))
    if writer is not None:
        writer.close()
    parallel.barrier()
    data_size = parallel.data_size()
    parallel.on_rank_zero(lambda: store.finish(folder, identity, sketch.size, data_size))
