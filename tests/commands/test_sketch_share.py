"""``select --sketch-share``: gradients of some samples, and a selection among all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import flat_requests
import numpy as np
import pytest
from ranks import Layout, RankError, run_on_ranks
from trained import LEARNT, train

from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.config import Given
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.data.samples import Samples
from megatron_direct.gradients.store import SketchStore
from megatron_direct.selection.distilled import draw_share
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.sketch import read_sketches

SHARE, SEED, SIZE = 0.5, 5, 64


@pytest.fixture(scope="module")
def folder(learnt_folder) -> Path:
    return learnt_folder


def _select(folder, name, flags=None, layout=None):
    select(flat_requests.make(
        SelectRequest, (layout or Layout()).config(), Given(),
        **{"load": str(folder / "theta"), "data_path": (str(folder / "a"), str(folder / "b")),
           "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
           "seed": SEED, "num_select": 40, "shrinkage_clusters": 2, "pilot_iters": 0,
           "sketch_size": SIZE, "num_valid_samples": 16, "num_eigenpairs": 4,
           "sketch_share": SHARE, **(flags or {})}))


def _found(folder, name):
    run = folder / name / "selections" / "direct"
    return _masks(run / "masks"), json.loads((run / "selection.json").read_text())


def _drawn(folder, name):
    return _masks(folder / name / "selections" / "direct" / "drawn")


def _masks(folder):
    return np.concatenate([SampleMask.load(folder / f"{pool}.mask.npz").keep for pool in "ab"])


@pytest.fixture(scope="module")
def shared(folder):
    run_on_ranks(1, _select, folder, "shared")
    return _found(folder, "shared")


def _usable(folder):
    return Samples([str(folder / name) for name in "ab"], 16).usable


def test_a_share_is_sketched_and_all_are_candidates(folder, shared):
    masks, summary = shared
    usable = _usable(folder)
    sketched = draw_share(usable, SHARE, SEED)
    rows = SketchStore(folder / "shared" / "sketches", SIZE).entries()
    assert len(rows) == len(sketched) + 16
    assert masks.sum() == summary["num_select"] == 40
    distilled = summary["distilled"]
    assert distilled["num_sketched"] == len(sketched)
    assert distilled["num_candidates"] == len(usable)
    # Of those that have sketches as many as their share asks for; the others make up the rest.
    assert masks[sketched].sum() == round(40 * len(sketched) / len(usable))
    # Two halves of the evidence say which of the sketched are a choice; all others were drawn.
    draw, is_drawn = summary["draw"], _drawn(folder, "shared")
    assert draw["whole"]["candidates"] == len(sketched)
    assert draw["whole"]["selected"] == masks[sketched].sum()
    assert draw["predicted"] == 40 - draw["whole"]["selected"]
    assert (is_drawn <= masks).all()
    assert is_drawn.sum() == draw["whole"]["drawn"] + draw["predicted"]
    assert is_drawn[sketched].sum() == draw["whole"]["drawn"]
    blend = json.loads((folder / "shared" / "selections" / "direct" / "blend" / "worth.json"
                        ).read_text())
    assert sum(group["samples"] for group in blend["domains"]) == len(usable)
    assert sum(group["selected"] for group in blend["domains"]) == 40 and not blend["clusters"]


def test_what_has_sketches_is_selected_as_if_it_were_the_pool(folder, shared):
    """Against datasets of these samples alone."""
    usable = _usable(folder)
    sketched, first = draw_share(usable, SHARE, SEED), Samples([str(folder / "a")], 16)
    for name, numbers in (("a", sketched[sketched < len(first)]),
                          ("b", sketched[sketched >= len(first)] - len(first))):
        prefix = str(folder / name)
        keep = np.zeros(indexed.num_documents(indexed.open_indexed(prefix)), dtype=bool)
        keep[numbers] = True
        (folder / "alone").mkdir(exist_ok=True)
        materialize(prefix, SampleMask(keep, indexed.dataset_digest(prefix)),
                    str(folder / "alone" / name))
    number = round(40 * len(sketched) / len(usable))
    run_on_ranks(1, _select, folder, "alone-run", {
        "data_path": tuple(str(folder / "alone" / name) for name in "ab"), "num_select": number,
        "sketch_share": 1.0})
    masks, summary = _found(folder, "alone-run")
    assert summary["distilled"] is None
    np.testing.assert_array_equal(sketched[masks], np.flatnonzero(shared[0])[
        np.isin(np.flatnonzero(shared[0]), sketched)])


@pytest.mark.parametrize("layout", [
    Layout(dp=2), pytest.param(Layout(tp=2), marks=pytest.mark.slow)], ids=str)
def test_other_layouts_select_the_same(folder, shared, layout):
    run_on_ranks(layout.world_size, _select, folder, f"shared-{layout}", {}, layout)
    masks, _ = _found(folder, f"shared-{layout}")
    # A near-tie of the chances may fall the other way by rounding.
    assert (masks & shared[0]).sum() >= 39


def test_a_larger_share_reuses_the_rows(folder, shared):
    shutil.copytree(folder / "shared", folder / "grown")
    run_on_ranks(1, _select, folder, "grown", {"sketch_share": 0.8})
    usable = _usable(folder)
    rows = SketchStore(folder / "grown" / "sketches", SIZE).entries()
    assert len(rows) == len(draw_share(usable, 0.8, SEED)) + 16


def _train_proxy(folder):
    train(folder, Layout(), dataclasses.replace(LEARNT, model=dataclasses.replace(
        LEARNT.model, num_layers=1, hidden_size=16, ffn_hidden_size=24, seq_length=12)), "proxy")


def _train_other_vocabulary(folder):
    train(folder, Layout(), dataclasses.replace(LEARNT, model=dataclasses.replace(
        LEARNT.model, num_layers=1, vocab_size=120)), "other-vocabulary")


def _losses(folder, name):
    """[samples] of the pools; NaN for those that have none."""
    samples = Samples([str(folder / pool) for pool in "ab"], 16)
    entries = SketchStore(folder / name / "proxy", 1).entries()
    found = np.full(len(samples), np.nan)
    found[samples.first[entries.dataset] + entries.document] = entries.loss
    return found


@pytest.fixture(scope="module")
def by_proxy(folder):
    """With the losses of a smaller model, which sees fewer tokens of a sample."""
    run_on_ranks(1, _train_proxy, folder)
    run_on_ranks(1, _select, folder, "by-proxy", {"proxy_load": str(folder / "proxy")})
    return _found(folder, "by-proxy")


def test_the_losses_of_a_smaller_model_are_those_of_all_usable_samples(folder, shared):
    """Of the large model in its place, those that its sketches come with."""
    run_on_ranks(1, _select, folder, "by-itself", {"proxy_load": str(folder / "theta")})
    losses, usable = _losses(folder, "by-itself"), _usable(folder)
    assert np.flatnonzero(np.isfinite(losses)).tolist() == usable.tolist()
    samples = Samples([str(folder / name) for name in "ab"], 16)
    sketches = read_sketches(SketchStore(folder / "by-itself" / "sketches", SIZE), Drawn(
        "pool", samples, draw_share(usable, SHARE, SEED),
        [indexed.dataset_digest(prefix) for prefix in samples.prefixes]))
    # Other micro-batches, so that sums are rounded otherwise.
    np.testing.assert_allclose(losses[sketches.samples], sketches.losses, rtol=1e-5)


def test_a_smaller_model_changes_what_is_predicted_and_not_what_is_sketched(
        folder, shared, by_proxy):
    sketched = draw_share(_usable(folder), SHARE, SEED)
    np.testing.assert_array_equal(shared[0][sketched], by_proxy[0][sketched])
    assert by_proxy[0].sum() == 40
    # So few samples with sketches let two features among 264 say little, and something.
    was, now = (summary["distilled"]["rank_correlation"] for _, summary in (shared, by_proxy))
    assert was != now


@pytest.mark.parametrize("layout", [
    Layout(dp=2), pytest.param(Layout(tp=2), marks=pytest.mark.slow)], ids=str)
def test_losses_are_the_same_in_other_layouts(folder, by_proxy, layout):
    name = f"by-proxy-{layout}"
    run_on_ranks(layout.world_size, _select, folder, name,
                 {"proxy_load": str(folder / "proxy")}, layout)
    np.testing.assert_allclose(_losses(folder, name), _losses(folder, "by-proxy"), rtol=1e-5)
    assert (_found(folder, name)[0] & by_proxy[0]).sum() >= 39  # as without a smaller model


def test_losses_are_computed_once_and_carried_on(folder, by_proxy):
    run, count = folder / "carried-on", len(_usable(folder))
    shutil.copytree(folder / "by-proxy", run)
    rows, entries = (run / "proxy" / name for name in ("rows-0.f32", "entries-0.bin"))
    before, written = entries.read_bytes(), [file.stat().st_mtime_ns for file in (rows, entries)]
    flags = {"proxy_load": str(folder / "proxy"), "num_select": 30}
    run_on_ranks(1, _select, folder, "carried-on", flags)
    assert [file.stat().st_mtime_ns for file in (rows, entries)] == written
    half = len(before) // count * (count // 2)
    entries.write_bytes(before[:half])  # a kill on the way
    run_on_ranks(1, _select, folder, "carried-on", {**flags, "num_select": 20})
    # The rest was appended: an entry for each sample, and no second one of those that were there.
    assert entries.read_bytes()[:half] == before[:half]
    assert len(entries.read_bytes()) == len(before)
    np.testing.assert_array_equal(_losses(folder, "carried-on"), _losses(folder, "by-proxy"))
    with pytest.raises(RankError, match="holds losses under a smaller model made with other "
                                        "settings: another checkpoint"):
        run_on_ranks(1, _select, folder, "carried-on", {"proxy_load": str(folder / "theta")})


def test_a_smaller_model_of_another_vocabulary_is_refused(folder):
    run_on_ranks(1, _train_other_vocabulary, folder)
    with pytest.raises(RankError, match="has a vocabulary of 120 entries, .* one of 90. Expected a "
                                        "smaller model of the same tokenizer: give another"):
        run_on_ranks(1, _select, folder, "refused",
                     {"proxy_load": str(folder / "other-vocabulary")})
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("flags, message", [
    ({"sketch_share": 1.0, "proxy_load": "p"}, "--proxy-load is for --sketch-share below 1"),
    ({"sketch_share": 0.01}, "--sketch-share 0.01 takes gradients of .* at least 50"),
    ({"num_valid_samples": 4}, "there are 4. Give more validation data"),
    ({"objective": "flat-energy"}, "--objective flat-energy cannot be kept with --sketch-share"),
    ({"max_count": 2}, "--max-count cannot be kept with --sketch-share"),
    ({"quotas": ("a:1:30",)}, "--quotas cannot be kept with --sketch-share"),
    ({"stiff_budget": 1.0}, "--stiff-budget cannot be kept with --sketch-share")])
def test_what_it_cannot_keep_is_refused_before_any_work(folder, flags, message):
    with pytest.raises(RankError, match=message):
        run_on_ranks(1, _select, folder, "refused", flags)
    assert not (folder / "refused").exists()
