"""A page as a browser sees it: its elements, its words, and what it would fetch from elsewhere."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

_INLINE = {"span", "strong", "b", "i", "a"}  # elements that do not separate words
VOID = {"meta", "img", "br", "link", "input", "hr", "source", "embed"}
# Attributes whose value a browser loads or leads to.
_REFERENCES = ("src", "href", "srcset", "poster", "data", "action", "formaction", "background",
               "xlink:href")
_SVG = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """Elements must be closed in order. tables: [table][row][cell] words; references: all that the
    page, its styles and its figures refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags, self.headings, self.words, self.references = [], [], [], []
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.feed(text)
        assert not self.open

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def external(self) -> list[str]:
        """References that lead out of the page."""
        return [reference for reference in self.references
                if not reference.startswith(("#", "data:image/"))]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in _INLINE:
            self.words.append(" ")
        for name, value in attrs:
            if name in _REFERENCES:
                self.references.append(value)
                if value.startswith(_SVG):
                    self._read_figure(base64.b64decode(value[len(_SVG):]))
            elif name == "style":
                self.references += _of_style(value)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "style" for tag, _ in self.open):
            self.references += _of_style(data)
            return
        self.words.append(data)
        tags = [tag for tag, _ in self.open]
        if tags and tags[-1] == "h2":
            self.headings.append(data)
        if "td" in tags or "th" in tags:
            self.tables[-1][-1][-1] += data
            if any("best" in (attrs.get("class") or "") for _, attrs in self.open):
                self.bold.append(data)

    def _read_figure(self, svg: bytes) -> None:
        for element in ElementTree.fromstring(svg).iter():
            for name, value in element.attrib.items():
                if name.split("}")[-1] in ("href", "src"):
                    self.references.append(value)
                else:
                    self.references += _of_style(value)
            if element.tag.endswith("style"):
                self.references += _of_style(element.text or "")


def _of_style(style: str) -> list[str]:
    return [reference.strip("'\" ") for found in re.findall(
        r"url\(([^)]*)\)|@import\s+(\S+)", style) for reference in found if reference]
