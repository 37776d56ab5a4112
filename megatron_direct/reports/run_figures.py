"""The figures of a run's page."""

from __future__ import annotations

import numpy as np

from megatron_direct.curvature.density import SpectralDensity
from megatron_direct.reports import drawing
from megatron_direct.reports.run_files import Annealing, Density, SpectrumRecord

_AVERAGED = 15  # one in so many of the iterations is averaged over, to show the trend


def curves(annealings: dict[str, Annealing]):
    """Training loss by iteration, and its moving average."""
    figure, axes = drawing.figure()
    trained = {arm: annealing for arm, annealing in annealings.items() if annealing.iterations}
    for number, (arm, annealing) in enumerate(trained.items()):
        iterations, losses = (np.array(values) for values in (annealing.iterations,
                                                              annealing.training_losses))
        axes.plot(iterations, losses, color=f"C{number}", linewidth=0.8, alpha=0.4)
        width = max(1, len(losses) // _AVERAGED)
        axes.plot(*(np.convolve(values, np.full(width, 1 / width), "valid")
                    for values in (iterations, losses)), color=f"C{number}", linewidth=2,
                  label=drawing.literal(arm))
    axes.set_xlabel("iteration of the annealing")
    axes.set_ylabel("training loss")
    if axes.lines:
        axes.legend()
    return figure


def eigenvalues(spectrum: SpectrumRecord):
    """The leading ones, with the elbow; those that are not positive have no place on the axis."""
    figure, axes = drawing.figure()
    values = np.array(spectrum.eigenvalues)
    numbers, positive = np.arange(1, len(values) + 1), values > 0
    axes.plot(numbers[positive], values[positive], "o-", markersize=3)
    stiff = spectrum.elbow.num_stiff
    axes.axvline(stiff + 0.5, linestyle="--", color="tab:red",
                 label=f"elbow: {stiff} stiff directions")
    axes.set_xlabel("number of the eigenvalue")
    axes.set_ylabel(f"eigenvalue ({spectrum.operator})")
    axes.set_yscale("log")
    axes.legend()
    return figure


def density(spectrum: SpectrumRecord, found: Density):
    smoothed = SpectralDensity(np.array(found.nodes), np.array(found.weights), found.trace,
                               found.positive_trace, num_matvecs=0)
    figure, axes = drawing.figure()
    axes.plot(*smoothed.smooth())
    axes.set_xlabel(f"eigenvalue ({spectrum.operator})")
    axes.set_ylabel("density")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-3 / spectrum.dimension)
    return figure
