"""Pretrain, select and anneal as a user runs them, in one layout and then in others.

One checkpoint is pre-trained on one rank; everything else starts from it, in every layout.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset
from page_reader import Page
from ranks import Layout, RankError, run_on_ranks

from megatron_direct.commands.anneal import AnnealConfig, anneal, arm_folder
from megatron_direct.commands.pretrain import PretrainConfig, pretrain
from megatron_direct.commands.report import ReportConfig, report
from megatron_direct.commands.select import SelectConfig, select
from megatron_direct.config import BatchConfig, ModelConfig, OptimizerConfig
from megatron_direct.data.mask import SampleMask
from megatron_direct.gradients import store
from megatron_direct.steps.curvature import CurvatureConfig
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.solve import SelectionConfig

VOCAB_SIZE = 90
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                    ffn_hidden_size=48, seq_length=16, vocab_size=VOCAB_SIZE,
                    make_vocab_size_divisible_by=32)
OPTIMIZER = OptimizerConfig(lr=5e-3, lr_warmup_iters=4)
BATCH = BatchConfig(micro_batch_size=2, global_batch_size=8)
ITERATIONS = 8
OTHERS = [Layout(tp=2, pp=2), Layout(dp=2)]


def _documents(seed, count):
    """Two kinds of text: runs that count up, which can be learnt, and noise."""
    documents = random_documents(count, VOCAB_SIZE, seed=seed, longest=30)
    for number in range(0, count, 2):
        start, length = number % 50, 4 + number % 20
        documents[number] = [list(range(start, start + length))]
    return documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    for seed, (name, count) in enumerate((("a", 90), ("b", 60), ("valid", 24), ("test", 12))):
        write_dataset(folder / name, _documents(seed, count))
    run_on_ranks(1, _pretrain, folder, Layout(), OPTIMIZER, "theta")
    return folder


def _pretrain(folder, layout, optimizer, name):
    pretrain(PretrainConfig(data_path=(str(folder / "a"), str(folder / "b")),
                            save=str(folder / name), train_iters=12, save_interval=12),
             MODEL, layout.config(), optimizer, BATCH)


def _select(folder, layout, name, theta="theta", **settings):
    kinds = {kind: {k: v for k, v in settings.items() if k in kind.__dataclass_fields__}
             for kind in (SelectConfig, PilotConfig, CurvatureConfig, SelectionConfig)}
    select(SelectConfig(**{
        "load": str(folder / theta), "data_path": (str(folder / "a"), str(folder / "b")),
        "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
        "sketch_size": 256, "micro_batch_size": 4, **kinds[SelectConfig]}),
        {}, layout.config(),
        CurvatureConfig(**{"curvature": "fisher", "num_eigenpairs": 6, "lanczos_tol": 1e-5,
                           **kinds[CurvatureConfig]}),
        SelectionConfig(**{"num_select": 40, **kinds[SelectionConfig]}),
        PilotConfig(**{"pilot_iters": 0, **kinds[PilotConfig]}))


def _select_with(folder, layout, name, settings):
    _select(folder, layout, name, **settings)


def _anneal(folder, layout, name, arm="direct", given=None, **settings):
    anneal(AnnealConfig(run_dir=str(folder / name), selection=arm, lr_wsd_decay_iters=ITERATIONS,
                        test_data_path=(str(folder / "test"),), save_interval=3, **settings),
           given or {}, layout.config())


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A selection on one rank."""
    run_on_ranks(1, _select, folder, Layout(), "run")
    return folder / "run"


def _metrics(run, arm="direct"):
    lines = (arm_folder(run, arm) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _kept(run):
    return np.concatenate([SampleMask.load(run / "masks" / f"{name}.mask.npz").keep
                           for name in "ab"])


@pytest.mark.parametrize("objective", ["flat-energy", "descent"])
@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_the_layout_changes_neither_sketches_nor_selection(folder, layout, objective):
    first, other = f"1-{objective}", f"{layout}-{objective}"
    if not (folder / first).exists():
        run_on_ranks(1, _select_with, folder, Layout(), first, {"objective": objective})
    run_on_ranks(layout.world_size, _select_with, folder, layout, other,
                 {"objective": objective})
    one = store.load(folder / first / "sketches" / "pool")
    many = store.load(folder / other / "sketches" / "pool")
    np.testing.assert_array_equal(one.samples, many.samples)
    errors = np.linalg.norm(one.rows - many.rows, axis=1) / np.linalg.norm(one.rows, axis=1)
    assert errors.max() < 1e-4
    kept, kept_there = _kept(folder / first), _kept(folder / other)
    assert kept.sum() == kept_there.sum() == 40
    # The pools share some documents: of such copies both layouts take the ones of lower numbers.
    np.testing.assert_array_equal(kept, kept_there)
    values = [json.loads((folder / name / "selection.json").read_text())["objective_value"]
              for name in (first, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    spectra = [json.loads((folder / name / "curvature" / "spectrum.json").read_text())
               for name in (first, other)]
    np.testing.assert_allclose(*(s["eigenvalues"] for s in spectra), rtol=1e-4)


@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_a_pilot_depends_on_the_layout_by_rounding_alone(folder, layout, run):
    settings = {"pilot_iters": 6}
    if not (folder / "pilot-1").exists():
        run_on_ranks(1, _select_with, folder, Layout(), "pilot-1", settings)
    run_on_ranks(layout.world_size, _select_with, folder, layout, f"pilot-{layout}", settings)
    here, there, onset = (store.load(path / "sketches" / "pool").rows for path in (
        folder / "pilot-1", folder / f"pilot-{layout}", run))
    # Training multiplies rounding, as it does in the annealing itself, whose losses are held to the
    # same bound; what the pilot does to the sketches is far more.
    assert np.linalg.norm(here - there) < 1e-3 * np.linalg.norm(here)
    assert np.linalg.norm(here - onset) > 1e-2 * np.linalg.norm(here)
    kept, kept_there = (_kept(path) for path in (folder / "pilot-1", folder / f"pilot-{layout}"))
    assert (kept & kept_there).sum() >= 39
    # The annealing begins at the checkpoint, not at the pilot.
    assert json.loads((folder / "pilot-1" / "run.json").read_text())["stages"]["select"][
        "identity"]["load"] == str(folder / "theta")


def _anneal_with_masks_of(folder, layout, run, name, optimizer_flags):
    if torch.distributed.get_rank() == 0:
        shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("anneal"))
    torch.distributed.barrier()
    _anneal(folder, layout, name, given={OptimizerConfig: optimizer_flags})


@pytest.fixture(scope="module")
def annealed(folder, run):
    run_on_ranks(1, _anneal_with_masks_of, folder, Layout(), run, "annealed", {})
    return folder / "annealed"


@pytest.mark.parametrize("layout", [*OTHERS, Layout(pp=2, vp=1), Layout(tp=2, sp=True)], ids=str)
def test_a_checkpoint_of_one_rank_anneals_in_other_layouts(folder, run, annealed, layout):
    name = f"annealed-{layout}"
    run_on_ranks(layout.world_size, _anneal_with_masks_of, folder, layout, run, name, {})
    one, many = _metrics(annealed), _metrics(folder / name)
    np.testing.assert_allclose([m["loss"] for m in many], [m["loss"] for m in one], rtol=1e-3)
    assert [m["lr"] for m in many] == [m["lr"] for m in one]
    results = [json.loads((arm_folder(r, "direct") / "result.json").read_text())
               for r in (annealed, folder / name)]
    for when in ("before", "after"):
        assert results[0][when]["test"]["test"] == \
            pytest.approx(results[1][when]["test"]["test"], rel=1e-3)


def test_the_learning_rate_decays_to_its_minimum_and_the_loss_falls(annealed):
    metrics = _metrics(annealed)
    rates = [m["lr"] for m in metrics]
    steps = np.linspace(OPTIMIZER.lr, 0, ITERATIONS + 1)[:-1]
    np.testing.assert_allclose(rates, steps)
    result = json.loads((arm_folder(annealed, "direct") / "result.json").read_text())
    assert result["after"]["valid"]["valid"] < result["before"]["valid"]["valid"]


@pytest.mark.parametrize(("layout", "distributed"), [
    (Layout(), False), pytest.param(Layout(dp=2), True, marks=pytest.mark.slow),
    (Layout(tp=2, pp=2), True)], ids=str)
def test_a_resumed_annealing_prints_the_losses_of_an_unbroken_one(folder, layout, distributed):
    """Killed after the checkpoint of iteration 6: what was printed since is printed again.

    The distributed optimizer's state is saved on one layout and loaded on another first.
    """
    theta = f"theta-{distributed}"
    if not (folder / theta).exists():
        optimizer = dataclasses.replace(OPTIMIZER, use_distributed_optimizer=distributed)
        saving = Layout(dp=2) if distributed else Layout()
        run_on_ranks(saving.world_size, _pretrain, folder, saving, optimizer, theta)
    name = f"resumed-{layout}-{distributed}"
    run_on_ranks(layout.world_size, _select_and_anneal, folder, layout, name, theta)
    run = folder / name
    unbroken = (arm_folder(run, "direct") / "metrics.jsonl").read_text()
    checkpoints = arm_folder(run, "direct") / "checkpoints"
    shutil.rmtree(checkpoints / f"iter_{ITERATIONS:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("6")
    record = json.loads((run / "run.json").read_text())
    record["stages"]["anneal direct"]["finished"] = False
    (run / "run.json").write_text(json.dumps(record))
    with open(arm_folder(run, "direct") / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 9, "lo')  # cut short by the kill
    run_on_ranks(layout.world_size, _anneal, folder, layout, name)
    assert (arm_folder(run, "direct") / "metrics.jsonl").read_text() == unbroken


def _select_and_anneal(folder, layout, name, theta):
    _select(folder, layout, name, theta)
    _anneal(folder, layout, name)


def test_the_optimizer_state_is_carried_into_the_annealing(folder, run, annealed):
    run_on_ranks(1, _anneal_afresh, folder, run, "afresh")
    assert abs(_metrics(folder / "afresh")[1]["loss"] - _metrics(annealed)[1]["loss"]) > 1e-3


def _anneal_afresh(folder, run, name):
    shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("anneal"))
    _anneal(folder, Layout(), name, load_optim=False)


def test_arms_differ_in_their_masks_alone(folder, annealed):
    run_on_ranks(1, _anneal, folder, Layout(), "annealed", "random")
    results = [json.loads((arm_folder(annealed, arm) / "result.json").read_text())
               for arm in ("direct", "random")]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["before"] == results[1]["before"]
    kept = [sum(part["documents"] for part in result["blend"]) for result in results]
    assert kept == [40, 40]
    assert [m["lr"] for m in _metrics(annealed)] == [m["lr"] for m in _metrics(annealed, "random")]
    assert _metrics(annealed) != _metrics(annealed, "random")


def test_the_report_shows_both_arms(folder, annealed, capsys):
    report(ReportConfig(run_dir=str(annealed)))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    page = Page((annealed / "report.html").read_text())
    assert page.headings[:3] == ["Test loss", "Validation loss", "Annealing"]
    assert page.tags.count("img") == 2 and page.external == []
    for arm in ("direct", "random"):
        result = json.loads((arm_folder(annealed, arm) / "result.json").read_text())
        row = [arm, *(f"{result['after']['test'][name]:.4f}" for name in ("test", "all"))]
        assert row in page.tables[0] and row in printed
    assert ["objective", "descent"] in page.tables[3]


def test_a_finished_stage_is_not_done_again(folder, run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    run_on_ranks(1, _select, folder, Layout(), "run")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


# --- what is refused, and that it leaves earlier results as they were -----------------------------


def _refused(match, folder, function, *arguments, world_size=1):
    """Every rank must raise UserError; nothing in the folder may change."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RankError, match=match) as error:
        run_on_ranks(world_size, function, folder, *arguments)
    assert str(error.value).count("UserError: ") == world_size
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_the_directory_of_another_run_is_refused(folder, run):
    _refused("run belongs to another run: its select had --num-select 40, this one has 41",
             folder, _select_with, Layout(), "run", {"num_select": 41})


def test_more_samples_than_the_pool_has_are_refused(folder):
    _refused(r"--num-select 151 must lie between 1 and the pool's 150 samples",
             folder, _select_with, Layout(dp=2), "new", {"num_select": 151}, world_size=2)


def test_a_missing_checkpoint_is_named(folder):
    _refused("nowhere holds no Megatron distributed checkpoint", folder, _select_with, Layout(),
             "new", {"load": "nowhere"})


def test_a_pool_that_is_also_the_validation_set_is_refused(folder):
    _refused("listed as a pool and as a validation", folder, _select_with, Layout(), "new",
             {"valid_data_path": (str(folder / "a"),)})


def _select_wider(folder):
    select(SelectConfig(load=str(folder / "theta"), data_path=(str(folder / "a"),),
                        valid_data_path=(str(folder / "valid"),), run_dir=str(folder / "new")),
           {"hidden_size": 64}, Layout().config(), CurvatureConfig(), SelectionConfig())


def test_a_checkpoint_of_another_shape_is_refused(folder):
    _refused(r"--hidden-size 64 was given, but .*theta.* was made with 32", folder, _select_wider)


def test_a_layout_that_does_not_fit_is_refused(folder):
    _refused("does not divide the model's --num-query-groups", folder, _select_with, Layout(tp=4),
             "new", {}, world_size=4)


def test_a_budget_that_no_selection_meets_names_the_smallest(folder):
    run_on_ranks(1, _select, folder, Layout(), "tight")
    shutil.rmtree(folder / "tight" / "masks")
    record = json.loads((folder / "tight" / "run.json").read_text())["stages"]["select"]
    assert record["finished"]
    with pytest.raises(RankError, match=r"Give --stiff-budget of at least \d"):
        run_on_ranks(1, _select_with, folder, Layout(), "too-tight", {"stiff_budget": 1e-9})
    assert not (folder / "too-tight" / "masks").exists()
    assert not json.loads((folder / "too-tight" / "run.json").read_text())[
        "stages"]["select"]["finished"]


def test_anneal_without_a_selection_is_refused(folder):
    _refused("never holds no finished select", folder, _anneal, Layout(), "never")


def test_a_pool_that_changed_since_is_refused(folder, run):
    shutil.copytree(run, folder / "changed", ignore=shutil.ignore_patterns("anneal"))
    write_dataset(folder / "a", _documents(99, 90))
    try:
        _refused("a has changed since the selection was made", folder, _anneal, Layout(),
                 "changed")
    finally:
        write_dataset(folder / "a", _documents(0, 90))


# --- the selection problem's settings ---------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"objective": "flat-energy"},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"objective": "alignment", "flat_subspace": "bulk", "energy_share": 0.3},
                 marks=pytest.mark.slow)], ids=str)
def test_rows_spread_over_the_ranks_give_the_gathered_selection(folder, settings):
    """The rows were written by two data-parallel ranks; four solve, two of them without rows."""
    names = [f"{where}-{settings}" for where in ("gathered", "spread")]
    for where, name in zip(("gathered", "spread"), names, strict=True):
        run_on_ranks(4, _select_with, folder, Layout(tp=2, dp=2), name,
                     {**settings, "sketch_rows": where})
    np.testing.assert_array_equal(_kept(folder / names[0]), _kept(folder / names[1]))
    summaries = [json.loads((folder / name / "selection.json").read_text()) for name in names]
    assert summaries[0]["mask_digests"] == summaries[1]["mask_digests"]
    assert summaries[0]["stiff_cost"] == pytest.approx(summaries[1]["stiff_cost"], rel=1e-9)


def test_quotas_are_kept(folder):
    run_on_ranks(1, _select_with, folder, Layout(), "quotas", {"quotas": ("a:25:25", "b::20")})
    composition = json.loads((folder / "quotas" / "selection.json").read_text())["composition"]
    assert (composition["a"]["selected"], composition["b"]["selected"]) == (25, 15)


@pytest.mark.parametrize(("quotas", "match"), [
    (("c:1:2",), "no pool is called c. They are called a, b"),
    pytest.param(("a:few:2",), "--quotas a:few:2 is not NAME:LEAST:GREATEST",
                 marks=pytest.mark.slow),
    pytest.param(("b:61:",), "--quotas: .*61", marks=pytest.mark.slow),
])
def test_quotas_that_cannot_be_met_are_refused(folder, quotas, match):
    with pytest.raises(RankError, match=match):
        run_on_ranks(1, _select_with, folder, Layout(), f"no-{quotas[0]}", {"quotas": quotas})
