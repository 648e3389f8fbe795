"""What ExSearch does with the dev questions of an iteration."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.config import Config, EmConfig, RolloutConfig, WeightingConfig
from pipeline.core.run import Json
from pipeline.em import ExpectationMaximisation
from pipeline.steps import Begun, together


class Asked:
    """The part of a run that dev questions ask for; writes down what it is asked for."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.begun: list[tuple[str, Any]] = []
        self.ended: list[str] = []

    def _begin(self, name: str, asked: Any) -> Begun:
        self.begun.append((name, asked))

        def end(how: str) -> Json:
            self.ended.append(f"{name} {how}")
            return {"step": name}

        return Begun(lambda: end("finished"), lambda: end("cancelled") and None)

    def begin_evaluation(self, t: int, program: Any, roles: Any, *, answers: str) -> Begun:
        return self._begin("evaluation", (t, program, roles))

    def begin_dev_bound(self, t: int, program: Any, roles: Any, weigh: Any, **how: Any) -> Begun:
        return self._begin("bound", (t, program, roles, weigh, how))


def begin_dev(**sections: Any) -> tuple[Asked, Begun]:
    run: Any = Asked(Config(**sections))
    return run, ExpectationMaximisation(run, cold_start=None).begin_dev(2)  # type: ignore[arg-type]


def test_without_samples_dev_questions_are_answered_and_nothing_else() -> None:
    run, begun = begin_dev()
    assert begun.finish() == {"step": "evaluation"}
    assert [name for name, _ in run.begun] == ["evaluation"]


def test_the_bound_on_dev_is_sampled_from_the_same_version_as_the_e_step_samples() -> None:
    run, begun = begin_dev(
        em=EmConfig(dev_samples=3),
        rollout=RolloutConfig(temperature=0.7),
        weighting=WeightingConfig(method="posterior", correct_proposal=True),
    )
    (_, (_, greedy, _)), (_, (t, program, roles, weigh, how)) = run.begun
    assert (t, roles) == (2, {"searcher": 2})
    assert (greedy.score_answers, program.score_answers) == (False, True)
    assert (how["samples"], how["sampling"].temperature) == (3, 0.7)
    # One trajectory has a bound, too, whatever the weights of the E-step compare; the ratio stays in it.
    assert (weigh.weighting.method, weigh.weighting.correct_proposal) == ("likelihood", True)
    assert begun.finish() == {"step": "evaluation"}
    assert run.ended == ["evaluation finished", "bound finished"]


def test_both_are_cancelled_together() -> None:
    run, begun = begin_dev(em=EmConfig(dev_samples=1))
    begun.cancel()
    assert run.ended == ["bound cancelled", "evaluation cancelled"]


def test_what_has_failed_is_not_taken_for_finished() -> None:
    def fail() -> Json:
        raise RuntimeError("the engines are gone")

    with pytest.raises(RuntimeError, match="the engines are gone"):
        together(Begun(dict), Begun(fail)).finish()
