"""The command line of the retriever: `exsearch index ...`, or alone `python -m retriever_service ...`.

Exit codes: 0 done, 2 the user can mend it (one clear message), 130 or 143 interrupted (Ctrl-C, SIGTERM), 1 anything
else.
"""

from __future__ import annotations

# In the order of `exsearch index --help`: to import one is to add its commands.
from retriever_service.cli import building, searching, updating  # isort: skip
from retriever_service.cli.program import app

__all__ = ["app", "building", "main", "searching", "updating"]


def main() -> None:
    """Entry point of `python -m retriever_service`."""
    app()
