"""Flashbacks: which questions are old, what is kept of them, and how they get into every optimiser step."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import methods
from pipeline.core.agents.program import Completion
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import Config
from pipeline.core.errors import RunError, UserError
from pipeline.core.example_files import read_examples
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint, Part
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.packing import plan_epoch
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.shards import write_examples
from pipeline.recipes.flashback import FLASHBACK, Flashbacks, Settings, check, flashbacks_beside, old_and_new
from pipeline.run import Run

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "methods" / "flashback-cpu.yaml"


def config(*overrides: str) -> Config:
    return methods.load(
        CONFIG, [f"model.path={ROOT / 'models' / 'tiny-searcher'}", "data.root=world", *overrides]
    )


def question(name: str, hops: int) -> Question:
    return Question(name, f"{name}?", ("Ada",), hops=hops)


def test_old_questions_are_prompts_alone_and_no_new_one_is_old() -> None:
    questions = [question(f"q{k}", 1 + k % 3) for k in range(30)]
    old, new = old_and_new(config("flashback.prompts=4"), questions)
    assert len(old) == 4 and {q.hops for q in old} == {1}
    assert new == [q for q in questions if q.hops != 1]
    again, _ = old_and_new(config("flashback.prompts=4"), questions)
    other, _ = old_and_new(config("flashback.prompts=4", "seed=7"), questions)
    assert again == old != other


@pytest.mark.parametrize("hops", [[1, 1], [2, 3]])
def test_tasks_of_one_kind_alone_are_refused(hops: list[int]) -> None:
    with pytest.raises(UserError, match=r"flashback\.old_hops is \[1\]: of 2 training questions"):
        old_and_new(config(), [question(f"q{k}", number) for k, number in enumerate(hops)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["flashback.per_step=32"], r"leaves no room for new tasks in learner\.batch_size \(32\)"),
        (["flashback.project_conflicts=true", "learner.zero_stage=3"], r"zero_stage of 2 at most"),
        (["cold_start.mix=0.1"], r"cold_start\.mix"),
    ],
)
def test_settings_that_make_no_flashbacks_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config(*overrides))


def episode(reason: StopReason) -> Episode:
    transcript = Transcript()
    transcript.append_environment([1, 2])
    transcript.append_model(Completion([3, 4], [-0.5, -1.0], "", None, "stop"))
    transcript.append_environment([5, 6])
    transcript.append_model(Completion([7], [-0.25], "", None, "stop"))
    turn = transcript.trajectory(
        question_id="q", sample=0, role="searcher", policy_version=0, stop_reason=reason, answer="wrong"
    )
    return Episode("q", 0, (turn,))


def test_what_the_old_model_wrote_is_kept_whether_it_is_right_or_not() -> None:
    weighted = Flashbacks()(question("q", 1), [episode(StopReason.ANSWERED)])
    (kept,) = weighted.examples[FLASHBACK]
    assert kept.role == FLASHBACK
    # Neither the prompt nor what was found is the old model's.
    assert kept.loss_mask.tolist() == [False, False, True, True, False, False, True]


def test_what_the_infrastructure_ended_is_not_kept() -> None:
    assert Flashbacks()(question("q", 1), [episode(StopReason.ENGINE_ERROR)]).examples[FLASHBACK] == []


class Directory:
    """In place of a run: where things lie in it."""

    def __init__(self, path: Path, settings: Config) -> None:
        self.path, self.config = path, settings

    def shards(self, t: int, name: str) -> list[Path]:
        return sorted((self.path / f"{t}/{name}/examples").glob("*.parquet"))

    def fresh(self, step: str) -> Path:
        (self.path / step).mkdir(parents=True, exist_ok=True)
        return self.path / step


def made(number: int, role: str) -> list[Example]:
    return [Example.supervised(f"{role}{k}", role, [1], [2]) for k in range(number)]


@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 7))
def test_every_optimiser_step_has_so_many_flashbacks_and_they_take_turns(
    tmp_path_factory: pytest.TempPathFactory, weighted: int, kept: int, per_step: int
) -> None:
    settings = config(f"flashback.per_step={per_step}", "learner.batch_size=8")
    run = Directory(tmp_path_factory.mktemp("run"), settings)
    new = run.path / "1/searcher/examples/000000.parquet"
    for shard, role, number in (
        (run.path / f"0/{FLASHBACK}/examples/000000.parquet", FLASHBACK, kept),
        (new, "searcher", weighted),
    ):
        shard.parent.mkdir(parents=True)
        write_examples(shard, made(number, role))
    own: Settings = settings.of_recipe
    found = read_examples(flashbacks_beside(cast(Run, run), own, 1, [new]))
    examples = [*read_examples(new), *found]
    steps = plan_epoch(
        [e.length for e in examples],
        batch_size=8,
        world_size=1,
        token_budget=100,
        seed=(0, 0),
        units=[e.unit for e in examples],
        kinds=[int(e.role == FLASHBACK) for e in examples],
    )
    assert len(steps) == math.ceil(weighted / (8 - per_step))
    for step in steps:
        assert sum(k >= weighted for k in step.examples) == per_step
    times = Counter(e.token_ids.tobytes() for e in found)
    assert sum(times.values()) == len(steps) * per_step


def test_each_flashback_comes_as_often_as_the_others(tmp_path: Path) -> None:
    settings = config("flashback.per_step=4", "learner.batch_size=8")
    run = Directory(tmp_path, settings)
    old, new = tmp_path / f"0/{FLASHBACK}/examples/0.parquet", tmp_path / "1/searcher/examples/0.parquet"
    for shard in (old, new):
        shard.parent.mkdir(parents=True)
    kept = [Example.supervised(f"o{k}", FLASHBACK, [1], [2 + k]) for k in range(3)]
    write_examples(old, kept)
    write_examples(new, made(24, "searcher"))
    found = read_examples(flashbacks_beside(cast(Run, run), settings.of_recipe, 1, [new]))
    assert sorted(Counter(int(e.token_ids[-1]) for e in found).values()) == [8, 8, 8]
    assert len({e.id for e in found}) == len(found) == 24


def test_without_anything_to_keep_a_run_ends_with_the_reason(tmp_path: Path) -> None:
    run = Directory(tmp_path, config())
    with pytest.raises(RunError, match="nothing to keep"):
        flashbacks_beside(cast(Run, run), run.config.of_recipe, 1, [])


# ------------------------------------------------- what the released code has otherwise


def test_both_directions_of_the_divergence_count() -> None:
    """The released trainer adds the forward one twice."""
    import torch

    from pipeline.core.losses.loss import Outputs, Rows

    p, q = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 0.5, 0.0]])
    numbers: dict[str, Any] = {}
    rows = Rows(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), numbers, {})
    found = float(Divergence("symmetric", reference="f").terms(Outputs(p, q), rows, 1.0).loss)
    a, b = (x.softmax(-1).double().numpy()[0] for x in (p, q))
    forward, reverse = (float(np.sum(x * np.log(x / y))) for x, y in ((b, a), (a, b)))
    assert abs(forward - reverse) > 0.01
    # The recipe's coefficient is of the sum, and the loss is the mean.
    assert 2 * found == pytest.approx(forward + reverse, rel=1e-5)


def test_a_prompt_of_an_old_task_has_no_label_and_its_own_tokens_do_not_count() -> None:
    """The released trainer's divergence is over the prompt as well."""
    weighted = Flashbacks()(question("q", 1), [episode(StopReason.ANSWERED)])
    (kept,) = weighted.examples[FLASHBACK]
    assert dict(kept.streams) == {}
    joint = Joint((Part("searcher", WeightedNll()), Part(FLASHBACK, Divergence("symmetric", "f"))))
    assert joint.parts[1].loss.prepare([kept]).sizes == [3]
