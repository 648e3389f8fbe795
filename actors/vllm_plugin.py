"""What runs first in every vLLM process: the entry point of the group `vllm.general_plugins`.

It makes our weight receivers known, and has vLLM's lines also go to the log of the worker that the engine belongs to.
And it ties the engine's processes to the process that started them, and to nothing else: vLLM's own engine process
would outlive a killed rollout actor and keep its memory (on a GPU: all of it) from the actor's replacement, and end at
a Ctrl-C in the terminal, while its parent still has answers to finish.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

from actors import weight_transfer
from actors.actor_log import introduce_libraries
from actors.allocator import heed_settings

_PR_SET_PDEATHSIG = 1


def load() -> None:
    """May be called more than once in a process."""
    weight_transfer.register()
    end_with_parent()
    heed_settings()
    introduce_libraries()


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, and no terminal interrupt it. Does nothing in one that is
    no `multiprocessing` child.

    By the kernel, because it must also happen to a process that hangs or is stopped. The parent is, to be exact, the
    thread that started this process; with vLLM these last as long as their process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if not parent.is_alive():
        os._exit(1)
    # A terminal interrupts its foreground group.
    os.setpgid(0, 0)
