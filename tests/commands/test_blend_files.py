"""The blend files of a selection: what they say, and that trainings take them."""

from __future__ import annotations

import json
import os
import shutil

import flat_requests
import numpy as np
import pytest
from page_reader import Page
from ranks import Layout, RankError, run_on_ranks

from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import AnnealRequest
from megatron_direct.commands.report import ReportConfig, ReportRequest, report
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.data import blend_files, indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.mask_files import find_mask_files
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.steps import selected
from megatron_direct.steps.domains import Domains


def _select(folder, layout, name, settings):
    select(flat_requests.make(SelectRequest, layout.config(), **{
        "load": str(folder / "theta"), "data_path": (str(folder / "a"), str(folder / "b")),
        "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
        "sketch_size": 64, "num_eigenpairs": 6, "num_select": 40, "pilot_iters": 0,
        "shrinkage_clusters": 5, **settings}))


def _anneal(folder, name, settings):
    anneal(flat_requests.make(
        AnnealRequest, Layout().config(), run_dir=str(folder / name), lr_wsd_decay_iters=4,
        max_epochs=100.0, **settings))


@pytest.fixture(scope="module")
def run(learnt_folder):
    run_on_ranks(1, _select, learnt_folder, Layout(), "run", {})
    return selected.selection_folder(learnt_folder / "run", "direct")


def _lengths(prefix):
    return indexed.document_lengths(indexed.open_indexed(prefix)).astype(int)


def test_weights_are_shares_of_the_selected_tokens(run, learnt_folder):
    found = Domains.read(run)
    prefixes = [str(learnt_folder / name) for name in "ab"]
    masks = [SampleMask.load(run / "masks" / f"{name}.mask.npz") for name in "ab"]
    tokens = np.array([_lengths(prefix) @ mask.counts
                       for prefix, mask in zip(prefixes, masks, strict=True)])
    assert [group.prefix for group in found.domains] == prefixes
    np.testing.assert_allclose([group.weight for group in found.domains], tokens / tokens.sum())
    assert sum(group.selected for group in found.domains) == 40
    for text, blend in (("domains.txt", blend_files.read_data_args(run / "blend" / "domains.txt")),
                        ("domains.json", blend_files.read_per_split_data_args(
                            run / "blend" / "domains.json")["train"])):
        assert list(blend.prefixes) == prefixes, text
        np.testing.assert_allclose(blend.weights, tokens / tokens.sum(), rtol=1e-5)
    splits = json.loads((run / "blend" / "domains.json").read_text())
    assert splits["valid"] == [str(learnt_folder / "valid")] and splits["test"] is None


def test_what_nothing_is_selected_of_is_no_hindrance(learnt_folder):
    """One sample: of one pool and one cluster, whose blend files name no other, while masks/ has
    all pools. Several validation sets have weights, without which Megatron would make one epoch."""
    valid = tuple(str(learnt_folder / name) for name in ("valid", "test"))
    run_on_ranks(1, _select, learnt_folder, Layout(), "few",
                 {"num_select": 1, "valid_data_path": valid})
    few = selected.selection_folder(learnt_folder / "few", "direct")
    for name, folder in (("domains", few / "masks"), ("clusters", few / "blend" / "clusters")):
        prefix, = blend_files.read_data_args(few / "blend" / f"{name}.txt").prefixes
        assert list(find_mask_files([prefix], folder=str(folder))) == [prefix]
    splits = blend_files.read_per_split_data_args(few / "blend" / "domains.json")
    assert tuple(splits["valid"].prefixes) == valid
    assert splits["valid"].weights == [_lengths(prefix).sum() for prefix in valid]


def test_a_selection_gives_way_whole_and_to_one_that_is_found(run, learnt_folder):
    """One that cannot be solved leaves the earlier one; one without clusters leaves none of its."""
    shutil.copytree(run.parents[1], learnt_folder / "replaced")
    there = selected.selection_folder(learnt_folder / "replaced", "direct")
    before = {path.relative_to(there): path.stat().st_mtime_ns for path in there.rglob("*")}
    assert any("clusters" in str(path) for path in before)
    with pytest.raises(RankError, match="no 40 samples fit a stiff budget of 0"):
        run_on_ranks(1, _select, learnt_folder, Layout(), "replaced", {"stiff_budget": 0.0})
    assert {path.relative_to(there): path.stat().st_mtime_ns for path in there.rglob("*")} == before
    assert Artefact(there, "a selection").is_finished()
    run_on_ranks(1, _select, learnt_folder, Layout(), "replaced", {"shrinkage_clusters": 0})
    names = {path.name for path in (there / "blend").rglob("*")}
    assert names == {"worth.json", "domains.txt", "domains.json"}


def test_clusters_part_the_pools_without_a_copy(run, learnt_folder):
    found = Domains.read(run)
    assert 4 <= len(found.clusters) <= 6
    assert sum(group.weight for group in found.clusters) == pytest.approx(1)
    covered = {name: 0 for name in "ab"}
    for group in found.clusters:
        name = os.path.basename(group.prefix)[0]
        assert os.path.realpath(group.prefix + ".bin") == f"{learnt_folder / name}.bin"
        mask = SampleMask.load(group.prefix + ".mask.npz")
        mask.require_belongs_to(group.prefix)
        kept = SampleMask.load(run / "masks" / f"{name}.mask.npz")
        assert mask.num_kept == group.samples
        assert (mask & kept).num_kept == group.selected
        covered[name] = covered[name] + mask.keep.astype(int)
        assert len(group.typical) == min(3, group.samples)
        assert group.worth[1] <= group.worth[0] <= group.worth[2]
    for name, times in covered.items():  # each usable sample is in one cluster
        np.testing.assert_array_equal(times, _lengths(str(learnt_folder / name)) >= 2)
    # Megatron-LM finds the masks by --sample-masks.
    prefixes = [group.prefix for group in found.clusters]
    assert len(find_mask_files(prefixes, folder=str(run / "blend" / "clusters"))) == len(prefixes)


def test_a_team_that_takes_only_the_weights_trains_on_what_they_say(run, learnt_folder):
    blend = run / "blend"
    run_on_ranks(1, _anneal, learnt_folder, "run", {"data_args_path": str(blend / "clusters.txt")})
    found = Domains.read(run)
    result = json.loads((selected.arm_folder(learnt_folder / "run", "direct") / "result.json"
                         ).read_text())
    weights = {group.prefix: group.weight for group in found.clusters if group.weight}
    assert {part["prefix"] for part in result["blend"]} == set(weights)
    for part in result["blend"]:
        mask = SampleMask.load(part["prefix"] + ".mask.npz")
        assert part["masked"] and part["documents"] == mask.num_kept
        assert part["tokens"] == _lengths(part["prefix"]) @ mask.counts
        assert part["weight"] == pytest.approx(weights[part["prefix"]], rel=1e-5)


def test_a_pool_has_its_mask_however_its_path_is_spelt(run, learnt_folder):
    """And what is annealed on is one arm, for the digests that tell them apart are of files."""
    os.symlink(learnt_folder, learnt_folder / "link")
    shutil.copytree(run.parents[1], learnt_folder / "spelt",
                    ignore=shutil.ignore_patterns("anneal"))
    spelt = f"0.5 {learnt_folder}/./a 0.5 {learnt_folder}/link/b".split()
    run_on_ranks(1, _anneal, learnt_folder, "spelt", {"data_path": tuple(spelt)})
    written = selected.arm_folder(learnt_folder / "spelt", "direct") / "result.json"
    result = json.loads(written.read_text())
    assert [part["masked"] for part in result["blend"]] == [True, True]
    assert sum(part["documents"] for part in result["blend"]) == 40
    plain = tuple(str(learnt_folder / name) for name in "ab")
    before = written.stat().st_mtime_ns
    run_on_ranks(1, _anneal, learnt_folder, "spelt",
                 {"data_path": ("0.5", plain[0], "0.5", plain[1])})
    assert written.stat().st_mtime_ns == before


def test_the_report_shows_domains_and_clusters(run, learnt_folder, capsys):
    report(ReportRequest(ReportConfig(run_dir=str(learnt_folder / "run"))))
    page = Page((learnt_folder / "run" / "report.html").read_text())
    table, = (table for table in page.tables if table[0][0] == "domain or cluster")
    found = Domains.read(run)
    rows = {row[0]: row for row in table[1:]}
    assert set(rows) == {group.name for group in (*found.domains, *found.clusters)}
    for group in (*found.domains, *found.clusters):
        assert rows[group.name][4] == f"{group.worth[0]:+.4f}"


@pytest.mark.slow
def test_ranks_and_spread_rows_change_nothing(run, learnt_folder):
    run_on_ranks(4, _select, learnt_folder, Layout(tp=2, pp=2), "spread",
                 {"sketch_rows": "spread"})
    here, there = (Domains.read(folder) for folder in (
        run, selected.selection_folder(learnt_folder / "spread", "direct")))
    for one, other in zip((*here.domains, *here.clusters), (*there.domains, *there.clusters),
                          strict=True):
        assert (one.name, one.samples, one.selected) == (other.name, other.samples, other.selected)
        assert one.worth == pytest.approx(other.worth, abs=1e-4)


def test_a_test_set_that_is_called_as_all_of_them_together_is_refused(run, learnt_folder):
    with pytest.raises(RankError, match="has the name all, by which losses over all test sets"):
        run_on_ranks(1, _anneal, learnt_folder, "run",
                     {"test_data_path": (str(learnt_folder / "all"),)})
