"""What to do with a run that has ended, as commands to copy."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.agents.search import SEARCHER
from pipeline.core.run import RunFiles


def command(name: str) -> str:
    """How a program of this environment is called from the shell that we were called from."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))


def next_steps(run: Path, question: str, further: Sequence[str] = ()) -> str:
    """Looking at it, and where it has trained a searcher asking and serving that.

    Args:
        question: an example of what it can be asked.
        further: arguments of `exsearch` that come last.
    """
    where, asked = shlex.quote(str(run)), shlex.quote(question)
    steps = [f"view {where}"]
    if SEARCHER in RunFiles(run).trained():
        steps += [f"ask --run {where} {asked}", f"serve --follow {where}"]
    return "\n".join(["", "Next:", *(f"  {command('exsearch')} {step}" for step in [*steps, *further])])
