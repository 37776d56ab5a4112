"""Small indexed datasets for tests, written with Megatron's own builder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def write_dataset(prefix, documents: Sequence[Sequence[Sequence[int]]], dtype=np.int32) -> str:
    """A dataset whose documents are lists of sequences, which are lists of tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        tokens = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(tokens, dtype=torch.int32),
                             [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(count: int, vocab_size: int, seed: int = 0, longest: int = 40,
                     ) -> list[list[list[int]]]:
    """Documents of 2 to ``longest`` tokens, some of two sequences."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        tokens = rng.integers(0, vocab_size, rng.integers(2, longest + 1)).tolist()
        cut = len(tokens) // 2
        documents.append([tokens[:cut], tokens[cut:]] if number % 3 == 0 and cut else [tokens])
    return documents
