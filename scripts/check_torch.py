"""Whether the installed torch is the one for this machine's devices, and on GPUs whether kernels can be compiled:
`check_torch.py cpu|gpu`, for `make setup`.

pip may take another build than was meant: a local version such as 2.13.0+cpu counts as newer than 2.13.0.
"""

from __future__ import annotations

import os
import sys


def verdict(
    device: str, version: str, cuda: str | None, *, gpu_visible: bool, lacks: str
) -> tuple[bool, str]:
    """(whether the set-up may go on, what to tell the user).

    Args:
        device: "cpu" or "gpu", the set of packages that was asked for.
        version: torch's.
        cuda: version of CUDA that it was built for; None for a build without it.
        gpu_visible: whether it can use a GPU here.
        lacks: what keeps kernels from being compiled here; "" if nothing does.
    """
    again = f"Run: rm -rf .venv; make setup DEVICE={device}"
    if device == "cpu" and cuda is not None:
        return False, f"torch {version} in .venv is not the CPU build. {again}"
    if device == "gpu" and cuda is None:
        return False, (
            f"torch {version} in .venv was built without CUDA: pip found a CPU build in PIP_FIND_LINKS, an extra index "
            f"or its cache, and prefers its local version. Take that away (pip config list; pip cache purge). {again}"
        )
    if device == "gpu" and lacks:
        return False, f"{lacks[0].upper()}{lacks[1:]}. Then run make setup DEVICE=gpu again."
    if device == "gpu" and not gpu_visible:
        return True, (
            f"Warning: torch {version} sees no GPU here. It needs an NVIDIA driver for CUDA {cuda}; see nvidia-smi."
        )
    return True, ""


def main() -> int:
    """The exit code: 1 if the set-up must not go on."""
    import torch

    from pipeline.core.preflight import lacks_to_compile

    good, message = verdict(
        sys.argv[1],
        torch.__version__,
        torch.version.cuda,
        gpu_visible=torch.cuda.is_available(),
        lacks=lacks_to_compile(os.environ),
    )
    if message:
        print(message, file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
