"""The report of a run: it follows the files, escapes their text, and stands alone."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from annealed_run import (
    DOMAINS,
    TEST_LOSSES,
    made_up_density,
    write_annealed_run,
    write_arm,
)
from page_reader import Page

from megatron_direct.commands.report import ReportConfig, ReportRequest, report
from megatron_direct.errors import UserError
from megatron_direct.reports.run_files import RunReport, read_report_files
from megatron_direct.reports.run_page import headline, loss_tables, write_page

HOSTILE = "<script>alert(1)</script> | `tick`\n& _x_ $\\q$"


def _page(run) -> Page:
    write_page(read_report_files(run), run / "report.html")
    return Page((run / "report.html").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_annealed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def page(run) -> Page:
    return _page(run)


def test_it_opens_with_the_difference_and_the_budget(page):
    first = page.text.index("direct ends with")
    assert page.text[first:].startswith(
        "direct ends with a test loss of 3.4400 per token, 0.0500 below random (3.4900; 3.7000 "
        "before annealing). Each arm was annealed on 307,200 tokens. Selecting the samples took "
        "165 seconds (pilot 12, sketch 104, curvature 49).")
    assert page.headings[0] == "Test loss" and first < page.text.index("Test loss ")


def test_the_losses_with_the_lowest_in_bold_and_the_difference(page):
    assert page.headings[:2] == ["Test loss", "Validation loss"]
    assert page.tables[0] == [
        ["arm", "docstrings", "source", "licenses", "all"],
        ["(before annealing)", "5.0000", "3.2000", "4.6000", "3.7000"],
        ["direct", "4.7000", "2.9000", "4.4000", "3.4400"],
        ["random", "4.9000", "3.0000", "4.3000", "3.4900"],
        ["direct - random", "-0.2000", "-0.1000", "+0.1000", "-0.0500"]]
    assert page.bold == 2 * ["4.7000", "2.9000", "3.4400", "4.3000"]  # row by row


def _with_arms(folder, **arms):
    """A run to which arms are added: name -> (loss, settings)."""
    run = write_annealed_run(folder)
    names = {kind: [f"embedded_{domain}_{kind}" for domain in DOMAINS]
             for kind in ("pool", "valid", "test")}
    for name, (loss, settings) in arms.items():
        name = name.replace("_", "-")
        write_arm(run / "anneal" / name, name, names, ("test",), 3, (loss,) * 4, **settings)
    return read_report_files(run)


def test_an_average_is_compared_with_the_random_arms_average():
    """Not with its end, beside which averaging alone would be a difference."""
    names = ("direct", "direct, last 4 averaged", "random", "random, last 2 averaged")
    annealings = {name: SimpleNamespace(arm=name.partition(",")[0], settings={}) for name in names}

    def run():
        return RunReport("run", annealings, {}, {}, {}, None, {}, ())

    assert run().reference_of("direct, last 4 averaged") == "random, last 4 averaged"
    assert [name for name in annealings if run().is_compared(name)] == ["direct"]
    annealings["random, last 4 averaged"] = annealings["random"]
    assert [name for name in annealings if run().is_compared(name)] == list(names[:2])


def test_a_selection_is_compared_with_its_own_random_arm(tmp_path):
    found = _with_arms(tmp_path / "run", quarter=(3.4, {}), random_quarter=(3.6, {}),
                       randomized=(3.5, {}))
    said = " ".join(headline(found))
    assert "quarter ends with a test loss of 3.4000 per token, 0.2000 below random-quarter" in said
    assert "randomized ends with a test loss of 3.5000 per token (3.7000 before annealing); " \
        "random-randomized has not been annealed yet." in said
    differences = [row[0] for row in loss_tables(found)[0][1].rows if " - " in str(row[0])]
    assert [str(label) for label in differences] == ["direct - random", "quarter - random-quarter"]


def test_arms_that_were_annealed_otherwise_are_not_subtracted(tmp_path):
    found = _with_arms(tmp_path / "run", quarter=(3.4, {"seed": 1, "segments": [1]}),
                       random_quarter=(3.6, {"seed": 2, "segments": [2]}))
    said = " ".join(headline(found))
    assert "random-quarter was annealed with other settings (seed)." in said
    assert not any("quarter - " in str(row[0]) for row in loss_tables(found)[0][1].rows)


def test_a_random_arm_of_another_number_of_samples_is_not_subtracted(tmp_path):
    run = write_annealed_run(tmp_path / "run")
    path = run / "anneal" / "random" / "composition.json"
    drawn = json.loads(path.read_text())
    next(iter(drawn.values()))["selected"] += 1
    path.write_text(json.dumps(drawn))
    found = read_report_files(run)
    assert "random was annealed with other settings (number of samples)." in headline(found)[0]
    assert not any(" - " in str(row[0]) for row in loss_tables(found)[0][1].rows)


def test_pools_of_all_selections_have_a_row(tmp_path):
    run = write_annealed_run(tmp_path / "run")
    folder = run / "selections" / "more"
    shutil.copytree(run / "selections" / "direct", folder)
    selection = json.loads((folder / "selection.json").read_text())
    counts = selection["composition"].pop("embedded_source_pool")
    (folder / "selection.json").write_text(json.dumps({
        **selection, "composition": {**selection["composition"], "web": counts}}))
    rows = _page(run).tables[2]
    assert rows[0][-4:] == ["more: selected", "more: corrupted", "random: selected",
                            "random: corrupted"]
    of_pool = {row[0]: row for row in rows[1:]}
    assert [of_pool[name][5] for name in of_pool] == ["10", "-", "12", "11"]


def test_what_was_chosen_and_what_was_drawn_by_cluster(page, tmp_path):
    assert "Draw: 20 kept (64% of the tokens), 13 drawn at random within their clusters (36%)." \
        in page.text
    rows = page.tables[3]
    assert rows[0] == ["pool or cluster", "samples", "selected", "kept", "drawn", "repeats"]
    assert rows[1:4] == [["embedded_docstrings_pool", "100", "10", "5", "5", "50%"],
                         ["embedded_docstrings_pool-c0", "60", "10", "5", "5", "50%"],
                         ["embedded_docstrings_pool-c1", "40", "0", "0", "0", "-"]]
    assert rows[-1] == ["all", "300", "33", "20", "13", "61%"]
    # A selection of a version that did not record it.
    run = write_annealed_run(tmp_path / "run")
    path = run / "selections" / "direct" / "selection.json"
    summary = json.loads(path.read_text())
    del summary["draw"]
    path.write_text(json.dumps(summary))
    assert "Chosen or drawn: direct" not in _page(run).headings


def test_the_rest_of_the_page(page):
    assert page.headings[2:] == ["Annealing", "Spectrum", "Selected samples",
                                 "Chosen or drawn: direct", "Selection problem", "Run record"]
    assert page.tags.count("img") == 2
    assert "33 of 1,300 samples. 1,250 samples were cut at the sequence length" in page.text
    assert "How many: 311 of 1298 samples have a worth below 0" in page.text
    assert "over the whole pool +0.0210 [+0.0170, +0.0260]" in page.text
    assert "two selections share 62% of their samples (drawn at random within the same clusters, " \
        "41%) and 97% of their clusters." in page.text
    composition = page.tables[2]
    assert composition[0] == ["pool", "samples", "corrupted", "direct: selected",
                              "direct: corrupted", "random: selected", "random: corrupted"]
    assert composition[2] == ["source", "100", "20", "11", "0", "11", "2"]
    assert ["stiff budget", "-"] in page.tables[4] and ["stiff cost", "12.5"] in page.tables[4]
    assert page.tables[5][1] == ["select", "TP 2, PP 1", "megatron-direct 0.2.0, torch 2.6.0"]


def test_it_needs_no_other_file(page):
    assert page.external == []
    assert sum(reference.startswith("data:") for reference in page.references) == 2


def test_text_of_users_is_shown_and_not_interpreted(tmp_path):
    run = write_annealed_run(tmp_path / "<b>run<", domains=(HOSTILE, "x<i>", "_y"), prefix="")
    page = _page(run)
    assert not {"script", "b", "i"} & set(page.tags)
    assert " ".join(HOSTILE.split()) in page.text
    assert page.tables[0][0] == ["arm", HOSTILE, "x<i>", "_y", "all"]
    assert f"Run: {run}" in page.text


def test_pools_without_corrupted_samples_have_no_such_column(tmp_path):
    page = _page(write_annealed_run(tmp_path / "run", corrupted=0))
    assert page.tables[2][0] == ["pool", "samples", "direct: selected", "random: selected"]


@pytest.mark.parametrize(("arms", "sentence", "tables"), [
    ((), "No selection has been annealed yet.", 0),
    (("random",), "No selection has been annealed yet.", 2),
    (("direct",), "direct ends with a test loss of 3.4400 per token (3.7000 before annealing); "
                  "random has not been annealed yet.", 2)])
def test_arms_that_are_missing(tmp_path, arms, sentence, tables):
    run = read_report_files(write_annealed_run(tmp_path / "run", arms=arms))
    assert headline(run)[0] == sentence
    assert len(loss_tables(run)) == tables
    page = _page(tmp_path / "run")
    assert sentence in page.text
    assert ("Annealing" in page.headings) == bool(arms)
    assert "includes the noise of a single seed" not in page.text
    assert not any(" - random" in row[0] for table in page.tables for row in table)


def test_without_test_sets_the_validation_loss_stands_for_them(tmp_path):
    run = read_report_files(write_annealed_run(tmp_path / "run", kinds=("valid",)))
    assert headline(run)[0].startswith("direct ends with a validation loss of 3.4400 per token, "
                                       "0.0500 below random")
    assert [heading for heading, _ in loss_tables(run)] == ["Validation loss"]


def test_arms_that_were_measured_on_other_datasets_are_not_compared(tmp_path):
    run = write_annealed_run(tmp_path / "run")
    path = run / "anneal" / "random" / "result.json"
    result = json.loads(path.read_text())
    for when in ("before", "after"):
        result[when]["test"] = {"embedded_docstrings_test": 4.9, "all": 4.9}
    path.write_text(json.dumps(result))
    assert headline(read_report_files(run))[0] == (
        "direct ends with a test loss of 3.4400 per token (3.7000 before annealing); random was "
        "measured on other datasets.")
    page = _page(run)
    assert page.tables[0][3] == ["random", "4.9000", "-", "-", "4.9000"]
    assert page.tables[0][4] == ["direct - random", "-0.2000", "-", "-", "-"]
    assert page.bold[:3] == ["4.7000", "2.9000", "4.4000"]  # and neither of the losses over all
    assert page.bold.count("3.4400") == 1  # of the validation sets


def test_a_selection_that_ends_higher_is_said_to_be_above(tmp_path, monkeypatch):
    monkeypatch.setitem(TEST_LOSSES, "direct", (5.0, 3.1, 4.4, 3.50001))
    run = read_report_files(write_annealed_run(tmp_path / "run"))
    assert "3.5000 per token, 0.0100 above random" in headline(run)[0]
    monkeypatch.setitem(TEST_LOSSES, "direct", (5.0, 3.1, 4.4, 3.49001))
    run = read_report_files(write_annealed_run(tmp_path / "other"))
    assert "3.4900 per token, level with random" in headline(run)[0]


def test_the_density_is_shown_with_the_trace_where_there_is_one(tmp_path):
    page = _page(write_annealed_run(tmp_path / "run", density=made_up_density()))
    assert page.tags.count("img") == 3
    assert "Trace 42 with standard error 0.5; positive eigenvalues sum to 45." in page.text


def test_the_command_prints_what_the_page_opens_with(run, capsys):
    report(ReportRequest(ReportConfig(run_dir=str(run))))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "Test loss"
    assert lines[4].split() == ["direct", "4.7000", "2.9000", "4.4000", "3.4400"]
    for sentence in headline(read_report_files(run)):
        assert sentence in lines
    assert lines[-1] == f"report: {run / 'report.html'}"


def test_a_run_without_a_selection_is_refused(tmp_path):
    run = write_annealed_run(tmp_path / "run")
    path = run / "selections" / "direct" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": False}))
    with pytest.raises(UserError, match="holds no finished selection named direct"):
        read_report_files(run)


def test_a_file_that_is_damaged_is_named(tmp_path):
    run = write_annealed_run(tmp_path / "run")
    path = run / "anneal" / "random" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": None}))
    with pytest.raises(UserError, match=r"random/result.json cannot be read: ArmResult"
                                        r".tokens: expected int, got None"):
        read_report_files(run)
