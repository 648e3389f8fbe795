"""What a plan sees of the machine that it is made on."""

from __future__ import annotations

from pipeline.core.plan.machine import core_tflops


def test_a_core_computes_something() -> None:
    assert 0 < core_tflops("float32") < 100
