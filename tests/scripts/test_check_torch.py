"""`make setup` goes on only with the torch that was asked for."""

from __future__ import annotations

import pytest

from scripts.check_torch import verdict


@pytest.mark.parametrize(
    ("device", "version", "cuda", "gpu_visible", "good", "says"),
    [
        ("gpu", "2.13.0+cpu", None, False, False, "built without CUDA"),
        ("gpu", "2.13.0+cu130", "13.0", True, True, ""),
        ("gpu", "2.13.0", "13.0", False, True, "driver for CUDA 13.0"),
        ("cpu", "2.13.0", "13.0", False, False, "not the CPU build"),
        ("cpu", "2.13.0+cpu", None, False, True, ""),
    ],
)
def test_the_wrong_build_of_torch_ends_the_set_up_with_the_mend(
    device: str, version: str, cuda: str | None, gpu_visible: bool, good: bool, says: str
) -> None:
    goes_on, message = verdict(device, version, cuda, gpu_visible=gpu_visible)

    assert goes_on == good
    assert says in message and (bool(says) == bool(message))
    assert good or f"make setup DEVICE={device}" in message
