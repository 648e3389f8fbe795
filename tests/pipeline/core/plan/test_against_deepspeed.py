"""Model states against DeepSpeed's own estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.plan.learner import RankLoad, model_states
from tests.pipeline.core.plan.shapes import LLAMA_SHAPE, QWEN_SHAPE

LOAD = RankLoad(
    device="gpu",
    dtype="bfloat16",
    ranks=8,
    zero_stage=3,
    row_tokens=16_384,
    trained_tokens=2_900,
    checkpointing=True,
)


@pytest.fixture(scope="module")
def estimators() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of stage 2 and of stage 3. They print nothing and need no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    return estimate_zero2_model_states_mem_needs, estimate_zero3_model_states_mem_needs


@pytest.mark.parametrize("shape", [QWEN_SHAPE, LLAMA_SHAPE])
@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_stage_2(estimators: Any, shape: Any, ranks: int) -> None:
    """It counts 16-bit gradients beside the float32 ones; ours are summed in float32 as they come."""
    stage_2, _ = estimators
    _, gpu = stage_2(shape.parameters, num_gpus_per_node=ranks, cpu_offload=False)

    assert model_states(shape, replace(LOAD, zero_stage=2, ranks=ranks))["gpu"] == pytest.approx(gpu, rel=0.1)


@pytest.mark.parametrize("shape", [QWEN_SHAPE, LLAMA_SHAPE])
@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_stage_3(estimators: Any, shape: Any, ranks: int) -> None:
    """Its estimate without the largest layer, which is among our buffers."""
    _, stage_3 = estimators
    _, gpu, layer = stage_3(
        shape.parameters, shape.layer_parameters, num_gpus_per_node=ranks, cpu_offload=False
    )

    assert model_states(shape, replace(LOAD, ranks=ranks))["gpu"] == pytest.approx(gpu - layer, rel=0.1)


@pytest.mark.parametrize("ranks", [2, 8])
def test_offloaded_optimisers(estimators: Any, ranks: int) -> None:
    """All ranks of a node together on the host; the estimators' reserve of a half is left out."""
    stage_2, stage_3 = estimators
    two = replace(LOAD, zero_stage=2, ranks=ranks, offload_optimizer=True)
    host, gpu = stage_2(
        QWEN_SHAPE.parameters, num_gpus_per_node=ranks, cpu_offload=True, additional_buffer_factor=1
    )
    # With more than four ranks it counts the copy of the model that each rank loads, not the states.
    assert gpu == pytest.approx(model_states(QWEN_SHAPE, two)["gpu"], rel=0.1)
    if ranks <= 4:
        assert ranks * model_states(QWEN_SHAPE, two)["host"] == pytest.approx(host, rel=0.1)

    three = replace(LOAD, ranks=ranks, offload_optimizer=True)
    host, gpu, layer = stage_3(
        QWEN_SHAPE.parameters,
        QWEN_SHAPE.layer_parameters,
        num_gpus_per_node=ranks,
        cpu_offload=True,
        cpu_offload_params=False,
        additional_buffer_factor=1,
    )
    assert ranks * model_states(QWEN_SHAPE, three)["host"] == pytest.approx(host, rel=0.1)
    assert model_states(QWEN_SHAPE, three)["gpu"] == pytest.approx(gpu - layer, rel=0.1)


def test_offloaded_parameters_leave_the_gpu(estimators: Any) -> None:
    _, stage_3 = estimators
    load = replace(LOAD, offload_optimizer=True, offload_parameters=True)
    host, gpu, layer = stage_3(
        QWEN_SHAPE.parameters,
        QWEN_SHAPE.layer_parameters,
        num_gpus_per_node=8,
        cpu_offload=True,
        cpu_offload_params=True,
        additional_buffer_factor=1,
    )
    assert 8 * model_states(QWEN_SHAPE, load)["host"] == pytest.approx(host, rel=0.1)
    assert model_states(QWEN_SHAPE, load).get("gpu", 0) == gpu - layer == 0
