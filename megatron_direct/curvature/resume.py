"""A Lanczos run on disk, step by step: a killed one carries on after its last step, and one that
has ended continues to more eigenpairs.

Each rank of the first copy of the model keeps its shards of the basis vectors, one file per vector,
and writes a vector once: a step adds one and replaces the one before it, which it has made
orthogonal; a restart rewrites those that it rotated. A step counts when all ranks have written it
and rank 0 has said so; the step before is kept until then. On disk there is thus one basis, and
while a step is written what that step changes of it a second time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_direct.curvature.krylov import KrylovState
from megatron_direct.mcore import grid
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.runtime import arrays, digests, files, host, parallel

_MARKER = "step.json"
_FORMAT = 2  # of vectors: since 2 as numpy writes them


class LanczosLog:
    """folder: the run's. operator: a digest of what it is; shards: the parameters that this rank
    has of its vectors. A log of another operator, or whose ranks had others, is not used.
    """

    def __init__(self, folder: Path, operator: str, shards: Sequence[ParameterShard]):
        self._writes = grid.is_of_first_copy()  # the others hold the same, and read it from there
        held = [of_rank for of_rank in parallel.gather_objects(
            [(s.name, *s.parameter.shape) for s in shards] if self._writes else None)
            if of_rank is not None]
        self.folder = folder
        self._identity = {"operator": operator, "shards": digests.digest(repr(held)),
                          "format": _FORMAT}
        self._rank = grid.model_rank()
        self._names: dict[int, tuple[torch.Tensor, str]] = {}  # by id; the vector keeps its id ours
        self._written = 0

    def load(self) -> KrylovState | None:
        """The state after the last finished step, on all ranks, or None."""
        marker = parallel.on_rank_zero(self._marker)
        if marker is None:
            parallel.on_rank_zero(self._clear)
            return None
        remedy = f"Delete {self.folder}, and run the command again: Lanczos starts from scratch."
        values = arrays.read_npz(self._state_path(marker["step"]), remedy)
        basis = []
        for name in values.pop("names").tolist():
            vector = arrays.read_npy(self.folder / name, remedy).copy()
            basis.append(torch.from_numpy(vector).to(host.device()))
            self._names[id(basis[-1])] = (basis[-1], name)
        self._written = marker["written"]
        scalars: dict[str, Any] = {key: value.item() if value.ndim == 0 else value.copy()
                                   for key, value in values.items()}
        return KrylovState(basis=basis, **scalars)

    def write(self, state: KrylovState) -> None:
        """Called after every step, on all ranks."""
        step = state.num_matvecs
        names = [self._write_vector(vector) for vector in state.basis]
        values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)
                  if f.name != "basis"}
        if self._writes:
            with files.written_whole(self._state_path(step)) as file:
                np.savez(file, names=np.array(names), **values)
        parallel.barrier()
        parallel.on_rank_zero(lambda: files.write_json(self.folder / _MARKER, {
            "identity": self._identity, "step": step, "written": self._written}))
        self._forget(names, step)

    def num_bytes(self) -> int:
        """What the log of all ranks takes on disk; all ranks call this."""
        return parallel.on_rank_zero(
            lambda: sum(path.stat().st_size for path in self.folder.glob("*")))

    def _marker(self) -> dict | None:
        path = self.folder / _MARKER
        marker = files.read_json(path) if path.is_file() else None
        return marker if marker is not None and marker["identity"] == self._identity else None

    def _clear(self) -> None:
        """Of a run that this one cannot carry on (rank 0)."""
        if (self.folder / _MARKER).is_file():
            print(f"{self.folder} holds the vectors of another operator, or of ranks that divide "
                  "the model otherwise: Lanczos starts from scratch.", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _state_path(self, step: int) -> Path:
        return self.folder / f"rank-{self._rank}-step-{step}.npz"

    def _write_vector(self, vector: torch.Tensor) -> str:
        known = self._names.get(id(vector))
        if known is not None:
            return known[1]
        self._written += 1
        name = f"rank-{self._rank}-vector-{self._written}.npy"
        if self._writes:
            with files.written_whole(self.folder / name) as file:
                np.save(file, vector.cpu().numpy())
        self._names[id(vector)] = (vector, name)
        return name

    def _forget(self, names: list[str], step: int) -> None:
        """Files that the step just finished no longer needs."""
        kept = {*names, self._state_path(step).name}
        self._names = {key: value for key, value in self._names.items() if value[1] in kept}
        if self._writes:
            for path in self.folder.glob(f"rank-{self._rank}-*"):
                if path.name not in kept:
                    path.unlink()
