"""Tables in a terminal."""

from __future__ import annotations

import pytest

from megatron_direct.reports.tables import Cell, make_table, text_table

TABLE = make_table(["arm", "loss", "verdict"], [
    ["direct", Cell("3.4", "best", note=Cell("-0.05")), "better"],
    ["a long name", "13.4999", "no clear difference"]], left=(0, 2))


def test_columns_of_words_begin_and_columns_of_figures_end_at_one_place():
    assert text_table(TABLE).splitlines() == [
        "arm               loss  verdict",
        "-------------------------------------------",
        "direct       3.4 -0.05  better",
        "a long name    13.4999  no clear difference"]


def test_a_row_is_one_line_whatever_is_in_its_cells():
    lines = text_table(make_table(["a\nname", "loss"], [["x\n\ty", "1"]])).splitlines()
    assert lines == ["a name  loss", "------------", "x y        1"]


def test_a_table_without_rows_is_its_header():
    assert text_table(make_table(["arm", "loss"], [])).splitlines() == ["arm  loss", "---------"]


def test_rows_must_have_the_columns_of_the_header():
    with pytest.raises(AssertionError):
        make_table(["arm"], [["direct", "3.4"]])
