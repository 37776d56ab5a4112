"""Masks in Megatron-LM's own training loop: its entry scripts, unchanged, from a checkout.

``MEGATRON_LM_PATH=/path/to/Megatron-LM pytest tests/plugins`` runs what needs the checkout, which
has to be of the version of the installed megatron-core (tests/megatron_lm_runs.py).
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import flat_requests
import megatron_lm_runs as runs
import numpy as np
import pytest
from indexed_files import write_dataset
from megatron_lm_runs import POISON, ROOT, SAMPLES, needs_checkout
from ranks import Layout, run_on_ranks

from megatron_direct import SampleMask
from megatron_direct.data.blend_plan import BlendPart
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.materialize import materialize
from megatron_direct.plugins.megatron_lm import what_is_missed


@pytest.mark.parametrize(("epochs", "share"), [(1.0, 0.1), (2.0, 0.5), (0.5, 0.05)])
def test_what_a_blend_that_begins_within_a_run_misses(epochs, share):
    """As Megatron shuffles: all epochs together, of which the last part is read."""
    documents, of_run = 20_000, epochs / share
    part = BlendPart("pool", documents, 10 * documents, 1.0, epochs, masked=True)
    words = what_is_missed(part, share)
    order = np.tile(np.arange(documents), round(of_run))
    np.random.default_rng(0).shuffle(order)
    read = order[-round(epochs * documents):]
    unseen = 1 - len(np.unique(read)) / documents
    said = int(re.search(r"about (\d+)% of the selected documents", words)[1]) / 100
    assert abs(said - unseen) < 0.015  # the words are rounded to a hundredth
    assert not what_is_missed(dataclasses.replace(part, masked=False), share)
    assert not what_is_missed(part, 1.0) and not what_is_missed(
        dataclasses.replace(part, epochs=share), share)  # one epoch in all: each is seen once
    assert not what_is_missed(dataclasses.replace(part, epochs=0.0), 0.0)  # it is through


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return runs.make_pools(tmp_path_factory.mktemp("megatron_lm"))


@dataclass(frozen=True)
class Training:
    """A training by an entry script of Megatron-LM, with the flags of its architecture."""

    layout: Layout
    architecture: list[str]
    script: str = "pretrain_gpt"

    def __str__(self) -> str:
        return f"{self.script.removeprefix('pretrain_')}-{self.layout}"

    def flags(self, folder: Path, pools: list[str]) -> list:
        """The same blend in two of the ways in which Megatron-LM takes it."""
        blend = runs.whole_blend(pools) if self.layout.world_size == 1 \
            else runs.blend_per_split(folder, pools)
        return [*self.architecture, "--train-samples", SAMPLES, *blend,
                "--data-cache-path", f"cache-{self}"]

    def run(self, folder: Path, *flags, **keywords) -> tuple[dict[int, str], str]:
        return runs.run(folder, self.layout, *flags, script=f"launch/{self.script}_direct.py",
                        **keywords)


TRAININGS = [Training(Layout(), runs.GPT2), Training(Layout(tp=2, pp=2), runs.LLAMA),
             Training(Layout(tp=2, pp=2), runs.HYBRID, "pretrain_hybrid")]


@pytest.fixture(scope="module", params=TRAININGS, ids=str)
def run(request, folder):
    """A masked training: (training, flags, losses)."""
    training = request.param
    if runs.WHY_NOT is None and not runs.has_script(training.script):
        pytest.skip(f"this version of Megatron-LM has no {training.script}.py")
    flags = [*training.flags(folder, ["pool0", "pool1"]), "--sample-masks", "masks"]
    losses, output = training.run(folder, *flags, record=f"masked-{training}")
    assert len(losses) == 8, output[-5000:]
    for shown in (r"> pool0: \d+ documents, \d+ tokens, weight 0.2500, \d\.\d\d epochs",
                  r"> pool2: 40 documents, \d+ tokens \(no mask\), weight 0.2500"):
        assert re.search(shown, output)
    return training, flags, losses


@needs_checkout
def test_no_masked_token_reaches_a_batch(folder, run):
    training, _, _ = run
    for tokens in runs.batches(folder, f"masked-{training}").values():
        # Two micro-batches an iteration, and one or more of validation in the larger layout.
        assert len(tokens) >= 16 and not (tokens == POISON).any()


@needs_checkout
def test_without_masks_the_same_tokens_do_reach_batches(folder):
    training = TRAININGS[0]
    training.run(folder, *training.flags(folder, ["pool0", "pool1"]), record="plain")
    assert (runs.batches(folder, "plain")["tokens"] == POISON).any()


@needs_checkout
def test_losses_are_those_of_a_training_on_materialized_datasets(folder, run):
    training, _, losses = run
    assert training.run(folder, *training.flags(folder, ["alone0", "alone1"]))[0] == losses


@needs_checkout
def test_a_killed_training_resumes_with_the_same_losses(folder, run):
    training, flags, losses = run
    saving = [*flags, "--save", f"killed-{training}", "--load", f"killed-{training}",
              "--save-interval", 4]
    before, _ = training.run(folder, *saving, kill_at=5)
    after, _ = training.run(folder, *saving)
    assert sorted(after) == [5, 6, 7, 8]
    # Megatron-LM does not begin its running mean anew after the first iteration that it prints, so
    # that the second line of any run is the mean of two iterations.
    mean = (float(losses[5]) + float(losses[6])) / 2
    assert float(after.pop(6)) == pytest.approx(mean, abs=2e-6)  # both are rounded to 1e-6
    assert {**before, 6: losses[6], **after} == losses


# Every document consists of one token of its own, so that tokens can be counted.
COUNTS, DOCUMENT = np.arange(59) % 4, 6


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Path:
    """A pool, a mask of counts up to 3, and the dataset that holds documents so many times."""
    folder = tmp_path_factory.mktemp("counted")
    prefix = write_dataset(folder / "pool", [[[d] * DOCUMENT] for d in range(len(COUNTS))],
                           np.uint16)
    mask = SampleMask(COUNTS, dataset_digest(prefix))
    mask.save(folder / "masks" / "pool.mask.npz")
    materialize(prefix, mask, str(folder / "alone"))
    return folder


@needs_checkout
@pytest.mark.parametrize("training", TRAININGS[:2], ids=str)
def test_a_document_comes_as_often_in_an_epoch_as_its_count(counted, training):
    def run(pool, *flags, **keywords):
        losses, _ = training.run(
            counted, *training.architecture, "--train-samples", SAMPLES, "--data-path", pool,
            "--split", "100,0,0", "--eval-iters", 0, "--data-cache-path", f"cache-{training}",
            *flags, **keywords)
        return losses

    losses = run("pool", "--sample-masks", "masks", record=f"batches-{training}")
    assert len(losses) == 8 and losses == run("alone")
    tokens = runs.batches(counted, f"batches-{training}")["tokens"]
    assert tokens.size == SAMPLES * 16
    # All samples are one epoch, but for the few tokens that do not fill another.
    missing = DOCUMENT * COUNTS - np.bincount(tokens.ravel(), minlength=len(COUNTS))
    assert missing.min() >= 0 and missing.sum() == DOCUMENT * COUNTS.sum() - tokens.size < 16


def _loss_and_masks(folder, training, batches):
    """Our model's loss on a batch that Megatron-LM saw; a selection at the same checkpoint."""
    import torch

    from megatron_direct.commands.select import SelectRequest, select
    from megatron_direct.config import Job, ModelConfig, ParallelConfig
    from megatron_direct.mcore import checkpoint, grid, model, training_folder

    found = training_folder.latest(folder / f"killed-{training}").parent / "iter_0000004"
    opened = checkpoint.open_checkpoint(found)
    architecture = opened.settings(ModelConfig, {})
    assert opened.iteration == 4
    with grid.model_parallel(ParallelConfig()):
        chunk, = chunks = model.build(Job(architecture, ParallelConfig()))
        checkpoint.load_model(found, chunks)
        tokens, labels = (torch.from_numpy(np.concatenate(batches[name][8:10]))
                          for name in ("tokens", "labels"))  # of the fifth iteration
        with torch.no_grad():
            loss = chunk(tokens, torch.arange(16).expand(4, 16), None, labels=labels).mean().item()
    select(flat_requests.make(
        SelectRequest, ParallelConfig(), load=str(found), data_path=(str(folder / "alone0"),),
        valid_data_path=(str(folder / "pool2"),), sketch_size=64,
        run_dir=str(folder / f"selected-{training}"), curvature="fisher", num_eigenpairs=3,
        lanczos_tol=1e-2, num_select=5, pilot_iters=2))
    return loss


@needs_checkout
def test_select_reads_a_checkpoint_with_the_arguments_it_carries(folder, run):
    training, _, losses = run
    if training.script != "pretrain_gpt":
        pytest.skip("for a HybridModel see tests/mcore")
    batches = runs.batches(folder, f"masked-{training}")
    loss, = run_on_ranks(1, _loss_and_masks, folder, str(training), batches)
    # What the training printed, in seven digits of fp32 and in the layout it was trained in.
    assert loss == pytest.approx(float(losses[5]), rel=1e-5)
    mask = SampleMask.load(folder / f"selected-{training}" / "selections" / "direct" / "masks"
                           / "alone0.mask.npz")
    assert mask.num_kept == 5


def test_without_a_checkout_the_entry_script_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain_gpt_direct.py")], capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert re.search(r"pretrain_gpt.py and megatron.training are not on the Python path. Put a "
                     r"checkout of Megatron-LM there: PYTHONPATH=", done.stderr)
