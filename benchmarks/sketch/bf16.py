"""Rows of a model in bfloat16 beside those of the same weights in float32.

Both are the gradients of one small trained model on passages of Python; sums of a sketch are in
float32 either way. What is printed: errors of rows, of their inner products, the rank correlation
of cosines with the mean gradient, and how many samples of the best quarter are the same.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from quality import MODEL, bytes_of_python, sketched_rows, train
from scipy.stats import spearmanr

from megatron_direct import solve_selection
from megatron_direct.config import Job, ParallelConfig, Precision
from megatron_direct.data.samples import Samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import model
from megatron_direct.mcore.shards import parameter_shards

SAMPLES, TRAINING, SIZE, MICRO_BATCH = 128, 128, 2048, 8
SEQ_LENGTH = 128


def print_bf16(folder: str) -> None:
    """In the folder the passages are written."""
    architecture = dataclasses.replace(MODEL, seq_length=SEQ_LENGTH)
    prefix = bytes_of_python(folder, SAMPLES + TRAINING, SEQ_LENGTH)
    samples = Samples([prefix], SEQ_LENGTH)
    numbers = samples.usable[TRAINING:]
    exact_chunks = model.build(Job(architecture, ParallelConfig()))
    train(exact_chunks, samples, samples.usable[:TRAINING])
    chunks = model.build(Job(architecture, ParallelConfig(), precision=Precision(bf16=True)))
    chunks[0].load_state_dict({name: value for name, value in exact_chunks[0].state_dict().items()
                               if torch.is_tensor(value)}, strict=False)
    exact, rows = (sketched_rows(found, samples, numbers,
                                 Sketch(parameter_shards(found), SIZE, seed=0), MICRO_BATCH)
                   for found in (exact_chunks, chunks))
    norms = np.linalg.norm(exact, axis=1)
    errors = np.linalg.norm(rows - exact, axis=1) / norms
    products = np.abs(rows @ rows.T - exact @ exact.T) / np.outer(norms, norms)
    best, expected = _best_quarter(rows), _best_quarter(exact)
    print(f"bfloat16 against float32, {SAMPLES} samples of {SEQ_LENGTH} tokens, k = {SIZE}: error "
          f"of a row {np.median(errors):.2%} (median), {errors.max():.2%} (largest; bar 2 %); of "
          f"inner products over both norms {np.median(products):.2%}, {products.max():.2%}; rank "
          "correlation of cosines with the mean gradient "
          f"{spearmanr(_cosines(rows), _cosines(exact)).statistic:.5f}; the same of the "
          f"{len(expected)} selected: {len(np.intersect1d(best, expected))}", flush=True)


def _cosines(rows: np.ndarray) -> np.ndarray:
    mean = rows.mean(0)
    return rows @ mean / (np.linalg.norm(rows, axis=1) * np.linalg.norm(mean))


def _best_quarter(rows: np.ndarray) -> np.ndarray:
    """What is selected for alignment with the mean gradient, at no cost."""
    return solve_selection(rows.T, np.zeros(len(rows)), len(rows) // 4, stiff_budget=1.0,
                           objective="alignment", target=rows.mean(0)).indices
