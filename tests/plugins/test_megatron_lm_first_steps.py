"""docs/first-megatron-lm.md, step by step.

Megatron-LM trains, ``select`` chooses at its checkpoint, and Megatron-LM decays on the blend file
and the masks that this has written.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import megatron_lm_runs as runs
import numpy as np
import pytest
from indexed_files import random_documents, write_dataset
from megatron_lm_runs import LLAMA, SAMPLES, needs_checkout
from ranks import Layout

from megatron_direct import SampleMask
from megatron_direct.data.blend_files import read_data_args

LAYOUT = Layout(tp=2)
ONSET, EARLIER = 4, 2  # iterations that are saved; of 8
BATCH = 4
BLEND = "runs/mine/selections/direct/blend"
MASKS = "runs/mine/selections/direct/masks"
# A decay that the first run's schedule, a constant rate, did not have.
DECAY = ["--lr-decay-style", "WSD", "--lr-decay-samples", SAMPLES, "--lr-wsd-decay-style",
         "linear", "--lr-wsd-decay-samples", (8 - ONSET) * BATCH, "--override-opt-param-scheduler"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run up to the onset, in iterations and without a word of what comes after it, and a
    selection there.

    Of random tokens ``auto`` would keep all.
    """
    folder = runs.make_pools(tmp_path_factory.mktemp("first_steps"))
    for number in range(2):
        documents = random_documents(20, runs.VOCAB, seed=number + 3)
        write_dataset(folder / f"heldout{number}", documents, np.uint16)
    losses, output = runs.run(
        folder, LAYOUT, *LLAMA, "--train-iters", SAMPLES // BATCH, "--data-path", "pool2",
        "--split", "100,0,0", "--eval-iters", 0, "--save", "ckpt", "--save-interval", EARLIER,
        "--exit-interval", ONSET)
    assert sorted(losses) == [1, 2, 3, 4], output[-5000:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "megatron_direct", "select", "--load", "ckpt", "--run-dir", "runs/mine",
         "--anneal-tokens", str((8 - ONSET) * BATCH * 16), "--data-path", "alone0", "alone1",
         "pool2", "--valid-data-path", "heldout0", "heldout1", "--tensor-model-parallel-size", "2",
         "--sequence-parallel", "--micro-batch-tokens", "256", "--sketch-size", "64",
         "--num-eigenpairs", "3", "--num-select", "40"],
        cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def _anneal(folder: Path, *flags, blend=("--data-args-path", f"{BLEND}/domains.txt", "--split",
                                         "100,0,0", "--eval-iters", 0), **keywords):
    return runs.run(folder, LAYOUT, *LLAMA, *blend, "--sample-masks", MASKS, *flags, **keywords)


def _goes_on(onset: int | str) -> list:
    """The flags of step 2 that make a run go on from an iteration at its blend's beginning."""
    return ["--train-samples", SAMPLES, *DECAY, "--load", "ckpt", "--exit-on-missing-checkpoint",
            "--phase-transition-iterations", onset]


@pytest.fixture(scope="module")
def decay(folder) -> tuple[dict[int, str], str]:
    """Step 2 from the newest checkpoint: (losses, output); its batches are in ``newest``."""
    losses, output = _anneal(folder, *_goes_on(ONSET), record="newest")
    assert sorted(losses) == [5, 6, 7, 8]
    return losses, output


def _require_batches_of_a_fresh_run(folder: Path, record: str, onset: int) -> None:
    _anneal(folder, "--train-samples", SAMPLES - onset * BATCH, record=f"fresh-{record}")
    np.testing.assert_array_equal(runs.batches(folder, record)["tokens"],
                                  runs.batches(folder, f"fresh-{record}")["tokens"])


@needs_checkout
def test_the_decay_begins_at_the_first_sequence_of_the_blend(folder, decay):
    """With the phase transition named to the second run only."""
    assert "will not be seen" not in decay[1]
    _require_batches_of_a_fresh_run(folder, "newest", ONSET)


@needs_checkout
def test_it_goes_on_from_an_older_iteration(folder):
    losses, _ = _anneal(folder, *_goes_on(EARLIER), "--ckpt-step", EARLIER, record="older")
    assert sorted(losses) == [3, 4, 5, 6, 7, 8]
    _require_batches_of_a_fresh_run(folder, "older", EARLIER)


@needs_checkout
def test_a_decay_that_stopped_goes_on_from_its_own_folder(folder, decay):
    """With the flags of before, but for the folder that is loaded."""
    flags = ["--save", "annealed", "--save-interval", 2]
    first, _ = _anneal(folder, *_goes_on(ONSET), *flags, "--exit-interval", ONSET + 2)
    assert sorted(first) == [5, 6]
    losses, _ = _anneal(folder, *_goes_on(ONSET), *flags, "--load", "annealed", record="resumed")
    assert sorted(losses) == [7, 8]
    np.testing.assert_array_equal(runs.batches(folder, "resumed")["tokens"],
                                  runs.batches(folder, "newest")["tokens"][4:])


@needs_checkout
def test_the_blend_changes_once_more_in_the_decay(folder):
    """As after a second selection; each phase begins at its blend's first sequence."""
    phases = _goes_on(f"{ONSET},{ONSET + 2}")
    losses, _ = _anneal(folder, *phases, "--save", "halfway", "--save-interval", 100,
                        record="first-phase")
    assert sorted(losses) == [5, 6]
    other = ["--data-path", "heldout0", "--split", "100,0,0", "--eval-iters", 0]
    losses, _ = runs.run(folder, LAYOUT, *LLAMA, *other, *phases, "--load", "halfway",
                         record="second-phase")
    assert sorted(losses) == [7, 8]
    runs.run(folder, LAYOUT, *LLAMA, *other, "--train-samples", 2 * BATCH, record="other-alone")
    np.testing.assert_array_equal(runs.batches(folder, "second-phase")["tokens"],
                                  runs.batches(folder, "other-alone")["tokens"])


@needs_checkout
def test_what_is_trained_on_is_what_was_selected(folder, decay):
    """Documents of random tokens: no batch has a piece of one that was left out."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    blend = read_data_args(str(folder / BLEND / "domains.txt"))
    kept, left_out = set(), set()
    for prefix in blend.prefixes:
        dataset = IndexedDataset(str(folder / prefix))
        mask = SampleMask.load(folder / MASKS / f"{Path(prefix).name}.mask.npz")
        for number, count in enumerate(mask.counts):
            first, last = dataset.document_indices[number:number + 2]
            for sequence in dataset[first:last]:
                (kept if count else left_out).update(_sixes(sequence))
    seen = {six for row in runs.batches(folder, "newest")["tokens"].reshape(-1, 16)
            for six in _sixes(row)}
    assert seen & kept and left_out - kept and not seen & (left_out - kept)


def _sixes(tokens) -> set[tuple[int, ...]]:
    """Runs of six tokens, of which two random documents share none."""
    return {tuple(six.tolist()) for six in np.lib.stride_tricks.sliding_window_view(tokens, 6)} \
        if len(tokens) >= 6 else set()


@needs_checkout
def test_with_the_validation_sets_it_trains_on_the_same_and_reports_them(folder, decay):
    losses, output = decay
    blend = ["--per-split-data-args-path", f"{BLEND}/domains.json", "--eval-iters", 1]
    validated, shown = _anneal(folder, *_goes_on(ONSET), blend=blend)
    assert validated == losses
    assert "validation loss at iteration 8" in shown and "validation loss" not in output


@needs_checkout
def test_the_rate_decays_from_the_onset(decay):
    """What is printed with an iteration is the rate of the next."""
    rates = runs.learning_rates(decay[1])
    assert sorted(rates) == [5, 6, 7, 8]
    np.testing.assert_allclose([rates[iteration] for iteration in sorted(rates)],
                               [7.5e-3, 5e-3, 2.5e-3, 0])


@needs_checkout
@pytest.mark.parametrize(("onset", "name"), [(ONSET, []), (EARLIER, ["--ckpt-step", EARLIER])],
                         ids=["newest", "an older iteration"])
def test_a_cache_that_is_built_ahead_is_the_one_that_the_decay_reads(folder, onset, name):
    """Without a phase transition, where the index depends on the iteration it goes on from."""
    flags = ["--train-samples", SAMPLES, *DECAY, "--load", "ckpt", *name, "--data-cache-path",
             f"cache-{onset}"]
    _anneal(folder, *flags, script="tools/build_blend_cache.py")
    built = {path.name for path in (folder / f"cache-{onset}").iterdir()}
    assert built
    losses, _ = _anneal(folder, *flags)
    assert sorted(losses) == list(range(onset + 1, 9))
    assert {path.name for path in (folder / f"cache-{onset}").iterdir()} == built


@needs_checkout
def test_a_missing_iteration_ends_the_run(folder):
    losses, output = _anneal(folder, *_goes_on(ONSET), "--ckpt-step", 3, fails=True)
    assert not losses and "iter_0000003" in output
