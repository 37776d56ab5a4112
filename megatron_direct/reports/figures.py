"""The figures of a comparison's page, each from the summary alone."""

from __future__ import annotations

import numpy as np

from megatron_direct.comparison.statistics import BETTER, UNCLEAR, WORSE
from megatron_direct.comparison.summary import PAPER_ARM
from megatron_direct.reports import html, wording

VERDICT_COLOURS = {BETTER: "#1a7f37", WORSE: "#b42318", UNCLEAR: "#6b7280"}
_OTHERS = "#c3c7ce"  # arms that no colour is spent on
_WIDE = (0.65, 1)  # a text of two digits is so much wider than high
_ROW = 0.24  # inches a row takes in a figure with a row for each arm
# Arms that are worse by more than this many times what matters stand at the edge.
_CUT_OFF = 1.6


def highlighted(summary: dict) -> dict[str, str]:
    """arm -> colour: the reference, the default, the paper's and, if another, the lowest."""
    colours = {summary["reference"]: "#222222", summary["default_arm"]: "#0969da",
               PAPER_ARM: "#d1660a"}
    best = wording.lowest(summary)
    if best is not None:
        colours.setdefault(best["name"], VERDICT_COLOURS[BETTER])
    return {name: colour for name, colour in colours.items() if name in summary["setting"]["arms"]}


def differences(summary: dict):
    """A row for each arm: mean difference, both intervals, and each seed."""
    arms = wording.compared(summary)
    figure, axes = html.figure(8, 0.9 + _ROW * len(arms))
    reference = wording.arm_of(summary, summary["reference"])["losses"]
    edge = _worst_shown(summary)
    for row, arm in enumerate(arms):
        found = arm["difference"]
        colour = VERDICT_COLOURS[found["verdict"]]
        if found["mean"] > edge:
            axes.annotate(wording.signed(found["mean"]), (edge, row), xytext=(0.85 * edge, row),
                          color=colour, fontsize=8, va="center", ha="center",
                          arrowprops={"arrowstyle": "->", "color": colour})
            continue
        for key, width in (("student", 1.2), ("bootstrap", 4)):
            if found[key] is not None:
                axes.plot(found[key], [row, row], color=colour, linewidth=width, alpha=0.7,
                          solid_capstyle="butt")
        seeds = [loss - reference[seed] for seed, loss in arm["losses"].items()
                 if seed in reference]
        axes.plot(seeds, [row] * len(seeds), "o", color="white", markeredgecolor=colour,
                  markersize=3, markeredgewidth=0.7)
        axes.plot(found["mean"], row, "D", color=colour, markersize=5)
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_xlim(right=edge)
    axes.set_xlabel(f"mean test loss less that of {summary['reference']}  (left: better)")
    _name_rows(axes, [arm["name"] for arm in arms])
    return figure


def _worst_shown(summary: dict) -> float:
    """The difference up to which arms are drawn to scale.

    An arm that picks nothing but noise would leave no room for those that matter: what matters is
    the greatest gain, or the median difference if that is greater.
    """
    means = [arm["difference"]["mean"] for arm in wording.compared(summary)]
    return _CUT_OFF * max(-min(means), float(np.median(np.abs(means))), 1e-4)


def _name_rows(axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)


def curves(summary: dict):
    """Training losses, with the range over seeds of the arms that have a colour."""
    figure, axes = html.figure(8, 3.4)
    colours = highlighted(summary)
    shown, everything = [], []
    for arm in summary["arms"]:
        curve, colour = arm["curve"], colours.get(arm["name"])
        if curve is None:
            continue
        everything += curve["mean"]
        if colour is None:
            axes.plot(curve["iteration"], curve["mean"], color=_OTHERS, linewidth=0.9)
            continue
        axes.plot(curve["iteration"], curve["mean"], color=colour, linewidth=1.8,
                  label=arm["name"], zorder=3)
        axes.fill_between(curve["iteration"], curve["low"], curve["high"], color=colour,
                          alpha=0.15, linewidth=0, zorder=2)
        shown += [*curve["low"], *curve["high"]]
    if shown:
        margin = 0.6 * (max(shown) - min(shown))
        axes.set_ylim(max(min(shown + everything) - 0.1 * margin, min(shown) - margin),
                      min(max(shown + everything) + 0.1 * margin, max(shown) + margin))
        axes.plot([], [], color=_OTHERS, linewidth=0.9, label="other arms")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_xlabel("iteration of the annealing")
    axes.set_ylabel("training loss")
    return figure


def spectra(summary: dict):
    """Eigenvalues of each seed, with the last stiff one marked."""
    figure, axes = html.figure(8, 3.2)
    for i, (seed, spectrum) in enumerate(summary["spectra"].items()):
        values, stiff = np.array(spectrum["eigenvalues"]), spectrum["num_stiff"]
        numbers = np.arange(1, len(values) + 1)
        positive = values > 0
        axes.plot(numbers[positive], values[positive], ".-", color=f"C{i}", linewidth=1,
                  markersize=4, alpha=0.8, label=f"seed {seed}: {stiff} stiff")
        if 0 < stiff <= len(values):
            axes.plot(stiff, values[stiff - 1], "o", color=f"C{i}", markersize=9,
                      fillstyle="none", markeredgewidth=1.8)
    operators = {spectrum["operator"] for spectrum in summary["spectra"].values()}
    axes.set_xlabel("number")
    axes.set_ylabel(f"eigenvalue ({', '.join(sorted(operators))})")
    axes.set_yscale("log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def stiff_costs(summary: dict):
    """Stiff cost against loss; an arm is the number that it has in the table."""
    figure, axes = html.figure(9, 4.6)
    colours = highlighted(summary)
    highest = np.inf
    if wording.compared(summary):
        highest = _worst_shown(summary) + wording.arm_of(
            summary, summary["reference"])["mean_loss"]
    points, budgets = [], set()
    for number, arm in enumerate(summary["arms"], start=1):
        problems = list(arm["problem"].values())
        costs = [p["stiff_cost"] for p in problems if p["stiff_cost"] is not None]
        if costs:
            points.append((float(np.mean(costs)), arm["mean_loss"], number, arm["name"]))
        taus = [p["stiff_budget"] for p in problems if p["stiff_budget"] is not None]
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
    axes.set_xlabel("stiff cost, 1 = as many average samples")
    axes.set_ylabel("mean test loss")
    figure.draw_without_rendering()  # the layout is settled: what is where in pixels stays so
    _label(axes, [(cost, min(loss, highest), str(number)) for cost, loss, number, _ in points])
    return figure


def _label(axes, points: list[tuple[float, float, str]]) -> None:
    """Writes each text beside its point; texts that would cover points or texts give way."""
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


def picks(summary: dict):
    """Shares of the domains, losses and lengths of what each arm picked, below the whole pool."""
    arms = [arm for arm in summary["arms"] if arm["picks"]["samples"]]
    rows = [("(the pool)", summary["pool"]["picks"], {
        name: (counts["samples"], counts["corrupted"])
        for name, counts in summary["pool"]["domains"].items()})]
    rows += [(arm["name"], arm["picks"], {
        name: (counts["selected"], counts["selected_corrupted"])
        for name, counts in arm["composition"].items()}) for arm in arms]
    figure, (shares, losses, lengths) = html.figure(
        10, 1.1 + _ROW * len(rows), ncols=3, sharey=True, width_ratios=(1.5, 1, 1))
    short = wording.short_names(summary["setting"]["pools"])
    corrupted_at_all = False
    for row, (_, picked, domains) in enumerate(rows):
        left, total = 0.0, max(sum(samples for samples, _ in domains.values()), 1)
        for i, name in enumerate(summary["setting"]["pools"]):
            samples, corrupted = domains.get(name, (0, 0))
            for count, hatch in ((samples - corrupted, None), (corrupted, "////")):
                shares.barh(row, count / total, left=left, height=0.75, color=f"C{i}",
                            alpha=0.75, hatch=hatch, edgecolor="white", linewidth=0,
                            label=None if row or hatch else short[name])
                left += count / total
            corrupted_at_all |= corrupted > 0
        for axes, key in ((losses, "loss"), (lengths, "labels")):
            _box(axes, row, picked[key])
    if corrupted_at_all:
        shares.bar(0, 0, color="#999999", hatch="////", edgecolor="white", linewidth=0,
                   label="corrupted")
    shares.set_xlim(0, 1)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=8)
    shares.set_xlabel("share of the picked samples")
    losses.set_xlabel("loss before annealing")
    lengths.set_xlabel("length in tokens")
    _name_rows(shares, [name for name, *_ in rows])
    return figure


def _box(axes, row: int, quantiles: list[float] | None) -> None:
    """5 to 95 % as a line, 25 to 75 % as a bar, the median as a point."""
    if quantiles is None:
        return
    least, lower, median, upper, most = quantiles
    axes.plot([least, most], [row, row], color="#6b7280", linewidth=0.9)
    axes.plot([lower, upper], [row, row], color="#6b7280", linewidth=5, alpha=0.6,
              solid_capstyle="butt")
    axes.plot(median, row, "o", color="#222222", markersize=3.5)


def overlaps(summary: dict):
    """Jaccard indices between arms; between the seeds of an arm on the diagonal."""
    names = [arm["name"] for arm in summary["arms"] if arm["picks"]["samples"]]
    places = [summary["overlap"]["arms"].index(name) for name in names]
    values = np.array(summary["overlap"]["matrix"], dtype=float)[np.ix_(places, places)]
    for i, name in enumerate(names):
        own = wording.arm_of(summary, name)["overlap_between_seeds"]
        values[i, i] = np.nan if own is None else own
    size = 2.2 + 0.3 * len(names)
    figure, axes = html.figure(size, size - 0.3)
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
