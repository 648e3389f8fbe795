"""The command line: parse, call, print. No logic.

    exsearch --help
    python -m pipeline.cli --help       (what `ray job submit` runs)

Exit codes: 0 done, 2 the user can mend it (one clear message), 130 or 143 interrupted (Ctrl-C, SIGTERM), 1 anything
else.
"""

from __future__ import annotations

# In the order of `exsearch --help`: to import one is to add its commands.
from pipeline.cli import training, runs, models, data, program  # isort: skip
from pipeline.cli.options import app

__all__ = ["app", "data", "main", "models", "program", "runs", "training"]


def main() -> None:
    """Entry point of the console script."""
    app()
