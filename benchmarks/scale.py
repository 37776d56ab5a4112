"""Planning and solving at sizes that no test has: time and memory of each step.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/scale.py plan \\
        --documents 1e8 --prefixes 1000
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/scale.py solve \\
        --samples 2e5 --sketch-size 1024

plan: pools of which only the index is there (.idx written, .bin a hole of the right size) go
through all that ``select`` and ``anneal`` do with them but for the passes over the model, as one of
``--of`` ranks does its share: digests, samples, the plan of the passes, masks, the blend. Memory is
what a rank allocates (anonymous) above what it had at the start, at its peak, and what the ranks of
a node share; pages of mapped index files, which the system can drop, are not counted.

solve: all that the default does of as many samples as are asked for, on random sketches and
without texts, the rows spread over the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import numpy as np

from megatron_direct.config import ParallelConfig
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import Blend
from megatron_direct.data.samples import MicroBatchLimits, PassShape, Samples
from megatron_direct.gradients.store import SketchStore
from megatron_direct.mcore import blend, grid
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import digests as digests_of
from megatron_direct.runtime import parallel, sharing
from megatron_direct.selection.choice import choose
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.steps import pass_plan, selected, sketch
from megatron_direct.steps.onset import dataset_digests

SEQ_LENGTH, VOCAB_SIZE, RANKS_OF_A_NODE = 4096, 128000, 8


def resident(field: str) -> int:
    """Bytes of this process: RssAnon, RssShmem."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Watch:
    """Prints time and peak memory of each step, of the slowest and the largest rank; what a core
    worked tells more than the clock where other work runs on the machine."""

    def __init__(self):
        self._start = resident("RssAnon")
        self.seconds, self.peaks, self.shared = np.zeros(2), np.zeros(2), 0.0

    @contextlib.contextmanager
    def step(self, name: str, counted: bool = True):
        parallel.barrier()
        going, peak = True, 0

        def look():
            nonlocal peak
            while going:
                peak = max(peak, resident("RssAnon") - self._start)
                time.sleep(0.01)

        watcher = threading.Thread(target=look)
        watcher.start()
        begun, worked = time.perf_counter(), time.process_time()
        yield
        taken, worked = time.perf_counter() - begun, time.process_time() - worked
        going = False
        watcher.join()
        found = parallel.gather_objects((taken, peak, resident("RssShmem"), worked))
        first, others = found[0][1], max((f[1] for f in found[1:]), default=0)
        slowest, busiest = (max(f[i] for f in found) for i in (0, 3))
        self.shared = max(self.shared, *(f[2] for f in found))
        if counted:
            self.seconds += np.array([slowest, busiest])
            self.peaks = np.maximum(self.peaks, [first, others])
        parallel.say(f"{name:42s} {slowest:8.2f} s ({busiest:6.2f} of CPU)   rank 0 "
                     f"{first / 1e9:6.2f} GB   others {others / 1e9:6.2f} GB"
                     f"{'' if counted else '   (not counted)'}")

    def total(self) -> None:
        first, others = self.peaks
        node = first + (RANKS_OF_A_NODE - 1) * others + self.shared
        parallel.say(f"in all {self.seconds[0]:.1f} s ({self.seconds[1]:.1f} of CPU); shared by a "
                     f"node {self.shared / 1e9:.2f} GB; a node of {RANKS_OF_A_NODE} ranks: "
                     f"{node / 1e9:.2f} GB")


def write_pools(folder: Path, num_documents: int, num_prefixes: int) -> list[str]:
    """Documents of 2 to 4000 tokens, a sequence each, of which only the index is there."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prefixes = [str(folder / f"pool-{number:04d}") for number in range(num_prefixes)]
    for number, prefix in enumerate(prefixes):
        lengths = rng.integers(2, 4001, num_documents // num_prefixes, np.int32)
        if os.path.isfile(prefix + ".idx"):
            continue
        with open(prefix + ".bin", "wb") as file:
            file.write(number.to_bytes(4, "little"))  # no two hold the same documents
            file.truncate(int(lengths.sum(dtype=np.int64)) * 4)
        indexed.write_index(prefix + ".idx", np.int32, lengths)
    return prefixes


def plan(flags: argparse.Namespace) -> None:
    count, rank = int(flags.documents), parallel.rank_and_size()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(flags.folder or scratch)
        prefixes = parallel.on_rank_zero(lambda: write_pools(folder, count, flags.prefixes))
        run = Path(parallel.on_rank_zero(lambda: scratch)) / "run"
        watch = Watch()
        with watch.step(f"indexes examined, a share of {flags.of}"):
            for prefix in prefixes[rank:: flags.of]:
                indexed.examine(prefix)
        with watch.step("all indexes examined", counted=False):
            digests = dataset_digests(prefixes)
        with watch.step("samples"):
            samples = Samples(prefixes, SEQ_LENGTH, VOCAB_SIZE, sharing.node_array)
        drawn = pass_plan.Drawn("pool", samples, samples.usable, list(digests.values()))
        store = SketchStore(run / "sketches", 2048)
        with watch.step("rows that are missing"):
            assert sketch.num_missing(store, drawn) == len(samples.usable)
        with watch.step("plan of the passes"):
            passes = pass_plan.make_plan(store, drawn)
        with watch.step(f"first 100 passes, a share of {flags.of}"):
            shape = PassShape(MicroBatchLimits(8), share=rank, num_shares=flags.of)
            batches = samples.passes(passes.planned, shape, passes.done)
            for _ in range(100):
                next(batches, None)
        selection = run / "selections" / "direct"
        with watch.step("masks made and written"):
            written = parallel.on_rank_zero(lambda: _write_masks(samples, digests, selection))
        with watch.step("masks read"):
            masks = selected.load_masks(selection, prefixes, written)
        with watch.step("the blend, with Megatron's indices"):
            request = blend.BlendRequest(SEQ_LENGTH, max(1, count // 100), 1, run / "cache",
                                         blend.Vocabulary(VOCAB_SIZE, "none"))
            blend.build_blend(Blend(prefixes), masks, request)
        watch.total()


def _write_masks(samples: Samples, digests: dict[str, str], folder: Path) -> dict[str, str]:
    drawn = np.random.default_rng(1)
    chosen = np.concatenate([block[drawn.random(len(block), np.float32) < 0.25]
                             for block in np.array_split(samples.usable, 64)])
    selected.composition(samples, chosen)
    return selected.write_masks(folder, selected.masks_of(samples, list(digests.values()), chosen))


def solve(flags: argparse.Namespace) -> None:
    count, size = int(flags.samples), flags.sketch_size
    rank, ranks = parallel.rank_and_size()
    ids = np.array_split(np.arange(count), ranks)[rank]
    rows = np.empty((len(ids), size), np.float32)
    means = np.random.default_rng(0).standard_normal((16, size), np.float32)
    for start in range(0, len(ids), 1000):  # the same whoever holds them, if 1000 divides shares
        here = ids[start: start + 1000]
        rng = np.random.default_rng([1, int(here[0])])
        rows[start: start + 1000] = rng.standard_normal((len(here), size), np.float32)
        rows[start: start + 1000] += means[here % 16]
    rng = np.random.default_rng(2)
    directions = np.linalg.qr(rng.standard_normal((size, 32)))[0].T
    evidence = Evidence(
        rows, 100 + ids % 400, ids * 8 // count, 8, ids,
        (rng.standard_normal((64, size)) + means[0]).astype(np.float32),
        Directions(np.geomspace(10, 0.01, 32), directions, 8), parallel.sum_over_world)
    watch = Watch()
    parallel.say(f"rows of a rank: {rows.nbytes / 1e9:.2f} GB")
    with watch.step(f"{count} x {size} on {ranks} ranks, beyond the rows"):
        found = choose(SelectionConfig(num_select=count // 4), evidence, 0, {}).selection
    parallel.say(f"{found.status}, objective {found.objective:.9g}, indices "
                 f"{digests_of.digest(found.indices.tobytes())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("plan", "solve"))
    parser.add_argument("--documents", type=float, default=1e7)
    parser.add_argument("--prefixes", type=int, default=1000)
    parser.add_argument("--of", type=int, default=128, help="ranks, of which each runs as one")
    parser.add_argument("--folder", default="", help="where the pools stay; default: nowhere")
    parser.add_argument("--samples", type=float, default=2e5)
    parser.add_argument("--sketch-size", type=int, default=1024)
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    with megatron_runtime(), parallel.process_group(), grid.model_parallel(ParallelConfig()):
        {"plan": plan, "solve": solve}[flags.what](flags)


if __name__ == "__main__":
    main()
