"""Indexed datasets of Megatron-LM's tools/preprocess_data.py and ours: each reads the other's."""

from __future__ import annotations

import filecmp
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import preprocess_runs
import pytest
from megatron_lm_runs import ON_CPU, needs_checkout
from sentencepiece import SentencePieceProcessor

from megatron_direct.data import indexed

WORDS = "the onset of annealing is where the learning rate begins to fall towards zero".split()


@dataclass(frozen=True)
class Datasets:
    """One text, and what the tools have made of it."""

    texts: list[str]
    model: Path
    ours: str
    theirs: str


def _their_tool(name: str, *flags) -> None:
    done = subprocess.run(
        [sys.executable, str(ON_CPU), str(Path(os.environ["MEGATRON_LM_PATH"]) / "tools" / name),
         *map(str, flags)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Datasets:
    folder, draw = tmp_path_factory.mktemp("preprocessing"), random.Random(3)
    texts = [f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))
             for number in range(80)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    model = folder / "tokenizer.model"
    preprocess_runs.run([text], folder / "ours", model, "--append-eod", "--split", "100,0,0",
                        "--train-tokenizer", "--vocab-size", "330")
    _their_tool("preprocess_data.py", "--input", text, "--output-prefix", folder / "theirs",
                "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model,
                "--append-eod", "--workers", 2, "--keep-sequential-samples")
    return Datasets(texts, model, str(folder / "ours_text_pool"),
                    str(folder / "theirs_text_document"))


@needs_checkout
def test_both_tools_write_the_same_bytes(datasets):
    for suffix in (".idx", ".bin"):
        assert filecmp.cmp(datasets.ours + suffix, datasets.theirs + suffix, shallow=False)


@needs_checkout
def test_ours_reads_theirs(datasets):
    tokenizer = SentencePieceProcessor(model_file=str(datasets.model))
    read = preprocess_runs.read(datasets.theirs)
    assert [tokenizer.decode(list(document[:-1])) for document in read] == datasets.texts
    assert indexed.dataset_digest(datasets.theirs) == indexed.dataset_digest(datasets.ours)


@needs_checkout
def test_their_merge_reads_ours(datasets, tmp_path):
    """tools/merge_datasets.py: both datasets of a folder, in the order of their names."""
    for name, prefix in (("a", datasets.ours), ("b", datasets.theirs)):
        for suffix in (".idx", ".bin"):
            os.link(prefix + suffix, tmp_path / f"{name}{suffix}")
    _their_tool("merge_datasets.py", "--input", tmp_path, "--output-prefix",
                tmp_path.parent / "merged")
    once = preprocess_runs.read(datasets.ours)
    assert preprocess_runs.read(tmp_path.parent / "merged") == once + once


@needs_checkout
def test_their_dataset_reads_ours(datasets):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(datasets.ours)
    assert indexed.num_documents(dataset) == len(datasets.texts)
    for number, document in enumerate(preprocess_runs.read(datasets.theirs)):
        np.testing.assert_array_equal(dataset.get(number), document)
