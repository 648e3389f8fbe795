"""The exceptions that a command ends by without a traceback, and what they say in place of an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, model or index.

    The message is one sentence or two: what is wrong, where (file and line, or configuration key), and how to mend
    it. The command line prints it without a traceback and exits with code 2.
    """


class RunError(RuntimeError):
    """A run cannot go on, and no mistake of the user's is known: something failed too often, or taught nothing.

    The command line prints the message and how to go on, and exits with code 1. The log of the run has the traceback.
    """


def suggestion(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names) or 'none'}"
