"""One checkpoint, selected from with several versions of megatron-core: the same numbers.

    python tests/version_agreement.py .venv .venvs/core-*

Each argument is a virtual environment with a megatron-core of its own. The first trains the models
of ``CASES`` and saves them (it should be the earliest: 0.19's checkpoints need 0.19). Each then
selects from the first's checkpoints, in a process of its own Python. Printed are the largest
differences from the first: of sketches, relative to a sketch's norm; of eigenvalues, relative to
the largest; and the number of samples that only one of the two selects. Above 1e-5, or with a
sample more or less, the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BAR = 1e-5
NUM_SELECT = 40


@dataclass(frozen=True)
class Found:
    """Of one checkpoint: [n, k] sketches, the leading eigenvalues, and who was selected."""

    sketches: object
    eigenvalues: list[float]
    chosen: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venvs", nargs="+", type=Path)
    first, *others = parser.parse_args().venvs
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(first, "--train", folder)
        expected = _selected(first, folder)
        print(f"{first.name}: " + ", ".join(
            f"{case} (largest eigenvalue {found.eigenvalues[0]:.6g})"
            for case, found in expected.items()), flush=True)
        for venv in others:
            for case, found in _selected(venv, folder).items():
                sketches, eigenvalues, samples = _differences(found, expected[case])
                failed |= max(sketches, eigenvalues) > BAR or samples > 0
                print(f"{venv.name}, {case}: sketches {sketches:.1e}, eigenvalues "
                      f"{eigenvalues:.1e}, {samples} of {NUM_SELECT} samples others", flush=True)
    sys.exit(failed)


def _selected(venv: Path, folder: Path) -> dict[str, Found]:
    _run(venv, "--select", folder)
    return pickle.loads((folder / "found.pickle").read_bytes())


def _run(venv: Path, action: str, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run([venv / "bin/python", __file__, action, folder],
                          env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{venv} failed at {action}:\n{done.stdout}{done.stderr}")


def _differences(found: Found, expected: Found) -> tuple[float, float, int]:
    import numpy as np

    difference = np.linalg.norm(found.sketches - expected.sketches, axis=1)
    sketches = float((difference / np.linalg.norm(expected.sketches, axis=1)).max())
    values, truth = np.array(found.eigenvalues), np.array(expected.eigenvalues)
    assert values.shape == truth.shape, (values, truth)
    return (sketches, float(abs(values - truth).max() / truth.max()),
            len(set(found.chosen) - set(expected.chosen)))


# --- in one environment ------------------------------------------------------------------------


def _cases() -> dict:
    """{name: (how it is trained, --curvature)}"""
    from trained import LEARNT

    def case(curvature: str, **of_model):
        return dataclasses.replace(
            LEARNT, model=dataclasses.replace(LEARNT.model, **of_model)), curvature

    return {
        "dense": case("hessian"),
        "experts": case("fisher", num_experts=4, moe_ffn_hidden_size=16,
                        moe_shared_expert_intermediate_size=16),
        "hybrid": case("gauss-newton", num_layers=4, hybrid_layer_pattern="M-*-",
                       mamba_state_dim=8, mamba_head_dim=8, mamba_num_groups=2),
    }


def _train(folder: Path) -> None:
    from indexed_files import write_dataset
    from ranks import Layout, run_on_ranks
    from trained import documents, train

    for seed, (name, count) in enumerate((("a", 60), ("b", 40), ("valid", 24))):
        write_dataset(folder / name, documents(seed, count))
    for name, (trained, _) in _cases().items():
        run_on_ranks(1, train, folder, Layout(), trained, f"theta-{name}")


def _select(folder: Path) -> None:
    from ranks import run_on_ranks

    found = {name: run_on_ranks(1, _select_from, folder, name, curvature)[0]
             for name, (_, curvature) in _cases().items()}
    (folder / "found.pickle").write_bytes(pickle.dumps(found))


def _select_from(folder: Path, name: str, curvature: str) -> Found:
    import flat_requests
    import numpy as np

    from megatron_direct.commands.select import SelectRequest, select
    from megatron_direct.config import ParallelConfig
    from megatron_direct.data.mask import SampleMask
    from megatron_direct.gradients.store import SketchStore
    from megatron_direct.mcore import compat
    from megatron_direct.steps import selected

    run = folder / f"run-{compat.version()}-{name}"
    select(flat_requests.make(SelectRequest, ParallelConfig(), **{
        "load": str(folder / f"theta-{name}"), "run_dir": str(run),
        "data_path": (str(folder / "a"), str(folder / "b")),
        "valid_data_path": (str(folder / "valid"),), "sketch_size": 256, "micro_batch_size": 4,
        "curvature": curvature, "num_eigenpairs": 6, "lanczos_tol": 1e-4,
        "num_select": NUM_SELECT, "pilot_iters": 0}))
    store = SketchStore(run / "sketches", 256)
    entries = store.entries()
    order = np.lexsort((entries.document, entries.dataset))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    masks = selected.selection_folder(run, "direct") / "masks"
    kept = np.concatenate([SampleMask.load(masks / f"{pool}.mask.npz").keep for pool in "ab"])
    spectrum = json.loads((run / "curvature/spectrum.json").read_text())
    return Found(store.read(entries, numbers).rows, spectrum["eigenvalues"],
                 np.flatnonzero(kept).tolist())


if __name__ == "__main__":
    halves = {"--train": _train, "--select": _select}
    if sys.argv[1:2] and sys.argv[1] in halves:
        halves[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
