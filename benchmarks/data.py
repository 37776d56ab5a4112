"""Masked datasets against unmasked ones, as ratios within one run, and the size of a mask.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--documents 1000000]

- Reading: ``__getitem__`` of a dataset under a half mask over that of an unmasked dataset of the
  same tokens, by turns on the same sequences, both of Megatron's class or a subclass of it.
- Building: document, sample and shuffle indices of both, through BlendedMegatronDatasetBuilder and
  into a new cache each time. The check that the mask belongs to its dataset, which reads the whole
  .idx, is made once a process; its time is given apart.
- Size: masks of 1e9 documents on disk and in memory.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

warnings.filterwarnings("ignore")

import numpy as np

from megatron_direct import SampleMask
from megatron_direct.config import ParallelConfig
from megatron_direct.data import indexed
from megatron_direct.data.materialize import materialize
from megatron_direct.mcore import grid
from megatron_direct.mcore.blend import Vocabulary
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import parallel

SEQ_LENGTH, VOCAB_SIZE = 1024, 32000


def write_pool(prefix: str, num_documents: int) -> None:
    """Documents of 1 to 400 random tokens, a sequence each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 401, num_documents)
    with open(prefix + ".bin", "wb") as file:
        for block in np.array_split(lengths, 32):
            rng.integers(0, VOCAB_SIZE, int(block.sum()), dtype=np.uint16).tofile(file)
    indexed.write_index(prefix + ".idx", np.uint16, lengths, np.arange(num_documents + 1))


def build(prefix: str, masks: dict, cache: Path):
    """(dataset, seconds) of one epoch over a prefix."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_direct import MaskedGPTDataset, MaskedGPTDatasetConfig

    settings = dict(
        random_seed=1, sequence_length=SEQ_LENGTH, blend=([prefix], None), split="100,0,0",
        path_to_cache=str(cache), tokenizer=Vocabulary(VOCAB_SIZE, "benchmark"),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False)
    kind, config = ((MaskedGPTDataset, MaskedGPTDatasetConfig(**settings, sample_masks=masks))
                    if masks else (GPTDataset, GPTDatasetConfig(**settings)))
    shutil.rmtree(cache, ignore_errors=True)
    start = time.perf_counter()
    dataset, _, _ = BlendedMegatronDatasetBuilder(kind, [None, 0, 0], lambda: True, config).build()
    return dataset, time.perf_counter() - start


def compare_building(whole: str, masks: dict, alone: str, folder: Path, rounds: int) -> None:
    times = {"masked": [], "unmasked": []}
    for _ in range(rounds):
        times["masked"].append(build(whole, masks, folder / "cache")[1])
        times["unmasked"].append(build(alone, {}, folder / "cache")[1])
    ratio = median(m / u for m, u in zip(*times.values(), strict=True))
    print(f"building indices, masked / unmasked of the same tokens: {ratio:.3f} (bar 1.1; "
          f"{median(times['masked']) * 1e3:.0f} ms, {median(times['unmasked']) * 1e3:.0f} ms)")


def compare_reading(whole: str, masks: dict, alone: str, folder: Path, rounds: int) -> None:
    masked, _ = build(whole, masks, folder / "cache-masked")
    unmasked, _ = build(alone, {}, folder / "cache-unmasked")
    assert len(masked) == len(unmasked)
    numbers = np.random.default_rng(2).integers(0, len(masked), 2000)
    for number in numbers[:100]:
        assert (masked[number]["tokens"] == unmasked[number]["tokens"]).all()
    ratios = []
    for turn in range(rounds):
        pair = ((masked, unmasked), (unmasked, masked))[turn % 2]
        first, second = (_seconds(dataset, numbers) for dataset in pair)
        ratios.append(second / first if turn % 2 == 0 else first / second)
    print(f"__getitem__, throughput masked / unmasked: {median(ratios):.3f} (bar 0.97; "
          f"{rounds} rounds of {len(numbers)} sequences of {SEQ_LENGTH} tokens)")


def _seconds(dataset, numbers) -> float:
    start = time.perf_counter()
    for number in numbers:
        dataset[number]
    return time.perf_counter() - start


def measure_mask(share: float, num_documents: int, folder: Path) -> None:
    rng = np.random.default_rng(3)
    keep = np.empty(num_documents, dtype=bool)
    for block in np.array_split(keep, 64):  # a view of each stretch
        block[:] = rng.random(len(block), dtype=np.float32) < share
    mask = SampleMask(keep, "0" * 32, "runs/mine")
    del keep
    path = folder / "mask.npz"
    start = time.perf_counter()
    mask.save(path)
    saved = time.perf_counter() - start
    again = SampleMask.load(path)
    assert again.digest == mask.digest
    print(f"mask of {num_documents:.0e} documents that keeps {share:.0%}: "
          f"{os.path.getsize(path) / 1e6:.2f} MB on disk (bar 125), {num_documents / 8e6:.2f} MB "
          f"in memory; saved in {saved:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--mask-documents", type=int, default=1_000_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name, megatron_runtime(), parallel.process_group(), \
            grid.model_parallel(ParallelConfig()):
        folder = Path(name)
        whole, alone = str(folder / "whole"), str(folder / "alone")
        write_pool(whole, flags.documents)
        keep = np.random.default_rng(1).random(flags.documents) < 0.5
        start = time.perf_counter()
        digest = indexed.dataset_digest(whole)
        print(f"check of ownership, once a process: {(time.perf_counter() - start) * 1e3:.0f} ms")
        mask = SampleMask(keep, digest)
        materialize(whole, mask, alone)
        compare_building(whole, {whole: mask}, alone, folder, flags.rounds)
        compare_reading(whole, {whole: mask}, alone, folder, flags.rounds)
        for share in (0.25, 0.5):  # a quarter is what select keeps unless told otherwise
            measure_mask(share, flags.mask_documents, folder)


if __name__ == "__main__":
    main()
