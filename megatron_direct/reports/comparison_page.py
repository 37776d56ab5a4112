"""``report.html`` of a comparison: one page that stands alone, made from the summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE
from megatron_direct.comparison.summary import PAPER_ARM, RANDOM_SUBSPACE
from megatron_direct.reports import figures, html, wording
from megatron_direct.reports.html import Markup, escape
from megatron_direct.runtime import files

_TEXT_LENGTH = 700  # characters of a sample that are shown
_CLASSES = {BETTER: "better", WORSE: "worse", UNCLEAR: "unclear"}


def write_page(summary: dict, path: str | Path) -> None:
    with files.written_whole(path, "w") as file:
        file.write(render(summary))


def render(summary: dict) -> str:
    """The page as HTML. Sections that nothing is known for are left out."""
    setting = summary["setting"]
    sections = [("In short", "", _in_short(summary))]
    if wording.lowest(summary) is not None:
        sections += _losses(summary)
    if any(arm["curve"] for arm in summary["arms"]):
        sections.append((
            "Training loss", "Each arm on its own samples, so the level tells what was picked, not "
            "how good it is. Lines are means over seeds and over short stretches of iterations, "
            "bands reach from the lowest to the highest seed. What lies far from the coloured arms "
            "is cut off.", html.image(figures.curves(summary), "training loss by iteration")))
    if summary["spectra"]:
        sections.append((
            "Spectrum", "Leading eigenvalues of the validation loss's curvature, for each seed's "
            "validation samples. The ring is the elbow: directions up to it are stiff.",
            html.image(figures.spectra(summary), "eigenvalues by seed") + _notes(summary)))
    if any(arm["problem"] for arm in summary["arms"]):
        sections.append((
            "Stiff cost", "How much an arm's samples move the model along stiff directions, "
            "against the loss it ends with. The numbers are the arms' places in the first table; "
            "the dashed line is the budget tau of the arms that have one. Triangles at the upper "
            "edge end higher still.",
            html.image(figures.stiff_costs(summary), "stiff cost against test loss")
            + _problems(summary)))
    if any(arm["picks"]["samples"] for arm in summary["arms"]):
        sections += _picked(summary)
    sections.append(("What choosing costs", _cost_text(summary), _costs(summary)))
    if summary["texts"]:
        sections.append((
            f"Texts that {summary['default_arm']} picks and drops", "The beginnings of some "
            "samples, with their loss before annealing and their length.", _texts(summary)))
    sections.append(("The run", "All of it is in run.json.", _record(summary)))
    return html.page(f"comparison, {setting['name']}", sections, _CSS)


def _in_short(summary: dict) -> str:
    best = wording.lowest(summary)
    paper = [arm for arm in wording.compared(summary) if arm["name"] == PAPER_ARM]
    sentences = [wording.setting_sentence(summary), wording.missing_sentence(summary)]
    if best is not None:
        sentences.append(f"Lowest mean test loss: {best['name']}, {wording.loss(best['mean_loss'])}"
                         f" ({wording.loss(summary['before']['mean_loss'])} before annealing).")
        sentences.append(wording.default_sentence(summary))
    sentences += [f"{wording.with_numbers(PAPER_ARM, arm['difference'])}, the paper's own "
                  f"objective, against {summary['reference']}: "
                  f"{wording.verdict(arm['difference'])}." for arm in paper]
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences if s) + "</ul>"


def _losses(summary: dict) -> list[tuple[str, str, str]]:
    reference, default = summary["reference"], summary["default_arm"]
    sections = [(
        "Which arm ends lowest", "The loss after annealing, a mean over test sets that each count "
        f"the same. Differences to {reference} are paired by seed. The interval spans a bootstrap "
        f"and a Student t interval of {wording.percent(summary['confidence'])} each; an arm is "
        "better or worse if both are clear of zero. p is that of a sign-flip test; Holm's rule "
        f"corrects it for the number of arms. Seeds are those that the arm shares with {reference}."
        f" {wording.chance_sentence(summary)}",
        _headline(summary) + _difference_figure(summary))]
    if summary["default_against"]:
        sections.append((
            f"{default} against the others", f"{default} is what select uses by default. Negative: "
            "its loss is lower than the other arm's. p is corrected for the number of rows.",
            _default(summary)))
    if len(summary["setting"]["test"]) > 1:
        sections.append((
            "By test set", f"The loss on each test set, and its difference to {reference}; coloured"
            " where both intervals are clear of zero. all: over the tokens of all test sets.",
            _by_test(summary)))
    return sections


def _difference_figure(summary: dict) -> str:
    if not wording.compared(summary):
        return ""
    return html.image(figures.differences(summary),
                      f"differences to {summary['reference']} with intervals") + _caption(
        "Diamonds are means, rings the seeds, thick lines bootstrap intervals, thin lines t "
        "intervals. An arrow points to an arm beyond the edge.")


def _headline(summary: dict) -> Markup:
    rows = [["", "arm", "test loss", "difference", "interval", "p", "p (Holm)", "verdict",
             "seeds"]]
    for number, arm in enumerate(summary["arms"], start=1):
        found, is_reference = arm["difference"], arm["name"] == summary["reference"]
        row = [str(number), _name(summary, arm), wording.loss(arm["mean_loss"])]
        row += [""] * 5 if is_reference or found["mean"] is None else [
            wording.signed(found["mean"]), wording.interval(found),
            wording.p_value(found["p_value"]), wording.p_value(found["p_holm"]),
            _coloured(wording.verdict(found), found)]
        count = len(arm["seeds"]) if is_reference else found["num_pairs"]
        rows.append([*row, str(count)])
    before = summary["before"]
    rows.append(["", "(before annealing)", wording.loss(before["mean_loss"]), *[""] * 6])
    return html.table(rows, "second")


def _name(summary: dict, arm: dict) -> Markup:
    """With the description on hovering; in bold what has a colour in the figures."""
    colour = figures.highlighted(summary).get(arm["name"])
    style = f' style="color: {colour}; font-weight: 600"' if colour else ""
    return Markup(f'<span title="{escape(arm["description"])}"{style}>{escape(arm["name"])}</span>')


def _coloured(text: str, difference: dict) -> Markup:
    return Markup(f'<span class="{_CLASSES[difference["verdict"]]}">{escape(text)}</span>')


def _default(summary: dict) -> Markup:
    rows = [["other arm", "default less other", "interval", "p (Holm)", "the default is"]]
    rows += [[name, wording.signed(found["mean"]), wording.interval(found),
              wording.p_value(found["p_holm"]), _coloured(wording.verdict(found), found)]
             for name, found in summary["default_against"].items()]
    return html.table(rows)


def _by_test(summary: dict) -> Markup:
    sets = [*summary["setting"]["test"], "all"]
    short = {**wording.short_names(summary["setting"]["test"]), "all": "all"}
    rows = [["arm", *(short[name] for name in sets)]]
    for arm in summary["arms"]:
        if arm["mean_loss"] is None:
            continue
        row = [_name(summary, arm)]
        for name in sets:
            found, cell = arm["test_differences"][name], escape(wording.loss(arm["tests"][name]))
            if arm["name"] != summary["reference"] and found["mean"] is not None:
                cell += " " + _coloured(wording.signed(found["mean"]), found)
            row.append(Markup(cell))
        rows.append(row)
    rows.append(["(before annealing)", *(
        Markup(f'{wording.loss(summary["before"]["tests"].get(name))} <span class="blank">'
               "+0.0000</span>") for name in sets)])
    return html.table(rows)


def _notes(summary: dict) -> str:
    notes = dict.fromkeys(f"seed {seed}: {note}" for seed, spectrum in summary["spectra"].items()
                          for note in spectrum["notes"])
    return _folded("What the curvature stage noted", "".join(
        f"<div>{escape(note)}</div>" for note in notes))


def _problems(summary: dict) -> str:
    """The arms that solve a selection problem; means over seeds."""
    rows = [["arm", "stiff cost", "budget tau", "objective"]]
    for arm in summary["arms"]:
        means = {}
        for key in ("stiff_cost", "stiff_budget", "objective_value"):
            values = [p[key] for p in arm["problem"].values() if p[key] is not None]
            means[key] = float(np.mean(values)) if values else None
        if means["objective_value"] is not None:
            rows.append([_name(summary, arm), *("-" if value is None else f"{value:.4g}"
                                                for value in means.values())])
    if len(rows) == 1:
        return ""
    caption = ("Stiff cost and budget in units of what as many average samples cost. Objectives of "
               "different arms are different functions, and compare only where they are the same.")
    if any(arm["name"] == RANDOM_SUBSPACE for arm in summary["arms"]):
        caption += (f" The budget of {RANDOM_SUBSPACE} is one of costs along its own directions, "
                    "drawn at random, not of the costs shown.")
    return html.table(rows) + _caption(caption)


def _picked(summary: dict) -> list[tuple[str, str, str]]:
    setting = summary["setting"]
    chosen, total = setting["num_select"], setting["num_candidates"]
    by_chance = chosen / max(2 * total - chosen, 1)
    return [
        ("What each arm picked", "Left: from which domains, and how much of it was corrupted on "
         "purpose (hatched). Right: loss and length of the picked samples; the line holds 90 % of "
         "them, the bar the middle half, the point is the median. The first row is the whole pool.",
         html.image(figures.picks(summary), "composition, loss and length of the picked samples")
         + _folded("The numbers", _picked_numbers(summary))),
        ("How far arms agree", "Percent of the samples that two arms pick between them that both "
         "pick (Jaccard index), a mean over seeds. Framed, on the diagonal: the same between two "
         "seeds of one arm, which differ in their sketches and validation samples. Two random "
         f"choices share about {wording.percent(by_chance)}.",
         html.image(figures.overlaps(summary), "overlap between arms")),
    ]


def _picked_numbers(summary: dict) -> Markup:
    short = wording.short_names(summary["setting"]["pools"])
    rows = [["arm", "samples", "tokens", "times seen", *short.values(), "corrupted", "mean loss"]]

    def row(name, picked, counts):
        total = sum(counts.values())
        return [name, f"{picked['samples']:.0f}", f"{picked['tokens']:.0f}",
                f"{summary['setting']['tokens'] / picked['tokens']:.2f}",
                *(wording.percent(counts.get(pool, 0) / total if total else None)
                  for pool in short),
                wording.percent(picked["corrupted"]), f"{picked['loss_mean']:.3f}"]

    rows.append(row("(the pool)", summary["pool"]["picks"], {
        name: counts["samples"] for name, counts in summary["pool"]["domains"].items()}))
    rows += [row(_name(summary, arm), arm["picks"], {
        name: counts["selected"] for name, counts in arm["composition"].items()})
        for arm in summary["arms"] if arm["picks"]["samples"]]
    return html.table(rows)


def _cost_text(summary: dict) -> str:
    setting = summary["setting"]
    shared = list(setting["shared_seconds"].values())
    measured = []
    for key, what in (("onset", "sketches at the checkpoint"), ("select", "what select measures"),
                      ("adam-sketches", "sketches under Adam's scaling")):
        totals = [sum(of_seed[key].values()) for of_seed in shared if key in of_seed]
        if totals:
            measured.append(f"{np.median(totals):.0f} s for {what}")
    if setting["annealing_seconds"] is not None:
        measured.append(f"{setting['annealing_seconds']:.0f} s for an annealing")
    return ("In passes forward and back over the whole pool, and as a share of the annealing's own "
            f"tokens. Break-even: annealed on what is left, an arm costs as much as "
            f"{summary['reference']} on all of it; choosing pays if the arm needs no more than "
            f"that to reach the loss of {summary['reference']}. At 0 % choosing is as dear as "
            "the whole annealing, and no saving of its tokens pays for it. What an arm needs was "
            "not measured, since each was annealed for one length. The last column is a bound for "
            "arms that end lower: it holds if each further token of annealing brings less than the "
            f"one before. Measured here, a seed: {wording.listed(measured, 'nothing')}.")


def _costs(summary: dict) -> Markup:
    rows = [["arm", "passes over the pool", "share of the annealing", "left at break-even",
             "needs at most"]]
    for arm in summary["arms"]:
        cost = arm["cost"]
        rows.append([_name(summary, arm),
                     "-" if cost["passes"] is None else f"{cost['passes']:.2g}",
                     *(wording.percent(cost[key]) for key in (
                         "share_of_annealing", "annealing_left", "needed_at_most"))])
    return html.table(rows)


def _texts(summary: dict) -> str:
    def column(which: str, heading: str) -> str:
        shown = "".join(
            f'<figure><figcaption>{escape(text["pool"])}, loss {text["loss"]:.2f}, '
            f'{text["labels"]} tokens</figcaption><pre>{escape(_beginning(text["text"]))}</pre>'
            "</figure>" for text in summary["texts"].get(which, []))
        return f"<div><h3>{heading}</h3>{shown}</div>"

    return f'<div class="columns">{column("picked", "Picked")}{column("dropped", "Dropped")}</div>'


def _beginning(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH].rstrip() + " ..."


def _record(summary: dict) -> str:
    rows = [["flag", "value"]]
    rows += [[name, str(value)] for name, value in summary["identity"].items()]
    arms = [["arm", "what it takes"], *([arm["name"], arm["description"]]
                                        for arm in summary["arms"])]
    return (_folded("The arms", html.table(arms, "left"))
            + _folded("The flags", html.table(rows, "left")))


def _caption(text: str) -> str:
    return f'<p class="caption">{escape(text)}</p>'


def _folded(heading: str, content: str) -> str:
    return f"<details><summary>{escape(heading)}</summary>{content}</details>"


_CSS = """
body { max-width: 70em; } p, li { max-width: 56em; }
img { display: block; margin: .8em 0; }
.better { color: #1a7f37; font-weight: 600; } .worse { color: #b42318; font-weight: 600; }
.unclear { color: #6b7280; } .blank { visibility: hidden; }
.caption { color: #57606a; font-size: .9em; margin-top: .3em; }
table { font-size: .92em; } th, td { white-space: nowrap; padding: .22em .65em; }
table.second td:nth-child(2), table.second th:nth-child(2) { text-align: left; }
table.left td, table.left th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.left td:first-child { white-space: nowrap; }
details { margin: .6em 0; } summary { cursor: pointer; color: #0969da; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5em; }
.columns > div { min-width: 0; }
figure { margin: 0 0 1em; } figcaption { color: #57606a; font-size: .85em; }
h3 { font-size: 1em; margin: .3em 0; }
pre { font-size: 12px; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere;
      background: #f6f8fa; padding: .7em; margin: .2em 0; max-height: 16em; overflow-y: auto; }
@media (max-width: 45em) { .columns { grid-template-columns: 1fr; } }
"""
