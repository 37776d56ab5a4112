"""Errors that the sketch adds to inner products and norms of true gradients.

A dense Gaussian of k rows errs, in <g, h> / (|g| |h|), by sqrt((1 + cos^2) / k) in the root mean
square, and in |g|^2 / |g|^2 by sqrt(2 / k): exactly known, and what ours is divided by. The
gradients are those of a model of 6 M parameters, trained for some steps on the Python
installation's own source text as bytes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from megatron_direct.config import Job, ModelConfig, ParallelConfig
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import model, passes
from megatron_direct.mcore.shards import num_parameters, parameter_shards

# 6.3 M parameters.
MODEL = ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, vocab_size=256,
                    seq_length=256)
SAMPLES, STEPS, SEEDS, MICRO_BATCH = 24, 30, 8, 8


def print_quality() -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples([bytes_of_python(
            folder, SAMPLES + STEPS * MICRO_BATCH, MODEL.seq_length)], MODEL.seq_length)
        chunks = model.build(Job(MODEL, ParallelConfig()))
        train(chunks, samples, samples.usable[SAMPLES:])
        shards = parameter_shards(chunks)
        numbers = samples.usable[:SAMPLES]
        gradients = torch.stack(
            [one_gradient(chunks, samples, numbers[[i]]) for i in range(SAMPLES)])
        norms, cosines = norms_and_cosines(gradients)
        del gradients
        upper = np.triu_indices(SAMPLES, 1)
        print(f"{num_parameters(chunks) / 1e6:.1f} M parameters, {SAMPLES} gradients, "
              f"{SEEDS} "
              f"seeds; cosines from {cosines[upper].min():.2f} to {cosines[upper].max():.2f}")
        for size in (512, 2048):
            products, squares = [], []
            for seed in range(SEEDS):
                rows = sketched_rows(chunks, samples, numbers, Sketch(shards, size, seed),
                                     MICRO_BATCH)
                errors = rows @ rows.T / np.outer(norms, norms) - cosines
                products.append(errors[upper])
                squares.append(np.diag(errors))
            gaussian = np.sqrt(np.mean(1 + cosines[upper] ** 2))
            print(f"k {size:5}: error x sqrt(k) over a dense Gaussian's: inner products "
                  f"{np.sqrt(size * np.mean(np.square(products))) / gaussian:.2f}, squared norms "
                  f"{np.sqrt(size * np.mean(np.square(squares)) / 2):.2f}", flush=True)


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
