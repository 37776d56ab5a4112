"""Which mask file belongs to which prefix."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_direct.data.mask import SampleMask
from megatron_direct.data.mask_files import find_mask_files
from megatron_direct.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("x", "y"):
        SampleMask(np.ones(3, dtype=bool), "0" * 32).save(tmp_path / f"{name}.mask.npz")
    return tmp_path


def test_a_folder_gives_masks_by_name_and_flags_one_by_one(folder):
    found = find_mask_files(["/data/x", "/data/y", "/data/z"], [("/data/y", "my.npz")],
                            None)
    assert found == {"/data/y": "my.npz"}
    assert find_mask_files(["/data/x", "/data/y", "/data/z"], folder=str(folder)) == {
        "/data/x": str(folder / "x.mask.npz"), "/data/y": str(folder / "y.mask.npz")}


def test_a_flag_overrules_the_folder(folder):
    found = find_mask_files(["/data/x", "/data/y"], [("/data/x", str(folder / "y.mask.npz")),
                                                     ("/data/y", str(folder / "x.mask.npz"))],
                            str(folder))
    assert found["/data/x"].endswith("y.mask.npz")


def test_equal_names_are_told_apart_by_the_whole_path(tmp_path):
    for name in ("a__x", "b__x"):
        (tmp_path / f"{name}.mask.npz").touch()
    assert find_mask_files(["a/x", "b/x"], folder=str(tmp_path)) == {
        "a/x": str(tmp_path / "a__x.mask.npz"), "b/x": str(tmp_path / "b__x.mask.npz")}


@pytest.mark.parametrize(("prefixes", "pairs", "match"), [
    (["d/x"], (), "no prefix of the blend matches .*y.mask.npz. Say which"),
    (["d/x", "e/x", "d/y"], (), "x.mask.npz could belong to d/x and to e/x. Say"),
    (["d/x", "d/y"], [("d/w", "w.npz")], "--sample-mask d/w is not in the blend, .* are d/x"),
    (["d/x", "d/y"], [("d/x", "1"), ("d/x", "2")], "--sample-mask is given twice for d/x"),
])
def test_a_mask_that_finds_no_prefix_is_refused(folder, prefixes, pairs, match):
    with pytest.raises(UserError, match=match):
        find_mask_files(prefixes, pairs, str(folder))


def test_a_mask_that_keeps_nothing_needs_no_prefix(folder):
    SampleMask(np.zeros(3, dtype=bool), "0" * 32).save(folder / "y.mask.npz")
    assert list(find_mask_files(["d/x"], folder=str(folder))) == ["d/x"]


def test_a_folder_without_masks_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no .*.mask.npz. Give the masks folder of a sel"):
        find_mask_files(["x"], folder=str(tmp_path))
