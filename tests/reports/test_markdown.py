"""The text of results: that its sentences follow the numbers."""

from __future__ import annotations

import copy

import pytest
from synthetic_run import write_run

from megatron_direct.comparison.summary import summarise
from megatron_direct.reports.markdown import results

ARMS = {"random": (0.0, 0.0, 0.0), "perplexity-low": (0.1, 0.01, 0.33),
        "gradient-dot": (-0.2, 0.01, 0.8), "flat-energy": (-0.4, 0.01, 1.3),
        "descent": (0.4, 0.01, 1.3)}
# The same arms where the default does worst.
REVERSED = {**ARMS, "descent": (-0.6, 0.01, 1.3)}


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [summarise(write_run(folder / name, arms, default="descent", name=name,
                                num_candidates=60, num_select=15, iterations=10, seeds=(1, 2, 3, 4),
                                missing={("gradient-dot", 3)} if name == "shifted" else ()))
            for name, arms in (("clean", ARMS), ("shifted", REVERSED))]


def _row(text, *cells):
    """The first table row that begins with these cells."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("| ").split("|")]
        if found[: len(cells)] == list(cells):
            return found
    raise AssertionError(f"no row begins with {cells}")


def _prose(text):
    return " ".join(text.split())


def test_the_table_over_settings(summaries):
    text = results(summaries)
    means = [arm["difference"]["mean"] for summary in summaries for arm in summary["arms"]
             if arm["name"] == "descent"]
    assert _row(text, "`descent`")[1:] == [f"**{means[0]:.3f}**", f"_+{means[1]:.3f}_"]


def test_sentences_follow_the_numbers(summaries):
    text = _prose(results(summaries))
    assert "Better than the reference wherever it was run: `perplexity-low`." in text
    assert "Worse than the reference wherever it was run: `gradient-dot` and `flat-energy`." in text
    assert "Lowest in clean: `descent`" in text and "Lowest in shifted: `perplexity-low`" in text
    assert "in 1 of 2 settings (clean), and worse than at least one of them in 1 (shifted)" in text
    # The same text of the first setting alone says so.
    text = _prose(results(summaries[:1]))
    assert "in 1 of 1 settings (clean), and worse than at least one of them in 0 (none)" in text


def test_figures_come_from_the_summary(summaries):
    text = results(summaries)
    found = summaries[1]["default_against"]["gradient-dot"]
    assert found["num_pairs"] == 3
    row = _row(text, "shifted", "`gradient-dot`")
    assert row[2] == f"{found['mean']:+.4f}" and row[5] == "worse"
    assert "Without a result: gradient-dot (seed 3)." in _prose(text)
    paper = next(arm for arm in summaries[0]["arms"] if arm["name"] == "flat-energy")
    assert (f"`flat-energy`, the paper's own objective, in clean: {paper['mean_loss']:.4f}, "
            "place 5 of 5") in _prose(text)


def test_what_choosing_costs(summaries):
    def sentence(summary, **cost):
        summary = copy.deepcopy(summary)
        next(a for a in summary["arms"] if a["name"] == "descent")["cost"].update(cost)
        return _prose(results([summary]))

    cheap = {"share_of_annealing": 0.25, "annealing_left": 0.75}
    assert "on 75 % of the annealing's tokens. That was not measured;" in sentence(
        summaries[0], **cheap)
    assert "on 75 % of the annealing's tokens, and it does not reach it on all" in sentence(
        summaries[1], **cheap)
    assert "no saving of its tokens pays for it" in sentence(
        summaries[0], share_of_annealing=1.5, annealing_left=0.0)


def test_it_says_how_to_run_it_again(summaries):
    text = results(summaries, "make study")
    assert "```bash\nmake study\n```" in text
    assert "--num-select 15" in text and "--name clean" in text and "--num-seeds 4" in text
    assert "--pilot-iters 20" in text and "--normalize-gradients" in text
    assert "digest" not in text and "None" not in text


def test_lines_are_short(summaries):
    assert max(map(len, results(summaries).splitlines())) <= 110


def test_arms_that_were_not_run_are_named_as_such(summaries):
    summary = copy.deepcopy(summaries[0])
    summary["arms"] = [arm for arm in summary["arms"] if arm["name"] != "flat-energy"]
    summary["default_against"] = {}
    text = _prose(results([summary]))
    assert "`flat-energy`, the paper's own objective, was not run in clean." in text
    assert "The default was not run." in text


def test_nothing_to_compare(summaries):
    assert "Nothing has been compared yet" in results([])


def test_the_default_is_read_against_what_could_be_had(summaries):
    summary = copy.deepcopy(summaries[0])
    arms = {arm["name"]: arm for arm in summary["arms"]}
    arms["perplexity-low"]["name"] = "oracle"
    of_default, of_oracle = arms["descent"]["losses"], arms["perplexity-low"]["losses"]
    mean = sum(of_default[seed] - of_oracle[seed] for seed in of_oracle) / len(of_oracle)
    text = _prose(results([summary]))
    assert f"`descent` less other arms: `oracle` ({mean:+.4f} [" in text
    assert "less other arms" not in results(summaries[:1])  # it has none of them
