"""Headers of arrays that ask for more memory than there are bytes."""

from __future__ import annotations

import tracemalloc
import zipfile

import numpy as np
import pytest

from megatron_direct.errors import UserError
from megatron_direct.runtime import arrays

# Of format 2, whose header is 700 MB long by its own account.
_LONG = b"\x93NUMPY\x02\x00" + (700_000_000).to_bytes(4, "little") + b"{'descr': '<i8'"


def _peak(read) -> int:
    tracemalloc.start()
    with pytest.raises(UserError, match="promises 700000000 bytes of itself"):
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_header_that_promises_to_be_long_reserves_nothing(tmp_path):
    (tmp_path / "a.npy").write_bytes(_LONG)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", _LONG)
    assert _peak(lambda: arrays.read_npy(tmp_path / "a.npy", "")) < 1_000_000
    assert _peak(lambda: arrays.read_npz(tmp_path / "a.npz", "")) < 1_000_000


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_versions_of_the_format_are_read(tmp_path, version):
    expected = np.arange(6.0).reshape(2, 3)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, expected, version=version)
    np.testing.assert_array_equal(arrays.read_npy(tmp_path / "a.npy", ""), expected)
