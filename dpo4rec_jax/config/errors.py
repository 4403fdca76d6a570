"""What a command prints as one line."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave us; commands print its one line and exit with status 2."""
