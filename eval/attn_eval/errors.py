"""The error that every mistake of a user ends in: one line that says what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvaluationError(ValueError):
    """A recipe, a file, a length or a device that can't be used; the message is written for the user."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """``did you mean 'x'?`` if something allowed is near, otherwise the list of what is allowed."""
    options = sorted(allowed)
    close = difflib.get_close_matches(given, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "allowed: " + (", ".join(options) or "nothing")
