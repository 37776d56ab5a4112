"""A short draw of ``make test-fuzz``: damaged files are read, or refused by name."""

from __future__ import annotations

import pytest
from fuzz import campaign, readers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

READERS = readers.all_readers()


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, reader):
    outcome = campaign.run([reader], 60, 0, tmp_path)
    assert not outcome.bad
    assert outcome.read[reader.name] < 60 + len(reader.sound)  # so that something was refused


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_any_bytes_are_read_or_refused_by_name(tmp_path, reader):
    """By hypothesis, which makes what it finds small."""
    readers.place(reader, tmp_path)

    @settings(max_examples=15, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200), st.integers(0, 400), st.booleans())
    def check(data, start, is_inside):
        sound = reader.sound[0]
        outcome = campaign.Outcome()
        campaign.tracemalloc.start()
        campaign.try_one(reader, tmp_path, sound[:start] + data + sound[start + len(data):]
                         if is_inside else data, outcome)
        campaign.tracemalloc.stop()
        assert not outcome.bad

    check()


def test_the_campaign_finds_what_is_wrong(tmp_path):
    """An error of the reader's own, a message that names nothing, and too much memory."""
    def reads(error):
        def read(folder):
            if b"sound" not in (folder / "f").read_bytes():
                raise error
        return read

    def hungry(folder):
        return bytearray(10**6)

    for read, match in ((reads(KeyError("x")), "KeyError"),
                        (reads(campaign.UserError("x")), "does not name the file"),
                        (hungry, "bytes of memory")):
        outcome = campaign.Outcome()
        reader = readers.Reader("r", "f", (b"sound",), read)
        campaign.tracemalloc.start()
        campaign.try_one(reader, tmp_path, b"damaged", outcome)
        campaign.tracemalloc.stop()
        assert match in outcome.bad[0][1]
