"""The results of one or several comparisons as Markdown, for a file that is kept in a repository.

Every sentence is made from the summaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_direct.comparison.statistics import (
    BETTER,
    UNCLEAR,
    WORSE,
    PairedDifference,
    compare_by_seed,
)
from megatron_direct.comparison.summary import (
    AVERAGES,
    CEILING,
    PAPER_ARM,
    YARDSTICKS,
    ArmSummary,
    ComparisonSummary,
    seeds_that_count,
)
from megatron_direct.reports import wording
from megatron_direct.reports.markdown_blocks import (
    bullets,
    code,
    code_block,
    escape,
    paragraph,
    table,
)
from megatron_direct.reports.repeat_command import repeat_command

_MARKS = {BETTER: "**", WORSE: "_", UNCLEAR: ""}


def results(summaries: Sequence[ComparisonSummary], again: str = "", about: str = "") -> str:
    """The text. again: a command that repeats all of it, where there is one; about: what the
    settings are, in Markdown."""
    compared = [summary for summary in summaries if summary.compared]
    if not compared:
        return "# Results\n\nNothing has been compared yet.\n"
    parts = ["# Results", bullets(map(_verdict, compared)), paragraph(_how_to_read(compared)),
             about, *_over_settings(compared), "## The default compared with the other arms",
             *_defaults(compared), *_averages(compared)]
    for summary in compared:
        parts += _of_setting(summary)
    parts += ["## Reproducing these results", *_again(compared, again)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _name(summary: ComparisonSummary) -> str:
    return escape(summary.setting.name)


def _verdict(summary: ComparisonSummary) -> str:
    """The difference between the default and the reference."""
    sentence = f"{_name(summary)}: {wording.headline(summary)}"
    arm = summary.arm(summary.default_arm)
    if arm not in summary.compared:
        return sentence
    return f"{sentence} Verdict: **{wording.verdict(arm.difference)}**."


def _how_to_read(summaries: Sequence[ComparisonSummary]) -> str:
    reference = wording.listed(_quoted(dict.fromkeys(s.reference for s in summaries)))
    confidence = wording.percent(max(summary.confidence for summary in summaries))
    return (
        "Arms are annealed from one checkpoint with the same tokens, schedule and batches, and "
        f"differ in the samples they see{_but_for(summaries)}. The loss is a mean over the test "
        f"sets, which no selection saw; lower is better. Differences from {reference} are paired "
        "by seed. An interval spans a bootstrap interval and a Student t interval at "
        f"{confidence} each, and an arm is better or worse only if both exclude zero. p is the "
        "p-value of a sign-flip test after Holm's correction for the number of arms; with few "
        "seeds it cannot be small, whatever the difference. *tokens* are those that an arm is "
        "trained on after the checkpoint; *choosing* is what its choice costs, as a share of the "
        "annealing; *repeats* is the share of its choice, before any draw at random, that is the "
        "same when it is made from either half of the validation set and of the sketch's "
        "coordinates, with another seed; *seeds share* is the share of the samples it was annealed "
        "on that two seeds have in common, whose validation samples, hash and draws differ. In "
        "brackets is what random selections of that size share. This text is written from the "
        "numbers by `megatron-direct compare`.")


# What else distinguishes an arm of such a name.
_OTHER_DIFFERENCES = {
    "stable-averaged": "sees none", "-constant-averaged": "keeps the learning rate",
    "-moderate-averaged": "ends at a moderate one", "-averaged": "averages its last weights",
    "-rounds": "selects anew on its way"}


def _but_for(summaries: Sequence[ComparisonSummary]) -> str:
    """The arms that differ in something else."""
    there = {arm.name for summary in summaries for arm in summary.measured}
    found = []
    for end, what in _OTHER_DIFFERENCES.items():
        names = sorted(name for name in there if name.endswith(end))
        there -= set(names)
        if names:
            found.append(f"one that ends in `{end}` {what}" if end[0] == "-"
                         else f"`{end}` {what}")
    return f" ({'; '.join(found)})" if found else ""


def _over_settings(summaries: Sequence[ComparisonSummary]) -> list[str]:
    """A table of arms by settings, and what follows from it."""
    found: dict[str, dict[int, PairedDifference]] = {}  # arm -> number of the setting -> difference
    for number, summary in enumerate(summaries):
        for arm in summary.compared:
            found.setdefault(arm.name, {})[number] = arm.difference

    def mean_difference(arm: str) -> float:
        return sum(d.mean or 0.0 for d in found[arm].values()) / len(found[arm])

    seeds = [len(seeds_that_count(summary.arms)) for summary in summaries]

    def lacks_seeds(arm: str) -> bool:
        return all(d.num_pairs < seeds[number] for number, d in found[arm].items())

    arms = sorted(found, key=lambda arm: (arm == CEILING, lacks_seeds(arm), mean_difference(arm)))
    rows = [[code(arm), *(_marked(found[arm].get(number), of) for number, of in enumerate(seeds))]
            for arm in arms]
    always = {verdict: [arm for arm in arms if all(
        wording.verdict(difference) == verdict for difference in found[arm].values())]
        for verdict in _MARKS}
    return [
        "## Differences by setting",
        paragraph("Difference from the reference in mean test loss. Bold: better; italic: worse; "
                  "plain: no clear difference. In brackets the number of seeds of an arm that "
                  "lacks some: its differences are of those."),
        table(["arm", *map(_name, summaries)], rows, left=[0]),
        bullets([
            f"Better than the reference wherever it has a result: {_arms(always[BETTER])}.",
            f"Worse than the reference wherever it has a result: {_arms(always[WORSE])}.",
            f"No clear difference wherever it has a result: {_arms(always[UNCLEAR])}.",
            *map(_lowest, summaries), *map(_paper, summaries),
            *filter(None, map(_ceiling, summaries))])]


def _marked(difference: PairedDifference | None, seeds: int) -> str:
    """seeds: that the most complete arm has."""
    if difference is None:
        return "-"
    mark = _MARKS[difference.verdict]
    lacking = f" ({difference.num_pairs})" if difference.num_pairs < seeds else ""
    return f"{mark}{difference.mean:+.3f}{mark}{lacking}"


def _lowest(summary: ComparisonSummary) -> str:
    """The arm of lowest loss, and those that a paired comparison does not tell from it."""
    best = summary.ranked[0]
    others = {arm.name: compare_by_seed(arm.losses, best.losses)
              for arm in summary.measured if arm is not best}
    level = [name for name, found in others.items()
             if found.interval is not None and found.verdict == UNCLEAR]
    sentence = (f"Lowest in {_name(summary)}: {code(best.name)}, {wording.loss(best.mean_loss)}; "
                f"not clearly different from it: {_arms(level)}.")
    below = [f"{code(name)} ({wording.signed(found.mean)})" for name, found in others.items()
             if found.interval is None and found.mean is not None and found.mean < 0]
    if below and len(best.seeds) > 1:
        sentence += f" With one seed, and below it there: {wording.listed(below)}."
    tests = summary.setting.test
    if len(tests) > 1:
        short = wording.short_names(tests)
        lowest = {test: min((arm.tests[test], arm.name) for arm in summary.ranked)[1]
                  for test in tests}
        sentence += " By test set: " + wording.listed(
            f"{escape(short[test])} {code(lowest[test])}" for test in tests) + "."
    return sentence


def _paper(summary: ComparisonSummary) -> str:
    """The paper's own objective in a setting, whatever its place."""
    ranked = summary.ranked
    paper = summary.arm(PAPER_ARM)
    if paper not in summary.measured:
        return f"{code(PAPER_ARM)}, the paper's own objective, was not run in {_name(summary)}."
    found = paper.difference
    place = f"place {ranked.index(paper) + 1} of {len(ranked)}" if paper in ranked else \
        wording.seeds_in_words(paper.seeds)
    return (f"{code(PAPER_ARM)}, the paper's own objective, in {_name(summary)}: "
            f"{wording.loss(paper.mean_loss)}, {place}, "
            f"{wording.signed(found.mean)} {wording.interval(found)} compared with "
            f"{code(summary.reference)}: {wording.verdict(found)}.")


def _ceiling(summary: ComparisonSummary) -> str:
    """How much of what a search found is had by the default, at the seeds of the ceiling; empty
    where none was made."""
    ceiling, default = summary.arm(CEILING), summary.arm(summary.default_arm)
    reference = summary.arm(summary.reference)
    if ceiling not in summary.compared or default not in summary.compared or reference is None:
        return ""
    assert ceiling is not None and default is not None, "compared"
    shared = ceiling.losses.keys() & default.losses.keys() & reference.losses.keys()
    found = ceiling.difference
    sentence = (f"{code(CEILING)}, the best mixture of clusters that a search found for the "
                f"validation set, in {_name(summary)}: "
                f"{wording.with_numbers(wording.loss(ceiling.mean_loss), found)}")
    has_too_few_seeds = found.interval is None
    of_default, of_ceiling = (sum(arm.losses[seed] - reference.losses[seed] for seed in shared)
                              for arm in (default, ceiling))
    if of_ceiling >= 0 or not (has_too_few_seeds or found.verdict == BETTER):
        return f"{sentence}: nothing to gain was found."
    share = of_default / of_ceiling
    return (f"{sentence}; {code(default.name)} has {wording.percent(share)} of its gain"
            f"{', by too few seeds for an interval' if has_too_few_seeds else ''}"
            f"{', so which clusters is not all there is to gain' if share > 1 else ''}.")


def _defaults(summaries: Sequence[ComparisonSummary]) -> list[str]:
    """default - other, by setting; first how often the default beats them all."""
    parts = []
    for default in dict.fromkeys(summary.default_arm for summary in summaries):
        mine = [s for s in summaries if s.default_arm == default and s.default_against]
        if not mine:
            continue
        best, bad = [], []
        for summary in mine:
            verdicts = {difference.verdict for difference in summary.default_against.values()}
            if verdicts == {BETTER}:
                best.append(_name(summary))
            if WORSE in verdicts:
                bad.append(_name(summary))
        parts.append(paragraph(
            f"{code(default)} is what `select` uses by default. It is better than every arm that "
            f"it is compared with here in {len(best)} of {wording.counted(len(mine), 'setting')} "
            f"({wording.listed(best)}), and worse than at least one of them in {len(bad)} "
            f"({wording.listed(bad)}). p is corrected for the rows of a setting."))
    rows = [[_name(summary), code(other), *_figures(found)]
            for summary in summaries for other, found in summary.default_against.items()]
    if not rows:
        return [paragraph("The default was not run.")]
    return [*parts, table(["setting", "other arm", "default - other", "interval", "p (Holm)",
                           "the default is"], rows, left=[0, 1, 5])]


def _averages(summaries: Sequence[ComparisonSummary]) -> list[str]:
    """The default's selection with averaged weights, against averages of others."""
    rows = []
    for summary in summaries:
        losses = {arm.name: arm.losses for arm in summary.measured}
        rows += [[_name(summary), code(mine), code(other), wording.signed(found.mean),
                  wording.interval(found), wording.verdict(found)]
                 for mine, others in AVERAGES for other in others
                 if mine in losses and other in losses
                 for found in [compare_by_seed(losses[mine], losses[other])]]
    if not rows:
        return []
    return ["## Against averages of weights", paragraph(
        "Two arms of one name but for its beginning are annealed the same way, on the same number "
        "of tokens; `stable-averaged` sees none after the checkpoint."),
        table(["setting", "arm", "other arm", "arm - other", "interval", "the arm is"], rows,
              left=[0, 1, 2, 5])]


def _figures(difference: PairedDifference) -> list[str]:
    return [wording.signed(difference.mean), wording.interval(difference),
            wording.p_value(difference.p_holm), wording.verdict(difference)]


def _of_setting(summary: ComparisonSummary) -> list[str]:
    ordered = sorted(summary.arms, key=lambda arm: arm.name == CEILING)
    rows = [[code(arm.name), wording.loss(arm.mean_loss),
             *([""] * 4 if arm.name == summary.reference else _figures(arm.difference)),
             str(len(arm.seeds))] for arm in ordered]
    rows.insert(len(rows) - (summary.arm(CEILING) is not None),
                ["(before annealing)", wording.loss(summary.loss_before), *[""] * 5])
    sentences = [wording.setting_sentence(summary), wording.repetition_sentence(summary),
                 wording.missing_sentence(summary), wording.versions_sentence(summary),
                 wording.chance_sentence(summary), wording.cost_sentence(summary)]
    return [f"## {_name(summary)}",
            paragraph(" ".join(sentence for sentence in sentences if sentence)),
            table(["arm", "mean test loss", f"arm - {code(summary.reference)}", "interval",
                   "p (Holm)", "verdict", "seeds"], rows, left=[0, 5]), _yardsticks(summary),
            table(["arm", "tokens", "choosing", "repeats (by chance)", "seeds share (by chance)"],
                  [[code(arm.name), *_tokens_and_repeats(arm)] for arm in ordered], left=[0])]


def _tokens_and_repeats(arm: ArmSummary) -> list[str]:
    """What the arm sees after the checkpoint; what choosing costs, as a share of that; how much of
    the choice repeats, and how much seeds share, each also by chance."""
    return [wording.thousands(arm.cost.tokens), wording.percent(arm.cost.share_of_annealing),
            wording.repeats(arm.repeats), wording.repeats(arm.shared_by_seeds)]


def _yardsticks(summary: ComparisonSummary) -> str:
    """The default minus arms that are not its rivals: what cannot be had, and its own parts."""
    default = summary.arm(summary.default_arm)
    if default not in summary.measured:
        return ""
    found = {arm.name: compare_by_seed(default.losses, arm.losses)
             for name in YARDSTICKS for arm in summary.measured if arm.name == name}
    if not found:
        return ""
    parts = [f"{wording.with_numbers(code(name), difference)}, {wording.verdict(difference)}"
             for name, difference in found.items()]
    return paragraph(f"{code(default.name)} minus other arms: {'; '.join(parts)}.")


def _again(summaries: Sequence[ComparisonSummary], again: str) -> list[str]:
    """Commands; optimizer and model are as the checkpoint says where they are left out."""
    commands = [f"# {' '.join(s.setting.name.split())}\n{repeat_command(s)}" for s in summaries]
    if not again:
        return [code_block("\n\n".join(commands), "bash")]
    return ["All of it:", code_block(again, "bash"),
            "The first setting alone, once checkpoint and datasets are there:",
            code_block(commands[0], "bash")]


def _quoted(names: Iterable[str]) -> list[str]:
    return [code(name) for name in names]


def _arms(names: Iterable[str]) -> str:
    return wording.listed(_quoted(names))
