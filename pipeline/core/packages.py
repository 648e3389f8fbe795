"""Which of the two sets of packages is installed, that for GPUs or that for CPUs, and how to install one."""

from __future__ import annotations

import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pipeline.core import shipped

_TORCH_FOR_CPUS = "--extra-index-url https://download.pytorch.org/whl/cpu "


@cache
def has_gpu_packages() -> bool:
    """Whether the installed torch, and vLLM with it, were built for GPUs.

    Without importing torch, which takes a second or two in processes that have no other use for it.
    """
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    return runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] is not None


def how_to_install(device: Literal["cpu", "gpu"]) -> str:
    """The command that installs a set, whole or anew."""
    if shipped.IS_CHECKOUT:
        return f"make --always-make setup DEVICE={device}"
    index = _TORCH_FOR_CPUS if device == "cpu" else ""
    return f"pip install {index}'exsearch[{device}]', in an environment without the other set"
