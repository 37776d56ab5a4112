"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron_direct.errors import UserError


def require(module: str, needed_for: str, extra: str) -> ModuleType:
    """The module. Raises UserError with the pip command where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{needed_for} needs the package {module.partition('.')[0]}, which cannot "
                        f"be imported ({error}). Run pip install -e '.[{extra}]'"
                        ) from error
