"""Figures and findings of a comparison in words, for the page and the text alike.

Every sentence is made from the numbers: none can contradict them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from megatron_direct.comparison.repeats import Repeats
from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE, PairedDifference
from megatron_direct.comparison.summary import ComparisonSummary


def short_names(names: Sequence[str]) -> dict[str, str]:
    """name -> name without the words, split at ``_``, that all begin and end with."""
    if len(names) < 2:
        return {name: name for name in names}
    words = [name.split("_") for name in names]
    head = len(os.path.commonprefix(words))
    words = [of_name[head:] for of_name in words]
    tail = len(os.path.commonprefix([of_name[::-1] for of_name in words]))
    short = ["_".join(of_name[: len(of_name) - tail]) for of_name in words]
    return dict(zip(names, short if all(short) else names, strict=True))


def loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def interval(difference: PairedDifference) -> str:
    """The span of both intervals."""
    if difference.interval is None:
        return "-"
    return "[{:+.4f}, {:+.4f}]".format(*difference.interval)


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value >= 0.001 else "< 0.001"


def thousands(count: int) -> str:
    return f"{round(count / 1000):,} k" if count else "0"


def repeats(found: Repeats | None) -> str:
    """What repeats, and what would by chance."""
    return "-" if found is None else f"{percent(found.samples)} ({percent(found.by_chance)})"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def verdict(difference: PairedDifference) -> str:
    """As the statistics have it; with too few seeds, that nothing can be said."""
    return "too few seeds" if difference.interval is None else difference.verdict


def listed(items: Iterable[str], nothing: str = "none") -> str:
    """a, b and c."""
    items = list(items)
    if len(items) < 2:
        return items[0] if items else nothing
    return f"{', '.join(items[:-1])} and {items[-1]}"


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def with_numbers(name: str, difference: PairedDifference) -> str:
    """arm (mean difference, interval), or no interval where there is none."""
    numbers = [signed(difference.mean)]
    if difference.interval is not None:
        numbers.append(interval(difference))
    return f"{name} ({' '.join(numbers)})"


def below(difference: float) -> str:
    """The size and sign of a difference of losses: 0.0100 below, 0.0100 above, or level with."""
    size = f"{abs(difference):.4f}"
    if float(size) == 0:
        return "level with"
    return f"{size} {'below' if difference < 0 else 'above'}"


def by_verdict(differences: Mapping[str, PairedDifference]) -> dict[str, list[str]]:
    """verdict -> names."""
    found: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for name, difference in differences.items():
        found[difference.verdict].append(name)
    return found


def headline(summary: ComparisonSummary) -> str:
    """Where the default arm ends; the verdict is left to the reader of the difference."""
    name, reference = summary.default_arm, summary.reference
    arm = summary.arm(name)
    if arm is None or arm.mean_loss is None:
        return f"{name}, the default of select, has no result in this comparison."
    sentence = (f"{name}, the default of select, ends with a mean test loss of "
                f"{loss(arm.mean_loss)} per token")
    found = arm.difference
    if name == reference or found.mean is None:
        return f"{sentence}; there is no result for {reference} to compare it with."
    sentence += f", {below(found.mean)} {reference}"
    if found.interval is None:
        return f"{sentence} with the one seed that both have."
    return (f"{sentence} ({percent(summary.confidence)} interval of the difference "
            f"{interval(found)}, {found.num_pairs} seeds).")


def lowest_sentence(summary: ComparisonSummary) -> str:
    if not summary.ranked:
        return "No arm has a result yet."
    best, lacking = summary.ranked[0], len(summary.measured) > len(summary.ranked)
    among = f" of the arms with all {len(best.seeds)} seeds" if lacking else ""
    return (f"The lowest mean test loss{among} is that of {best.name}: {loss(best.mean_loss)}, "
            f"against {loss(summary.loss_before)} before annealing.")


def default_sentence(summary: ComparisonSummary) -> str:
    """What the default arm is to the reference and each rival that was run."""
    name, against = summary.default_arm, summary.default_against
    if not against:
        return (f"{name}, the default of select, was not run, or none of the arms that it is "
                "compared with.")
    if not any(difference.interval for difference in against.values()):
        return f"{name}, the default of select, has too few seeds to be compared."
    found = by_verdict({other: difference for other, difference in against.items()
                        if difference.interval is not None})
    found["too few seeds"] = [other for other, difference in against.items()
                              if difference.interval is None]
    parts = [f"{words} {listed(found[which])}" for which, words in (
        (BETTER, "better than"), (UNCLEAR, "not clearly different from"), (WORSE, "worse than"),
        ("too few seeds", "not compared, for too few seeds, with")) if found[which]]
    return f"{name}, the default of select, is {'; '.join(parts)}."


def chance_sentence(summary: ComparisonSummary) -> str:
    """How little a few seeds can show."""
    arms = [arm for arm in summary.compared if arm.difference.interval is not None]
    if not arms:
        return (f"No arm shares two seeds with {summary.reference}, so there are no confidence "
                "intervals.")
    seeds = max(arm.difference.num_pairs for arm in arms)
    by_chance = (1 - summary.confidence) * len(arms)
    return (f"With {seeds} seeds no p-value can be below {2.0 ** (1 - seeds):.4g}, even before the "
            f"correction for {counted(len(arms), 'arm')}. If no arm differed from "
            f"{summary.reference}, up to about {by_chance:.1f} of them would still be called "
            "better or worse by chance.")


def setting_sentence(summary: ComparisonSummary) -> str:
    setting = summary.setting
    left_open = (f" (seed {setting.seeds[0]}; the default of select takes as many as are worth it, "
                 "the others as many, or half of the pool where it takes all of it)"
                 if summary.identity.get("num_select") == "auto" else "")
    return (f"{setting.num_select:,} of {setting.num_candidates:,} samples are selected"
            f"{left_open}; the model "
            f"has {setting.parameters / 1e6:.3g} M parameters; each annealing runs for "
            f"{counted(setting.iterations, 'iteration')} on {setting.tokens / 1e3:,.0f} thousand "
            f"tokens; {seeds_in_words(setting.seeds)}.")


def seeds_in_words(seeds: Sequence[int]) -> str:
    """seeds 1 to 12, or each by number."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(map(str, seeds))}"


def repetition_sentence(summary: ComparisonSummary) -> str:
    """How often the annealing sees the selected samples, from the most tokens to the fewest."""
    tokens = sorted((-arm.selected.tokens_of_an_epoch, arm.name)
                    for arm in summary.arms if arm.selected)
    if not tokens:
        return ""
    times = [f"{summary.setting.tokens / -tokens_of_arm:.2g} times ({name})"
             for tokens_of_arm, name in (tokens[0], tokens[-1])]
    return f"The annealing sees the selected samples {times[0]} to {times[1]}."


def missing_sentence(summary: ComparisonSummary) -> str:
    """Which runs are missing, and why those that failed; empty if none is."""
    missing = [f"{arm.name} ({seeds_in_words(arm.missing)})"
               for arm in summary.arms if arm.missing]
    failed = [f"{arm.name}, seed {seed}: {why.rstrip('.')}"
              for arm in summary.arms for seed, why in arm.failed.items()]
    return " ".join([*([f"No result for {listed(missing)}."] if missing else []),
                     *([f"Failed: {'; '.join(failed)}."] if failed else [])])


def versions_sentence(summary: ComparisonSummary) -> str:
    """Which results are of which version; empty if all are of one."""
    arms: dict[tuple[str, ...], list[str]] = {}
    for arm in summary.arms:
        if arm.versions:
            arms.setdefault(arm.versions, []).append(arm.name)
    if len(set().union(*arms)) < 2:
        return ""
    found = [f"{listed(names)} by {listed(of_names)}" for of_names, names in arms.items()]
    return f"Results were made by several versions of megatron-direct: {'; '.join(found)}."


def cost_sentence(summary: ComparisonSummary) -> str:
    """What selecting with the default costs; empty if that is not known."""
    arm = summary.arm(summary.default_arm)
    if arm is None or arm.cost.share_of_annealing is None:
        return ""
    cost = arm.cost
    sentence = (f"Selecting with {arm.name} costs {cost.passes:.2g} training passes over the pool, "
                f"{percent(cost.share_of_annealing)} of the annealing itself")
    if cost.annealing_left == 0:
        return (f"{sentence}. The annealing here is so short that no saving of its tokens would "
                "pay for that.")
    sentence += (f". That pays off if {arm.name} reaches the loss of {summary.reference} on "
                 f"{percent(cost.annealing_left)} of the annealing's tokens")
    gain = arm.difference.mean
    if gain is not None and gain >= 0:
        return f"{sentence}; it does not reach it on all of them."
    if cost.needed_at_most is None:
        return f"{sentence}, which was not measured."
    return (f"{sentence}, which was not measured; if each further token brings less than the one "
            f"before, it needs at most {percent(cost.needed_at_most)}.")
