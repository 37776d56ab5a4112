"""Checks over all datasets of a command."""

from __future__ import annotations

import json

import pytest
from indexed_files import random_documents, write_dataset

from megatron_direct.config import Given, ParallelConfig
from megatron_direct.data.checks import (
    require_disjoint,
    require_names_of_their_own,
    require_one_vocabulary,
)
from megatron_direct.errors import UserError
from megatron_direct.steps.onset import OnsetConfig, open_onset


@pytest.fixture
def prefixes(tmp_path):
    """Two datasets of one tokenizer, one of another, one without a card."""
    found = [write_dataset(tmp_path / name, random_documents(3, 20)) for name in "abcd"]
    for prefix, digest, size in zip(found, ("one", "one", "two"), (20, 20, 30), strict=False):
        with open(prefix + ".json", "w") as file:
            json.dump({"tokenizer_digest": digest, "vocab_size": size}, file)
    return found


def test_datasets_agree_and_those_without_a_card_agree_with_all(prefixes):
    a, b, _, d = prefixes
    assert require_one_vocabulary([a, b, d], None, None) == (20, "one")
    assert require_one_vocabulary([a, b], 128, "one") == (128, "one")
    assert require_one_vocabulary([d], 50, None) == (50, None)


def test_another_tokenizer_is_named(prefixes):
    a, _, c, _ = prefixes
    with pytest.raises(UserError, match=r"c was made with a tokenizer of 30 entries .*--tokenizer"):
        require_one_vocabulary([a, c], None, None)
    with pytest.raises(UserError, match="the checkpoint with another one"):
        require_one_vocabulary([a], 128, "two")
    with pytest.raises(UserError, match="uses a vocabulary of 20 entries, but the model has 16"):
        require_one_vocabulary([a], 16, "one")
    with pytest.raises(UserError, match="Give --vocab-size"):
        require_one_vocabulary([prefixes[3]], None, None)


def test_pools_are_kept_apart_from_what_judges_them():
    require_disjoint(pool=["a"], validation=["b"])
    with pytest.raises(UserError, match="b is listed as a pool and as a validation set"):
        require_disjoint(pool=["a", "b"], validation=["b"])


def test_a_dataset_by_another_path_is_the_same(tmp_path):
    (tmp_path / "a.bin").touch()
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(UserError, match="link is listed as a validation set and as a test set"):
        require_disjoint(pool=["b"], validation=[str(tmp_path / "a")],
                         test=[str(tmp_path / "link")])


def test_a_set_that_is_called_as_all_of_them_together_is_refused():
    require_names_of_their_own(["data/all"], ["test"])  # its loss is that of all validation sets
    for valid, test, what in ((["v"], ["data/all"], "test"), (["v", "data/all"], [], "validation")):
        with pytest.raises(UserError, match=f"the {what} set data/all has the name all, .* Rename"):
            require_names_of_their_own(valid, test)


def test_so_it_is_where_test_sets_are_opened():
    config = OnsetConfig(load="theta", data_path=("a",), valid_data_path=("v",), run_dir="run")
    with pytest.raises(UserError, match="has the name all"):
        open_onset(config, ParallelConfig(), Given(), ["data/all"])
