"""GRPO: advantages, examples, its loss from episodes to gradient, and a whole run on a stand-in for the cluster."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.cluster import Cluster, SampleReport
from pipeline import methods
from pipeline.core.agents.program import Completion
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import Config
from pipeline.core.data.splits import Splits
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.example_files import read_examples
from pipeline.core.losses.loss import Outputs, Rows
from pipeline.core.losses.policy_gradient import ClippedRatio, MeanOver
from pipeline.core.models import write_checksums
from pipeline.core.packing import collate
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.run import RunDirectory
from pipeline.core.shards import Shards
from pipeline.core.tracking import Tracker
from pipeline.recipes.grpo import GroupAdvantages, Scale, Settings, advantages_of
from pipeline.run import Run

MODEL = Path(__file__).parents[2] / "models" / "tiny-searcher"
QUESTION = Question("q", "Who?", ("Mara Velin",))


def episode(sample: int, answer: str, reason: StopReason = StopReason.ANSWERED, task: str = "q") -> Episode:
    """A prompt, a sub-query of the model's, a passage, and the model's answer: of another length for each sample."""
    transcript = Transcript()
    transcript.append_environment([1, 2])
    transcript.append_model(Completion([3, 4], [-0.5, -1.0 - sample], "", None, "stop"))
    transcript.append_environment([5, 6, 7])
    transcript.append_model(Completion([8] * (1 + sample), [-0.25] * (1 + sample), "", None, "stop"))
    turn = transcript.trajectory(
        question_id=task, sample=sample, role="searcher", policy_version=0, stop_reason=reason, answer=answer
    )
    return Episode(task, sample, (turn,))


# ---------------------------------------------------------------- advantages

rewards = st.lists(st.integers(0, 12).map(lambda n: n / 12), min_size=2, max_size=16)
scales = st.sampled_from(["std", "none"])


@given(rewards, scales, st.floats(-3, 3), st.randoms())
def test_advantages_are_zero_on_average_and_know_neither_level_nor_order(
    group: list[float], scale: Scale, level: float, random: Any
) -> None:
    found = advantages_of(group, scale)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    if len(set(group)) > 1:
        np.testing.assert_allclose(advantages_of([r + level for r in group], scale), found, atol=1e-9)
    order = random.sample(range(len(group)), len(group))
    np.testing.assert_allclose(advantages_of([group[k] for k in order], scale), found[order], atol=1e-12)


@given(rewards, st.floats(0.01, 100))
def test_divided_advantages_know_no_unit_and_the_others_do(group: list[float], unit: float) -> None:
    larger = [unit * reward for reward in group]
    np.testing.assert_allclose(advantages_of(larger, "std"), advantages_of(group, "std"), atol=1e-9)
    np.testing.assert_allclose(advantages_of(larger, "none"), unit * advantages_of(group, "none"), atol=1e-9)


@given(st.floats(0, 1), st.integers(2, 16), scales)
def test_a_group_of_equal_rewards_has_no_advantages(reward: float, size: int, scale: Scale) -> None:
    assert advantages_of([reward] * size, scale).tolist() == [0.0] * size


def test_an_advantage_is_how_far_a_reward_is_from_the_others_in_standard_deviations() -> None:
    assert advantages_of([1.0, 0.0, 0.0, 0.0], "none").tolist() == [0.75, -0.25, -0.25, -0.25]
    assert advantages_of([1.0, 0.0, 0.0, 0.0], "std").tolist() == [1.5, -0.5, -0.5, -0.5]


# ---------------------------------------------------------------- examples


def test_every_trajectory_is_an_example_with_what_it_was_sampled_with() -> None:
    weighted = GroupAdvantages("em", "none", "exsearch")(
        QUESTION, [episode(0, "Mara Velin"), episode(1, "X")]
    )
    first, second = weighted.examples["searcher"]
    assert (first.unit, second.unit) == ("q", "q")
    assert (first.number("advantage"), second.number("advantage")) == (0.5, -0.5)
    # Neither the prompt nor the passage has a log-probability, and neither is a target.
    assert first.streams["old_logprob"].tolist() == [0, 0, -0.5, -1.0, 0, 0, 0, -0.25]
    assert first.loss_mask.tolist() == [False, False, True, True, False, False, False, True]


@pytest.mark.parametrize(
    ("reward", "protocol", "expected"),
    [("em", "exsearch", 0.0), ("f1", "exsearch", 0.0), ("f1", "kilt", 0.5)],
)
def test_the_reward_is_a_metric_of_the_configured_protocol(
    reward: Any, protocol: Any, expected: float
) -> None:
    question = Question("q", "Is it?", ("yes",))
    said = [episode(0, "yes it surely is"), episode(1, "no")]
    statistics = GroupAdvantages(reward, "std", protocol)(question, said).statistics
    assert statistics["rewards"] == [pytest.approx(expected * 0.8), 0.0]


def test_what_teaches_nothing_is_counted() -> None:
    weigh = GroupAdvantages("em", "std", "exsearch")
    right, wrong, failed = "Mara Velin", "X", StopReason.ENGINE_ERROR
    questions = [
        [episode(0, right), episode(1, wrong), episode(2, "", failed)],
        [episode(0, right), episode(1, right)],
        [episode(0, wrong), episode(1, wrong)],
        [episode(0, right), episode(1, "", failed)],
        [episode(0, "", failed)],
    ]
    weighted = [weigh(QUESTION, episodes) for episodes in questions]
    assert [len(one.examples["searcher"]) for one in weighted] == [2, 2, 2, 0, 0]
    found = weigh.summarise([one.statistics for one in weighted])
    assert (found["groups"], found["equal_groups"], found["solved_groups"]) == (1, 2, 1)
    assert (found["excluded"], found["excluded_nothing_to_compare"]) == (4, 1)
    assert found["reward"] == 0.5
    assert found["stop_reasons"]["engine_error"] == 3


def test_without_two_trajectories_of_any_question_the_run_stops() -> None:
    weigh = GroupAdvantages("em", "std", "exsearch")
    alone = weigh(QUESTION, [episode(0, "X"), episode(1, "", StopReason.RETRIEVER_UNAVAILABLE)])
    with pytest.raises(RunError, match=r"no question has two trajectories.*'retriever_unavailable': 1"):
        weigh.summarise([alone.statistics])


# ---------------------------------------------------------------- the whole loss


def rows_of(pack: Sequence[int], examples: Sequence[Example], loss: ClippedRatio) -> Rows:
    batch = collate(tuple(pack), examples, loss.streams, loss.prepare(examples).streams)
    arrays = (batch.numbers, batch.streams)
    numbers, streams = ({name: torch.from_numpy(v) for name, v in some.items()} for some in arrays)
    return Rows(torch.from_numpy(batch.example_of_target), torch.from_numpy(batch.unit), numbers, streams)


GROUPS = {
    "a": [("Mara Velin", 0.3), ("X", -0.4), ("Mara Velin", -0.1)],
    "b": [("Velin", 0.5), ("Mara Velin", -0.5), ("X", 0.1)],
    "c": [("X", 0.2), ("X", -0.2)],
}
"""Of each question: answers, and by how much the log-probability of each token has risen since it was sampled."""


def plain_formula(now: list[torch.Tensor], mean_over: MeanOver, scale: Scale) -> torch.Tensor:
    """From the published formulas, with F1 worked out by hand: one trajectory after the other."""
    by_hand = {"Mara Velin": 1.0, "Velin": 2 / 3, "X": 0.0}
    of_groups, position = [], 0
    for question in GROUPS.values():
        rewards = torch.tensor([by_hand[answer] for answer, _ in question])
        advantages = rewards - rewards.mean()
        if scale == "std" and advantages.abs().max() > 0:
            advantages = advantages / rewards.std()
        of_sequences = []
        for k, advantage in enumerate(advantages):
            p, old = now[position], torch.tensor([-0.5, -1.0 - k] + [-0.25] * (1 + k))
            ratio = torch.exp(p - old)
            kl = torch.exp(-2.0 - p) - (-2.0 - p) - 1
            of_sequences.append(
                -torch.min(ratio * advantage, torch.clip(ratio, 0.8, 1.28) * advantage) + 0.1 * kl
            )
            position += 1
        of_groups.append(of_sequences)
    if mean_over == "step":
        return torch.cat([tokens for group in of_groups for tokens in group]).mean()
    if mean_over == "sequence":
        return torch.stack([tokens.mean() for group in of_groups for tokens in group]).mean()
    return torch.stack([torch.cat(group).mean() for group in of_groups]).mean()


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("mean_over", ["step", "group", "sequence"])
def test_from_episodes_to_loss_value_and_gradient_are_those_of_the_formula(
    mean_over: MeanOver, scale: Scale
) -> None:
    weigh = GroupAdvantages("f1", scale, "exsearch")
    examples, risen = [], []
    for name, question in GROUPS.items():
        episodes = [episode(k, answer, task=name) for k, (answer, _) in enumerate(question)]
        task = Question(name, "Who?", ("Mara Velin",))
        examples += weigh(task, episodes).examples["searcher"]
        risen += [by for _, by in question]
    masks = [np.flatnonzero(example.loss_mask) for example in examples]
    start = [
        torch.tensor(example.streams["old_logprob"][mask] + by, dtype=torch.float32)
        for example, mask, by in zip(examples, masks, risen, strict=True)
    ]
    expected_at = [values.clone().requires_grad_() for values in start]
    expected = plain_formula(expected_at, mean_over, scale)
    expected.backward()

    loss = ClippedRatio(0.2, 0.28, kl_coefficient=0.1, mean_over=mean_over, reference="live")
    found_at = [values.clone().requires_grad_() for values in start]
    normaliser, found = sum(loss.prepare(examples).sizes), torch.zeros(())
    for pack in ([7, 0, 1], [2, 3, 4, 5], [6]):  # units that are cut, as long ones are
        predicted = torch.cat([found_at[k] for k in pack])
        outputs = Outputs(predicted, reference=torch.full_like(predicted, -2.0))
        found = found + loss.terms(outputs, rows_of(pack, examples, loss), normaliser).loss
    found.backward()

    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(found_at, expected_at, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_was_just_sampled_is_pushed_by_its_advantage_and_nothing_else() -> None:
    """At ratio 1 the gradient is that of the plain policy gradient."""
    episodes = [episode(0, "Mara Velin"), episode(1, "X")]
    examples = GroupAdvantages("em", "none", "exsearch")(QUESTION, episodes).examples["searcher"]
    loss = ClippedRatio(mean_over="sequence")
    now = torch.tensor([-0.5, -1.0, -0.25, -0.5, -2.0, -0.25, -0.25], requires_grad=True)
    loss.terms(Outputs(now), rows_of([0, 1], examples, loss), 2.0).loss.backward()
    assert now.grad is not None
    torch.testing.assert_close(now.grad, -torch.tensor([0.5 / 3] * 3 + [-0.5 / 4] * 4) / 2)


def test_groups_of_equal_rewards_count_in_the_mean_and_are_computed_for_a_divergence_alone() -> None:
    weigh = GroupAdvantages("em", "std", "exsearch")
    examples = weigh(QUESTION, [episode(0, "X"), episode(1, "X")]).examples["searcher"]
    for coefficient in (0.0, 0.1):
        prepared = ClippedRatio(kl_coefficient=coefficient, mean_over="group").prepare(examples)
        assert prepared.computed == [coefficient > 0] * 2
        assert sum(prepared.sizes) == pytest.approx(1.0)


# ---------------------------------------------------------------- which questions, and when they are scored


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_all_questions_come_once_before_one_comes_again(count: int, at_most: int, seed: int) -> None:
    questions = [Question(f"q{n}", "Who?", ("A",)) for n in range(count)]
    settings = Settings(questions_per_step=at_most)
    of_an_epoch = math.ceil(count / at_most)
    epochs = [
        [settings.questions_of(t, questions, seed) for t in range(first, first + of_an_epoch)]
        for first in (1, 1 + of_an_epoch)
    ]
    for epoch in epochs:
        assert sorted(q.id for step in epoch for q in step) == sorted(q.id for q in questions)
        sizes = [len(step) for step in epoch]
        assert max(sizes) <= settings.sampled_questions(count)
        assert max(sizes) - min(sizes) <= 1


def test_without_a_number_every_iteration_has_all_questions() -> None:
    questions = [Question(f"q{n}", "Who?", ("A",)) for n in range(3)]
    assert Settings().questions_of(4, questions, 0) == questions
    assert Settings().sampled_questions(3) == 3


def test_dev_questions_are_scored_every_so_often_and_at_the_end() -> None:
    settings = Settings(iterations=7, evaluate_every=3)
    assert [t for t in range(8) if settings.is_evaluated(t)] == [0, 3, 6, 7]


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.samples=1", r"rollout\.samples of at least 2, not 1"),
        ("rollout.temperature=0.8", r"set rollout\.temperature=1 \(it is 0\.8\)"),
        ("rollout.top_p=0.9", r"top_p=1 \(0\.9\)"),
        ("cold_start.mix=0.5", r"cold_start\.mix adds weighted examples"),
    ],
)
def test_settings_with_which_it_would_be_another_method_are_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    config = methods.load(None, ["recipe=grpo", "cold_start.questions=1", override])
    with pytest.raises(UserError, match=message):
        methods.train(config, tmp_path / "run", Display())
    assert not (tmp_path / "run").exists()


class Killed(BaseException):
    """Stands in for the end of the process."""


class StandIn:
    """A cluster whose searcher is right in its first sample of every question, and in one more for each version.

    Attributes:
        said: what was done, in order.
        kill_at: raised when this is about to be done.
    """

    pushed = None

    def __init__(self, kill_at: str = "") -> None:
        self.said: list[str] = []
        self.losses: list[ClippedRatio] = []
        self.kill_at, self.version = kill_at, -1

    def policy(self, name: str) -> StandIn:
        return self

    def _do(self, what: str) -> None:
        if what == self.kill_at:
            raise Killed
        self.said.append(what)

    def begin(
        self, program: Any, shards: Shards, weigh: Any, roles: Any, *, samples: int, name: str, **_: Any
    ) -> Any:
        self._do(f"{name} of {self.version}: {','.join(sorted(task.id for task in shards.to_do()))}")

        def answer(task: Question, sample: int) -> Episode:
            is_right = sample <= self.version
            return episode(sample, task.answers[0] if is_right else "X", task=task.id)

        for number in range(len(shards)):
            done = []
            for task in cast(Sequence[Question], shards.members(number)):
                episodes = [answer(task, sample) for sample in range(samples)]
                done.append((episodes, weigh(task, episodes)))
            shards.write(number, done)
        report = SampleReport(len(shards.tasks), 50, 1.0, weigh.summarise(shards.statistics()))
        return SimpleNamespace(result=lambda: report, cancel=lambda: None)

    def restore(self, snapshot: Snapshot) -> None:
        self.version = snapshot.version

    def train(self, shards: list[Path], loss: Any, **_: Any) -> Any:
        self._do(f"train from {self.version}")
        self.losses.append(loss)
        computed = loss.prepare([example for shard in shards for example in read_examples(shard)]).computed
        figures = {"computed": sum(computed), "clipped": 0.25, "seconds": 2.0}
        return SimpleNamespace(history=[], figures=lambda: figures)

    def save(self, version: int, *, state: Path, model: Path) -> None:
        for directory in (state, model):
            directory.mkdir(parents=True, exist_ok=True)
        write_checksums(model)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[StandIn, dict[str, Any]]]:
    """The run's command once more, on a stand-in; gives it and the report."""
    for split, count in (("train", 4), ("dev", 2), ("test", 1)):
        rows = [{"id": f"{split}{n}", "question": f"{split} {n}?", "answers": ["Ada"]} for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def begun(*overrides: str, kill_at: str = "") -> tuple[StandIn, dict[str, Any]]:
        cluster = StandIn(kill_at)

        @contextmanager
        def open_run(
            config: Config, path: Path, display: Display, splits: Splits, policies: Sequence[PolicySpec]
        ) -> Iterator[Run]:
            with RunDirectory(path, config) as files, Tracker(path, config.tracking, "run") as tracker:
                run = Run(config, files, splits, path, tracker, display, policies)
                run.cluster = cast(Cluster, cluster)
                with run:
                    yield run

        monkeypatch.setattr("pipeline.recipes.grpo.open_run", open_run)
        paths = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "dev", "test")]
        settings = ["recipe=grpo", f"model.path={MODEL}", "rollout.samples=3", "tracking.tensorboard=false"]
        config = methods.load(None, [*settings, *paths, "grpo.reward=em", *overrides])
        outcome = methods.train(config, tmp_path / "run", Display())
        Display().outcome(outcome)
        return cluster, outcome.report

    return begun


def test_an_iteration_samples_some_questions_with_the_version_before_and_trains_on_them(start: Any) -> None:
    cluster, report = start("grpo.iterations=2", "grpo.questions_per_step=2", "grpo.clip_high=0.28")
    sampled = [said.split(": ") for said in cluster.said if said.startswith("sample")]
    assert [who for who, _ in sampled] == ["sample of 0", "sample of 1"]
    assert sorted(",".join(which for _, which in sampled).split(",")) == [
        "train0",
        "train1",
        "train2",
        "train3",
    ]
    assert [said for said in cluster.said if said.startswith("train")] == ["train from 0", "train from 1"]
    assert cluster.losses == [ClippedRatio(0.2, 0.28, mean_over="group")] * 2
    first, second = report["iterations"]
    assert first["sample"]["reward"] == pytest.approx(1 / 3)
    assert second["sample"]["reward"] == pytest.approx(2 / 3)
    assert (first["sample"]["groups"], first["searcher/train"]["computed"]) == (2, 6)
    assert report["start"]["evaluation"]["scores"]["em"] == 100.0
    assert report["test"].keys() == {"start", "best"}


def test_a_run_that_was_killed_goes_on_with_the_same_questions(start: Any, tmp_path: Path) -> None:
    settings = ("grpo.iterations=2", "grpo.questions_per_step=2")
    undisturbed, report = start(*settings)
    sampling = undisturbed.said[-4]
    assert sampling.startswith("sample of 1")
    for kill_at, to_do in ((sampling, [sampling, "train from 1"]), ("train from 1", ["train from 1"])):
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(Killed):
            start(*settings, kill_at=kill_at)
        resumed, again = start(*settings)
        assert [said for said in resumed.said if said.startswith(("sample", "train"))] == to_do
        assert again["iterations"][1]["sample"]["reward"] == report["iterations"][1]["sample"]["reward"]


def test_a_divergence_is_from_the_model_of_iteration_0(start: Any) -> None:
    cluster, _ = start("grpo.iterations=2", "grpo.kl_coefficient=0.04")
    assert cluster.losses == [ClippedRatio(0.2, 0.2, 0.04, "group", str(MODEL))] * 2


def test_iterations_whose_groups_are_all_equal_leave_the_model_as_it_is_and_say_so(start: Any) -> None:
    cluster, report = start("grpo.iterations=3", "grpo.evaluate_every=3", "rollout.samples=2")
    rows = [(row["sample"]["groups"], row["searcher/train"]["computed"]) for row in report["iterations"]]
    assert rows == [(4, 8), (0, 0), (0, 0)]
    assert [row.keys() & {"evaluation"} for row in report["iterations"]] == [set(), set(), {"evaluation"}]
    assert [said for said in cluster.said if said.startswith("evaluation")] == [
        "evaluation of 0: dev0,dev1",
        "evaluation of 3: dev0,dev1",
    ]
