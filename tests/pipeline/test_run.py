"""The steps that all recipes share, over kills and resumes; a small stand-in takes the cluster's place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from actors.cluster import Cluster, SampleReport
from pipeline.core.agents.program import Completion, Sampling
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import Config, EvaluationConfig, LearnerConfig, RolloutConfig, TrackingConfig
from pipeline.core.data.splits import Splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.models import write_checksums
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.record_tables import trajectories_from_table
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.run import Json, RunDirectory, write_json
from pipeline.core.shards import Shards
from pipeline.core.tracking import Tracker
from pipeline.core.weighing import Weighted
from pipeline.run import Run
from pipeline.steps import Begun

NAMES = ("selector", "generator", "searcher")


class Killed(BaseException):
    """Stands in for the end of the process: nothing in the program catches it."""


def kill(*_: object, **__: object) -> Any:
    raise Killed


class StandInPolicy:
    """Trains by writing down from which version, and on what."""

    def __init__(self) -> None:
        self.current: Snapshot | None = None
        self.trained: list[tuple[Any, ...]] = []

    def restore(self, snapshot: Snapshot) -> None:
        self.current = snapshot

    def train(self, shards: list[Path], loss: object, **settings: Any) -> Any:
        assert self.current is not None
        self.trained.append((self.current.version, [shard.name for shard in shards], settings["seed"]))
        return SimpleNamespace(
            history=[{"loss": 0.5}, {"loss": 0.25}], figures=lambda: {"loss": 0.375, "steps": 2}
        )

    def save(self, version: int, *, state: Path, model: Path) -> None:
        for directory in (state, model):
            directory.mkdir(parents=True, exist_ok=True)


@contextmanager
def opened(
    path: Path,
    test: Sequence[Question] = (),
    train: Sequence[Question] = (),
    dev: Sequence[Question] = (),
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008  (frozen)
    **rollout: Any,
) -> Iterator[Run]:
    """The run as one start of its command sees it."""
    config = Config(
        tracking=TrackingConfig(tensorboard=False), rollout=RolloutConfig(**rollout), evaluation=evaluation
    )
    specs = [PolicySpec(name, config.model, learner=LearnerConfig()) for name in NAMES]
    with RunDirectory(path, config) as files, Tracker(path, config.tracking, "run") as tracker:
        run = Run(config, files, Splits(list(train), list(dev), list(test)), path, tracker, Display(), specs)
        policies = {name: StandInPolicy() for name in NAMES}
        run.cluster = cast(Cluster, SimpleNamespace(policy=policies.__getitem__, policies=policies))
        yield run


def begins(phase: Callable[..., SampleReport], cancel: Callable[[], None] = lambda: None) -> Any:
    """A cluster's `begin`, which does all of the phase when its result is asked for."""

    def begin(*arguments: Any, **settings: Any) -> Any:
        return SimpleNamespace(result=lambda: phase(*arguments, **settings), cancel=cancel)

    return begin


def answer_all(program: Any, shards: Shards, *_: object, **__: object) -> SampleReport:
    """A phase of one answer for each task."""
    for number in range(len(shards)):
        shards.write(number, [([answer(t.id)], Weighted({}, {})) for t in shards.members(number)])
    return SampleReport(len(shards.tasks), 1, 1.0, {})


def trained(run: Run, name: str) -> list[tuple[Any, ...]]:
    return cast(Any, run.cluster).policies[name].trained  # type: ignore[no-any-return]


def train(run: Run, t: int, name: str) -> Json:
    return run.train(t, name, WeightedNll(), seed=t)


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_done_and_recorded_once(tmp_path: Path) -> None:
    for _ in range(2):
        with opened(tmp_path) as run:
            result = run.once("3/selector/score", lambda: {"bound": -2.0, "counts": {"kept": 4}})
    assert result["bound"] == -2.0
    (line,) = metrics(tmp_path)
    assert (line["iteration"], line["phase"], line["step"]) == (3, "selector/score", None)
    assert line["values"] == {"bound": -2.0, "counts.kept": 4.0}


def train_once(path: Path) -> None:
    with opened(path) as run:
        train(run, 1, "selector")


@pytest.mark.parametrize("killed_in", ["pipeline.core.run.write_json", "pipeline.core.run.RunDirectory.once"])
def test_a_training_that_was_cut_off_leaves_no_trace_in_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    def done_and_killed(self: RunDirectory, step: str, work: Callable[[], Json]) -> Json:
        work()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(killed_in, done_and_killed if killed_in.endswith("once") else kill)
        with pytest.raises(Killed):
            train_once(tmp_path)
    train_once(tmp_path)
    assert [(line["phase"], line["step"], line["values"]["loss"]) for line in metrics(tmp_path)] == [
        ("selector/train", 1, 0.5),
        ("selector/train", 2, 0.25),
        ("selector/train", None, 0.375),
    ]


def test_no_figures_are_missing_after_a_kill_behind_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_and_killed(path: Path, value: Json) -> None:
        write_json(path, value)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.core.run.write_json", written_and_killed)
        with pytest.raises(Killed):
            train_once(tmp_path)
    train_once(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, None]


def test_a_sampling_that_was_cut_off_goes_on_behind_its_complete_shards(tmp_path: Path) -> None:
    questions = [Question(f"q{number}", "Who?", ("A",)) for number in range(5)]
    weigh, sampling = cast(Any, SimpleNamespace(outputs=["selector"])), cast(Any, None)
    seen: list[list[str]] = []

    def sample(run: Run, numbers: Sequence[int], then: Callable[[], SampleReport]) -> Json:
        """A cluster that makes these shards."""

        def on_cluster(program: Any, shards: Shards, *_: object, **__: object) -> SampleReport:
            seen.append([task.id for task in shards.to_do()])
            for number in numbers:
                episodes = [
                    (list[Any](), Weighted({"selector": []}, {"id": t.id})) for t in shards.members(number)
                ]
                shards.write(number, episodes)
            return then()

        cast(Any, run.cluster).begin = begins(on_cluster)
        return run.sample(1, cast(Any, None), {}, weigh, samples=1, sampling=sampling)

    with opened(tmp_path, train=questions, questions_per_shard=2) as run, pytest.raises(Killed):
        sample(run, [1], kill)
    with opened(tmp_path, train=questions, questions_per_shard=2) as run:
        result = sample(run, [0, 2], lambda: SampleReport(5, 50, 1.0, {"bound": -1.0}))
        assert [shard.name for shard in run.shards(1, "selector")] == [f"00000{n}.parquet" for n in range(3)]
    assert seen == [["q0", "q1", "q2", "q3", "q4"], ["q0", "q1", "q4"]]
    assert (result["trajectories"], result["generated_tokens"], result["bound"]) == (5, 50, -1.0)


def test_a_sampling_is_told_how_long_its_questions_took_in_the_iteration_before(tmp_path: Path) -> None:
    weigh, told = cast(Any, SimpleNamespace(outputs=["selector"])), list[Any]()

    def sample(program: Any, shards: Shards, *_: object, lengths: Any, **__: object) -> SampleReport:
        told.append(lengths)
        shards.write(0, [([answer("q")], Weighted({"selector": []}, {}))])
        return SampleReport(1, 2, 1.0, {})

    with opened(tmp_path, train=[Question("q", "Who?", ("A",))]) as run:
        cast(Any, run.cluster).begin = begins(sample)
        for t in (1, 2):
            run.sample(t, cast(Any, None), {}, weigh, samples=1, sampling=cast(Any, None))
    assert told == [{}, {"q": 2.0}]


def beside(path: Path, then: Callable[[Run, Begun], object]) -> list[str]:
    """What is done of iteration 2 that was begun, and beside it; iteration 1 is trained meanwhile."""
    done: list[str] = []

    def phase(program: Any, shards: Shards, *_: object, **__: object) -> SampleReport:
        done.append("sampled")
        shards.write(0, [([], Weighted({"selector": []}, {"id": "q"}))])
        return SampleReport(5, 50, 7.5, {"bound": -1.0})

    with opened(path, train=[Question("q", "Who?", ("A",))]) as run, run:
        cast(Any, run.cluster).begin = begins(phase, cancel=lambda: done.append("cancelled"))
        weigh = cast(Any, SimpleNamespace(outputs=["selector"]))
        begun = run.begin_sampling(2, cast(Any, None), {}, weigh, samples=1, sampling=cast(Any, None))
        train(run, 1, "selector")
        done.append("trained")
        then(run, begun)
    return done


def test_a_sampling_goes_on_beside_a_training_and_is_recorded_at_its_end(tmp_path: Path) -> None:
    assert beside(tmp_path, lambda run, begun: begun.finish()) == ["trained", "sampled"]
    with opened(tmp_path) as run:
        result = run.files.finished("2/sample")
    assert result is not None
    assert (result["bound"], result["seconds"]) == (-1.0, 7.5)
    assert [line["phase"] for line in metrics(tmp_path)] == [*["selector/train"] * 3, "sample"]


def test_a_sampling_that_is_not_ended_is_cancelled_with_the_run_and_begun_again_by_the_next(
    tmp_path: Path,
) -> None:
    assert beside(tmp_path, lambda run, begun: None) == ["trained", "cancelled"]
    assert beside(tmp_path, lambda run, begun: begun.cancel()) == ["trained", "cancelled"]
    assert beside(tmp_path, lambda run, begun: begun.finish()) == ["trained", "sampled"]
    assert beside(tmp_path, lambda run, begun: begun.finish()) == ["trained"]


def test_a_shard_that_is_lost_before_training_has_read_it_is_sampled_again(tmp_path: Path) -> None:
    questions = [Question(f"q{number}", "Who?", ("A",)) for number in range(5)]
    sampled: list[list[str]] = []

    def sample(run: Run) -> Json:
        def on_cluster(program: Any, shards: Shards, *_: object, **__: object) -> SampleReport:
            sampled.append([task.id for task in shards.to_do()])
            for number in {shards.shard_of(task) for task in shards.to_do()}:
                members = shards.members(number)
                shards.write(number, [([], Weighted({"selector": []}, {"id": t.id})) for t in members])
            return SampleReport(5, 50, 1.0, {"bound": -1.0})

        cast(Any, run.cluster).begin = begins(on_cluster)
        weigh = cast(Any, SimpleNamespace(outputs=["selector"]))
        return run.sample(1, cast(Any, None), {}, weigh, samples=1, sampling=cast(Any, None))

    for lost in ("selector/examples/000001.parquet", "rollouts/000000.parquet", None):
        with opened(tmp_path, train=questions, questions_per_shard=2) as run:
            sample(run)
            if lost is not None:
                run.at(f"1/{lost}").unlink()
    assert sampled == [["q0", "q1", "q2", "q3", "q4"], ["q2", "q3"], ["q0", "q1"]]
    with opened(tmp_path, train=questions, questions_per_shard=2) as run:
        train(run, 1, "selector")
        run.at("1/selector/examples/000001.parquet").unlink()
        sample(run)
    assert len(sampled) == 3


def test_examples_that_no_sampling_made_are_made_again_where_they_are_lost_or_damaged(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> tuple[dict[str, list[Example]], Json]:
        made.append(len(made))
        examples = {name: [Example.supervised("q", name, [1], [2, 3])] for name in NAMES}
        return examples, {"questions": 1}

    def start(damage: Callable[[Path], object] | None, stay: bool = False) -> None:
        with opened(tmp_path) as run:
            assert run.make_examples("0/formats", NAMES, make, stay=stay)["questions"] == 1
            (shard,) = run.shards(0, "generator")
            assert len(pq.read_table(shard)) == 1
            if damage is not None:
                damage(shard)

    start(None)
    start(lambda shard: shard.unlink())
    start(lambda shard: shard.write_bytes(shard.read_bytes()[:-1] + b"x"))
    start(lambda shard: (shard.parent / "_000000.json").unlink())
    start(lambda shard: shutil.rmtree(shard.parent))
    start(None)
    start(None)
    assert len(made) == 5
    assert [line["values"] for line in metrics(tmp_path)] == [{"questions": 1.0}]
    with opened(tmp_path) as run:
        for name in NAMES:
            train(run, 0, name)
    start(lambda shard: shard.write_bytes(b"x"))
    with opened(tmp_path) as run:  # nobody will read it
        run.make_examples("0/formats", NAMES, make)
    assert len(made) == 5
    start(None, stay=True)
    assert len(made) == 6


@pytest.mark.parametrize(
    ("keeps", "message"), [(True, "was changed since it was written"), (False, "not there any")]
)
def test_a_model_that_was_damaged_or_removed_is_refused_where_it_is_to_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool, message: str
) -> None:
    def write(self: StandInPolicy, version: int, *, state: Path, model: Path) -> None:
        state.mkdir(parents=True)
        model.mkdir(parents=True)
        (model / "weights").write_text(f"{version}")
        write_checksums(model)

    monkeypatch.setattr(StandInPolicy, "save", write)
    question = [Question("q", "Who?", ("A",))]
    with opened(tmp_path, test=question) as run:
        train(run, 1, "selector")
        train(run, 2, "selector")
    model = tmp_path / "iterations/0001/selector/model"
    if keeps:
        (model / "weights").write_text("x")
    else:
        shutil.rmtree(model)
    with opened(tmp_path, test=question) as run:
        cast(Any, run.cluster).begin = begins(answer_all)
        assert run.test("best", cast(Any, None), {"selector": 2}, answers="selector")["iteration"] == 2
        with pytest.raises(UserError, match=message):
            run.test("start", cast(Any, None), {"selector": 1}, answers="selector")


def test_a_test_is_done_again_if_another_version_is_the_best_one_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([10.0, 20.0])
    monkeypatch.setattr("pipeline.run.evaluate", lambda *_: {"em": next(scores)})
    with opened(tmp_path, test=[Question("q", "Who?", ("A",))]) as run:
        cast(Any, run.cluster).begin = begins(answer_all)
        for version in (1, 1, 2):
            run.test("best", cast(Any, None), {"selector": version}, answers="selector")
        result = run.files.test_results()["best"]
    assert (result["iteration"], result["em"]) == (2, 20.0)
    assert metrics(tmp_path) == []


def test_an_evaluation_that_was_cut_off_goes_on_behind_its_complete_shards_of_the_same_version(
    tmp_path: Path,
) -> None:
    questions = [Question(f"q{number}", "Who?", ("A",)) for number in range(5)]
    seen: list[list[str]] = []

    def test(version: int, then: Callable[[], None]) -> Json | None:
        """A cluster that makes one shard more, and then all of them."""

        def on_cluster(program: Any, shards: Shards, *_: object, **__: object) -> SampleReport:
            to_do = [n for n in range(len(shards)) if n not in shards.complete]
            seen.append([task.id for task in shards.to_do()])
            for number in to_do:
                shards.write(number, [([answer(t.id)], Weighted({}, {})) for t in shards.members(number)])
                then()
            return SampleReport(5, 50, 1.0, {})

        with opened(tmp_path, test=questions, questions_per_shard=2) as run:
            cast(Any, run.cluster).begin = begins(on_cluster)
            return run.test("best", cast(Any, None), {"selector": version}, answers="selector")

    for version in (1, 1, 2):
        with pytest.raises(Killed):
            test(version, kill)
    result = test(2, lambda: None)
    everything = [question.id for question in questions]
    assert seen == [everything, everything[2:], everything, everything[2:]]
    assert result is not None and result["iteration"] == 2
    kept = trajectories_from_table(pq.read_table(tmp_path / "test/best.parquet"))
    assert [trajectory.question_id for trajectory in kept] == everything
    assert not (tmp_path / "test/best.parts").exists()


class Counted:
    """A weighting that says how many episodes there were, and makes an example of none."""

    outputs = ("selector",)

    def __call__(self, task: Question, episodes: Sequence[Episode]) -> Weighted:
        return Weighted({"selector": [cast(Example, None)]}, {"episodes": len(episodes)})

    def summarise(self, statistics: Sequence[Any]) -> Json:
        return {"episodes": sum(row["episodes"] for row in statistics)}


def test_the_bound_on_dev_is_sampled_once_and_trains_nothing(tmp_path: Path) -> None:
    questions = [Question(f"d{number}", "Who?", ("A",)) for number in range(3)]
    asked: list[int] = []

    def sample(
        program: Any, shards: Shards, weigh: Any, roles: Any, *, samples: int, **_: object
    ) -> SampleReport:
        asked.append(samples)
        for number in range(len(shards)):
            done = {task.id: [answer(task.id)] * samples for task in shards.members(number)}
            shards.write(
                number, [(episodes, weigh(Question(id_, "", ()), episodes)) for id_, episodes in done.items()]
            )
        return SampleReport(6, 60, 2.5, weigh.summarise(shards.statistics()))

    def bound(run: Run) -> Json:
        begun = run.begin_dev_bound(
            1, cast(Any, None), {"selector": 1}, Counted(), samples=2, sampling=Sampling(1.0)
        )
        return begun.finish()

    for _ in range(2):
        with opened(tmp_path, dev=questions, questions_per_shard=2) as run:
            cast(Any, run.cluster).begin = begins(sample)
            found = bound(run)
    assert asked == [2]
    assert (found["episodes"], found["generated_tokens"], found["seconds"]) == (6, 60, 2.5)
    at = tmp_path / "iterations/0001"
    assert sorted(path.name for path in (at / "dev_samples").iterdir()) == [
        "000000.parquet", "000001.parquet", "_000000.json", "_000001.json"
    ]  # fmt: skip
    assert not list(at.glob("*/examples"))
    with opened(tmp_path / "without") as run:
        assert bound(run) == {}


@pytest.mark.parametrize(("protocol", "em"), [("exsearch", 100.0), ("kilt", 0.0)])
def test_a_run_scores_by_the_protocol_of_its_configuration(tmp_path: Path, protocol: Any, em: float) -> None:
    episode = answer("q")
    said = Episode("q", 0, (replace(episode.turns[0], answer="1914\u20131918"),))

    def sample(program: Any, shards: Shards, *_: object, **__: object) -> SampleReport:
        shards.write(0, [([said], Weighted({}, {}))])
        return SampleReport(1, 1, 1.0, {})

    questions = [Question("q", "When?", ("1914-1918",))]
    with opened(tmp_path, test=questions, evaluation=EvaluationConfig(protocol=protocol)) as run:
        cast(Any, run.cluster).begin = begins(sample)
        result = run.test("best", cast(Any, None), {"selector": 0}, answers="selector")
    assert result["em"] == em


def answer(task_id: str) -> Episode:
    transcript = Transcript()
    transcript.append_model(Completion([5, 6], [-1.0, -1.0], "", None, "eos"))
    turn = transcript.trajectory(
        question_id=task_id, sample=0, role="selector", policy_version=0, stop_reason=StopReason.ANSWERED
    )
    return Episode(task_id, 0, (turn,))


def test_without_questions_there_is_no_evaluation_and_no_test(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        program, roles = cast(Any, None), {"selector": 0}
        assert run.evaluate(0, program, roles, answers="selector") == {}
        assert run.test("best", program, roles, answers="selector") == {}
        assert run.files.finished("0/evaluation") is None
        assert run.files.test_results() == {}
