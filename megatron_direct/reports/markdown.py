"""The results of one or several comparisons as Markdown, for a file that stands in a repository.

Every sentence is made from the summaries. An arm *wins* in a setting if it is better than the
reference there, by both intervals.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path

from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE, compare_by_seed
from megatron_direct.comparison.summary import PAPER_ARM, YARDSTICKS, difference
from megatron_direct.config import ModelConfig, flag_name
from megatron_direct.reports import wording

_WIDTH = 108


def results(summaries: list[dict], again: str = "", about: str = "") -> str:
    """The text. again: a command that makes all of it anew, where there is one; about: what the
    settings are, in Markdown."""
    finished = [summary for summary in summaries if wording.compared(summary)]
    if not finished:
        return "# Results\n\nNothing has been compared yet.\n"
    parts = ["# Results", _paragraph(_how_to_read(finished)), about, *_over_settings(finished),
             "## The default against the others", *_defaults(finished)]
    for summary in finished:
        parts += _of_setting(summary)
    parts += ["## Once more", *_again(finished, again)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how_to_read(summaries: list[dict]) -> str:
    reference = wording.listed(_quoted(dict.fromkeys(s["reference"] for s in summaries)))
    confidence = wording.percent(max(summary["confidence"] for summary in summaries))
    return (
        f"Arms are annealed from one checkpoint with the same tokens, schedule and batches, and "
        f"differ in the samples they see. The loss is a mean over the test sets, which no "
        f"selection saw; lower is better. Differences to {reference} are paired by seed. An "
        f"interval spans a bootstrap and a Student t interval of {confidence} each, and an arm is "
        "better or worse only if both are clear of zero. p is that of a sign-flip test after "
        "Holm's correction for the number of arms; with few seeds it cannot be small, whatever the "
        "difference. This text is written from the numbers by `megatron-direct compare`.")


def _over_settings(summaries: list[dict]) -> list[str]:
    """A table of arms by settings, and what it says."""
    found = {arm["name"]: {} for summary in summaries for arm in wording.compared(summary)}
    for summary in summaries:
        for arm in wording.compared(summary):
            found[arm["name"]][summary["setting"]["name"]] = arm["difference"]
    names = [summary["setting"]["name"] for summary in summaries]

    def middle(of_arm: dict[str, dict]) -> float:
        return sum(d["mean"] for d in of_arm.values()) / len(of_arm)

    arms = sorted(found, key=lambda arm: middle(found[arm]))
    table = _table(["arm", *names], [
        [f"`{arm}`", *(_marked(found[arm].get(name)) for name in names)] for arm in arms])
    wins, losses, unclear = (
        {arm: [n for n, d in found[arm].items()
               if d["interval"] is not None and d["verdict"] == which] for arm in arms}
        for which in (BETTER, WORSE, UNCLEAR))
    lowest = [_lowest(summary) for summary in summaries]
    return [
        "## What wins where",
        _paragraph("Difference to the reference in mean test loss. Bold: better; italic: worse; "
                   "plain: no clear difference."), table,
        _bullets([*lowest, _in_every_setting("Better than the reference", wins, found)]),
        "## What does not",
        _bullets([_in_every_setting("Worse than the reference", losses, found),
                  _in_every_setting("No clear difference", unclear, found),
                  *(_paper(summary) for summary in summaries)])]


def _marked(difference: dict | None) -> str:
    if difference is None:
        return "-"
    mark = {BETTER: "**", WORSE: "_", UNCLEAR: ""}[difference["verdict"]]
    return f"{mark}{difference['mean']:+.3f}{mark}"


def _lowest(summary: dict) -> str:
    """The arm of lowest loss, and those that a paired comparison does not tell from it."""
    best, *others = [arm for arm in summary["arms"] if arm["mean_loss"] is not None]
    level = [arm["name"] for arm in others
             if compare_by_seed(arm["losses"], best["losses"]).verdict == UNCLEAR]
    sentence = (f"Lowest in {summary['setting']['name']}: `{best['name']}`, "
                f"{wording.loss(best['mean_loss'])}; not clearly different from it: "
                f"{wording.listed(_quoted(level))}.")
    tests = summary["setting"]["test"]
    if len(tests) > 1:
        short = wording.short_names(tests)
        with_all = [best, *others]
        sentence += " By test set: " + wording.listed(
            f"{short[test]} `{min(with_all, key=lambda arm, t=test: arm['tests'][t])['name']}`"
            for test in tests) + "."
    return sentence


def _in_every_setting(words: str, by_arm: dict[str, list[str]], found: dict) -> str:
    """Arms of which something holds in every setting that they were run in."""
    arms = [arm for arm, names in by_arm.items() if names and len(names) == len(found[arm])]
    return f"{words} wherever it was run: {wording.listed(_quoted(arms))}."


def _paper(summary: dict) -> str:
    """The paper's own objective in a setting, wherever it stands."""
    name = summary["setting"]["name"]
    ranked = [arm for arm in summary["arms"] if arm["mean_loss"] is not None]
    for place, arm in enumerate(ranked, start=1):
        if arm["name"] == PAPER_ARM:
            found = arm["difference"]
            return (f"`{PAPER_ARM}`, the paper's own objective, in {name}: "
                    f"{wording.loss(arm['mean_loss'])}, place {place} of {len(ranked)}, "
                    f"{wording.signed(found['mean'])} {wording.interval(found)} to "
                    f"`{summary['reference']}`: {wording.verdict(found)}.")
    return f"`{PAPER_ARM}`, the paper's own objective, was not run in {name}."


def _defaults(summaries: list[dict]) -> list[str]:
    """default - other, by setting; first how often the default beats them all."""
    parts = []
    for default in dict.fromkeys(summary["default_arm"] for summary in summaries):
        mine = [s for s in summaries if s["default_arm"] == default and s["default_against"]]
        if not mine:
            continue
        best, bad = [], []
        for summary in mine:
            verdicts = {d["verdict"] for d in summary["default_against"].values()}
            if verdicts == {BETTER}:
                best.append(summary["setting"]["name"])
            if WORSE in verdicts:
                bad.append(summary["setting"]["name"])
        parts.append(_paragraph(
            f"`{default}` is what `select` uses by default. It is better than each arm that it is "
            f"set against here in {len(best)} of {len(mine)} settings "
            f"({wording.listed(best)}), and worse than at least one of them in {len(bad)} "
            f"({wording.listed(bad)}). p is corrected for the rows of a setting."))
    rows = []
    for summary in summaries:
        for other, found in summary["default_against"].items():
            rows.append([summary["setting"]["name"], f"`{other}`", wording.signed(found["mean"]),
                         wording.interval(found), wording.p_value(found["p_holm"]),
                         wording.verdict(found)])
    if not rows:
        return [_paragraph("The default was not run.")]
    return [*parts, _table(["setting", "other arm", "default - other", "interval", "p (Holm)",
                            "the default is"], rows)]


def _of_setting(summary: dict) -> list[str]:
    rows = []
    for arm in summary["arms"]:
        found = arm["difference"]
        row = [f"`{arm['name']}`", wording.loss(arm["mean_loss"])]
        row += ["", "", "", ""] if arm["name"] == summary["reference"] else [
            wording.signed(found["mean"]), wording.interval(found),
            wording.p_value(found["p_holm"]), wording.verdict(found)]
        rows.append(row)
    rows.append(["(before annealing)", wording.loss(summary["before"]["mean_loss"]),
                 "", "", "", ""])
    sentences = [wording.setting_sentence(summary), wording.repetition_sentence(summary),
                 wording.missing_sentence(summary),
                 wording.chance_sentence(summary), _cost(summary)]
    return [f"## {summary['setting']['name']}",
            _paragraph(" ".join(sentence for sentence in sentences if sentence)),
            _table(["arm", "mean test loss", f"to `{summary['reference']}`", "interval",
                    "p (Holm)", "verdict"], rows), _yardsticks(summary)]


def _yardsticks(summary: dict) -> str:
    """The default less arms that are no rivals: what cannot be had, and its own parts."""
    losses = {arm["name"]: arm["losses"] for arm in summary["arms"]
              if arm["mean_loss"] is not None}
    default = summary["default_arm"]
    found = {name: difference(losses[default], losses[name])
             for name in YARDSTICKS if name in losses and default in losses}
    if not found:
        return ""
    parts = [f"{wording.with_numbers(f'`{name}`', d)}, {wording.verdict(d)}"
             for name, d in found.items()]
    return _paragraph(f"`{default}` less other arms: {'; '.join(parts)}.")


def _cost(summary: dict) -> str:
    """What the default's choice costs."""
    arms = [arm for arm in summary["arms"] if arm["name"] == summary["default_arm"]]
    if not arms or arms[0]["cost"]["share_of_annealing"] is None:
        return ""
    cost = arms[0]["cost"]
    sentence = (f"Choosing by `{summary['default_arm']}` takes {cost['passes']:.2g} passes over "
                f"the pool, {wording.percent(cost['share_of_annealing'])} of the annealing's own "
                "cost")
    if cost["annealing_left"] == 0:
        return (sentence + ": here, where the annealing is short, no saving of its tokens pays for "
                "it.")
    sentence += (": it pays if the arm reaches the reference's loss on "
                 f"{wording.percent(cost['annealing_left'])} of the annealing's tokens")
    gain = arms[0]["difference"]["mean"]
    if gain is not None and gain >= 0:
        return sentence + ", and it does not reach it on all of them."
    if cost["needed_at_most"] is None:
        return sentence + ", which was not measured."
    return (sentence + ". That was not measured; if each further token brings less than the one "
            f"before, it needs at most {wording.percent(cost['needed_at_most'])}.")


def _again(summaries: list[dict], again: str) -> list[str]:
    """Commands; optimizer and model are as the checkpoint says where they are left out."""
    commands = [f"# {summary['setting']['name']}\n{_command(summary)}" for summary in summaries]
    if not again:
        return ["```bash\n" + "\n\n".join(commands) + "\n```"]
    return ["All of it:", f"```bash\n{again}\n```",
            "The first setting alone, once checkpoint and datasets are there:",
            f"```bash\n{commands[0]}\n```"]


def _command(summary: dict) -> str:
    """``megatron-direct compare`` with the flags that the run had.

    Those of the architecture are the checkpoint's.
    """
    setting, identity = summary["setting"], summary["identity"]
    flags = {"run_dir": "RUN_DIR", "name": setting["name"], "num_seeds": len(setting["seeds"]),
             "arms": list(setting["arms"]), "tokenizer_model": setting.get("tokenizer_model"),
             "pilot_iters": (identity.get("pilot") or {}).get("pilot_iters", 0)}
    flags |= {key: value for key, value in identity.items()
              if key not in ModelConfig.__dataclass_fields__ and not isinstance(value, dict)
              and key != "pilot" and not key.endswith("digest")}
    lines = ["megatron-direct compare"]
    for key, value in flags.items():
        if value in (None, "", []):
            continue
        if isinstance(value, bool):
            lines.append(flag_name(key) if value else flag_name("no_" + key))
        else:
            values = value if isinstance(value, list) else [value]
            lines.append(_folded([flag_name(key), *(shlex.quote(_shown(v)) for v in values)]))
    return " \\\n    ".join(lines)


def _shown(value) -> str:
    """Paths below the working directory as seen from it."""
    text = str(value)
    here = f"{Path.cwd()}/"
    return text[len(here):] if text.startswith(here) else text


def _folded(words: list[str]) -> str:
    """Over several lines where they are long; a word stays whole, whatever is in it."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > _WIDTH - 12:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n        ".join(lines)


def _quoted(names: Iterable[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _paragraph(text: str, **indents: str) -> str:
    """Wrapped; an interval stays on one line."""
    held = re.sub(r"(\[[-+.\d]+,) ", "\\1\0", text)
    return textwrap.fill(held, _WIDTH, break_long_words=False, break_on_hyphens=False,
                         **indents).replace("\0", " ")


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(_paragraph(sentence, initial_indent="- ", subsequent_indent="  ")
                     for sentence in sentences)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned for who reads the source: names to the left, figures to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    left = [all(not cell[:1].isdigit() and cell[:1] not in "+-[_*" for cell in column if cell)
            for column in zip(*cells[1:], strict=True)]

    def line(row):
        return "| " + " | ".join(cell.ljust(width) if to_left else cell.rjust(width) for
                                 cell, width, to_left in zip(row, widths, left, strict=True)) + " |"

    rule = "|" + "|".join(":" + "-" * (width + 1) if to_left else "-" * (width + 1) + ":"
                          for width, to_left in zip(widths, left, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
