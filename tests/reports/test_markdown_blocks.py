"""Markdown that shows any text as it is."""

from __future__ import annotations

import re

import pytest

from megatron_direct.reports import markdown_blocks as blocks

HOSTILE = "<script>alert(1)</script> | `tick` *bold* [a](b)\n# x_y_ & ~z~ $q$"


def _shown(markdown: str) -> str:
    """What CommonMark shows of a text without markup: a backslash before punctuation is dropped."""
    assert not re.search(r"(?<!\\)[`*<>\[\]]", markdown)  # all that would be markup is escaped
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)


@pytest.mark.parametrize("text", [HOSTILE, "a_b", "_a_", "back\\slash", "# heading", "1. item",
                                  "- item", "+ item", "=", "plain"])
def test_escaped_text_is_shown_as_it_is_on_one_line(text):
    escaped = blocks.escape(text)
    assert "\n" not in escaped
    assert _shown(escaped) == " ".join(text.split())
    assert not re.match(r"#|[-+=]|\d+[.)]", escaped)  # neither a heading nor a list


def test_names_of_datasets_stay_readable_in_the_source():
    assert blocks.escape("data_code_test") == "data_code_test"


@pytest.mark.parametrize(("text", "span"), [
    ("direct", "`direct`"), ("a`b", "``a`b``"), ("`a`", "`` `a` ``"), ("a\n b", "`a b`"),
    ("```", "```` ``` ````")])
def test_code_spans_hold_any_text(text, span):
    assert blocks.code(text) == span


def test_a_code_block_is_not_ended_by_its_content():
    text = "echo '\n```\nrm -r x\n'"
    assert blocks.code_block(text, "bash") == f"````bash\n{text}\n````"
    assert blocks.code_block("ls", "bash") == "```bash\nls\n```"


def test_a_cell_stays_one_cell():
    lines = blocks.table(["arm", "loss"], [[blocks.escape(HOSTILE), "1"],
                                           [blocks.code("a|b"), "22"]], left=[0]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    for line in lines:
        assert len(re.split(r"(?<!\\)\|", line)) == 4
    assert lines[1].startswith("|:--") and lines[1].endswith("--:|")


def test_paragraphs_are_wrapped_and_intervals_kept_whole():
    text = blocks.paragraph(" ".join(["word"] * 20 + ["[-0.01, +0.02]", "5 %"] * 12))
    assert all(len(line) <= blocks.WIDTH for line in text.splitlines())
    assert len(text.splitlines()) > 2
    assert text.replace("\n", " ").count("[-0.01, +0.02] 5 %") == 12
    for line in text.splitlines():
        assert line.count("[") == line.count("]") and not line.startswith("%")


@pytest.mark.parametrize("word", ["-", "+", "#", "12.", "3)", ">"])
def test_no_line_of_a_paragraph_begins_a_list_or_a_heading(word):
    text = blocks.paragraph(" ".join(f"{'a' * (1 + i % 7)} {word}" for i in range(200)))
    assert len(text.splitlines()) > 3
    assert not any(line.split()[0] == word for line in text.splitlines())
