"""Tables: what is in them, and how they look in a terminal.

A page shows a table by the macro ``table`` of ``templates/macros.html.j2``, a Markdown text by
``markdown_blocks.table``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """Text, and how a page shows it; note: a second figure beside the first."""

    text: str
    css_class: str = ""
    colour: str = ""
    title: str = ""  # shown when the mouse is over the cell
    note: Cell | None = None

    def __str__(self) -> str:
        return self.text if self.note is None else f"{self.text} {self.note}"


@dataclass(frozen=True)
class Table:
    """left: numbers of the columns of words; the others hold figures, and end at the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: frozenset[int]

    def __post_init__(self):
        for row in self.rows:
            assert len(row) == len(self.header), (self.header, row)


def make_table(header: Sequence[str], rows: Iterable[Iterable[str | Cell]],
               left: Collection[int] = (0,)) -> Table:
    return Table(tuple(header), tuple(
        tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows),
        frozenset(left))


def text_table(table: Table) -> str:
    """Lines of columns of equal width, with a rule below the header; a row is one line."""
    rows = [[" ".join(str(cell).split()) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) if i in table.left else cell.rjust(width)
                         for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
