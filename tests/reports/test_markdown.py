"""The text of results: that its sentences follow the numbers."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from synthetic_run import write_run

from megatron_direct.comparison.repeats import Repeats
from megatron_direct.comparison.summarise import summarise
from megatron_direct.reports.markdown import results
from megatron_direct.reports.wording import default_sentence, lowest_sentence

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
    means = [summary.arm("descent").difference.mean for summary in summaries]
    assert _row(text, "`descent`")[1:] == [f"**{means[0]:.3f}**", f"_+{means[1]:.3f}_"]


def test_sentences_follow_the_numbers(summaries):
    text = _prose(results(summaries))
    assert "Better than the reference wherever it has a result: `perplexity-low`." in text
    assert ("Worse than the reference wherever it has a result: `gradient-dot` and `flat-energy`."
            in text)
    assert "Lowest in clean: `descent`" in text and "Lowest in shifted: `perplexity-low`" in text
    assert "in 1 of 2 settings (clean), and worse than at least one of them in 1 (shifted)" in text
    text = _prose(results(summaries[:1]))
    assert "in 1 of 1 setting (clean), and worse than at least one of them in 0 (none)" in text


def test_it_opens_with_a_verdict_for_each_setting(summaries):
    text = _prose(results(summaries))
    opening = text[: text.index("Arms are annealed")]
    for summary, verdict in zip(summaries, ("better", "worse"), strict=True):
        arm = summary.arm("descent")
        assert (f"- {summary.setting.name}: descent, the default of select, ends with a mean test "
                f"loss of {arm.mean_loss:.4f} per token, {abs(arm.difference.mean):.4f} "
                f"{'below' if verdict == 'better' else 'above'} random") in opening
    assert re.findall(r"Verdict: \*\*(\w+)\*\*", opening) == ["better", "worse"]


def test_figures_come_from_the_summary(summaries):
    text = results(summaries)
    found = summaries[1].default_against["gradient-dot"]
    assert found.num_pairs == 3
    row = _row(text, "shifted", "`gradient-dot`")
    assert row[2] == f"{found.mean:+.4f}" and row[5] == "worse"
    assert "No result for gradient-dot (seed 3)." in _prose(text)
    paper = summaries[0].arm("flat-energy")
    assert (f"`flat-energy`, the paper's own objective, in clean: {paper.mean_loss:.4f}, "
            "place 5 of 5") in _prose(text)


def test_it_says_how_to_run_it_again(summaries):
    text = results(summaries, "make study")
    assert "```bash\nmake study\n```" in text
    assert "--num-select 15" in text and "--name clean" in text and "--num-seeds 4" in text
    assert "--pilot-iters 20" in text and "--normalize-gradients" in text
    assert "digest" not in text and "None" not in text


def test_lines_are_short(summaries):
    assert max(map(len, results(summaries).splitlines())) <= 110


def _with_arms(summary, change):
    """The summary with each arm changed, or left out where it is changed to None."""
    arms = [change(arm) for arm in summary.arms]
    return replace(summary, arms=tuple(arm for arm in arms if arm is not None))


def test_arms_that_were_not_run_are_named_as_such(summaries):
    summary = _with_arms(summaries[0], lambda arm: None if arm.name == "flat-energy" else arm)
    text = _prose(results([replace(summary, default_against={})]))
    assert "`flat-energy`, the paper's own objective, was not run in clean." in text
    assert "The default was not run." in text


def test_nothing_to_compare():
    assert "Nothing has been compared yet" in results([])


def test_the_default_is_compared_with_what_could_be_had(summaries):
    summary = _with_arms(summaries[0], lambda arm: replace(
        arm, name={"perplexity-low": "oracle"}.get(arm.name, arm.name)))
    of_default, of_oracle = summary.arm("descent").losses, summary.arm("oracle").losses
    mean = sum(of_default[seed] - of_oracle[seed] for seed in of_oracle) / len(of_oracle)
    text = _prose(results([summary]))
    assert f"`descent` minus other arms: `oracle` ({mean:+.4f} [" in text
    assert "minus other arms" not in results(summaries[:1])  # it has none of them


def test_two_settings_of_one_name_are_not_mixed_up(summaries):
    same = [replace(s, setting=replace(s.setting, name="same")) for s in summaries]
    row = _row(results(same), "`descent`")
    assert row == _row(results(summaries), "`descent`")


def test_text_of_users_is_shown_and_not_interpreted(summaries):
    """The setting's name and those of test sets: no markup, no further cell, no further line."""
    hostile = "<script>alert(1)</script> | `tick` *x*\n- y\n```\nrm -r ~"
    summary = summaries[0]
    tests = dict(zip(summary.setting.test, (f"a_{hostile}_test", "a_b_test"), strict=True))
    summary = _with_arms(summary, lambda arm: replace(
        arm, tests={tests.get(name, name): loss for name, loss in arm.tests.items()}))
    text = results([replace(summary, setting=replace(
        summary.setting, name=hostile, test=tuple(tests.values())))])
    prose, block = text.split("````bash\n")
    # Outside of code spans, everything that would be markup is escaped.
    assert prose.count("script") >= 8
    assert not re.search(r"(?<!\\)[<>]", re.sub(r"`[^`\n]*`", "", prose.replace("\\`", "")))
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    assert any("script" in line for line in tables)
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in tables}
    # Of the tables' two, five, six and seven columns, with what is outside the edges.
    assert widths == {4, 7, 8, 9}
    assert not any(line.startswith(("- y", "```", "rm ")) for line in prose.splitlines())
    # The command's comment is one line, and its quoted name ends before the block does.
    assert block.splitlines()[0].startswith("# <script>") and block.endswith("\n````\n")
    words = shlex.split(block[block.index("megatron-direct"): block.rindex("````")])
    assert hostile in words


def test_averages_are_compared_with_averages(tmp_path):
    arms = {"random": (0.0, 0.0, 0.0), "random-averaged": (0.1, 0.01, 0.0),
            "stable-averaged": (0.2, 0.01, 0.0), "direct-averaged": (0.5, 0.01, 1.3)}
    summary = summarise(write_run(tmp_path / "run", arms, default="direct-averaged"))
    text = results([replace(summary, arms=tuple(
        replace(arm, repeats=Repeats(0.618, 0.25), shared_by_seeds=Repeats(0.5, 0.204))
        if arm.name == "direct-averaged" else arm
        for arm in summary.arms))])
    losses = {arm.name: arm.losses for arm in summary.arms}
    for other in ("random-averaged", "stable-averaged"):
        mean = sum(losses["direct-averaged"][seed] - loss for seed, loss in losses[other].items())
        row = _row(text, "quarter corrupted", "`direct-averaged`", f"`{other}`")
        assert row[3] == f"{mean / 5:+.4f}" and row[5] == "better"
    assert "`whole-pool-averaged`" not in text
    # Of 60 x 16 x 256 tokens of annealing; choosing costs 1.3 passes over the pool.
    share = 1.3 * summary.pool.candidates.tokens / (60 * 16 * 256)
    assert _row(text, "`direct-averaged`", "246 k")[2:] == [f"{share:.0%}".replace("%", " %"),
                                                            "62 % (25 %)", "50 % (20 %)"]


def test_arms_that_lack_seeds_are_not_ranked_by_means_over_others(tmp_path):
    """An arm that was run on an easy seed alone, and is worse than the default there."""
    arms = {"random": (0.0, 0.0, 1.0), "descent": (0.4, 0.01, 1.0), "ngrams": (0.3, 0.01, 1.0)}
    folder = write_run(tmp_path / "run", arms, default="descent", name="one", seeds=(1, 2, 3),
                       missing={("ngrams", 2), ("ngrams", 3)})
    for result in folder.glob("arms/*/1/result.json"):  # the easy seed
        found = json.loads(result.read_text())
        found["after"]["test"] = {name: loss - 1 for name, loss in found["after"]["test"].items()}
        result.write_text(json.dumps(found))
    summary = summarise(folder)
    assert summary.arm("ngrams").mean_loss < summary.arm("descent").mean_loss
    assert [arm.name for arm in summary.ranked] == ["descent", "random"]
    text = _prose(results([summary]))
    assert _row(results([summary]), "`ngrams`")[1].endswith(" (1)")
    assert _row(results([summary]), "`descent`")[1].startswith("**")
    assert "Lowest in one: `descent`" in text and "With one seed, and below it" not in text
    assert re.search(r"\| `ngrams` .*\| too few seeds *\| *1 \|", results([summary]))
    assert "with all 3 seeds is that of descent" in lowest_sentence(summary)
    assert "not compared, for too few seeds, with ngrams" in default_sentence(summary)


def test_why_an_arm_failed_is_said(tmp_path):
    folder = write_run(tmp_path / "run", ARMS, default="descent", name="one",
                       missing={("flat-energy", 2)})
    path = folder / "arms" / "flat-energy" / "2" / "failed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"error": "the loss of iteration 7 is nan. Lower --lr."}))
    summary = summarise(folder)
    assert summary.finished
    assert ("No result for flat-energy (seed 2). Failed: flat-energy, seed 2: the loss of "
            "iteration 7 is nan. Lower --lr." in _prose(results([summary])))


def test_results_of_several_versions_are_told_apart(tmp_path):
    folder = write_run(tmp_path / "run", ARMS, default="descent", name="one")
    assert "several versions" not in results([summarise(folder)])
    for number, result in enumerate(sorted(folder.glob("arms/descent/*/result.json"))):
        found = json.loads(result.read_text())
        result.write_text(json.dumps({**found, "version": f"0.{number % 2 + 1}.0"}))
    assert ("made by several versions of megatron-direct: descent by 0.1.0 and 0.2.0."
            in _prose(results([summarise(folder)])))


def test_what_else_distinguishes_an_arm_is_said(tmp_path):
    text = _prose(results([summarise(write_run(tmp_path / "run", {
        **ARMS, "direct-rounds": (0.1, 0.1, 1.0), "direct-averaged": (0.1, 0.1, 1.0)},
        default="descent", name="one"))]))
    assert ("in the samples they see (one that ends in `-averaged` averages its last weights; one "
            "that ends in `-rounds` selects anew on its way). The loss" in text)


def test_the_ceiling_is_the_last_line_and_what_share_of_it_the_default_has(tmp_path):
    arms = {**ARMS, "ceiling": (0.8, 0.01, 5.0)}
    text = results([summarise(write_run(tmp_path / "run", arms, default="descent", name="one"))])
    tables = [table for table in text.split("\n\n")
              if "`ceiling`" in table and table.startswith("| arm")]
    assert len(tables) == 3
    for table in tables:
        assert table.splitlines()[-1].startswith("| `ceiling`")
    assert re.search(r"`descent` has (4[89]|5[012]) % of its gain\.", _prose(text))


@pytest.mark.parametrize(("effect", "words"), [
    (0.8, r"`descent` has \d\d % of its gain, by too few seeds for an interval\."),
    (0.3, r"`descent` has 1\d\d % of its gain, by too few seeds for an interval, so which clusters "
          r"is not all there is to gain\."),
    (-0.2, "nothing to gain was found"),
])
def test_a_ceiling_of_one_seed_says_so(tmp_path, effect, words):
    run = write_run(tmp_path / "run", {**ARMS, "ceiling": (effect, 0.01, 5.0)}, default="descent",
                    name="one", missing=[("ceiling", seed) for seed in (2, 3, 4, 5)])
    summary = summarise(run)
    text = _prose(results([summary]))
    assert re.search(words, text)
    if effect > 0:  # what the default has at that seed, not at others
        ceiling, default, reference = (summary.arm(name).losses[1] for name in (
            "ceiling", "descent", summary.reference))
        share = (default - reference) / (ceiling - reference)
        assert f"`descent` has {100 * share:.0f} % of its gain" in text
