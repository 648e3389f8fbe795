"""Other weights of the samples that a run has: those that it trained with come out again, and so do all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.core.config import AgentConfig, Config, WeightingConfig
from pipeline.core.config.method import Weighting
from pipeline.core.errors import UserError
from pipeline.core.record_tables import examples_from_table
from pipeline.core.records import Episode, Question, StopReason, Trajectory
from pipeline.core.renderer import Renderer
from pipeline.core.reweighing import bounds_of, figures_of, read_stored, reweigh, scored_under
from pipeline.core.run import RunDirectory, finite
from pipeline.core.shards import Shards
from pipeline.core.weighing import SearchWeights, Weighted
from pipeline.core.weighting import bound_of

QUESTIONS = [
    Question("q1", "Who founded the maker of the Silver Harp?", ("Mara Velin", "Orvane")),
    Question("q2", "Who?", ("Orvane", "Mara Velin")),
    Question("q3", "Who?", ("Orvane", "Mara Velin")),
]
LIKELIHOODS = {
    "q1": [(-3.0, -1.0), (-2.0, -2.5), (-math.inf, -math.inf)],
    "q2": [(-0.5, -0.1), (-4.0, -5.0), (-1.0, -2.0)],
    "q3": [(-0.5, -0.1), (math.nan, math.nan), (-9.0, -9.0)],
}
ANSWERS = ["Mara", "Orvane", "nobody"]

OTHERS = [
    {"method": "likelihood"},
    {"method": "likelihood", "temperature": 2.0, "max_weight": 0.3},
    {"method": "posterior"},
    {"method": "posterior", "floor": 0.1},
    {"method": "length_normalised"},
    {"method": "length_normalised", "self_normalised": True},
    {"method": "reward", "reward": "f1"},
    {"method": "reward", "reward": "em"},
    {"method": "uniform"},
]
CORRECTED = [{**weighting, "correct_proposal": True, "max_ratio": 3.0} for weighting in OTHERS]


class Runs:
    """Runs that sampled the same trajectories and weighed them differently."""

    def __init__(self, tokenizer: Any, at: Path) -> None:
        self.renderer, self.at = Renderer(tokenizer, AgentConfig()), at

    def episodes(self, question: Question, *, records_proposal: bool) -> list[Episode]:
        turns = [
            self.trajectory(question, sample, likelihoods, records_proposal)
            for sample, likelihoods in enumerate(LIKELIHOODS[question.id])
        ]
        died = replace(turns[0], sample=3, stop_reason=StopReason.ENGINE_ERROR, log_likelihoods=())
        return [Episode(question.id, turn.sample, (turn,)) for turn in (*turns, died)]

    def trajectory(
        self, question: Question, sample: int, likelihoods: tuple[float, ...], records_proposal: bool
    ) -> Trajectory:
        encode = self.renderer.tokenizer
        pieces = [
            (self.renderer.prompt_ids(question.text), False),
            (encode("<think> which </think> <answer>")["input_ids"], True),
            (encode(f" {ANSWERS[sample]} </answer>")["input_ids"], True),
        ]
        mask = np.array([flag for ids, flag in pieces for _ in ids], dtype=np.bool_)
        logprobs = np.where(mask, np.float32(-0.5), np.float32(np.nan))
        proposal = np.where(mask, np.float32(-0.45 - 0.1 * sample), np.float32(np.nan))
        return Trajectory(
            question_id=question.id,
            sample=sample,
            policy_version=0,
            token_ids=np.array([i for ids, _ in pieces for i in ids], dtype=np.int32),
            loss_mask=mask,
            logprobs=logprobs,
            answer_start=sum(len(ids) for ids, _ in pieces[:2]),
            steps=(),
            answer=ANSWERS[sample],
            stop_reason=StopReason.ANSWERED,
            log_likelihoods=likelihoods,
            proposal_logprobs=proposal if records_proposal else None,
        )

    def run(
        self, weighting: WeightingConfig, *, records_proposal: bool, usual: int | None = None
    ) -> RunDirectory:
        # Else what is trained has no weight of each trajectory.
        apart = weighting.model_copy(update={"merge_copies": False})
        weigh = SearchWeights(apart, AgentConfig(), "model", usual=usual)
        run = RunDirectory(self.at / f"run{len(list(self.at.iterdir()))}", Config(weighting=weighting))
        shards = Shards(QUESTIONS, run.at("1/rollouts"), {"searcher": run.at("1/searcher/examples")}, 2)
        shards.resume()
        done = {
            q.id: (episodes := self.episodes(q, records_proposal=records_proposal), weigh(q, episodes))
            for q in QUESTIONS
        }
        for number in range(len(shards)):
            shards.write(number, [done[task.id] for task in shards.members(number)])
        run.once("1/sample", lambda: dict(weigh.summarise(shards.statistics())))
        return run


@pytest.fixture
def runs(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setattr("pipeline.core.weighing.renderer_at", lambda path, agent: Renderer(tokenizer, agent))
    return Runs(tokenizer, tmp_path)


def trained(run: RunDirectory) -> dict[str, float]:
    """The weights that the learner gets, by example."""
    paths = sorted(run.at("1/searcher/examples").glob("*.parquet"))
    examples = [example for path in paths for example in examples_from_table(pq.read_table(path))]
    return {example.id: example.number("log_weight") for example in examples}


def recomputed(run: RunDirectory, weighting: WeightingConfig, *, from_the_model: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for stored in read_stored(run, 1):
        logs = reweigh(stored, weighting, from_the_model=from_the_model)
        found |= {
            f"{stored.id}/{facts.sample}": log for facts, log in zip(stored.facts, logs or (), strict=True)
        }
    return found


@pytest.mark.parametrize("usual", [None, 1])
@pytest.mark.parametrize("weighting", [*OTHERS, *CORRECTED], ids=str)
def test_the_stored_weights_come_out_again_to_the_last_digit(
    runs: Runs, weighting: dict[str, Any], usual: int | None
) -> None:
    config = WeightingConfig(**weighting)
    run = runs.run(config, records_proposal=config.correct_proposal, usual=usual)
    again = recomputed(run, config, from_the_model=not config.correct_proposal)
    assert again == trained(run)
    assert len(again) == 8  # of twelve three died, and one was too long to be scored
    for stored in read_stored(run, 1):
        assert reweigh(stored, config, from_the_model=not config.correct_proposal) == stored.log_weights


@pytest.mark.parametrize("made_with", [OTHERS[0], CORRECTED[4], CORRECTED[6]], ids=str)
@pytest.mark.parametrize("other", CORRECTED, ids=str)
def test_other_weights_are_those_of_a_run_that_had_them(
    runs: Runs, made_with: dict[str, Any], other: dict[str, Any]
) -> None:
    records = bool(made_with.get("correct_proposal"))
    uncorrected = {key: value for key, value in other.items() if key not in ("correct_proposal", "max_ratio")}
    config = WeightingConfig(**(other if records else uncorrected))
    run = runs.run(WeightingConfig(**made_with), records_proposal=records)
    theirs = runs.run(config, records_proposal=records)
    assert recomputed(run, config, from_the_model=not records) == trained(theirs)


def test_what_is_stored_of_a_trajectory(runs: Runs) -> None:
    run = runs.run(WeightingConfig(correct_proposal=True), records_proposal=True)
    stored = {one.id: one for one in read_stored(run, 1)}
    tokens = {name: len(runs.renderer.answer_ids(name)) for name in ("Mara Velin", "Orvane")}
    assert [facts.sample for facts in stored["q3"].facts] == [0, 2]
    assert [facts.gold_tokens for facts in stored["q1"].facts[:2]] == [tokens["Orvane"], tokens["Mara Velin"]]
    first, second = stored["q1"].facts[:2]
    assert (first.em, first.f1, second.em) == (0.0, pytest.approx(2 / 3), 1.0)
    sampled = runs.episodes(QUESTIONS[0], records_proposal=True)[1].turns[0]
    in_front = int(sampled.loss_mask[: sampled.answer_start].sum())
    assert second.log_ratio == pytest.approx(0.05 * in_front, rel=1e-5)
    assert second.log_ratio_with_answer == pytest.approx(0.05 * sampled.loss_mask.sum(), rel=1e-5)


def test_a_ratio_that_was_not_recorded_is_not_taken_for_one(runs: Runs) -> None:
    run = runs.run(WeightingConfig(), records_proposal=False)
    corrected = WeightingConfig(correct_proposal=True)
    with pytest.raises(UserError, match="did not record them"):
        recomputed(run, corrected, from_the_model=False)
    assert recomputed(run, corrected, from_the_model=True) == trained(run)


def test_the_figures_of_other_weights_are_those_of_a_run_that_had_them(runs: Runs) -> None:
    run = runs.run(WeightingConfig(), records_proposal=False)
    for method in get_args(Weighting):
        config = WeightingConfig(method=method)
        theirs = runs.run(config, records_proposal=False).finished("1/sample")
        found = figures_of(read_stored(run, 1), config, from_the_model=True)
        assert theirs is not None
        shared = found.keys() & theirs.keys()
        assert {"likelihood_bound", "global_effective_sample_size", "mean_weight"} < shared
        assert {key: finite(found[key]) for key in shared} == {key: theirs[key] for key in shared}


def test_the_share_of_the_weight_on_right_answers(runs: Runs) -> None:
    run = runs.run(WeightingConfig(), records_proposal=False)
    stored = read_stored(run, 1)
    uniform = figures_of(stored, WeightingConfig(method="uniform"), from_the_model=True)
    # Right is sample 1 alone: a third of two questions' weight, and in q3 it was too long to be scored.
    assert uniform["right_share"] == pytest.approx(100 * (2 / 3) / 3)
    assert figures_of(stored, WeightingConfig(method="reward", reward="em"), from_the_model=True)[
        "right_share"
    ] == pytest.approx(100.0)


def test_a_baseline_that_was_not_scored_is_not_made_up(runs: Runs) -> None:
    stored = read_stored(runs.run(WeightingConfig(), records_proposal=False), 1)
    with pytest.raises(UserError, match=r"subtract_baseline needs .* this run did not score it"):
        figures_of(stored, WeightingConfig(subtract_baseline=True), from_the_model=True)


def test_bounds_by_question_are_those_of_the_run(runs: Runs) -> None:
    config = WeightingConfig(correct_proposal=True)
    run = runs.run(config, records_proposal=True)
    expected = {
        one.id: bound_of(scored_under(one, config, from_the_model=False), config)
        for one in read_stored(run, 1)
    }
    assert bounds_of(run, "1/sample", "1/rollouts", config) == expected
    assert np.mean(list(expected.values())) == pytest.approx(
        (run.finished("1/sample") or {})["likelihood_bound"]
    )
    assert bounds_of(run, "2/sample", "2/rollouts", config) == {}


def test_a_run_of_an_earlier_version_or_without_an_e_step_says_so(runs: Runs) -> None:
    run = runs.run(WeightingConfig(), records_proposal=False)
    with pytest.raises(UserError, match="no finished E-step of iteration 2"):
        read_stored(run, 2)
    old(run)
    with pytest.raises(UserError, match="written by an earlier version"):
        read_stored(run, 1)
    assert set(bounds_of(run, "1/sample", "1/rollouts", WeightingConfig())) == {
        "q1",
        "q2",
        "q3",
    }  # these it has


def old(run: RunDirectory) -> None:
    """The side-cars as they were before they had facts."""
    weigh = SearchWeights(WeightingConfig(), AgentConfig(), "model")
    shards = Shards(QUESTIONS, run.at("1/rollouts"), {"searcher": run.at("1/searcher/examples")}, 2)

    def without(question: Question, episodes: Sequence[Episode]) -> Weighted:
        weighted = weigh(question, episodes)
        return replace(
            weighted, statistics={key: value for key, value in weighted.statistics.items() if key != "facts"}
        )

    by_task: dict[str, list[Episode]] = {}
    for episode in shards.episodes():
        by_task.setdefault(episode.task_id, []).append(episode)
    questions = {question.id: question for question in QUESTIONS}
    for number in range(len(shards)):
        members = [task.id for task in shards.members(number)]
        shards.write(number, [(by_task[id_], without(questions[id_], by_task[id_])) for id_ in members])
