"""`make setup` goes on only with the torch that was asked for."""

from __future__ import annotations

import pytest

from scripts.check_torch import verdict


@pytest.mark.parametrize(
    ("device", "version", "cuda", "gpu_visible", "lacks", "good", "says"),
    [
        ("gpu", "2.13.0+cpu", None, False, "", False, "built without CUDA"),
        ("gpu", "2.13.0+cu130", "13.0", True, "", True, ""),
        ("gpu", "2.13.0", "13.0", False, "", True, "driver for CUDA 13.0"),
        ("gpu", "2.13.0", "13.0", True, "there is no C compiler", False, "There is no C compiler"),
        ("cpu", "2.13.0", "13.0", False, "", False, "not the CPU build"),
        ("cpu", "2.13.0+cpu", None, False, "there is no C compiler", True, ""),
    ],
)
def test_the_wrong_build_of_torch_or_nothing_to_compile_with_ends_the_set_up_with_the_mend(
    device: str, version: str, cuda: str | None, gpu_visible: bool, lacks: str, good: bool, says: str
) -> None:
    goes_on, message = verdict(device, version, cuda, gpu_visible=gpu_visible, lacks=lacks)

    assert goes_on == good
    assert says in message and (bool(says) == bool(message))
    assert good or f"make setup DEVICE={device}" in message
