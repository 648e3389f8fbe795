"""vLLM, imported in less time, in this process and in those that it starts for an engine.

Import this before anything of vLLM. A process that vLLM starts does so by itself: it is a `VllmProcess`, and finds its
class here before it gets to what it is to run.
"""

from __future__ import annotations

import logging
import os
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING

from retriever_service.imports import quick_imports

# What it says while it is imported comes before it reads the level itself.
logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())

with quick_imports():
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmProcess(SpawnProcess):
    """Nothing but a process that imports this module first."""


class _Context(SpawnContext):
    Process = VllmProcess


# vLLM spawns these processes in any case: on CPUs by itself, on GPUs because `engine_options.set_environment` says so.
for _starter in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
    assert callable(_starter.get_mp_context)
    _starter.get_mp_context = _Context


def async_llm() -> type[AsyncLLM]:
    """The class of an engine's front end."""
    with quick_imports():
        from vllm.v1.engine.async_llm import AsyncLLM
    return AsyncLLM
