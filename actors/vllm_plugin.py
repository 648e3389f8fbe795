"""What runs first in every vLLM process: the entry point of the group `vllm.general_plugins`.

It makes our weight receivers known, and ties the engine process to the process that started it: vLLM's own engine
process would outlive a killed rollout actor and keep its memory (on a GPU: all of it) from the actor's replacement.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time

from actors import weight_transfer

logger = logging.getLogger(__name__)

GRACE_S = 30.0
"""How long an orphaned process may take to shut down, in seconds."""


def load() -> None:
    """May be called more than once in a process."""
    weight_transfer.register()
    end_with_parent()


def end_with_parent() -> None:
    """Shuts this process down when its parent is gone. Does nothing in a process that is no `multiprocessing` child."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == "end-with-parent" for thread in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        logger.warning(
            f"{multiprocessing.current_process().name} shuts down: its parent {parent.pid} is gone"
        )
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
