"""Pieces of Markdown that read well as source, too: wrapped paragraphs, aligned tables.

Text that is not Markdown yet, such as the name of a setting or a dataset, passes through
:func:`escape` or :func:`code` first.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 108


def escape(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    text = re.sub(r"[\\`*\[\]<>~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", _one_line(text))
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", text)  # no heading, no list


def code(text: str) -> str:
    """The text as a code span, whatever backticks are in it."""
    text = _one_line(text)
    fence = "`" * (1 + _longest_run_of_backticks(text))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + _longest_run_of_backticks(text))
    return f"{fence}{language}\n{text}\n{fence}"


def paragraph(text: str, first_indent: str = "", indent: str = "") -> str:
    """Wrapped. An interval or a percentage stays on one line, and what would begin a list or a
    heading at the start of a line stays behind the word before it."""
    held = re.sub(r"(\[[-+.\d]+,) ", "\\1\0", text)
    held = re.sub(r" (?=([-+*#>=%]|\d+[.)])([\s;,.]|$))", "\0", held)
    return textwrap.fill(held, WIDTH, initial_indent=first_indent, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(paragraph(sentence, "- ", "  ") for sentence in sentences)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int]) -> str:
    """Cells are Markdown. left: numbers of the columns of words, as in ``tables.Table``."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |"

    rule = "|" + "|".join(":" + "-" * (width + 1) if i in left else "-" * (width + 1) + ":"
                          for i, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
