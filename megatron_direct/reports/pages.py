"""Pages from the templates beside this file. All values are escaped where they enter a page."""

from __future__ import annotations

import functools
import os
from dataclasses import fields

import jinja2

from megatron_direct.runtime import files


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_direct.reports"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, page) -> str:
    """page: a dataclass, whose fields are the names that the template knows."""
    values = {field.name: getattr(page, field.name) for field in fields(page)}
    return _environment().get_template(template).render(values)


def write_html(text: str, path: str | os.PathLike) -> None:
    with files.written_whole(path, "w") as file:
        file.write(text)
