"""Errors that a user can correct: what was expected, what was found, what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Raised for wrong flags, files and layouts; the command prints its message without a trace."""
