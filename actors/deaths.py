"""How Ray says that an actor is dead, and how people are told."""

from __future__ import annotations

import re

from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

DEATHS = (RayActorError, OutOfMemoryError)
"""What calls to an actor raise that is dead or out of reach. The second, of one that Ray's memory monitor has ended, is
none of the first."""

RESTART_PAUSE_S = 2.0
"""Mean pause before what did not start is started a second time, in seconds; it doubles."""


def in_words(error: Exception) -> str:
    """Without the traceback that Ray puts in front of what an actor raised, or the pages behind a lack of memory."""
    if isinstance(error, OutOfMemoryError):
        used = re.search(r"was (\S+) used / (\S+) limit", str(error))
        figures = f" ({used[1]} of {used[2]})" if used else ""
        return (
            f"Ray's memory monitor ended it, because the memory of its node was nearly full{figures}; `exsearch plan` "
            "says which part needs how much, and which keys lower it"
        )
    return str(error.cause if isinstance(error, RayTaskError) else error)
