"""The figures of a comparison's page, each drawn from the summary alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE
from megatron_direct.comparison.summary import (
    PAPER_ARM,
    ArmSummary,
    ComparisonSummary,
)
from megatron_direct.reports import drawing, wording

VERDICT_COLOURS = {BETTER: "#1a7f37", WORSE: "#b42318", UNCLEAR: "#6b7280"}
_OTHERS = "#c3c7ce"  # arms without a colour of their own
_WIDE = (0.65, 1)  # a text of two digits is so much wider than high
_ROW = 0.24  # inches a row takes in a figure with a row for each arm
# Arms that are worse by more than this many times what matters stand at the edge.
_CUT_OFF = 1.6


def highlighted(summary: ComparisonSummary) -> dict[str, str]:
    """arm -> colour: the reference, the default, the paper's and, if another, the lowest."""
    colours = {summary.reference: "#222222", summary.default_arm: "#0969da", PAPER_ARM: "#d1660a"}
    for best in summary.ranked[:1]:
        colours.setdefault(best.name, VERDICT_COLOURS[BETTER])
    return {name: colour for name, colour in colours.items() if name in summary.setting.arms}


def differences(summary: ComparisonSummary):
    """A row for each arm: mean difference, both intervals, and each seed."""
    arms = summary.compared
    figure, axes = drawing.figure(8, 0.9 + _ROW * len(arms))
    edge = _worst_shown(summary)
    reference = summary.arm(summary.reference)
    for row, arm in enumerate(arms):
        colour = VERDICT_COLOURS[arm.difference.verdict]
        if arm.difference.mean is not None and arm.difference.mean > edge:
            axes.annotate(wording.signed(arm.difference.mean), (edge, row),
                          xytext=(0.85 * edge, row), color=colour, fontsize=8, va="center",
                          ha="center", arrowprops={"arrowstyle": "->", "color": colour})
        else:
            _difference(axes, row, arm, reference.losses if reference else {})
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_xlim(right=edge)
    axes.set_xlabel(f"mean test loss minus that of {summary.reference}  (left of 0: better)")
    _name_rows(axes, [arm.name for arm in arms])
    return figure


def _difference(axes, row: int, arm: ArmSummary, reference: Mapping[int, float]) -> None:
    """reference: its losses by seed."""
    found, colour = arm.difference, VERDICT_COLOURS[arm.difference.verdict]
    for interval, width in ((found.student, 1.2), (found.bootstrap, 4)):
        if interval is not None:
            axes.plot(interval, [row, row], color=colour, linewidth=width, alpha=0.7,
                      solid_capstyle="butt")
    seeds = [loss - reference[seed] for seed, loss in arm.losses.items() if seed in reference]
    axes.plot(seeds, [row] * len(seeds), "o", color="white", markeredgecolor=colour,
              markersize=3, markeredgewidth=0.7)
    axes.plot(found.mean, row, "D", color=colour, markersize=5)


def _worst_shown(summary: ComparisonSummary) -> float:
    """The difference up to which arms are drawn to scale.

    An arm that selects nothing but noise would leave no room for those that matter: what matters is
    the greatest gain, or the median difference if that is greater.
    """
    means = [arm.difference.mean for arm in summary.compared if arm.difference.mean is not None]
    return _CUT_OFF * max(-min(means), float(np.median(np.abs(means))), 1e-4)


def _name_rows(axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)


def curves(summary: ComparisonSummary):
    """Training losses, with the range over seeds of the arms that have a colour."""
    figure, axes = drawing.figure(8, 3.4)
    colours = highlighted(summary)
    shown: list[float] = []
    everything: list[float] = []
    for arm in summary.arms:
        curve, colour = arm.curve, colours.get(arm.name)
        if curve is None:
            continue
        everything += curve.mean
        if colour is None:
            axes.plot(curve.iteration, curve.mean, color=_OTHERS, linewidth=0.9)
            continue
        axes.plot(curve.iteration, curve.mean, color=colour, linewidth=1.8, label=arm.name,
                  zorder=3)
        axes.fill_between(curve.iteration, curve.low, curve.high, color=colour, alpha=0.15,
                          linewidth=0, zorder=2)
        shown += [*curve.low, *curve.high]
    if shown:
        margin = 0.6 * (max(shown) - min(shown))
        axes.set_ylim(max(min(shown + everything) - 0.1 * margin, min(shown) - margin),
                      min(max(shown + everything) + 0.1 * margin, max(shown) + margin))
        axes.plot([], [], color=_OTHERS, linewidth=0.9, label="other arms")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_xlabel("iteration of the annealing")
    axes.set_ylabel("training loss")
    return figure


def spectra(summary: ComparisonSummary):
    """Eigenvalues of each seed, with the last stiff one marked."""
    figure, axes = drawing.figure(8, 3.2)
    for i, (seed, spectrum) in enumerate(summary.spectra.items()):
        values, stiff = np.array(spectrum.eigenvalues), spectrum.num_stiff
        numbers = np.arange(1, len(values) + 1)
        positive = values > 0
        axes.plot(numbers[positive], values[positive], ".-", color=f"C{i}", linewidth=1,
                  markersize=4, alpha=0.8, label=f"seed {seed}: {stiff} stiff")
        if 0 < stiff <= len(values):
            axes.plot(stiff, values[stiff - 1], "o", color=f"C{i}", markersize=9,
                      fillstyle="none", markeredgewidth=1.8)
    operators = {spectrum.operator for spectrum in summary.spectra.values()}
    axes.set_xlabel("number of the eigenvalue")
    axes.set_ylabel(f"eigenvalue ({', '.join(sorted(operators))})")
    axes.set_yscale("log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def stiff_cost_figure(summary: ComparisonSummary):
    """Stiff cost against loss; an arm is the number that it has in the table."""
    figure, axes = drawing.figure(9, 4.6)
    colours = highlighted(summary)
    highest = np.inf
    reference = summary.arm(summary.reference)
    if summary.compared and reference and reference.mean_loss is not None:
        highest = _worst_shown(summary) + reference.mean_loss
    points, budgets = [], set()
    for place, arm in enumerate(summary.arms, start=1):
        costs = [p.stiff_cost for p in arm.problem.values() if p.stiff_cost is not None]
        if costs and arm.mean_loss is not None:
            points.append((float(np.mean(costs)), arm.mean_loss, place, arm.name))
        taus = [p.stiff_budget for p in arm.problem.values() if p.stiff_budget is not None]
        if taus:
            budgets.add(round(float(np.mean(taus)), 3))
    for cost, loss, _, name in points:
        axes.plot(cost, min(loss, highest), "^" if loss > highest else "o", markersize=6,
                  color=colours.get(name, "#9aa0a9"), zorder=4 if name in colours else 3)
    for i, budget in enumerate(sorted(budgets)):
        axes.axvline(budget, linestyle="--", linewidth=1, color="#8250df",
                     label=None if i else "budget tau")
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.margins(0.06)
    costs = [point[0] for point in points]
    if costs and 0 < 10 * min(costs) < max(costs):
        axes.set_xscale("log")
    axes.set_xlabel("stiff cost, relative to that of as many average samples")
    axes.set_ylabel("mean test loss")
    figure.draw_without_rendering()  # from here on the layout in pixels stays as it is
    _label(axes, [(cost, min(loss, highest), str(place)) for cost, loss, place, _ in points])
    return figure


def _label(axes, points: list[tuple[float, float, str]]) -> None:
    """Writes each text beside its point; a text moves where it would cover a point or a text."""
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = list(places)
    ways = [radius * np.array([np.cos(angle), np.sin(angle)]) for radius in (12, 18, 26, 36)
            for angle in np.pi / 4 * np.arange(2, 10)]
    for (x, y, text), place in zip(points, places, strict=True):
        def room(way, place=place):
            return min(np.hypot(*((other - place - way) * _WIDE)) for other in taken)

        way = next((way for way in ways if room(way) > 11), ways[0])
        taken.append(place + way)
        far = np.linalg.norm(way) > 13
        axes.annotate(text, (x, y), xytext=way * 72 / axes.figure.dpi, textcoords="offset points",
                      ha="center", va="center", fontsize=8,
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5} if far else None)


def selected_samples(summary: ComparisonSummary):
    """Domains, losses and lengths of what each arm selected, below those of the whole pool."""
    rows: list[tuple] = [("(the pool)", summary.pool.candidates, {
        name: (counts.samples, counts.corrupted)
        for name, counts in summary.pool.domains.items()})]
    rows += [(arm.name, arm.selected, {
        name: (counts.selected, counts.selected_corrupted)
        for name, counts in arm.composition.items()}) for arm in summary.arms if arm.selected]
    figure, (shares, losses, lengths) = drawing.figure(
        10, 1.1 + _ROW * len(rows), ncols=3, sharey=True, width_ratios=(1.5, 1, 1))
    short = wording.short_names(summary.setting.pools)
    for row, (_, statistics, domains) in enumerate(rows):
        _shares(shares, row, domains, short)
        if statistics is not None:
            _box(losses, row, statistics.loss)
            _box(lengths, row, statistics.labels)
    if any(corrupted > 0 for *_, domains in rows for _, corrupted in domains.values()):
        shares.bar(0, 0, color="#999999", hatch="////", edgecolor="white", linewidth=0,
                   label="corrupted")
    shares.set_xlim(0, 1)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=8)
    shares.set_xlabel("share of the selected samples")
    losses.set_xlabel("loss before annealing")
    lengths.set_xlabel("length in tokens")
    _name_rows(shares, [name for name, *_ in rows])
    return figure


def _shares(axes, row: int, domains: dict[str, tuple[float, float]], short: dict[str, str],
            ) -> None:
    """A bar of parts. domains: pool -> (samples, corrupted ones among them)."""
    left, total = 0.0, max(sum(samples for samples, _ in domains.values()), 1)
    for i, (name, shown) in enumerate(short.items()):
        samples, corrupted = domains.get(name, (0, 0))
        for count, hatch in ((samples - corrupted, None), (corrupted, "////")):
            axes.barh(row, count / total, left=left, height=0.75, color=f"C{i}", alpha=0.75,
                      hatch=hatch, edgecolor="white", linewidth=0,
                      label=None if row or hatch else drawing.literal(shown))
            left += count / total


def _box(axes, row: int, quantiles: tuple[float, ...]) -> None:
    """5 to 95 % as a line, 25 to 75 % as a bar, the median as a point."""
    least, lower, median, upper, most = quantiles
    axes.plot([least, most], [row, row], color="#6b7280", linewidth=0.9)
    axes.plot([lower, upper], [row, row], color="#6b7280", linewidth=5, alpha=0.6,
              solid_capstyle="butt")
    axes.plot(median, row, "o", color="#222222", markersize=3.5)


def overlaps(summary: ComparisonSummary):
    """Jaccard indices between arms; between the seeds of an arm on the diagonal."""
    arms = [arm for arm in summary.arms if arm.selected]
    names = [arm.name for arm in arms]
    places = [summary.overlap.arms.index(name) for name in names]
    values = np.array(summary.overlap.matrix, dtype=float)[np.ix_(places, places)]
    for i, arm in enumerate(arms):
        own = arm.overlap_between_seeds
        values[i, i] = np.nan if own is None else own
    size = 2.2 + 0.3 * len(names)
    figure, axes = drawing.figure(size, size - 0.3)
    axes.grid(False)
    axes.imshow(values, cmap="Blues", vmin=0, vmax=np.nanmax(values))
    for i, row in enumerate(values):
        axes.add_patch(_frame(i))
        for j, value in enumerate(row):
            if np.isfinite(value):
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5,
                          color="white" if value > 0.55 * np.nanmax(values) else "#222222")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    return figure


def _frame(i: int):
    from matplotlib.patches import Rectangle

    return Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#d1660a", linewidth=1.1,
                     clip_on=False)
