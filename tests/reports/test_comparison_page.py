"""The page of a small comparison: whole, well-formed, and safe with any text."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from page_reader import Page
from synthetic_run import sample_texts, write_run

from megatron_direct.comparison.summarise import summarise
from megatron_direct.reports.comparison_page import render, write_page
from megatron_direct.runtime import files

ARMS = {"random": (0.0, 0.0, 0.0), "constant": (0.25, 0.0, 0.5),
        "perplexity-high": (-0.9, 0.02, 0.33), "flat-energy": (-0.05, 0.2, 1.3),
        "descent": (0.3, 0.02, 1.3)}
HOSTILE = "<script>alert(1)</script> | `tick`\n& $\\q$"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one", ARMS, seeds=(1, 2, 3),
                     default="descent", num_candidates=60, num_select=15, iterations=12,
                     missing={("perplexity-high", 2)}, texts=sample_texts(),
                     name="<b>bold</b> & more")


@pytest.fixture(scope="module")
def page(run_dir) -> Page:
    return Page(render(summarise(run_dir)))


def test_the_sections(page):
    assert page.headings == [
        "Test loss by arm", "descent compared with the other arms", "Loss by test set",
        "Training loss", "Spectrum", "Stiff cost", "Selected samples",
        "Overlap between selections", "Cost of selecting",
        "Examples of samples that descent selects and leaves out", "Run record"]
    assert page.tags.count("img") == 6


def test_it_opens_with_the_verdict(run_dir, page):
    arm = summarise(run_dir).arm("descent")
    low, high = arm.difference.interval
    opening = page.text[page.text.index("descent, the default of select, ends"):]
    assert opening.startswith(
        f"descent, the default of select, ends with a mean test loss of {arm.mean_loss:.4f} per "
        f"token, {-arm.difference.mean:.4f} below random (95 % interval of the difference "
        f"[{low:+.4f}, {high:+.4f}], 3 seeds). Verdict: better.")
    assert opening.index("Verdict") < opening.index("Test loss by arm")
    assert "No result for perplexity-high (seed 2)." in page.text


def test_the_table_of_losses_follows_the_summary(run_dir, page):
    summary = summarise(run_dir)
    assert [row[:3] for row in page.tables[0][1:-1]] == [
        [str(place) if arm in summary.ranked else "", arm.name, f"{arm.mean_loss:.4f}"]
        for place, arm in enumerate(summary.arms, start=1)]
    assert summary.arms[-1].name == "perplexity-high"  # which lacks a seed
    worst = summary.arm("perplexity-high").difference
    assert page.tables[0][-2][3:] == [
        f"{worst.mean:+.4f}", "worse", f"[{worst.interval[0]:+.4f}, {worst.interval[1]:+.4f}]",
        "0.5", "1", "2"]  # two seeds: the least p-value is 1/2
    assert page.tables[0][-1][1:3] == ["(before annealing)", "4.8000"]


def test_it_needs_no_other_file_and_is_written_the_same_twice(run_dir, page, tmp_path):
    assert page.external == []
    # Six figures, one of which holds a heat map as a picture.
    assert sum(reference.startswith("data:") for reference in page.references) == 7
    for name in ("one.html", "two.html"):
        write_page(summarise(run_dir), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_text_of_users_is_shown_and_not_interpreted(tmp_path):
    """The setting's name, those of datasets, and sample texts."""
    texts = sample_texts()
    texts["picked"][0]["text"] = f"</pre>{HOSTILE}"
    run = write_run(tmp_path / "run", ARMS, seeds=(1, 2), domains=(HOSTILE, "a<b>c"), prefix="",
                    default="descent", num_candidates=60, num_select=15, iterations=4,
                    texts=texts, name=HOSTILE)
    page = Page(render(summarise(run)))
    assert not {"script", "b"} & set(page.tags)
    shown = " ".join(HOSTILE.split())
    assert f"Comparison: {shown}" in page.text and f"</pre>{shown}" in page.text
    assert page.tables[2][0] == ["arm", HOSTILE, "a<b>c", "all"]
    assert page.external == []


def test_a_page_of_what_is_there(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "arms")
    (copy / "texts.json").unlink()
    setting = files.read_json(copy / "setting.json")
    files.write_json(copy / "setting.json", {**setting, "annealing_seconds": None})
    page = Page(render(summarise(copy)))
    assert page.headings == ["Spectrum", "Cost of selecting", "Run record"]
    assert "descent, the default of select, has no result in this comparison." in page.text


def test_a_comparison_without_reference_and_default(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    setting = files.read_json(copy / "setting.json")
    few = {name: setting["arms"][name] for name in ("constant", "flat-energy")}
    files.write_json(copy / "setting.json", {**setting, "arms": few})
    page = Page(render(summarise(copy)))
    assert page.headings[:3] == ["Test loss by arm", "Loss by test set", "Training loss"]
    assert "descent, the default of select, was not run" in page.text
    assert "Verdict" not in page.text


def test_one_seed_and_one_test_set(tmp_path):
    run = write_run(tmp_path / "run", ARMS, seeds=(7,), domains=("docstrings",), default="descent",
                    num_candidates=60, num_select=15, iterations=2)
    page = Page(render(summarise(run)))
    assert "Loss by test set" not in page.headings
    assert "No arm shares two seeds with random" in page.text
    assert "Verdict: too few seeds" in page.text


def test_a_measurement_that_serves_for_two_is_told_once(run_dir):
    summary = summarise(run_dir)
    seconds = {seed: {"onset": {"sketch": 30.0}, "select": {"sketch": 30.0},
                      "pilot": {"pilot": 5.0, "sketch": 31.0}} for seed in summary.setting.seeds}
    page = render(replace(summary, setting=replace(summary.setting, shared_seconds=seconds)))
    assert ("Measured for each seed: 30 s for sketches at the checkpoint, 36 s for a pilot and "
            "sketches after it and" in " ".join(Page(page).text.split()))
