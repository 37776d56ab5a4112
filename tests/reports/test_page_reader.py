"""That the tests' reader sees what would make a page depend on other files."""

from __future__ import annotations

import base64

import pytest
from page_reader import Page

SVG = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
       '{}</svg>')


def _figure(content: str) -> str:
    data = base64.b64encode(SVG.format(content).encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}">'


@pytest.mark.parametrize("element", [
    '<link rel="stylesheet" href="https://example.org/a.css">', '<img src="figure.png">',
    '<script src="//example.org/a.js"></script>', '<a href="http://example.org">x</a>',
    '<style>body { background: url("a.png"); }</style>', "<style>@import 'a.css';</style>",
    '<p style="background: url(a.png)">x</p>', '<img src="data:text/html;base64,AAAA">',
    _figure('<image xlink:href="http://example.org/a.png"/>'),
    _figure('<rect fill="url(http://example.org/a)"/>')])
def test_what_leads_out_of_a_page_is_found(element):
    assert len(Page(f"<html>{element}</html>").external) == 1


def test_what_stays_in_a_page_is_not():
    page = Page('<html><a href="#top">http://example.org</a><p title="http://example.org">x</p>'
                + _figure('<use xlink:href="#a"/><rect fill="url(#b)"/>') + "</html>")
    assert len(page.references) == 4 and page.external == []


def test_elements_that_are_not_closed_in_order_are_found():
    for text in ("<p><b>x</p></b>", "<p>x"):
        with pytest.raises(AssertionError):
            Page(text)
