"""Pages that stand alone: tables, figures as embedded SVG, and the frame around them.

Strings are escaped where they enter; what is HTML already says so by being :class:`Markup`, or is
the content of a section.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence


class Markup(str):
    """A string that is HTML, and not to be escaped again."""


def escape(text: str) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def table(rows: Sequence[Sequence[str]], css_class: str = "") -> Markup:
    """The first row is the header, the first column the names."""
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    # Wide tables scroll by themselves, and leave the page as wide as it is.
    return Markup(f'<div class="scroll"><table class="{css_class}">{line(rows[0], "th")}'
                  + "".join(line(row, "td") for row in rows[1:]) + "</table></div>")


def figure(width: float = 7, height: float = 3.2, **subplots):
    """(figure, its axes), drawn without pyplot: no display, no global state."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(**subplots)
    for ax in getattr(axes, "flat", [axes]):
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def image(drawn, description: str = "") -> Markup:
    """A figure as it stands in a page. description: what it shows, for who cannot see it."""
    import matplotlib

    buffer = io.BytesIO()
    # No date and no random names, so that the same numbers make the same page.
    with matplotlib.rc_context({"svg.hashsalt": "megatron-direct"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup(f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">')


def page(title: str, sections: Iterable[tuple[str, str, str]], css: str = "") -> str:
    """The page; a section has a heading, a text below it, and its content, which is HTML."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>"
                   + (f"<p>{escape(text)}</p>" if text else "") + f"{content}</section>"
                   for heading, text, content in sections)
    title = escape(f"megatron-direct: {title}")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f"<style>{_CSS}{css}</style></head>\n<body><h1>{title}</h1>{body}</body></html>\n")


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.scroll { overflow-x: auto; }
"""
