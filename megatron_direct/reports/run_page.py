"""``report.html`` of a run: what the annealing came to, and from what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_direct.reports import pages, run_figures, wording
from megatron_direct.reports.drawing import Image, image
from megatron_direct.reports.run_files import Density, Losses, RunReport, SelectionRecord
from megatron_direct.reports.tables import Cell, Table, make_table

REFERENCE = "random"  # the arm that the others are compared with
_PROBLEM = (
    ("objective", "objective"), ("status", "status"), ("objective value", "objective_value"),
    ("upper bound of the objective", "upper_bound"), ("stiff cost", "stiff_cost"),
    ("stiff budget", "stiff_budget"), ("smallest possible stiff cost", "least_stiff_cost"),
    ("stiff cost of as many average samples", "average_stiff_cost"))


@dataclass(frozen=True)
class RunPage:
    """What ``run.html.j2`` shows."""

    title: str
    headline: list[str]
    has_difference: bool
    losses: list[tuple[str, Table]]
    curves: Image | None
    spectrum: Image
    spectrum_notes: tuple[str, ...]
    density: Image | None
    trace: str
    selected: list[str]
    composition: Table
    problem: Table
    commands: Table


def write_page(run: RunReport, path: str | os.PathLike) -> None:
    pages.write(pages.render("run.html.j2", _page(run)), path)


def _page(run: RunReport) -> RunPage:
    density = run.spectrum.density
    return RunPage(
        title=f"Run: {run.path}", headline=headline(run),
        has_difference=REFERENCE in run.annealings and len(run.annealings) > 1,
        losses=loss_tables(run),
        curves=image(run_figures.curves(run.annealings), "training loss by iteration")
        if run.annealings else None,
        spectrum=image(run_figures.eigenvalues(run.spectrum), "leading eigenvalues"),
        spectrum_notes=run.spectrum.notes,
        density=image(run_figures.density(run.spectrum, density), "spectral density")
        if density else None,
        trace=_trace(density) if density else "",
        selected=[_selected(name, found) for name, found in run.selections.items()],
        composition=_composition(run), problem=_problem(run), commands=_commands(run))


def _trace(density: Density) -> str:
    return (f"Trace {density.trace.value:.4g} with standard error "
            f"{density.trace.standard_error:.2g}; positive eigenvalues sum to "
            f"{density.positive_trace.value:.4g}.")


def headline(run: RunReport) -> list[str]:
    """Sentences: the difference between the arms, and what it cost."""
    sentences = [_difference(run, arm) for arm in run.annealings if arm != REFERENCE]
    if not sentences:
        sentences.append("No selection has been annealed yet.")
    tokens = sorted({annealing.result.tokens for annealing in run.annealings.values()})
    if tokens:
        sentences.append(f"Each arm was annealed on {wording.listed(f'{n:,}' for n in tokens)} "
                         "tokens.")
    if run.seconds:
        steps = ", ".join(f"{step} {seconds:,.0f}" for step, seconds in run.seconds.items())
        total = sum(run.seconds.values())
        sentences.append(f"Selecting the samples took {total:,.0f} seconds ({steps}).")
    return sentences


def _difference(run: RunReport, arm: str) -> str:
    result = run.annealings[arm].result
    # The selection was made for the validation set, so its loss is the weaker evidence.
    kind, what = ("test", "test loss") if result.after.test else ("valid", "validation loss")
    after, before = (getattr(losses, kind)["all"] for losses in (result.after, result.before))
    sentence = f"{arm} ends with a {what} of {wording.loss(after)} per token"
    was = f"{wording.loss(before)} before annealing"
    if REFERENCE not in run.annealings:
        return f"{sentence} ({was}); {REFERENCE} has not been annealed yet."
    reference = getattr(run.annealings[REFERENCE].result.after, kind)["all"]
    return (f"{sentence}, {wording.below(after - reference)} {REFERENCE} "
            f"({wording.loss(reference)}; {was}).")


def loss_tables(run: RunReport) -> list[tuple[str, Table]]:
    """(heading, table) of the test sets and of the validation sets: arms, then differences."""
    if not run.annealings:
        return []
    first = next(iter(run.annealings.values())).result
    return [(heading, _loss_table(run, kind)) for heading, kind in (
        ("Test loss", "test"), ("Validation loss", "valid")) if getattr(first.after, kind)]


def _loss_table(run: RunReport, kind: str) -> Table:
    """kind: a field of Losses."""
    first = next(iter(run.annealings.values())).result
    names = list(getattr(first.after, kind))
    short = wording.short_names([name for name in names if name != "all"])

    def of(losses: Losses) -> list[float]:
        return [getattr(losses, kind)[name] for name in names]

    after = {arm: of(annealing.result.after) for arm, annealing in run.annealings.items()}
    best = [min(column) for column in zip(*after.values(), strict=True)]
    rows: list[Sequence[str | Cell]] = [
        ["(before annealing)", *map(wording.loss, of(first.before))]]
    rows += [[arm, *(Cell(wording.loss(loss), "best" if loss == least else "")
                     for loss, least in zip(losses, best, strict=True))]
             for arm, losses in after.items()]
    rows += [[f"{arm} - {REFERENCE}", *(wording.signed(loss - reference) for loss, reference
                                        in zip(losses, after[REFERENCE], strict=True))]
             for arm, losses in after.items() if arm != REFERENCE and REFERENCE in after]
    return make_table(["arm", *(short.get(name, name) for name in names)], rows)


def _selected(name: str, found: SelectionRecord) -> str:
    counts = found.samples
    return (f"{name}: {found.num_select:,} of {counts.in_pools:,} samples. {counts.cut:,} samples "
            f"were cut at the sequence length ({counts.cut_tokens:,} tokens), "
            f"{counts.too_short:,} were too short, and {counts.not_finite:,} had no finite "
            f"gradient. Mean loss before annealing: {found.mean_loss.selected:.3f} of the selected "
            f"samples, {found.mean_loss.pool:.3f} of the pool.")


def _composition(run: RunReport) -> Table:
    """Counts of corrupted samples are shown where there are any."""
    first = next(iter(run.compositions.values()))
    corrupted = any(counts.corrupted for counts in first.values())
    keys = (("selected", "selected"), ("corrupted", "selected_corrupted"))[: 1 + corrupted]
    header = ["pool", "samples", *(["corrupted"] if corrupted else []),
              *(f"{name}: {what}" for name in run.compositions for what, _ in keys)]
    short = wording.short_names(list(first))
    rows = []
    for pool, counts in first.items():
        rows.append([short[pool], f"{counts.samples:,}",
                     *([f"{counts.corrupted:,}"] if corrupted else []),
                     *(f"{getattr(of_selection[pool], key):,}"
                       for of_selection in run.compositions.values() for _, key in keys)])
    return make_table(header, rows)


def _problem(run: RunReport) -> Table:
    return make_table(["", *run.selections], [
        [label, *(_value(getattr(found, key)) for found in run.selections.values())]
        for label, key in _PROBLEM])


def _value(value: str | float | None) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.6g}"


def _commands(run: RunReport) -> Table:
    rows = []
    for command in run.commands:
        sizes = [f"{short} {command.layout[key]}" for short, key in (
            ("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"),
            ("CP", "context_parallel_size"), ("EP", "expert_model_parallel_size"))
            if key in command.layout]
        rows.append([command.name, ", ".join(sizes),
                     ", ".join(f"{name} {version}" for name, version in command.versions.items())])
    return make_table(["command", "layout", "versions"], rows, left=(0, 1, 2))
