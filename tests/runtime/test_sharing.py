"""Work dealt out to ranks, and arrays that a node's ranks map."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import RankError, run_on_ranks

from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel, sharing


def _squares(count):
    done = []

    def work(item):
        done.append(item)
        return item**2

    return sharing.map_shared_out(work, list(range(count))), done


@pytest.mark.parametrize("count", [0, 1, 5])
def test_each_rank_does_its_part_and_knows_all(count):
    results = run_on_ranks(2, _squares, count)
    for rank, (found, done) in enumerate(results):
        assert found == [item**2 for item in range(count)]
        assert done == list(range(rank, count, 2))


def _fails_at(bad):
    def work(item):
        if item in bad:
            raise UserError(f"item {item} is bad")

    messages = []
    try:
        sharing.map_shared_out(work, list(range(6)))
    except UserError as error:
        messages.append(str(error))
    return messages


def test_the_first_bad_item_is_reported_on_every_rank():
    assert run_on_ranks(2, _fails_at, [2, 3]) == [["item 2 is bad"]] * 2


def _arrays(room, folder):
    """The array, and what is left in the folder of its file: of a test's own, since others use the
    machine's."""
    filled = []

    def fill(array):
        filled.append(parallel.rank_and_size()[0])
        array[:] = np.arange(len(array)) ** 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_FOLDER", folder)
        if not room:
            patch.setattr(sharing.os, "posix_fallocate", _no_room)
        array = sharing.node_array(1000, np.int64, fill)
    left = list(folder.iterdir())
    return array.sum(), array.flags.writeable, filled, isinstance(array, np.memmap), left


def _no_room(*_):
    raise OSError("no space")


def test_one_rank_of_a_node_fills_the_array_of_all(tmp_path):
    expected = sum(i**2 for i in range(1000))
    results = run_on_ranks(2, _arrays, True, tmp_path)
    for total, writeable, _, mapped, _ in results:
        assert total == expected and not writeable and mapped
    assert [filled for *_, filled, _, _ in results] == [[0], []]
    assert not results[0][-1]  # no file is left


def test_where_there_is_no_room_each_rank_fills_its_own(tmp_path):
    for total, writeable, filled, mapped, _ in run_on_ranks(2, _arrays, False, tmp_path):
        assert total == sum(i**2 for i in range(1000)) and not writeable and not mapped
        assert len(filled) == 1


def _fill_that_fails():
    def fill(array):
        raise UserError("the index is damaged")

    sharing.node_array(10, np.int64, fill)


def test_an_error_of_the_rank_that_fills_is_raised_on_all():
    with pytest.raises(RankError) as error:
        run_on_ranks(2, _fill_that_fails)
    assert str(error.value).count("UserError: the index is damaged") == 2
