"""``report.html`` of a comparison: one page that needs no other file, made from the summary."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np

from megatron_direct.comparison.repeats import Repeats
from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE, PairedDifference
from megatron_direct.comparison.summary import (
    PAPER_ARM,
    RANDOM_SUBSPACE,
    ArmSummary,
    ComparisonSummary,
    SampleStatistics,
    SampleText,
)
from megatron_direct.reports import comparison_figures as figures
from megatron_direct.reports import pages, wording
from megatron_direct.reports.drawing import Image, image
from megatron_direct.reports.tables import Cell, Table, make_table

_TEXT_LENGTH = 700  # characters of a sample that are shown
_CLASSES = {BETTER: "better", WORSE: "worse", UNCLEAR: "unclear"}


@dataclass(frozen=True)
class Shown:
    """A section's figure and table, either of which may be missing."""

    figure: Image | None = None
    table: Table | None = None


@dataclass(frozen=True)
class ComparisonPage:
    """What ``comparison.html.j2`` shows. A section without data is None."""

    summary: ComparisonSummary
    title: str
    headline: str
    verdict: Cell | None
    findings: list[str]
    chance: str
    losses: Shown | None
    default_against: Shown | None
    by_test: Shown | None
    curves: Shown | None
    spectrum: Shown | None
    spectrum_notes: list[str]
    stiff_cost: Shown | None
    has_random_subspace: bool
    selected: Shown | None
    overlap: Shown | None
    overlap_by_chance: str
    measured_seconds: str
    costs: Shown
    texts: list[tuple[str, list[SampleText]]]
    arms: Table
    flags: Table


def write_page(summary: ComparisonSummary, path: str | os.PathLike) -> None:
    pages.write_html(render(summary), path)


def render(summary: ComparisonSummary) -> str:
    """The page as HTML."""
    return pages.render("comparison.html.j2", _page(summary))


def _page(summary: ComparisonSummary) -> ComparisonPage:
    setting = summary.setting
    default = summary.arm(summary.default_arm)
    has_results, has_selections = bool(summary.measured), any(arm.selected for arm in summary.arms)
    return ComparisonPage(
        summary=summary, title=f"Comparison: {setting.name}", headline=wording.headline(summary),
        verdict=_verdict(default.difference) if default and default in summary.compared else None,
        findings=_findings(summary), chance=wording.chance_sentence(summary),
        losses=_losses(summary) if has_results else None,
        default_against=Shown(table=_default_against(summary)) if summary.default_against else None,
        by_test=Shown(table=_by_test(summary)) if has_results and len(setting.test) > 1 else None,
        curves=Shown(image(figures.curves(summary), "training loss by iteration"))
        if any(arm.curve for arm in summary.arms) else None,
        spectrum=Shown(image(figures.spectra(summary), "eigenvalues by seed"))
        if summary.spectra else None,
        spectrum_notes=list(dict.fromkeys(
            f"seed {seed}: {note}" for seed, spectrum in summary.spectra.items()
            for note in spectrum.notes)),
        stiff_cost=Shown(image(figures.stiff_cost_figure(summary), "stiff cost against test loss"),
                         _problems(summary)) if any(a.problem for a in summary.arms) else None,
        has_random_subspace=summary.arm(RANDOM_SUBSPACE) is not None,
        selected=_selected(summary) if has_selections else None,
        overlap=Shown(image(figures.overlaps(summary), "overlap between selections"))
        if has_selections else None,
        overlap_by_chance=wording.percent(
            setting.num_select / max(2 * setting.num_candidates - setting.num_select, 1)),
        measured_seconds=_measured_seconds(summary), costs=Shown(table=_costs(summary)),
        texts=_texts(summary),
        arms=make_table(["arm", "selects"], [[arm.name, arm.description] for arm in summary.arms],
                        left=(0, 1)),
        flags=make_table(["flag", "value"], [[name, str(value)] for name, value
                                             in summary.identity.items()], left=(0, 1)))


def _findings(summary: ComparisonSummary) -> list[str]:
    """What follows the headline."""
    sentences = [wording.lowest_sentence(summary)]
    if summary.ranked:
        sentences.append(wording.default_sentence(summary))
    paper, default = summary.arm(PAPER_ARM), summary.arm(summary.default_arm)
    if paper and paper in summary.compared and paper is not default:
        sentences.append(
            f"{wording.with_numbers(PAPER_ARM, paper.difference)}, the paper's own objective, "
            f"compared with {summary.reference}: {wording.verdict(paper.difference)}.")
    sentences += [wording.setting_sentence(summary), wording.cost_sentence(summary),
                  wording.missing_sentence(summary), wording.versions_sentence(summary)]
    return [sentence for sentence in sentences if sentence]


def _losses(summary: ComparisonSummary) -> Shown:
    rows: list[list[str | Cell]] = []
    ranked = summary.ranked  # the first of the arms
    for place, arm in enumerate(summary.arms, start=1):
        found, is_reference = arm.difference, arm.name == summary.reference
        row: list[str | Cell] = [str(place) if place <= len(ranked) else "",
                                 _name(summary, arm), wording.loss(arm.mean_loss)]
        row += [""] * 5 if is_reference or found.mean is None else [
            wording.signed(found.mean), _verdict(found), wording.interval(found),
            wording.p_value(found.p_value), wording.p_value(found.p_holm)]
        rows.append([*row, str(len(arm.seeds) if is_reference else found.num_pairs)])
    rows.append(["", "(before annealing)", wording.loss(summary.loss_before), *[""] * 6])
    table = make_table(["", "arm", "test loss", "difference", "verdict", "interval", "p",
                        "p (Holm)", "seeds"], rows, left=(0, 1, 4))
    if not summary.compared:
        return Shown(None, table)
    return Shown(image(figures.differences(summary),
                       f"differences from {summary.reference} with intervals"), table)


def _name(summary: ComparisonSummary, arm: ArmSummary) -> Cell:
    """With the description under the mouse; arms that have a colour in the figures have it here."""
    colour = figures.highlighted(summary).get(arm.name, "")
    return Cell(arm.name, "coloured" if colour else "", colour, arm.description)


def _verdict(difference: PairedDifference) -> Cell:
    return _coloured(wording.verdict(difference), difference)


def _coloured(text: str, difference: PairedDifference) -> Cell:
    return Cell(text, _CLASSES[difference.verdict])


def _default_against(summary: ComparisonSummary) -> Table:
    rows = [(name, wording.signed(found.mean), _verdict(found), wording.interval(found),
             wording.p_value(found.p_holm)) for name, found in summary.default_against.items()]
    return make_table(["other arm", "difference", f"{summary.default_arm} is", "interval",
                       "p (Holm)"], rows, left=(0, 2))


def _by_test(summary: ComparisonSummary) -> Table:
    sets = summary.setting.test_and_all
    short = wording.short_names(summary.setting.test)
    before = summary.before.tests if summary.before else {}
    rows: list[list[str | Cell]] = []
    for arm in summary.measured:
        row: list[str | Cell] = [_name(summary, arm)]
        for test in sets:
            found = arm.test_differences[test]
            is_compared = arm.name != summary.reference and found.mean is not None
            row.append(Cell(wording.loss(arm.tests[test]), note=_coloured(
                wording.signed(found.mean), found) if is_compared else _NO_DIFFERENCE))
        rows.append(row)
    rows.append(["(before annealing)", *(
        Cell(wording.loss(before.get(test)), note=_NO_DIFFERENCE) for test in sets)])
    return make_table(["arm", *(short.get(test, test) for test in sets)], rows)


# As wide as a difference, so that losses stand below each other.
_NO_DIFFERENCE = Cell("+0.0000", "invisible")


def _problems(summary: ComparisonSummary) -> Table | None:
    """The arms that solve a selection problem; means over seeds."""
    def mean(values) -> float | None:
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    rows: list[list[str | Cell]] = []
    for arm in summary.arms:
        problems = arm.problem.values()
        objective = mean(p.objective_value for p in problems)
        if objective is not None:
            rows.append([_name(summary, arm), *map(wording.number, (
                mean(p.stiff_cost for p in problems), mean(p.stiff_budget for p in problems),
                objective))])
    return make_table(["arm", "stiff cost", "budget tau", "objective"], rows) if rows else None


def _selected(summary: ComparisonSummary) -> Shown:
    short = wording.short_names(summary.setting.pools)

    def row(name: str | Cell, found: SampleStatistics, counts: dict[str, float],
            *repeats: Repeats | None) -> list[str | Cell]:
        total = sum(counts.values())
        return [name, f"{found.samples:.0f}", f"{found.tokens:.0f}",
                f"{summary.setting.tokens / found.tokens_of_an_epoch:.2f}",
                *(wording.percent(counts.get(pool, 0) / total if total else None)
                  for pool in short),
                wording.percent(found.corrupted), f"{found.loss_mean:.3f}",
                *map(wording.repeats, repeats)]

    rows = []
    if summary.pool.candidates is not None:
        rows.append(row("(the pool)", summary.pool.candidates, {
            name: counts.samples for name, counts in summary.pool.domains.items()}, None, None))
    rows += [row(_name(summary, arm), arm.selected, {
        name: counts.selected for name, counts in arm.composition.items()},
        arm.repeats, arm.shared_by_seeds) for arm in summary.arms if arm.selected]
    return Shown(
        image(figures.selected_samples(summary), "domain, loss and length of selected samples"),
        make_table(["arm", "samples", "tokens", "times seen", *short.values(), "corrupted",
                    "mean loss", "repeats (by chance)", "seeds share (by chance)"], rows))


def _measured_seconds(summary: ComparisonSummary) -> str:
    """What each measurement took, the median over seeds; once, where two are one."""
    measured, told = [], []
    for key, what in (("onset", "sketches at the checkpoint"),
                      ("select", "the measurements of select"),
                      ("pilot", "a pilot and sketches after it"),
                      ("merged", "sketches at the average"),
                      ("proxy", "sketches by the smaller model"),
                      ("adam-sketches", "sketches under Adam's scaling")):
        totals = [sum(of_seed[key].values()) for of_seed in summary.setting.shared_seconds.values()
                  if key in of_seed]
        if totals and totals not in told:
            told.append(totals)
            measured.append(f"{np.median(totals):.0f} s for {what}")
    if summary.setting.annealing_seconds is not None:
        measured.append(f"{summary.setting.annealing_seconds:.0f} s for an annealing")
    return wording.listed(measured, "nothing")


def _costs(summary: ComparisonSummary) -> Table:
    rows: list[list[str | Cell]] = [
        [_name(summary, arm), "-" if arm.cost.passes is None else f"{arm.cost.passes:.2g}",
         *map(wording.percent, (arm.cost.share_of_annealing, arm.cost.annealing_left,
                                arm.cost.needed_at_most))] for arm in summary.arms]
    return make_table(["arm", "passes over the pool", "share of the annealing",
                       "left at break-even", "needs at most"], rows)


def _texts(summary: ComparisonSummary) -> list[tuple[str, list[SampleText]]]:
    """(heading, the beginnings of some samples)"""
    if summary.texts is None:
        return []
    short = wording.short_names(summary.setting.pools)
    return [(heading, [replace(text, text=_beginning(text.text),
                               pool=short.get(text.pool, text.pool)) for text in texts])
            for heading, texts in (("Selected", summary.texts.picked),
                                   ("Left out", summary.texts.dropped))]


def _beginning(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH].rstrip() + " ..."
