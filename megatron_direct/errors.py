"""Errors that a user can correct: what was expected, what was found, what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Raised for wrong flags, files and layouts; the command prints its message without a trace."""


class NothingFits(UserError):
    """No selection keeps the budget and the quotas that were given."""
