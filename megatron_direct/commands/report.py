"""``megatron-direct report``: the table of a run, and one self-contained page about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_direct.config import ParallelConfig
from megatron_direct.curvature.density import Estimate, SpectralDensity
from megatron_direct.mcore.training import read_metrics
from megatron_direct.reports import html
from megatron_direct.runtime import files, parallel
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.selected import arm_folder


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Report."""

    run_dir: str = flag("", "folder of a finished select", required=True)


@dataclass(frozen=True)
class ReportRequest:
    report: ReportConfig
    layout: ParallelConfig = field(default_factory=ParallelConfig)


def report(request: ReportRequest) -> None:
    """Writes ``report.html`` and prints the table."""
    parallel.on_rank_zero(lambda: _report(request.report))


def _report(config: ReportConfig) -> None:
    run = RunDirectory(config.run_dir)
    run.require()
    rows = loss_table(run)
    write_page(run, rows)
    print(format_table(rows), flush=True)
    print(f"report: {run.path / 'report.html'}", flush=True)


def arm_results(run: RunDirectory) -> dict[str, dict]:
    """arm -> result.json, of the arms that are finished."""
    return {path.parent.name: files.read_json(path)
            for path in sorted((run.path / "anneal").glob("*/result.json"))}


def loss_table(run: RunDirectory) -> list[list[str]]:
    """Header, the checkpoint before annealing, and a row an arm."""
    results = arm_results(run)
    if not results:
        return [["arm"]]
    first = next(iter(results.values()))
    columns = [(kind, name) for kind in ("valid", "test") for name in first["after"][kind]]
    header = ["arm", *(f"all {kind}" if name == "all" else name for kind, name in columns)]
    rows = [["(before annealing)", *_losses(first["before"], columns)]]
    rows += [[arm, *_losses(result["after"], columns)] for arm, result in results.items()]
    return [header, *rows]


def _losses(losses: dict, columns: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{losses[kind][name]:.4f}" for kind, name in columns]


def format_table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_page(run: RunDirectory, rows: list[list[str]]) -> None:
    selection = files.read_json(run.path / "selections" / "direct" / "selection.json")
    spectrum = files.read_json(run.path / "curvature" / "spectrum.json")
    sections = [
        ("Losses", "Mean loss a token, documents cut at the sequence length. The random arm has "
         "the same number of samples, tokens, seed and schedule.", html.table(rows)),
        ("Annealing", "Training loss, each arm on its own samples.", html.image(_loss_curves(run))),
        ("Spectrum", "; ".join(spectrum["notes"]) + ".",
         html.image(_spectrum(spectrum)) + _density(spectrum)),
        ("What was selected", _composition_text(selection), html.table(
            _composition(run, selection))),
        ("Selection problem", "", html.table(_problem(selection))),
        ("Run", "All flags, digests and versions are in run.json.", html.table(_record(run))),
    ]
    with files.written_whole(run.path / "report.html", "w") as file:
        file.write(html.page(str(run.path), sections))


def _composition_text(selection: dict) -> str:
    counts, loss = selection["samples"], selection["mean_loss"]
    return (f"{selection['num_select']} of {counts['in_pools']} samples; {counts['cut']} were cut "
            f"at the sequence length ({counts['cut_tokens']} tokens), {counts['too_short']} too "
            f"short, {counts['not_finite']} without a finite gradient. Mean loss before annealing: "
            f"{loss['selected']:.3f} of the selected, {loss['pool']:.3f} of the pool.")


def _composition(run: RunDirectory, selection: dict) -> list[list[str]]:
    arms = {"direct": selection["composition"]}
    drawn = arm_folder(run.path, "random") / "composition.json"
    if drawn.is_file():
        arms["random"] = files.read_json(drawn)
    rows = [["pool", "samples", "corrupted", *(f"{arm}: {what}" for arm in arms
                                               for what in ("selected", "of them corrupted"))]]
    for name, counts in selection["composition"].items():
        rows.append([name, str(counts["samples"]), str(counts["corrupted"]),
                     *(str(of_arm[name][key]) for of_arm in arms.values()
                       for key in ("selected", "selected_corrupted"))])
    return rows


def _problem(selection: dict) -> list[list[str]]:
    keys = ("objective", "status", "objective_value", "upper_bound", "stiff_cost", "stiff_budget",
            "least_stiff_cost", "average_stiff_cost")
    return [["", ""], *([key.replace("_", " "), _number(selection[key])] for key in keys)]


def _record(run: RunDirectory) -> list[list[str]]:
    rows = [["stage", "layout", "versions"]]
    for call in run.record():
        layout = call["flags"]["layout"]
        rows.append([call["command"], f"TP {layout['tensor_model_parallel_size']} x PP "
                     f"{layout['pipeline_model_parallel_size']}",
                     ", ".join(f"{k} {v}" for k, v in call["provenance"]["versions"].items())])
    return rows


def _number(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str("-" if value is None else value)


def _loss_curves(run: RunDirectory):
    figure, axes = html.figure()
    for arm in arm_results(run):
        metrics = read_metrics(arm_folder(run.path, arm) / "metrics.jsonl")
        axes.plot([m["iteration"] for m in metrics], [m["loss"] for m in metrics], label=arm)
    axes.set_xlabel("iteration of the annealing")
    axes.set_ylabel("training loss")
    if axes.lines:
        axes.legend()
    return figure


def _spectrum(spectrum: dict):
    figure, axes = html.figure()
    values = spectrum["eigenvalues"]
    axes.plot(range(1, len(values) + 1), values, "o-", markersize=3)
    axes.axvline(spectrum["elbow"]["num_stiff"] + 0.5, linestyle="--", color="tab:red",
                 label=f"elbow: {spectrum['elbow']['num_stiff']} stiff directions")
    axes.set_xlabel("number")
    axes.set_ylabel(f"eigenvalue ({spectrum['operator']})")
    axes.set_yscale("log")
    axes.legend()
    return figure


def _density(spectrum: dict) -> str:
    """The spectral density and the trace, if they were computed."""
    found = spectrum["density"]
    if found is None:
        return ""
    trace, energy = (Estimate(**found[key]) for key in ("trace", "positive_trace"))
    density = SpectralDensity(np.array(found["nodes"]), np.array(found["weights"]), trace, energy,
                              num_matvecs=0)
    figure, axes = html.figure()
    axes.plot(*density.smooth())
    axes.set_xlabel(f"eigenvalue ({spectrum['operator']})")
    axes.set_ylabel("density")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-3 / spectrum["dimension"])
    return (f"<p>Trace {trace.value:.4g} with standard error {trace.standard_error:.2g}; positive "
            f"eigenvalues sum to {energy.value:.4g}.</p>" + html.image(figure))
