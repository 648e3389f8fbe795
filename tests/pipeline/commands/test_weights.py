"""`exsearch weights`: the table and the JSON of other weights; the weights themselves have tests of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import WeightingConfig
from pipeline.core.config.loading import load_config
from pipeline.core.run import RunDirectory, write_json
from pipeline.core.weighing import Facts, statistics_of, weights_of
from pipeline.core.weighting import Gold, Scored

# A question whose first trajectory is right, and one whose trajectories all fail: an answer is impossible there.
LIKELIHOODS = {"q1": [-1.0, -3.0], "q2": [-6.0, float("-inf")]}


@pytest.fixture
def run(folder: Path) -> Path:
    """With E-steps of iterations 1 and 2, of the same figures."""
    with RunDirectory(folder / "run", load_config(folder / "config.yaml")) as run:
        for t in (1, 2):
            tasks = [{"id": id_, "statistics": statistics(values)} for id_, values in LIKELIHOODS.items()]
            write_json(run.at(f"{t}/rollouts/_000000.json"), {"files": {}, "tasks": tasks})
            run.once(f"{t}/sample", dict)
    return folder / "run"


def statistics(values: list[float]) -> dict[str, Any]:
    rights = [value == -1.0 for value in values]
    scored = [Scored.of([Gold(v, 2)], correct=r) for v, r in zip(values, rights, strict=True)]
    facts = [Facts(n, 2, float(r), float(r), float(r), None, None) for n, r in enumerate(rights)]
    return statistics_of(scored, weights_of(scored, WeightingConfig()), [], 0, facts)


def test_every_method_is_computed_of_the_last_e_step(run_command: Any, run: Path) -> None:
    found = json.loads(run_command("weights", "run", "--json").stdout)
    assert found["iteration"] == 2
    assert list(found["weightings"]) == [
        "the run's own", "likelihood", "posterior", "length_normalised", "reward", "uniform"
    ]  # fmt: skip
    assert found["weightings"]["the run's own"] == found["weightings"]["likelihood"]
    uniform = found["weightings"]["uniform"]
    assert (uniform["right_share"], uniform["global_effective_sample_size"]) == pytest.approx((25.0, 4.0))
    assert found["weightings"]["reward"]["right_share"] == pytest.approx(100.0)
    first, second = found["questions"]
    assert (first["id"], first["sample"], first["gold_tokens"]) == ("q1", [0, 1], [2, 2])
    assert first["log_weights"]["stored"] == first["log_weights"]["the run's own"] == [-1.0, -3.0]
    assert second["log_weights"]["likelihood"] == [-6.0, None]  # the logarithm of zero
    assert first["log_likelihood"] == [-1.0, -3.0]


@pytest.mark.usefixtures("run")
def test_methods_are_named_with_their_settings(run_command: Any) -> None:
    arguments = ("posterior", "posterior,floor=0.1", "method=likelihood,temperature=2")
    found = json.loads(run_command("weights", "run", *arguments, "--iteration", "1", "--json").stdout)
    assert (found["iteration"], list(found["weightings"])) == (1, list(arguments))
    (first, _) = found["questions"]
    assert first["log_weights"]["method=likelihood,temperature=2"] == [-0.5, -1.5]
    text = run_command("weights", "run", *arguments).stdout
    (row,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["posterior,floor=0.1"]]
    assert row[3] == "4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model",), "model is not a run directory"),
        (("run", "--iteration", "3"), "no finished E-step of iteration 3"),
        (("run", "postrior"), "configuration key weighting.method"),
        (
            ("run", "reward,reward=judges:one"),
            "no rewards of a run's trajectories are known but em, f1, accuracy and",
        ),
        (
            ("run", "posterior,flor=0.1"),
            "unknown configuration key weighting.flor; did you mean weighting.floor?",
        ),
    ],
)
@pytest.mark.usefixtures("run")
def test_weights_that_there_are_not(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("weights", *arguments)


def test_a_run_without_an_e_step(refused: Any, folder: Path) -> None:
    RunDirectory(folder / "run", load_config(folder / "config.yaml")).__exit__()
    assert "run has no finished E-step yet" in refused("weights", "run")
