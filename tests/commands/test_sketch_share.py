"""``select --sketch-share``: gradients of some samples, and a selection among all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import flat_requests
import numpy as np
import pytest
from ranks import Layout, RankError, run_on_ranks

from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.config import Given
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.data.samples import Samples
from megatron_direct.gradients.store import SketchStore
from megatron_direct.selection.distilled import draw_share

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


@pytest.mark.parametrize("flags, message", [
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
