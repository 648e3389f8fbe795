"""Files of experiments: arms in their order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import UserError
from pipeline.core.experiments.spec import Experiment, overrides_of, read_experiment

LEAST: dict[str, Any] = {"title": "T", "base": "demo", "arms": {"a": None, "b, c": {"weighting": "uniform"}}}


def read(tmp_path: Path, **keys: Any) -> Experiment:
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in (LEAST | keys).items() if v is not None}, sort_keys=False)
    )
    return read_experiment(path)


def test_arms_come_as_they_stand_and_the_first_is_the_baseline(tmp_path: Path) -> None:
    experiment = read(tmp_path, arms=LEAST["arms"] | {"d": {"of": "a", "test": "base"}})

    assert [(arm.name, arm.of, arm.test) for arm in experiment.arms] == [
        ("a", "a", "best"),
        ("b, c", "b, c", "best"),
        ("d", "a", "base"),
    ]
    assert [arm.folder for arm in experiment.with_runs] == ["a", "b-c"]
    assert experiment.baseline.name == "a"
    assert experiment.spec.seeds == (0, 1, 2)


def test_a_key_that_varies_makes_an_arm_of_each_value_and_several_of_each_combination(tmp_path: Path) -> None:
    one = read(tmp_path, arms=None, vary={"rollout.samples": [2, 4]}, baseline="samples=4")
    assert [(arm.name, arm.overrides, arm.values) for arm in one.arms] == [
        ("samples=2", ("rollout.samples=2",), (2,)),
        ("samples=4", ("rollout.samples=4",), (4,)),
    ]
    assert one.baseline.name == "samples=4"

    both = read(tmp_path, arms=None, vary={"rollout.samples": [2, 4], "weighting": ["uniform", "posterior"]})
    assert [arm.name for arm in both.arms] == [
        "samples=2, weighting=uniform",
        "samples=2, weighting=posterior",
        "samples=4, weighting=uniform",
        "samples=4, weighting=posterior",
    ]


def test_settings_may_be_nested_and_set_only_what_they_name() -> None:
    nested = {"rollout": {"samples": 2, "top_p": 0.5}, "data.train": ["a.jsonl"], "learner.lora": None}
    assert overrides_of(nested) == (
        "rollout.samples=2",
        "rollout.top_p=0.5",
        'data.train=["a.jsonl"]',
        "learner.lora=null",
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arm": {}}, "unknown key arm; did you mean arms?"),
        ({"title": 3}, "title: Input should be a valid string"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "name one twice"),
        ({"arms": None}, "has no arms"),
        ({"arms": {"a": {"of": "b"}}}, "has no arms"),
        ({"arms": {"a": {}, "b": {"of": "c"}}}, "arm b is of c; there are a"),
        ({"arms": {"a": {}, "b": {"of": "a", "weighting": "uniform"}}}, "has no settings: weighting"),
        ({"arms": {"a": {"test": "base"}}}, "`test` goes with `of: ARM`"),
        ({"arms": {"a b": {}, "a, b": {}}}, "two arms have the folder 'a-b'"),
        ({"arms": {"+": {}}}, "needs a name with letters or digits"),
        ({"arms": {"figures": {}}}, "the folder figures is for something else"),
        ({"baseline": "B, c"}, "baseline B, c is no arm; did you mean b, c?"),
        ({"plots": ["parameter"]}, "needs exactly one key under `vary`"),
        ({"plots": ["pie"]}, "plots.0: Input should be"),
        (
            {"arms": {str(i): {} for i in range(13)}},
            "13 arms, and the plot `iterations` tells 12 curves apart",
        ),
    ],
)
def test_what_is_no_experiment_is_refused_with_the_file_and_the_mend(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, **keys)
    assert message in str(caught.value)
    assert "study.yaml" in str(caught.value)
