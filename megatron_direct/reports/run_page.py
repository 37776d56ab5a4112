"""``report.html`` of a run: what the annealing came to, and from what."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from megatron_direct.reports import pages, run_figures, wording
from megatron_direct.reports.drawing import Image, image
from megatron_direct.reports.run_files import Density, RunReport
from megatron_direct.reports.tables import Cell, Table, make_table
from megatron_direct.steps.annealed import Losses
from megatron_direct.steps.domains import Domains
from megatron_direct.steps.draw import Draw
from megatron_direct.steps.selected import SelectionSummary

_ALL = "all"  # the losses over the tokens of all datasets
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
    draws: list[tuple[str, Table]]
    domains: list[tuple[str, Table]]
    problem: Table
    commands: Table


def write_page(run: RunReport, path: str | os.PathLike) -> None:
    pages.write_html(pages.render("run.html.j2", _page(run)), path)


def _page(run: RunReport) -> RunPage:
    density = run.spectrum.density
    return RunPage(
        title=f"Run: {run.path}", headline=headline(run),
        has_difference=any(map(run.is_compared, run.annealings)),
        losses=loss_tables(run),
        curves=image(run_figures.curves(run.annealings), "training loss by iteration")
        if run.annealings else None,
        spectrum=image(run_figures.eigenvalues(run.spectrum), "leading eigenvalues"),
        spectrum_notes=run.spectrum.notes,
        density=image(run_figures.density(run.spectrum, density), "spectral density")
        if density else None,
        trace=_trace(density) if density else "",
        selected=[_selected(name, found) for name, found in run.selections.items()],
        composition=_composition(run),
        draws=[(name, _draw(found.draw)) for name, found in run.selections.items()
               if found.draw is not None],
        domains=[(name, _domains(found)) for name, found in run.domains.items()],
        problem=_problem(run), commands=_commands(run))


def _trace(density: Density) -> str:
    return (f"Trace {density.trace.value:.4g} with standard error "
            f"{density.trace.standard_error:.2g}; positive eigenvalues sum to "
            f"{density.positive_trace.value:.4g}.")


def headline(run: RunReport) -> list[str]:
    """Sentences: the difference between the arms, and what it cost."""
    sentences = [_difference(run, arm) for arm in run.annealings if run.reference_of(arm)]
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
    after, before = (_of(losses, kind).get(_ALL) for losses in (result.after, result.before))
    sentence = f"{arm} ends with a {what} of {wording.loss(after)} per token"
    was, name = f"{wording.loss(before)} before annealing", run.reference_of(arm)
    if name not in run.annealings:
        return f"{sentence} ({was}); {name} has not been annealed yet."
    reference = _of(run.annealings[name].result.after, kind)
    if after is None or reference.keys() != _of(result.after, kind).keys():
        return f"{sentence} ({was}); {name} was measured on other datasets."
    different = run.differences(arm, name)
    if different:
        return (f"{sentence} ({was}); {name} was annealed with other settings "
                f"({wording.listed(different)}).")
    return (f"{sentence}, {wording.below(after - reference[_ALL])} {name} "
            f"({wording.loss(reference[_ALL])}; {was}).")


def _of(losses: Losses, kind: str) -> dict[str, float]:
    return losses.test if kind == "test" else losses.valid


def loss_tables(run: RunReport) -> list[tuple[str, Table]]:
    """(heading, table) of the test sets and of the validation sets: arms, then differences."""
    found = []
    for kind, heading in (("test", "Test loss"), ("valid", "Validation loss")):
        after = {arm: _of(annealing.result.after, kind)
                 for arm, annealing in run.annealings.items()}
        if any(after.values()):
            found.append((heading, _loss_table(run, kind, after)))
    return found


def _before(run: RunReport, kind: str) -> dict[str, dict[str, float]]:
    """Losses before annealing, by what they are called: where arms start from different models,
    each has a line."""
    annealings = run.annealings.items()
    by_arm = {f"({arm}, before annealing)": _of(annealing.result.before, kind)
              for arm, annealing in annealings}
    if len({annealing.settings.get("checkpoint_digest") for _, annealing in annealings}) > 1:
        return by_arm
    return {"(before annealing)": dict(itertools.chain.from_iterable(
        before.items() for before in by_arm.values()))}


def _loss_table(run: RunReport, kind: str, after: dict[str, dict[str, float]]) -> Table:
    """Losses by dataset, before, and by arm. Where the arms were measured on different datasets,
    their losses over all of them are different things, and are not compared."""
    names = [name for name in dict.fromkeys(name for losses in after.values() for name in losses)
             if name != _ALL] + [_ALL]
    short = wording.short_names(names[:-1])
    compared = names if len({tuple(losses) for losses in after.values()}) == 1 else names[:-1]
    best = {name: min(losses[name] for losses in after.values() if name in losses)
            for name in compared}
    rows: list[list[str | Cell]] = [
        [label, *(wording.loss(before.get(name)) for name in names)]
        for label, before in _before(run, kind).items()]
    for arm, losses in after.items():
        rows.append([arm, *(Cell(wording.loss(losses.get(name)),
                                 "best" if name in losses and losses[name] == best.get(name)
                                 else "") for name in names)])
    for arm, losses in after.items():
        reference = after.get(run.reference_of(arm), {})
        if reference and run.is_compared(arm):
            rows.append([f"{arm} - {run.reference_of(arm)}", *(
                wording.signed(losses[name] - reference[name])
                if name in compared and name in losses and name in reference else "-"
                for name in names)])
    return make_table(["arm", *(short.get(name, name) for name in names)], rows)


def _selected(name: str, found: SelectionSummary) -> str:
    counts = found.samples
    return (f"{name}: {found.num_select:,} of {counts.in_pools:,} samples. {counts.cut:,} samples "
            f"were cut at the sequence length ({counts.cut_tokens:,} tokens), "
            f"{counts.too_short:,} were too short, and {counts.not_finite:,} had no finite "
            f"gradient. Mean loss before annealing: {found.mean_loss.selected:.3f} for the "
            f"selected samples, {found.mean_loss.pool:.3f} for the pool."
            + "".join(f" {_sentence(str(part))}" for part in (
                found.how_many, found.stability, found.draw) if part is not None))


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[0].upper() + words[1:] + "."


def _composition(run: RunReport) -> Table:
    """Counts of corrupted samples are shown where there are any."""
    pools = {pool: counts for of_selection in run.compositions.values()  # which may have others
             for pool, counts in of_selection.items()}
    corrupted = any(counts.corrupted for counts in pools.values())
    keys = (("selected", "selected"), ("corrupted", "selected_corrupted"))[: 1 + corrupted]
    header = ["pool", "samples", *(["corrupted"] if corrupted else []),
              *(f"{name}: {what}" for name in run.compositions for what, _ in keys)]
    short = wording.short_names(list(pools))
    rows = []
    for pool, counts in pools.items():
        rows.append([short[pool], f"{counts.samples:,}",
                     *([f"{counts.corrupted:,}"] if corrupted else []),
                     *(f"{getattr(of_selection[pool], key):,}" if pool in of_selection else "-"
                       for of_selection in run.compositions.values() for _, key in keys)])
    return make_table(header, rows)


def _draw(found: Draw) -> Table:
    """A row for each pool, and below it for each of its clusters; then one for all of them."""
    rows = [[name, f"{of.candidates:,}", f"{of.selected:,}", f"{of.selected - of.drawn:,}",
             f"{of.drawn:,}", f"{of.repeated / of.selected:.0%}" if of.selected else "-"]
            for name, of in (*sorted([*found.pools.items(), *found.clusters.items()],
                                     key=lambda row: _place(row[0])), ("all", found.whole))]
    return make_table(["pool or cluster", "samples", "selected", "kept", "drawn", "repeats"], rows)


def _place(name: str) -> tuple[str, int]:
    """Of a pool, or of one of its clusters, POOL-cNUMBER, in the order of rows."""
    pool, _, number = name.rpartition("-c")
    return (pool, int(number)) if pool and number.isdigit() else (name, -1)


def _domains(found: Domains) -> Table:
    """A row for each domain, and below it for each of its clusters."""
    rows = []
    for group in (*found.domains, *found.clusters):
        rows.append([group.name, f"{group.samples:,}", f"{group.selected:,}",
                     f"{group.weight:.3f}", *_with_interval(group.worth),
                     *_with_interval(group.best), " · ".join(group.typical)])
    rows.sort(key=lambda row: _place(row[0]))
    return make_table(["domain or cluster", "samples", "selected", "weight", "worth", "interval",
                       "of its best", "interval", "typical samples"], rows, left=(0, 8))


def _with_interval(estimate: tuple[float, ...] | None) -> tuple[str, str]:
    if estimate is None:
        return "-", "-"
    value, low, high = estimate
    return f"{value:+.4f}", f"[{low:+.4f}, {high:+.4f}]"


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
