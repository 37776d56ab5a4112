"""The page of a small comparison: whole, well-formed, and safe with any text."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser

import pytest
from synthetic_run import sample_texts, write_run

from megatron_direct.comparison.summary import summarise
from megatron_direct.reports import wording
from megatron_direct.reports.comparison_page import render, write_page
from megatron_direct.runtime import files

ARMS = {"random": (0.0, 0.0, 0.0), "constant": (0.25, 0.0, 0.5),
        "perplexity-high": (-0.9, 0.02, 0.33), "flat-energy": (-0.05, 0.2, 1.3),
        "descent": (0.3, 0.02, 1.3)}
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """The elements of a page, which must all be closed in order, and its words."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.headings, self.words, self.sources = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one", ARMS, seeds=(1, 2, 3),
                     default="descent", num_candidates=60, num_select=15, iterations=12,
                     missing={("perplexity-high", 2)}, texts=sample_texts(),
                     name="<b>bold</b> & more")


def test_the_page(run_dir, tmp_path):
    summary = summarise(run_dir)
    write_page(summary, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Reader(text)
    assert page.headings == [
        "In short", "Which arm ends lowest", "descent against the others", "By test set",
        "Training loss", "Spectrum", "Stiff cost", "What each arm picked", "How far arms agree",
        "What choosing costs", "Texts that descent picks and drops", "The run"]
    assert page.tags.count("img") == 6
    # It stands alone: all that it shows is in it.
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    words = " ".join(page.words)
    assert "Without a result: perplexity-high (seed 2)." in words
    assert f"{summary['arms'][0]['mean_loss']:.4f}" in words
    assert render(summary) == text


def test_nothing_in_texts_or_names_becomes_html(run_dir):
    page = Reader(render(summarise(run_dir)))
    assert "script" not in page.tags and "b" not in page.tags
    words = " ".join(page.words)
    assert "<script>alert(1)</script>" in words and "<b>bold</b> & more" in words


def test_a_page_of_what_is_there(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "arms")
    (copy / "texts.json").unlink()
    setting = files.read_json(copy / "setting.json")
    files.write_json(copy / "setting.json", {**setting, "annealing_seconds": None})
    page = Reader(render(summarise(copy)))
    assert page.headings == ["In short", "Spectrum", "What choosing costs", "The run"]


def test_a_comparison_without_reference_and_default(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    setting = files.read_json(copy / "setting.json")
    few = {name: setting["arms"][name] for name in ("constant", "flat-energy")}
    files.write_json(copy / "setting.json", {**setting, "arms": few})
    page = Reader(render(summarise(copy)))
    assert page.headings[:4] == ["In short", "Which arm ends lowest", "By test set",
                                 "Training loss"]
    assert "descent, the default of select, was not run" in " ".join(page.words)


def test_one_seed_and_one_test_set(tmp_path):
    run = write_run(tmp_path / "run", ARMS, seeds=(7,), domains=("docstrings",), default="descent",
                    num_candidates=60, num_select=15, iterations=2)
    page = Reader(render(summarise(run)))
    assert "By test set" not in page.headings
    assert "No arm shares two seeds with random" in " ".join(page.words)
    assert "too few seeds" in page.words


def test_names_are_shortened_to_what_tells_them_apart():
    assert wording.short_names(["data_code_test", "data_wiki_en_test"]) == {
        "data_code_test": "code", "data_wiki_en_test": "wiki_en"}
    assert wording.short_names(["data_code_test"]) == {"data_code_test": "data_code_test"}
    assert wording.short_names(["a", "a_b"]) == {"a": "a", "a_b": "a_b"}


def test_lists_in_words():
    assert [wording.listed("abc"[:n]) for n in range(4)] == ["none", "a", "a and b", "a, b and c"]
