"""Errors that the sketch adds to inner products and norms of true gradients.

    python benchmarks/sketch/quality.py
    python benchmarks/sketch/quality.py --load CHECKPOINT --data-path PREFIX [PREFIX ...]

A dense Gaussian of k rows errs, in <g, h> / (|g| |h|), by sqrt((1 + cos^2) / k) in the root mean
square, and in |g|^2 / |g|^2 by sqrt(2 / k): exactly known, and what ours is divided by. Beside it
stand the errors with k buckets on all axes; their standard error over seeds; how the errors of two
halves of the coordinates correlate; and what of the gradients a single layer has. Without
--load the gradients are those of a model of 6 M parameters, trained for some steps on the Python
installation's own source text as bytes. On one rank, with all gradients in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_direct.cli import main as cli
from megatron_direct.config import Given, Job, ModelConfig, ParallelConfig
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import checkpoint, grid, model, passes
from megatron_direct.mcore.shards import ParameterShard, num_parameters, parameter_shards
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import parallel
from megatron_direct.steps.onset import job_of

# 6.3 M parameters.
MODEL = ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, vocab_size=256,
                    seq_length=256)
SAMPLES, STEPS, SEEDS, MICRO_BATCH = 24, 30, 8, 8
SIZES = (512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", help="a checkpoint of a small model")
    parser.add_argument("--data-path", nargs="+", help="datasets, of which samples are drawn")
    parser.add_argument("--num-samples", type=int, default=SAMPLES)
    flags = parser.parse_args()
    if (flags.load is None) != (flags.data_path is None):
        parser.error("--load and --data-path belong together")
    cli.quiet_imports()
    with megatron_runtime(), parallel.process_group(), grid.model_parallel(ParallelConfig()):
        if flags.load is None:
            print_quality()
            return
        opened = checkpoint.open_checkpoint(flags.load)
        job = job_of(opened, ParallelConfig(), Given(), flags.data_path)
        samples = Samples(flags.data_path, job.model.seq_length, job.model.vocab_size)
        chunks = model.build(dataclasses.replace(job, precision=dataclasses.replace(
            job.precision, bf16=False)))
        checkpoint.load_model(opened.path, chunks)
        numbers = np.random.default_rng(0).choice(samples.usable, flags.num_samples, replace=False)
        print_errors(chunks, samples, np.sort(numbers))


def print_quality() -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples([bytes_of_python(
            folder, SAMPLES + STEPS * MICRO_BATCH, MODEL.seq_length)], MODEL.seq_length)
        chunks = model.build(Job(MODEL, ParallelConfig()))
        train(chunks, samples, samples.usable[SAMPLES:])
        print_errors(chunks, samples, samples.usable[:SAMPLES])


def print_errors(chunks, samples: Samples, numbers: np.ndarray) -> None:
    count, shards = len(numbers), parameter_shards(chunks)
    gradients = torch.stack([one_gradient(chunks, samples, numbers[[i]]) for i in range(count)])
    norms, cosines = norms_and_cosines(gradients)
    name, share = _largest_layer(gradients, shards)
    del gradients
    upper = np.triu_indices(count, 1)
    print(f"{num_parameters(chunks) / 1e6:.1f} M parameters, {count} gradients, {SEEDS} "
          f"seeds; cosines from {cosines[upper].min():.2f} to {cosines[upper].max():.2f}; of a "
          f"squared norm at most {100 * share:.0f} % in one layer of the blocks, {name}")
    print(f"{'error x sqrt(k) / a dense Gaussian' + chr(39) + 's':36}{'inner products':>16}"
          f"{'squared norms':>15}{'halves':>9}")
    for size in SIZES:
        everywhere = [dataclasses.replace(shard, of_vocabulary=True) for shard in shards]
        for label, of in ((f"k {size}", shards), ("the same, k buckets everywhere", everywhere)):
            gaussian = np.sqrt(np.mean(1 + cosines[upper] ** 2) / size)
            products, squares, halves = [], [], []
            for seed in range(SEEDS):
                rows = sketched_rows(chunks, samples, numbers, Sketch(of, size, seed), MICRO_BATCH)
                rows /= norms[:, None]
                errors = rows @ rows.T - cosines
                products.append(_root_mean_square(errors[upper]) / gaussian)
                squares.append(_root_mean_square(np.diag(errors)) / np.sqrt(2 / size))
                order = np.random.default_rng(seed).permutation(size)
                halves.append([(2 * rows[:, part] @ rows[:, part].T - cosines)[upper]
                               for part in np.split(order, 2)])
            correlation = np.corrcoef(*np.array(halves).swapaxes(0, 1).reshape(2, -1))[0, 1]
            print(f"{label:36}{_with_error(products):>16}{_with_error(squares):>15}"
                  f"{correlation:9.2f}", flush=True)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _with_error(of_seeds: Sequence[float]) -> str:
    return (f"{_root_mean_square(np.array(of_seeds)):.2f} +- "
            f"{np.std(of_seeds, ddof=1) / np.sqrt(len(of_seeds)):.2f}")


def _largest_layer(gradients: torch.Tensor, shards: Sequence[ParameterShard]) -> tuple[str, float]:
    """Of those whose longer axis is narrowed (for the least k): its name, and the largest share
    that it has of a gradient's squared norm."""
    parts = gradients.split([shard.parameter.numel() for shard in shards], 1)
    whole = gradients.square().sum(1)
    shares = {shard.name: float((part.square().sum(1) / whole).max())
              for shard, part in zip(shards, parts, strict=True)
              if Hashes.draw(shard, SIZES[0], 0).narrowed is not None}
    name = max(shares, key=lambda name: shares[name])
    return name, shares[name]


def norms_and_cosines(gradients: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """([n], [n, n]) of gradients [n, P]."""
    norms = gradients.norm(dim=1).double().numpy()
    return norms, (gradients @ gradients.T).double().numpy() / np.outer(norms, norms)


def bytes_of_python(folder: str, count: int, seq_length: int) -> str:
    """The prefix of a dataset of ``count`` passages, a token a byte."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    library = Path(argparse.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    prefix, length = str(Path(folder) / "source"), seq_length + 1
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    places = np.random.default_rng(0).integers(0, len(text) - length, count)
    for place in places:
        tokens = np.frombuffer(text[place: place + length], np.uint8).astype(np.int32)
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(prefix + ".idx")
    return prefix


def train(chunks, samples: Samples, numbers: np.ndarray) -> None:
    optimizer = torch.optim.AdamW(chunks[0].parameters(), lr=1e-3)
    for micro_batches in passes.of_samples(chunks, samples, numbers,
                                           MicroBatchLimits(MICRO_BATCH)):
        optimizer.zero_grad()
        passes.run_pass(chunks, micro_batches, backward=True)
        optimizer.step()
    optimizer.zero_grad()


def one_gradient(chunks, samples: Samples, number: np.ndarray) -> torch.Tensor:
    for micro_batches in passes.of_samples(chunks, samples, number, MicroBatchLimits(1)):
        passes.run_pass(chunks, micro_batches, backward=True)
    gradient = torch.cat([p.grad.flatten() for p in chunks[0].parameters()])
    chunks[0].zero_grad()
    return gradient


def sketched_rows(chunks, samples: Samples, numbers: np.ndarray, sketch: Sketch, micro_batch: int,
                  ) -> np.ndarray:
    rows = {}
    model = GradientModel(chunks, parameter_shards(chunks), sketch,
                          micro_batch=MicroBatchLimits(micro_batch))
    for found, ids, _ in sketch_samples(model, samples, numbers):
        rows.update(zip(ids.tolist(), found, strict=True))
    return np.stack([rows[number] for number in numbers.tolist()]).astype(np.float64)


if __name__ == "__main__":
    main()
