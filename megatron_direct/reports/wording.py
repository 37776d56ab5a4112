"""Figures and findings of a summary in words, for the page and the text alike.

Every sentence is made from the numbers: none is there that other numbers would contradict.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE


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


def interval(difference: dict) -> str:
    """The span of both intervals."""
    if difference["interval"] is None:
        return "-"
    return "[{:+.4f}, {:+.4f}]".format(*difference["interval"])


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value >= 0.001 else "< 0.001"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def verdict(difference: dict) -> str:
    """As the statistics have it; for too few seeds, that nothing can be said."""
    if difference["interval"] is None:
        return "too few seeds"
    return difference["verdict"]


def listed(items: Iterable[str], nothing: str = "none") -> str:
    """a, b and c."""
    items = list(items)
    if len(items) < 2:
        return items[0] if items else nothing
    return f"{', '.join(items[:-1])} and {items[-1]}"


def with_numbers(name: str, difference: dict) -> str:
    """arm (mean difference, interval), or no interval where there is none."""
    numbers = [signed(difference["mean"])]
    if difference["interval"] is not None:
        numbers.append(interval(difference))
    return f"{name} ({' '.join(numbers)})"


def by_verdict(differences: dict[str, dict]) -> dict[str, list[str]]:
    """verdict -> names."""
    found: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for name, difference in differences.items():
        found[difference["verdict"]].append(name)
    return found


def arm_of(summary: dict, name: str) -> dict:
    return next(arm for arm in summary["arms"] if arm["name"] == name)


def compared(summary: dict) -> list[dict]:
    """The arms that have a difference to the reference, which is none of them."""
    return [arm for arm in summary["arms"]
            if arm["name"] != summary["reference"] and arm["difference"]["mean"] is not None]


def lowest(summary: dict) -> dict | None:
    """The arm of lowest mean test loss."""
    first = summary["arms"][0]
    return first if first["mean_loss"] is not None else None


def default_sentence(summary: dict) -> str:
    """What the default arm is to the reference and each rival that was run."""
    name = summary["default_arm"]
    against = summary["default_against"]
    if not against:
        return f"{name}, the default of select, was not run, or nothing that it is compared with."
    if not any(difference["interval"] for difference in against.values()):
        return f"{name}, the default of select, has too few seeds to be compared."
    found = by_verdict(against)
    parts = [f"{words} {listed(found[which])}" for which, words in (
        (BETTER, "better than"), (UNCLEAR, "not clearly different from"), (WORSE, "worse than"))
        if found[which]]
    return f"{name}, the default of select, is {'; '.join(parts)}."


def chance_sentence(summary: dict) -> str:
    """How little a few seeds can show."""
    arms = [arm for arm in compared(summary) if arm["difference"]["interval"] is not None]
    if not arms:
        return f"No arm shares two seeds with {summary['reference']}: there is no interval."
    seeds = max(arm["difference"]["num_pairs"] for arm in arms)
    by_chance = (1 - summary["confidence"]) * len(arms)
    return (f"With {seeds} seeds no p-value can be less than {2.0 ** (1 - seeds):.4g}, before the "
            f"correction for {len(arms)} arms; and were there no difference at all, up to about "
            f"{by_chance:.1f} of these arms would be called better or worse by chance.")


def setting_sentence(summary: dict) -> str:
    setting = summary["setting"]
    return (f"{setting['num_select']} of {setting['num_candidates']} samples; "
            f"{setting['parameters'] / 1e6:.3g} M parameters; {setting['iterations']} iterations "
            f"of annealing over {setting['tokens'] / 1e3:,.0f} thousand tokens; "
            f"{_seeds(setting['seeds'])}.")


def _seeds(seeds: Sequence[int]) -> str:
    """seeds 1 to 12, or each by number."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(map(str, seeds))}"


def repetition_sentence(summary: dict) -> str:
    """How often the annealing sees what an arm picked, from the arm of most tokens to the least."""
    tokens = {arm["name"]: arm["picks"]["tokens"] for arm in summary["arms"]
              if arm["picks"]["tokens"]}
    if not tokens:
        return ""
    most, least = max(tokens, key=tokens.get), min(tokens, key=tokens.get)
    times = [f"{summary['setting']['tokens'] / tokens[name]:.2g} times ({name})"
             for name in (most, least)]
    return f"An annealing sees what was picked {times[0]} to {times[1]}."


def missing_sentence(summary: dict) -> str:
    """Which runs are not there; empty if none is missing."""
    missing = [f"{arm['name']} ({_seeds(arm['missing'])})"
               for arm in summary["arms"] if arm["missing"]]
    return f"Without a result: {listed(missing)}." if missing else ""
