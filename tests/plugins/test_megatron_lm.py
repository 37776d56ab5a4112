"""Masks in Megatron-LM's own training loop: its pretrain_gpt.py, unchanged, from a checkout.

``MEGATRON_LM_PATH=/path/to/Megatron-LM pytest tests/plugins`` runs what needs the checkout, of the
version of the installed megatron-core (core_v0.16.1). Documents outside the masks are overwritten
with a token that occurs nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flat_requests
import numpy as np
import psutil
import pytest
from indexed_files import random_documents, write_dataset
from ranks import Layout, run_on_ranks

from megatron_direct import SampleMask
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.materialize import materialize

ROOT = Path(__file__).parents[2]
ON_CPU = Path(__file__).with_name("megatron_lm_on_cpu.py")
needs_checkout = pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ,
    reason="MEGATRON_LM_PATH is not set: needs a checkout of Megatron-LM, core_v0.16.1")

VOCAB, POISON = 60, 60
GPT2 = ("--position-embedding-type learned_absolute --normalization LayerNorm "
        "--no-bias-gelu-fusion").split()
LLAMA = ("--position-embedding-type rope --normalization RMSNorm --swiglu --ffn-hidden-size 32 "
         "--disable-bias-linear --group-query-attention --num-query-groups 2 "
         "--untie-embeddings-and-output-weights --no-bias-swiglu-fusion --no-rope-fusion").split()
SAMPLES = 32  # of 8 iterations
COMMON = """
    --num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4
    --lr 1e-2 --lr-decay-style constant --log-interval 1 --eval-interval 1000 --seed 5
    --hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size 61
    --distributed-backend gloo --transformer-impl local --use-cpu-initialization --num-workers 0
    --no-masked-softmax-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --attention-backend unfused""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """pool0 and pool1 with masks, that of pool1 with counts, and as datasets of what is kept
    (alone0, alone1); pool2 without.

    pool2 holds no poison.
    """
    folder, rng = tmp_path_factory.mktemp("megatron_lm"), np.random.default_rng(7)
    for number, count in enumerate((60, 50, 40)):
        documents = random_documents(count, VOCAB, seed=number)
        if number == 2:
            write_dataset(folder / "pool2", documents)
            continue
        keep = rng.random(count) < 0.5
        documents = [document if kept else [[POISON] * len(sequence) for sequence in document]
                     for document, kept in zip(documents, keep, strict=True)]
        prefix = write_dataset(folder / f"pool{number}", documents)
        # One of the masks has counts: some documents come twice per epoch.
        counts = keep * (1 + np.arange(count) % 2) if number == 1 else keep
        mask = SampleMask(counts, dataset_digest(prefix))
        mask.save(folder / "masks" / f"pool{number}.mask.npz")
        materialize(prefix, mask, str(folder / f"alone{number}"))
    return folder


def _command(layout: Layout, script: str, flags) -> list[str]:
    ranks = [] if script.startswith("tools") else [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.world_size)]
    return [sys.executable, *ranks, str(ON_CPU), str(ROOT / script), *COMMON,
            "--tensor-model-parallel-size", str(layout.tp),
            "--pipeline-model-parallel-size", str(layout.pp), *map(str, flags)]


def _run(folder: Path, layout: Layout, *flags, script="launch/pretrain_gpt_direct.py",
         record: str | None = None, kill_at: int | None = None, fails: bool = False,
         ) -> tuple[dict[int, str], str]:
    """({iteration: loss as printed}, all output). kill_at: the iteration after which all die."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if script.startswith("tools"):
        environment["WORLD_SIZE"] = str(layout.world_size)  # of the training that it is for
    if record is not None:
        (folder / record).mkdir()
        environment["RECORD_BATCHES"] = str(folder / record)
    lines = []
    with subprocess.Popen(_command(layout, script, flags), cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line)
            if kill_at is not None and re.search(rf" iteration +{kill_at}/", line):
                family = [*psutil.Process(process.pid).children(recursive=True), process]
                for member in family:
                    member.kill()
    output = "".join(lines)
    assert (process.returncode != 0) == (fails or kill_at is not None), output[-5000:]
    losses = re.findall(r" iteration +(\d+)/.* lm loss: (\S+)", output)
    return {int(iteration): loss for iteration, loss in losses}, output


def _batches(folder: Path, record: str) -> dict[str, np.ndarray]:
    """Rank 0's (which sees tokens) and the last rank's (which sees labels)."""
    ranks = sorted((folder / record).glob("rank*.npz"))
    return {"tokens": np.load(ranks[0])["tokens"], "labels": np.load(ranks[-1])["labels"]}


def _blends(folder: Path, layout: Layout, pools: list[str]) -> list:
    """The same blend in two of the ways in which Megatron-LM takes it."""
    weighted = f"1 {pools[0]} 2 {pools[1]} 1 pool2"
    if layout.world_size == 1:
        return ["--data-path", *weighted.split(), "--split", "100,0,0", "--eval-iters", 0]
    path = folder / f"blend-of-{pools[0]}.json"
    path.write_text(json.dumps({"train": weighted, "valid": ["pool2"], "test": None}))
    return ["--per-split-data-args-path", path, "--eval-iters", 1]


@pytest.fixture(scope="module", params=[(Layout(), GPT2), (Layout(tp=2, pp=2), LLAMA)],
                ids=lambda param: str(param[0]))
def run(request, folder):
    """A masked training: (layout, flags, losses)."""
    layout, architecture = request.param
    flags = [*architecture, "--train-samples", SAMPLES, "--data-cache-path", f"cache-{layout}",
             *_blends(folder, layout, ["pool0", "pool1"]), "--sample-masks", "masks"]
    losses, output = _run(folder, layout, *flags, record=f"masked-{layout}")
    assert len(losses) == 8, output[-5000:]
    for shown in (r"> pool0: \d+ documents, \d+ tokens, weight 0.2500, \d\.\d\d epochs",
                  r"> pool2: 40 documents, \d+ tokens \(no mask\), weight 0.2500"):
        assert re.search(shown, output)
    return layout, flags, losses


@needs_checkout
def test_no_masked_token_reaches_a_batch(folder, run):
    layout, _, _ = run
    for tokens in _batches(folder, f"masked-{layout}").values():
        # Two micro-batches an iteration, and one or more of validation in the larger layout.
        assert len(tokens) >= 16 and not (tokens == POISON).any()


@needs_checkout
def test_without_masks_the_same_tokens_do_reach_batches(folder):
    _run(folder, Layout(), *GPT2, "--train-samples", SAMPLES, "--data-cache-path", "cache-plain",
         *_blends(folder, Layout(), ["pool0", "pool1"]), record="plain")
    assert (_batches(folder, "plain")["tokens"] == POISON).any()


@needs_checkout
def test_losses_are_those_of_a_training_on_materialized_datasets(folder, run):
    layout, flags, losses = run
    flags = [f for f in flags if f not in ("--sample-masks", "masks")]
    for i, flag in enumerate(flags):
        flags[i] = {"pool0": "alone0", "pool1": "alone1"}.get(flag, flag)
    if layout.world_size > 1:
        flags += _blends(folder, layout, ["alone0", "alone1"])
    alone, _ = _run(folder, layout, *flags)
    assert alone == losses


@needs_checkout
def test_a_killed_training_resumes_with_the_same_losses(folder, run):
    layout, flags, losses = run
    saving = [*flags, "--save", f"killed-{layout}", "--load", f"killed-{layout}",
              "--save-interval", 4]
    before, _ = _run(folder, layout, *saving, kill_at=5)
    after, _ = _run(folder, layout, *saving)
    assert sorted(after) == [5, 6, 7, 8]
    # Megatron-LM does not begin its running mean anew after the first iteration that it prints, so
    # that the second line of any run is the mean of two iterations.
    mean = (float(losses[5]) + float(losses[6])) / 2
    assert float(after.pop(6)) == pytest.approx(mean, abs=2e-6)  # both are rounded to 1e-6
    assert {**before, 6: losses[6], **after} == losses


def _loss_and_masks(folder, layout, batches, valid):
    """Our model's loss on a batch that Megatron-LM saw; a selection at the same checkpoint."""
    import torch

    from megatron_direct.commands.select import SelectRequest, select
    from megatron_direct.config import Job, ModelConfig, ParallelConfig
    from megatron_direct.mcore import checkpoint, grid, model

    found = checkpoint.latest(folder / f"killed-{layout}").parent / "iter_0000004"
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
        run_dir=str(folder / f"selected-{layout}"), curvature="fisher", num_eigenpairs=3,
        lanczos_tol=1e-2, num_select=5, pilot_iters=2))
    return loss


@needs_checkout
def test_select_reads_a_checkpoint_with_the_arguments_it_carries(folder, run):
    layout, _, losses = run
    batches = _batches(folder, f"masked-{layout}")
    loss, = run_on_ranks(1, _loss_and_masks, folder, layout, batches, "pool2")
    # What the training printed, in seven digits of fp32 and in the layout it was trained in.
    assert loss == pytest.approx(float(losses[5]), rel=1e-5)
    mask = SampleMask.load(folder / f"selected-{layout}" / "selections" / "direct" / "masks"
                           / "alone0.mask.npz")
    assert mask.num_kept == 5


@needs_checkout
def test_a_new_blend_begins_at_its_first_sequence_after_a_phase_transition(folder):
    """And without one, where the old blend stopped: docs/blends.md says so."""
    masked = [*GPT2, *_blends(folder, Layout(), ["pool0", "pool1"]), "--sample-masks", "masks",
              "--data-cache-path", "cache-phases"]
    before = [*GPT2, "--data-path", "pool2", "--split", "100,0,0", "--eval-iters", 0,
              "--data-cache-path", "cache-phases"]
    samples = ["--train-samples", SAMPLES, "--save", "phases", "--save-interval", 100]
    phases = [*samples, "--phase-transition-iterations", 4]
    losses, _ = _run(folder, Layout(), *before, *phases)
    assert sorted(losses) == [1, 2, 3, 4]
    losses, output = _run(folder, Layout(), *masked, *phases, "--load", "phases",
                          record="second-phase")
    assert sorted(losses) == [5, 6, 7, 8]
    _run(folder, Layout(), *masked, "--train-samples", SAMPLES // 2, record="fresh-half")
    np.testing.assert_array_equal(_batches(folder, "second-phase")["tokens"],
                                  _batches(folder, "fresh-half")["tokens"])

    (folder / "phases" / "latest_checkpointed_iteration.txt").write_text("4")
    _run(folder, Layout(), *masked, *samples, "--load", "phases", record="no-transition")
    _run(folder, Layout(), *masked, "--train-samples", SAMPLES, record="fresh-whole")
    np.testing.assert_array_equal(_batches(folder, "no-transition")["tokens"],
                                  _batches(folder, "fresh-whole")["tokens"][8:])


@needs_checkout
def test_a_cache_that_was_built_ahead_is_used_as_it_is(folder, run):
    layout, flags, losses = run
    flags[flags.index("--data-cache-path") + 1] = cache = f"ahead-{layout}"
    _run(folder, layout, *flags, script="tools/build_blend_cache.py")
    built = {p.name: p.stat().st_mtime_ns for p in (folder / cache).iterdir()}
    assert any("BlendedDataset" in name for name in built)
    assert _run(folder, layout, *flags)[0] == losses
    assert {p.name: p.stat().st_mtime_ns for p in (folder / cache).iterdir()} == built


@needs_checkout
@pytest.mark.parametrize(("flags", "match"), [
    (["--data-path", "1", "pool0", "1", "pool1", "--split", "100,0,0",
      "--sample-mask", "pool0", "masks/pool1.mask.npz"],
     "the mask was made for a dataset with digest"),
    (["--mock-data", "--sample-masks", "masks"], "sample masks are for GPT pre-training data"),
], ids=["mask of another dataset", "mock data"])
def test_what_cannot_be_honoured_is_told_once(folder, flags, match):
    _, output = _run(folder, Layout(tp=2), *GPT2, "--train-samples", SAMPLES, "--eval-iters", 0,
                     *flags, fails=True)
    assert output.count("megatron-direct: error:") == 1
    assert re.search(f"megatron-direct: error: {match}", output)


def test_without_a_checkout_the_entry_script_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain_gpt_direct.py")], capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert re.search(r"pretrain_gpt.py and megatron.training are not on the Python path. Put a "
                     r"checkout of Megatron-LM there: PYTHONPATH=", done.stderr)
