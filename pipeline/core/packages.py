"""Which of the two sets of packages is installed, that for GPUs or that for CPUs."""

from __future__ import annotations

import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def has_gpu_packages() -> bool:
    """Whether the installed torch, and vLLM with it, were built for GPUs.

    Without importing torch, which takes a second or two in processes that have no other use for it.
    """
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    return runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] is not None
