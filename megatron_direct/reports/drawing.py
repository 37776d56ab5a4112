"""Figures without a display: empty axes to draw on, and finished figures as images of a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass


@dataclass(frozen=True)
class Image:
    """source: a data URI, so that the page needs no other file; description: what it shows, for
    those who cannot see it."""

    source: str
    description: str


def figure(width: float = 8, height: float = 3.2, **subplots):
    """(figure, its axes), drawn without pyplot: no display, no global state."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(**subplots)
    for ax in getattr(axes, "flat", [axes]):
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def literal(text: str) -> str:
    """Text of a label as it stands: matplotlib would read what is between two $ as a formula, and
    leave out of a legend what begins with _."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # a space of no width


def image(drawn, description: str) -> Image:
    import matplotlib

    buffer = io.BytesIO()
    # No date and no random names, so that the same numbers make the same page.
    with matplotlib.rc_context({"svg.hashsalt": "megatron-direct"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return Image(f"data:image/svg+xml;base64,{data}", description)
