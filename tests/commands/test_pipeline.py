"""Pretrain, select and anneal as a user runs them, in one layout and then in others.

One checkpoint is pre-trained on one rank; everything else starts from it, in every layout.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import flat_requests
import numpy as np
import pytest
import torch
from indexed_files import write_dataset
from page_reader import Page
from ranks import Layout, RankError, run_on_ranks
from trained import LEARNT, documents, train

from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import AnnealRequest
from megatron_direct.commands.report import ReportConfig, ReportRequest, report
from megatron_direct.commands.select import NameConfig, SelectRequest, select
from megatron_direct.config import Given
from megatron_direct.data import blend_files
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.store import SketchStore
from megatron_direct.steps import selected
from megatron_direct.steps.domains import Domains
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.sketch import read_sketches

MODEL, OPTIMIZER = LEARNT.model, LEARNT.optimizer
VOCAB_SIZE = MODEL.known_vocab_size
ITERATIONS = 8
OTHERS = [Layout(tp=2, pp=2), Layout(dp=2)]


@pytest.fixture(scope="module")
def folder(learnt_folder) -> Path:
    return learnt_folder


def _pretrain(folder, layout, optimizer, name):
    train(folder, layout, dataclasses.replace(LEARNT, optimizer=optimizer), name)


def _select(folder, layout, name, theta="theta", **settings):
    select(flat_requests.make(SelectRequest, layout.config(), **{
        "load": str(folder / theta), "data_path": (str(folder / "a"), str(folder / "b")),
        "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
        "sketch_size": 256, "micro_batch_size": 4, "curvature": "fisher", "num_eigenpairs": 6,
        "lanczos_tol": 1e-5, "num_select": 40, "pilot_iters": 0, **settings}))


def _select_with(folder, layout, name, settings):
    _select(folder, layout, name, **settings)


def _anneal(folder, layout, name, arm="direct", optimizer=None, **settings):
    anneal(flat_requests.make(
        AnnealRequest, layout.config(), Given(optimizer=optimizer or {}),
        run_dir=str(folder / name), selection=arm, lr_wsd_decay_iters=ITERATIONS,
        test_data_path=(str(folder / "test"),), save_interval=3, **settings))


def arm_folder(run, arm) -> Path:
    return selected.arm_folder(run, arm)


def _selection(run, name="direct") -> dict:
    return json.loads((selected.selection_folder(run, name) / "selection.json").read_text())


def _sketches(run):
    """Those of the pools, as the run's selections see them."""
    prefixes = [str(run.parent / name) for name in "ab"]
    samples = Samples(prefixes, MODEL.seq_length, VOCAB_SIZE)
    return read_sketches(SketchStore(run / "sketches", 256), Drawn(
        "pool", samples, samples.usable, [dataset_digest(prefix) for prefix in prefixes]))


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A selection on one rank."""
    run_on_ranks(1, _select, folder, Layout(), "run")
    return folder / "run"


def _metrics(run, arm="direct"):
    lines = (arm_folder(run, arm) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _kept(run, selection="direct"):
    masks = selected.selection_folder(run, selection) / "masks"
    return np.concatenate([SampleMask.load(masks / f"{name}.mask.npz").keep for name in "ab"])


def _select_twice(folder, layout, name):
    """By both objectives, of which the second takes up what was measured for the first."""
    for selection, objective in (("direct", "descent"), ("flat", "flat-energy")):
        _select(folder, layout, name, selection_name=selection, objective=objective)


@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_the_layout_changes_neither_sketches_nor_selection(folder, layout):
    first, other = "two-objectives-1", f"two-objectives-{layout}"
    if not (folder / first).exists():
        run_on_ranks(1, _select_twice, folder, Layout(), first)
    run_on_ranks(layout.world_size, _select_twice, folder, layout, other)
    one, many = _sketches(folder / first), _sketches(folder / other)
    np.testing.assert_array_equal(one.samples, many.samples)
    errors = np.linalg.norm(one.rows - many.rows, axis=1) / np.linalg.norm(one.rows, axis=1)
    assert errors.max() < 1e-4
    for selection in ("direct", "flat"):
        kept, kept_there = (_kept(folder / name, selection) for name in (first, other))
        assert kept.sum() == kept_there.sum() == 40
        # The pools share some documents: of such copies both layouts take those of lower numbers.
        np.testing.assert_array_equal(kept, kept_there)
        values = [_selection(folder / name, selection)["objective_value"]
                  for name in (first, other)]
        # In contrast the target is a difference, of a tenth of what it is a difference of.
        assert values[0] == pytest.approx(values[1], rel=2e-3 if selection == "direct" else 1e-4)
    spectra = [json.loads((folder / name / "curvature" / "spectrum.json").read_text())
               for name in (first, other)]
    np.testing.assert_allclose(*(s["eigenvalues"] for s in spectra), rtol=1e-4)


@pytest.mark.parametrize("layout", [
    pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.slow), Layout(dp=2)], ids=str)
def test_a_pilot_depends_on_the_layout_by_rounding_alone(folder, layout, run):
    settings = {"pilot_iters": 6}
    if not (folder / "pilot-1").exists():
        run_on_ranks(1, _select_with, folder, Layout(), "pilot-1", settings)
    run_on_ranks(layout.world_size, _select_with, folder, layout, f"pilot-{layout}", settings)
    here, there, onset = (_sketches(path).rows for path in (
        folder / "pilot-1", folder / f"pilot-{layout}", run))
    # Training multiplies rounding, as it does in the annealing itself, whose losses are held to the
    # same bound; what the pilot does to the sketches is far more.
    assert np.linalg.norm(here - there) < 1e-3 * np.linalg.norm(here)
    assert np.linalg.norm(here - onset) > 1e-2 * np.linalg.norm(here)
    kept, kept_there = (_kept(path) for path in (folder / "pilot-1", folder / f"pilot-{layout}"))
    assert (kept & kept_there).sum() >= 39
    # The annealing begins at the checkpoint, not at the pilot.
    origin, _ = selected.find_selection(folder / "pilot-1", "direct")
    assert origin.load == str(folder / "theta" / "iter_0000012")


def _anneal_with_masks_of(folder, layout, run, name, optimizer_flags):
    if torch.distributed.get_rank() == 0:
        shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("anneal"))
    torch.distributed.barrier()
    _anneal(folder, layout, name, optimizer=optimizer_flags)


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
    (Layout(), False),
    *(pytest.param(layout, True, marks=pytest.mark.slow)
      for layout in (Layout(tp=2), Layout(dp=2), Layout(tp=2, pp=2)))], ids=str)
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
    _unfinish(arm_folder(run, "direct"))
    with open(arm_folder(run, "direct") / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 9, "lo')  # cut short by the kill
    run_on_ranks(layout.world_size, _anneal, folder, layout, name)
    assert (arm_folder(run, "direct") / "metrics.jsonl").read_text() == unbroken


def _unfinish(artefact: Path) -> None:
    """As if the run had been killed before the artefact was finished."""
    manifest = json.loads((artefact / "manifest.json").read_text())
    (artefact / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))


def _select_and_anneal(folder, layout, name, theta):
    _select(folder, layout, name, theta, curvature="sketched-fisher")
    _anneal(folder, layout, name)


def test_the_optimizer_state_is_carried_into_the_annealing(folder, run, annealed):
    run_on_ranks(1, _anneal_afresh, folder, run, "afresh")
    afresh, carried = _metrics(folder / "afresh"), _metrics(annealed)
    assert afresh[0]["loss"] == carried[0]["loss"]  # of the same weights and batch
    # A single update may end with nearly the same loss by chance: 40 times this after two.
    assert abs(afresh[2]["loss"] - carried[2]["loss"]) > 1e-3


def _anneal_afresh(folder, run, name):
    shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("anneal"))
    _anneal(folder, Layout(), name, load_optim=False)


@pytest.fixture(scope="module")
def both_arms(folder, annealed):
    run_on_ranks(1, _anneal, folder, Layout(), "annealed", "random")
    return annealed


def test_arms_differ_in_their_masks_alone(both_arms):
    annealed = both_arms
    results = [json.loads((arm_folder(annealed, arm) / "result.json").read_text())
               for arm in ("direct", "random")]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["before"] == results[1]["before"]
    kept = [sum(part["documents"] for part in result["blend"]) for result in results]
    assert kept == [40, 40]
    assert [m["lr"] for m in _metrics(annealed)] == [m["lr"] for m in _metrics(annealed, "random")]
    assert _metrics(annealed) != _metrics(annealed, "random")


def test_the_report_shows_both_arms(both_arms, capsys):
    annealed = both_arms
    report(ReportRequest(ReportConfig(run_dir=str(annealed))))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    page = Page((annealed / "report.html").read_text())
    assert page.headings[:3] == ["Test loss", "Validation loss", "Annealing"]
    assert page.tags.count("img") == 2 and page.external == []
    for arm in ("direct", "random"):
        result = json.loads((arm_folder(annealed, arm) / "result.json").read_text())
        row = [arm, *(f"{result['after']['test'][name]:.4f}" for name in ("test", "all"))]
        assert row in page.tables[0] and row in printed
    assert any(["objective", "descent"] in table for table in page.tables)


def test_a_finished_selection_is_not_made_again(folder, run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    run_on_ranks(1, _select, folder, Layout(), "run")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


# --- what is taken up, whatever else changed ------------------------------------------------------


def _select_without_a_model(folder, layout, name, settings):
    """select, in which nothing may build a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("megatron_direct.mcore.model.build")
        _select(folder, layout, name, **settings)


@pytest.mark.parametrize("settings", [
    {"num_select": "auto", "anneal_tokens": 900}, {"quotas": ("a:20:20",)},
    {"objective": "flat-energy", "stiff_budget_fraction": 0.5},
    {"num_eigenpairs": 3}, {"micro_batch_size": 3, "sketch_rows": "gathered"},
    *(pytest.param(settings, marks=pytest.mark.slow) for settings in (
        {"num_select": 30}, {"objective": "flat-energy"}, {"energy_share": 0.5}))], ids=str)
def test_another_problem_in_the_same_run_only_solves(folder, run, settings):
    """And gives what a run of its own would have given."""
    name, alone = "again-" + str(settings), "alone-" + str(settings)
    shutil.copytree(run, folder / name, ignore=shutil.ignore_patterns("anneal"))
    measured = {p: p.read_bytes() for part in ("sketches", "curvature")
                for p in (folder / name / part).rglob("*") if p.is_file()}
    run_on_ranks(1, _select_without_a_model, folder, Layout(), name,
                 {**settings, "selection_name": "other"})
    assert {p: p.read_bytes() for p in measured} == measured
    run_on_ranks(1, _select_with, folder, Layout(), alone, settings)
    other, expected = _selection(folder / name, "other"), _selection(folder / alone)
    assert other["mask_digests"] == expected["mask_digests"]
    assert other["how_many"] == expected["how_many"]
    if "anneal_tokens" in settings:
        assert other["how_many"]["annealing_tokens"] == 900
        assert other["how_many"]["num_select"] == other["num_select"]
    else:
        assert other["how_many"] is None
    assert _selection(folder / name)["num_select"] == 40  # the first one stays as it was


def test_a_selection_gives_way_to_another_of_its_name_until_it_is_annealed(folder, run, annealed):
    shutil.copytree(run, folder / "replaced", ignore=shutil.ignore_patterns("anneal"))
    run_on_ranks(1, _select_with, folder, Layout(), "replaced", {"num_select": 20})
    assert _selection(folder / "replaced")["num_select"] == 20 == _kept(folder / "replaced").sum()
    shutil.copytree(annealed, folder / "used")
    shutil.copytree(run, folder / "drawn", ignore=shutil.ignore_patterns("anneal"))
    arm_folder(folder / "drawn", "random").mkdir(parents=True)  # of as many samples
    for name in ("used", "drawn"):
        with pytest.raises(RankError, match="was annealed, or as many samples at random were. Give "
                                            "this selection another name with --selection-name"):
            run_on_ranks(1, _select_with, folder, Layout(), name, {"num_select": 20})
        assert _selection(folder / name)["num_select"] == 40
    kept = _kept(folder / "used")
    shutil.rmtree(folder / "used" / "selections" / "direct")
    run_on_ranks(1, _select, folder, Layout(), "used")  # again, as docs/run-directory.md says
    np.testing.assert_array_equal(_kept(folder / "used"), kept)


@pytest.fixture(scope="module")
def elsewhere(folder) -> dict:
    """Flags of the same checkpoint, pools and validation set at other paths."""
    (folder / "elsewhere").mkdir()
    for name in ("a", "b", "valid"):
        for path in folder.glob(f"{name}.*"):
            shutil.copy(path, folder / "elsewhere")
    shutil.copytree(folder / "theta", folder / "elsewhere" / "theta")
    paths = {name: str(folder / "elsewhere" / name) for name in ("a", "b", "valid", "theta")}
    return {"data_path": (paths["a"], paths["b"]), "valid_data_path": (paths["valid"],),
            "theta": paths["theta"]}


def test_where_the_files_have_moved_selecting_again_gives_the_new_paths(folder, annealed,
                                                                        elsewhere):
    """Also where the selection was annealed: it is the same one, and so is its arm. Datasets are
    known by what they hold: neither sketches nor curvature are computed again."""
    shutil.copytree(annealed, folder / "moved")
    before = _selection(folder / "moved")
    run_on_ranks(1, _select_without_a_model, folder, Layout(), "moved", elsewhere)
    assert _selection(folder / "moved")["mask_digests"] == before["mask_digests"]
    origin, _ = selected.find_selection(folder / "moved", "direct")
    assert (str(Path(origin.load).parent), origin.data_path, origin.valid_data_path) == (
        elsewhere["theta"], elsewhere["data_path"], elsewhere["valid_data_path"])
    blend = selected.selection_folder(folder / "moved", "direct") / "blend"
    assert tuple(blend_files.read_data_args(blend / "domains.txt").prefixes) == \
        elsewhere["data_path"]
    links = [path for path in (blend / "clusters").iterdir() if path.is_symlink()]
    assert links and {path.readlink().parent for path in links} == {folder / "elsewhere"}
    trained = _metrics(folder / "moved")
    run_on_ranks(1, _anneal, folder, Layout(), "moved")
    assert _metrics(folder / "moved") == trained


def test_of_an_annealed_selection_nothing_is_written_over_that_would_be_another(
        folder, annealed, elsewhere):
    shutil.copytree(annealed, folder / "moved-other")
    path = selected.selection_folder(folder / "moved-other", "direct") / "selection.json"
    found = json.loads(path.read_text())
    found["mask_digests"]["a"] = "of another version"
    path.write_text(json.dumps(found))
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    with pytest.raises(RankError, match="would hold other samples .* --selection-name"):
        run_on_ranks(1, _select_without_a_model, folder, Layout(), "moved-other", elsewhere)
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before


def _select_with_texts(folder, layout, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_direct.commands.select.tokenizer_of", lambda *_: SimpleNamespace(
            decode=lambda tokens: f"{len(tokens)} words"))
        _select(folder, layout, name, tokenizer_model="a tokenizer")


def test_typical_samples_get_texts_once_there_is_a_tokenizer(folder, run):
    shutil.copytree(run, folder / "texts", ignore=shutil.ignore_patterns("anneal"))
    run_on_ranks(1, _select_with_texts, folder, Layout(), "texts")
    run_on_ranks(1, _select, folder, Layout(), "texts")  # as it is, it will do
    found = Domains.read(selected.selection_folder(folder / "texts", "direct"))
    assert all(text.endswith(" words") for group in found.clusters for text in group.typical)


def test_more_pools_sketch_only_what_is_new(folder):
    paths = {"data_path": (str(folder / "a"),)}
    run_on_ranks(1, _select_with, folder, Layout(), "grows", paths)
    rows = folder / "grows" / "sketches" / "rows-0.f32"
    before = rows.read_bytes()
    run_on_ranks(1, _select_with, folder, Layout(), "grows", {})
    assert rows.read_bytes()[: len(before)] == before
    assert rows.stat().st_size == 4 * 256 * (90 + 60 + 24)
    run_on_ranks(1, _select_with, folder, Layout(), "whole", {})
    np.testing.assert_array_equal(_kept(folder / "grows"), _kept(folder / "whole"))


def test_a_pilot_is_kept_when_pools_are_added(folder):
    paths = {"data_path": (str(folder / "a"),), "pilot_iters": 2}
    run_on_ranks(1, _select_with, folder, Layout(), "pilot-grows", paths)
    pilot = (folder / "pilot-grows" / "pilot" / "manifest.json").read_bytes()
    run_on_ranks(1, _select_with, folder, Layout(), "pilot-grows", {"pilot_iters": 2})
    assert (folder / "pilot-grows" / "pilot" / "manifest.json").read_bytes() == pilot
    assert len(_sketches(folder / "pilot-grows").samples) == 150


# --- what is refused, and that it leaves earlier results as they were -----------------------------


def _refused(match, folder, function, *arguments, world_size=1):
    """Every rank must raise UserError; nothing in the folder may change."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RankError, match=match) as error:
        run_on_ranks(world_size, function, folder, *arguments)
    assert str(error.value).count("UserError: ") == world_size
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a\\b", "random", "random-x"])
def test_names_that_are_no_folder_or_that_of_random_arms_are_refused(name):
    with pytest.raises(UserError, match="--selection-name (.* is not a valid name|is empty)"):
        NameConfig(selection_name=name)
    NameConfig(selection_name="randomised")


def test_sketches_of_another_key_are_refused(folder, run):
    shutil.copytree(run, folder / "other-seed", ignore=shutil.ignore_patterns("anneal"))
    with pytest.raises(RankError, match="sketches holds sketches made with other settings: --seed "
                                        "was 1234, now it is 5. Choose another"):
        run_on_ranks(1, _select_with, folder, Layout(), "other-seed", {"seed": 5})


def test_a_directory_of_the_version_before_is_refused(folder):
    (folder / "old").mkdir()
    (folder / "old" / "run.json").write_text(json.dumps(
        {"stages": {"select": {"versions": {"megatron-direct": "0.1.0"}}}}))
    _refused("was made by megatron-direct 0.1.0, whose run directories this version .* Use 0.1.0",
             folder, _select_with, Layout(), "old", {})


def test_one_dataset_under_two_paths_is_refused(folder):
    for suffix in ("idx", "bin"):
        shutil.copy(folder / f"a.{suffix}", folder / f"copy.{suffix}")
    _refused("copy holds the same documents as .*a. List one of them", folder, _select_with,
             Layout(), "twice", {"data_path": (str(folder / "a"), str(folder / "copy"))})


def test_more_samples_than_the_pool_has_are_refused(folder):
    _refused(r"--num-select 151 must be between 1 and the pool's 150 samples",
             folder, _select_with, Layout(dp=2), "new", {"num_select": 151}, world_size=2)


def test_sources_of_another_validation_set_are_refused_before_any_gradient(folder):
    sources = folder / "valid.sources.npy"
    np.save(sources, np.arange(3))
    try:
        _refused("has the sources of 3 documents, and .*valid has", folder, _select_with,
                 Layout(dp=2), "new", {}, world_size=2)
    finally:
        sources.unlink()


def test_a_validation_set_too_small_for_auto_is_refused_before_any_gradient(folder):
    _refused("7 samples are too few for that, it takes 8", folder, _select_with, Layout(), "new",
             {"num_select": "auto", "num_valid_samples": 7})


def test_a_missing_checkpoint_is_named(folder):
    _refused("nowhere holds no Megatron distributed checkpoint", folder, _select_with, Layout(),
             "new", {"load": "nowhere"})


def test_a_pool_that_is_also_the_validation_set_is_refused(folder):
    _refused("listed as a pool and as a validation", folder, _select_with, Layout(), "new",
             {"valid_data_path": (str(folder / "a"),)})


def _select_wider(folder):
    select(flat_requests.make(
        SelectRequest, Layout().config(), Given(model={"hidden_size": 64}),
        load=str(folder / "theta"), data_path=(str(folder / "a"),),
        valid_data_path=(str(folder / "valid"),), run_dir=str(folder / "new")))


def test_a_checkpoint_of_another_shape_is_refused(folder):
    _refused(r"--hidden-size 64 was given, but .*theta.* was made with 32", folder, _select_wider)


def test_a_layout_that_does_not_fit_is_refused(folder):
    _refused("does not divide the model's --num-query-groups", folder, _select_with, Layout(tp=4),
             "new", {}, world_size=4)


def test_a_budget_that_no_selection_meets_names_the_smallest(folder):
    with pytest.raises(RankError, match=r"Give --stiff-budget of at least \d"):
        run_on_ranks(1, _select_with, folder, Layout(), "too-tight", {"stiff_budget": 1e-9})
    there = selected.selection_folder(folder / "too-tight", "direct")
    assert not there.exists()
    run_on_ranks(1, _select, folder, Layout(), "too-tight")  # the corrected command carries on
    assert _kept(folder / "too-tight").sum() == 40


def test_anneal_without_a_selection_is_refused(folder):
    _refused("never holds no run", folder, _anneal, Layout(), "never")


def _annealed_name(folder, name):
    _anneal(folder, Layout(), "annealed", name)


def test_an_arm_that_is_no_selection_is_refused(folder, annealed):
    _refused("holds no finished selection named drect .it holds direct.", folder, _annealed_name,
             "drect")


def test_exchanged_masks_are_refused(folder, run):
    shutil.copytree(run, folder / "exchanged", ignore=shutil.ignore_patterns("anneal"))
    masks = selected.selection_folder(folder / "exchanged", "direct") / "masks"
    mask = SampleMask.load(masks / "a.mask.npz")
    SampleMask(~mask.keep, mask.dataset_digest).save(masks / "a.mask.npz")
    with pytest.raises(RankError, match="a.mask.npz was changed or replaced after the selection"):
        run_on_ranks(1, _anneal, folder, Layout(), "exchanged")


def test_a_test_set_that_was_remade_between_two_arms_is_refused(folder, annealed):
    shutil.copytree(annealed, folder / "remade", ignore=shutil.ignore_patterns("random"))
    _unfinish(arm_folder(folder / "remade", "direct"))
    write_dataset(folder / "test", documents(77, 12))
    try:
        with pytest.raises(RankError, match="made with other settings: other test"):
            run_on_ranks(1, _anneal, folder, Layout(), "remade")
        with pytest.raises(RankError, match="the test set test has changed since the arm direct"):
            run_on_ranks(1, _anneal, folder, Layout(), "remade", "random")
        assert not arm_folder(folder / "remade", "random").exists()
    finally:
        write_dataset(folder / "test", documents(3, 12))


def test_a_pool_that_changed_since_is_refused(folder, run):
    shutil.copytree(run, folder / "changed", ignore=shutil.ignore_patterns("anneal"))
    write_dataset(folder / "a", documents(99, 90))
    try:
        _refused("a has changed since the selection was made", folder, _anneal, Layout(),
                 "changed")
    finally:
        write_dataset(folder / "a", documents(0, 90))


# --- the selection problem's settings ---------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"objective": "flat-energy"},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"objective": "alignment", "flat_subspace": "bulk", "energy_share": 0.3},
                 marks=pytest.mark.slow)], ids=str)
def test_rows_spread_over_the_ranks_give_the_gathered_selection(folder, settings):
    """The rows were written by two data-parallel ranks; four solve, each with a quarter of them."""
    run = folder / f"spread-{settings}"
    for where in ("gathered", "spread"):
        run_on_ranks(4, _select_with, folder, Layout(tp=2, dp=2), run.name,
                     {**settings, "sketch_rows": where, "selection_name": where})
    np.testing.assert_array_equal(_kept(run, "gathered"), _kept(run, "spread"))
    summaries = [_selection(run, where) for where in ("gathered", "spread")]
    assert summaries[0]["mask_digests"] == summaries[1]["mask_digests"]
    assert summaries[0]["stiff_cost"] == pytest.approx(summaries[1]["stiff_cost"], rel=1e-9)


def test_each_rank_reads_an_equal_share_of_the_rows(folder, run):
    """However few files they were written into: here one."""
    prefixes = [str(folder / name) for name in "ab"]
    samples = Samples(prefixes, MODEL.seq_length, VOCAB_SIZE)
    store = SketchStore(run / "sketches", 256)
    drawn = Drawn("pool", samples, samples.usable, [dataset_digest(p) for p in prefixes])
    shares = [read_sketches(store, drawn, share, 4) for share in range(4)]
    assert {len(share.samples) for share in shares} == {37, 38}
    whole = read_sketches(store, drawn)
    np.testing.assert_array_equal(np.concatenate([s.samples for s in shares]), whole.samples)
    np.testing.assert_array_equal(np.concatenate([s.rows for s in shares]), whole.rows)


def test_quotas_are_kept(folder):
    run_on_ranks(1, _select_with, folder, Layout(), "quotas", {"quotas": ("a:25:25", "b::20")})
    composition = _selection(folder / "quotas")["composition"]
    assert (composition["a"]["selected"], composition["b"]["selected"]) == (25, 15)


@pytest.mark.parametrize(("quotas", "match"), [
    (("c:1:2",), "no pool has the name c. The pools are a, b"),
    pytest.param(("a:few:2",), "--quotas a:few:2 is not NAME:LEAST:GREATEST",
                 marks=pytest.mark.slow),
    pytest.param(("b:61:",), "--quotas: .*61", marks=pytest.mark.slow),
])
def test_quotas_that_cannot_be_met_are_refused(folder, quotas, match):
    with pytest.raises(RankError, match=match):
        run_on_ranks(1, _select_with, folder, Layout(), f"no-{quotas[0]}", {"quotas": quotas})
