"""No gradient that is not finite reaches a weight, on any number of ranks and at any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner import Learner
from pipeline.core.config import LearnerConfig
from pipeline.core.records import Example
from pipeline.core.training import TrainReport
from tests.actors.ranks import (
    AFTER_EACH_STEP,
    CONFIG,
    Weights,
    assert_same_weights,
    build_model,
    make_examples,
    nll_of,
    run_ranks,
    weights_of,
)

pytestmark = pytest.mark.component

BAD_STEP = 3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


def spoil(learner: Learner, value: float) -> None:
    """Give one parameter such a gradient in step `BAD_STEP`, on the last rank alone."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = learner.progress()["step"] == BAD_STEP - 1 and learner.rank == learner.world_size - 1
        return torch.full_like(gradient, value) if spoilt else gradient

    next(p for n, p in learner.model.named_parameters() if "q_proj.weight" in n).register_hook(hook)


def train_spoilt(learner: Learner, examples: list[Example]) -> tuple[TrainReport, list[Weights]]:
    """The report, and the weights behind each step."""
    spoil(learner, float("inf"))
    weights: list[Weights] = []
    report = learner.train(
        examples, nll_of(learner), phase_seed=1, on_step=lambda step: weights.append(weights_of(learner))
    )
    return report, weights


def layouts() -> list[dict[str, Any]]:
    float32 = [{"num_ranks": ranks, "zero_stage": stage} for ranks in (1, 2) for stage in range(4)]
    offloaded = [{"num_ranks": 2, "zero_stage": stage, "offload_optimizer": True} for stage in (2, 3)]
    bfloat16 = [{"num_ranks": 2, "zero_stage": stage, "dtype": "bfloat16"} for stage in (1, 2, 3)]
    return [*float32, *offloaded, *bfloat16]


@pytest.fixture(scope="module")
def expected(model_path: Path) -> tuple[TrainReport, list[Weights]]:
    """Stage 0 on one rank, where the step is left out by us before torch's optimiser is called."""
    found: tuple[TrainReport, list[Weights]] = run_ranks(
        CONFIG.model_copy(update={"max_skipped_steps": 1}), model_path, train_spoilt, make_examples()
    )
    return found


@pytest.mark.parametrize("changes", layouts(), ids=lambda changes: " ".join(f"{v}" for v in changes.values()))
def test_a_step_that_may_be_skipped_changes_no_weight_moment_or_schedule(
    model_path: Path, expected: tuple[TrainReport, list[Weights]], changes: dict[str, Any]
) -> None:
    config: LearnerConfig = CONFIG.model_copy(update={"max_skipped_steps": 1, **changes})
    report, weights = run_ranks(config, model_path, train_spoilt, make_examples())
    assert (report.steps, report.skipped_steps) == (6, 1)
    assert_same_weights(weights[BAD_STEP - 1], weights[BAD_STEP - 2], atol=0)
    rates = [step["learning_rate"] for step in report.history]
    assert rates[BAD_STEP - 1] == rates[BAD_STEP]
    assert rates == [step["learning_rate"] for step in expected[0].history]
    if config.dtype == "float32":
        assert report.averages == pytest.approx(expected[0].averages, rel=1e-5)
        assert_same_weights(weights[-1], expected[1][-1])
    else:
        assert report.averages == pytest.approx(expected[0].averages, rel=0.05)


def train_saving(learner: Learner, examples: list[Example], path: Path) -> None:
    spoil(learner, float("nan"))
    learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path)


def go_on(learner: Learner, examples: list[Example], path: Path) -> TrainReport:
    return learner.train(examples, nll_of(learner), phase_seed=1, checkpoints=path)


def test_by_default_it_is_an_error_that_names_step_and_examples_and_leaves_the_last_checkpoint(
    model_path: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(
        update={"num_ranks": 2, "zero_stage": 1, "checkpoint_minutes": AFTER_EACH_STEP}
    )
    message = (
        rf"(?s)FloatingPointError.*step {BAD_STEP} of 6 .*max_skipped_steps: 0.*examples are q\d+/0, q\d+/0"
    )
    with pytest.raises(RuntimeError, match=message):
        run_ranks(config, model_path, train_saving, make_examples(), tmp_path)
    report = run_ranks(config, model_path, go_on, make_examples(), tmp_path)
    assert (report.resumed_at, report.steps, report.skipped_steps) == (BAD_STEP - 1, 6, 0)


def with_a_bad_weight(learner: Learner, path: Path) -> None:
    parameter = next(p for n, p in learner.model.named_parameters() if n.endswith("norm.weight"))
    held = getattr(parameter, "ds_tensor", parameter).data
    held[0] = float("nan")
    for write in (learner.save, learner.export):
        with pytest.raises(FloatingPointError, match=r"1 parameters .* such as model\..*norm\.weight"):
            write(path)


@pytest.mark.parametrize("changes", [{}, {"num_ranks": 2, "zero_stage": 3}], ids=["stage 0", "stage 3"])
def test_weights_that_are_not_finite_are_not_written(
    model_path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_ranks(CONFIG.model_copy(update=changes), model_path, with_a_bad_weight, tmp_path / "out")
    assert not (tmp_path / "out").exists()
