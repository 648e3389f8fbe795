"""A run, up and working: what every recipe stands on, and the steps that all recipes share.

A recipe opens a run and then reads like its algorithm: sample, train, evaluate, one step after the other. A step that
the run directory says is finished is not done again, so the same command resumes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from actors.background import Ongoing
from actors.cluster import Cluster, SampleReport
from actors.observer import Observer
from actors.policy import Policy
from pipeline.core.agent_settings import AGENT_FILE, agent_settings
from pipeline.core.agents.program import GREEDY, Further, Program, Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.config import Config, Iterations
from pipeline.core.data.splits import Splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.evaluation import evaluate
from pipeline.core.losses.joint import Joint
from pipeline.core.losses.loss import Loss
from pipeline.core.models import check_export
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.question_scores import scored_table
from pipeline.core.records import Example, Question
from pipeline.core.report import DEV_BOUND, DEV_SAMPLES, step_report
from pipeline.core.retention import remove_what_need_not_stay
from pipeline.core.retrieval import Searched
from pipeline.core.run import Json, RunDirectory, write_json, write_records
from pipeline.core.shards import Shards, generated_tokens, has_examples, write_examples
from pipeline.core.tracking import Tracker
from pipeline.core.weighing import NothingToTrainOn, OnlyFigures, Weigh
from pipeline.steps import Begun, Steps, in_iteration

logger = logging.getLogger(__name__)


class Run(Steps):
    """One run of a recipe. `pipeline.opening.open_run` gives it.

    Versions of a policy: t is what the last training up to step "t/NAME/train" made; before the first of them it is the
    model that the policy started from.
    """

    def __init__(
        self,
        config: Config,
        files: RunDirectory,
        splits: Splits,
        searched: Searched,
        tracker: Tracker,
        display: Display,
        policies: Sequence[PolicySpec],
    ) -> None:
        super().__init__(files, tracker, display, config.tracking)
        self.config, self.splits, self.searched = config, splits, searched
        self._specs = {spec.name: spec for spec in policies}
        self._frozen: dict[str, Snapshot] = {}
        self._whole: set[Path] = set()
        """Models that this process has exported, or has read through."""
        self._closing = ExitStack()

    @cached_property
    def cluster(self) -> Cluster:
        """Up as soon as a step begins: a run of which no step is left starts none, and only tells what it found.

        Engines start with the newest version of each policy, which spares a resumed run one load.
        """
        newest = {name: self._newest_model(name) for name in self._specs}
        with self.display.status("starting the retriever and the vLLM engines"):
            return self._closing.enter_context(
                Cluster(
                    list(self._specs.values()),
                    self.config.cluster,
                    self.config.retriever,
                    self.searched,
                    serving=newest,
                    status=self.display.status,
                    observer=Observer(self.files.path, self.display.restarted),
                )
            )

    def _begins(self, step: str) -> None:
        _ = self.cluster  # before the step's time begins
        super()._begins(step)

    def __exit__(self, *exception: object) -> None:
        with self._closing:
            super().__exit__(*exception)

    # ---------------------------------------------------------------- policies and paths

    def snapshot(self, name: str, version: int) -> Snapshot:
        """A version of a policy on disk."""
        if name in self._frozen:
            return self._frozen[name]
        made = self.files.newest_version(name, up_to=version)
        if made < 0:
            return Snapshot(version, self._specs[name].model.path)
        return Snapshot(made, str(self.at(f"{made}/{name}/model")), self.at(f"{made}/{name}/learner"))

    def freeze(self, name: str, at: Snapshot) -> None:
        """Let a policy without a learner, such as a reference, be this version of another one from now on."""
        self._frozen[name] = at

    def at(self, step: str) -> Path:
        """Where a step's data lie."""
        return self.files.at(step)

    def fresh(self, step: str) -> Path:
        """The same as an empty directory: what an interrupted step left there is removed."""
        return self.files.fresh(step)

    def shards(self, t: int, name: str) -> list[Path]:
        """The training examples of a policy in iteration t."""
        return sorted(self.at(f"{t}/{name}/examples").glob("*.parquet"))

    # ---------------------------------------------------------------- steps

    def sample(
        self,
        t: int,
        program: Program[Any],
        roles: Mapping[str, int],
        weigh: Weigh[Any],
        *,
        samples: int,
        sampling: Sampling,
    ) -> Json:
        """Step "t/sample": `begin_sampling`, and its end."""
        return self.begin_sampling(t, program, roles, weigh, samples=samples, sampling=sampling).finish()

    def begin_sampling(
        self,
        t: int,
        program: Program[Any],
        roles: Mapping[str, int],
        weigh: Weigh[Any],
        *,
        samples: int,
        sampling: Sampling,
        questions: Sequence[Question] | None = None,
        further: Further | None = None,
    ) -> Begun:
        """Step "t/sample": episodes of the training questions, and the examples made of them for each policy.

        It goes on beside the steps that are done until its `finish`: an evaluation of the same versions, which then
        shares the engines, or a training, where the learner has devices of its own.

        A step that was cut off keeps its complete shards; their questions are not sampled again. One that is finished
        is done again as far as shards are missing now, unless all that was to be trained on them is trained.

        Args:
            roles: the version of each policy that plays a role of its own name.
            weigh: makes the examples; its outputs are names of policies.
            samples: episodes per question.
            sampling: its seed is that of run and iteration.
            questions: those of this iteration, always the same; None: all.
            further: how many more episodes of a question, given those.
        """

        shards = Shards(
            self.splits.train if questions is None else questions,
            self.at(f"{t}/rollouts"),
            {name: self.at(f"{t}/{name}/examples") for name in weigh.outputs},
            self.config.rollout.questions_per_shard,
        )
        if self.files.finished(f"{t}/sample") is not None and self._are_still_to_be_read(t, weigh.outputs):
            shards.resume()
            if len(shards.complete) < len(shards):  # `resume` has said why
                self.files.forget(f"{t}/sample")

        def work() -> AbstractContextManager[Ongoing[SampleReport]]:
            policies, title = self._at(roles), f"iteration {t}: sampling"
            lengths = generated_tokens(self.at(f"{t - 1}/rollouts"))
            return self._sampling(
                shards, "sample", title, program, policies, weigh, samples, sampling, lengths, further
            )

        return self.begin(f"{t}/sample", work, _figures)

    def make_examples(
        self,
        step: str,
        names: Sequence[str],
        make: Callable[[], tuple[Mapping[str, Sequence[Example]], Json]],
        *,
        stay: bool = False,
    ) -> Json:
        """A step ("0/cold_start") of examples that no sampling made, one shard for each of the policies `names`.

        One that is finished is done again if a shard is missing or damaged now, as long as it is to be read.

        Args:
            make: gives the examples of each policy, and figures.
            stay: they are read also when the policies are trained on them.
        """
        t = int(step.split("/")[0])
        shards = {name: self.at(f"{t}/{name}/examples") / "000000.parquet" for name in names}
        is_read = stay or self._are_still_to_be_read(t, names)
        if is_read and self.files.finished(step) is not None and not all(map(has_examples, shards.values())):
            self.files.forget(step)

        def work() -> Json:
            examples, figures = make()
            for name, shard in shards.items():
                self.fresh(f"{t}/{name}/examples")
                write_examples(shard, examples[name])
            return figures

        return self.once(step, work)

    def train(
        self,
        t: int,
        name: str,
        loss: Loss | Joint,
        *,
        seed: int,
        beside: Callable[[Sequence[Path]], Sequence[Path]] | None = None,
        learning_rate: float | None = None,
        epochs: int | None = None,
    ) -> Json:
        """Step "t/NAME/train": version t of a policy, from version t - 1 on the examples of t.

        Args:
            loss: what is minimised.
            seed: of run and iteration, for the order of the examples.
            beside: makes further shards to train on, given those of t.
            learning_rate, epochs: in place of the configured ones.
        """

        def work() -> Json:
            policy = self.cluster.policy(name)
            policy.restore(self.snapshot(name, t - 1))
            shards = self.shards(t, name)
            with self.display.progress(f"iteration {t}: training {name}", None, "steps") as advance:
                report = policy.train(
                    [*shards, *(beside(shards) if beside is not None else ())],
                    loss,
                    state=self.at(f"{t}/{name}/learner"),
                    seed=seed,
                    learning_rate=learning_rate,
                    epochs=epochs,
                    on_progress=advance.to,
                )
            policy.save(t, state=self.at(f"{t}/{name}/learner"), model=self.at(f"{t}/{name}/model"))
            if name == SEARCHER:
                write_json(self.at(f"{t}/{name}/model/{AGENT_FILE}"), agent_settings(self.config))
            self._whole.add(self.at(f"{t}/{name}/model"))
            for number, step in enumerate(report.history, start=1):
                self.tracker.log(step, iteration=t, phase=f"{name}/train", step=number)
            return report.figures()

        return self.once(f"{t}/{name}/train", work)

    def evaluate(self, t: int, program: Program[Any], roles: Mapping[str, int], *, answers: str) -> Json:
        """Step "t/evaluation": `begin_evaluation`, and its end."""
        return self.begin_evaluation(t, program, roles, answers=answers).finish()

    def begin_evaluation(
        self, t: int, program: Program[Any], roles: Mapping[str, int], *, answers: str
    ) -> Begun:
        """Step "t/evaluation": greedy scores on the dev questions; `push` says what the pushes moved, by policy.

        It goes on beside a sampling of the same versions, and begun before that has its questions answered first.
        Without dev questions nothing is done, and the result is empty.

        Args:
            roles: the version of each policy that plays a role of its own name.
            answers: the role whose turn holds the answer.
        """
        if not self.splits.dev:
            return Begun(dict)

        def result(scores: Json) -> Json:
            pushes = {name: self.cluster.policy(name).pushed for name in roles}
            pushed = {name: asdict(report) for name, report in pushes.items() if report is not None}
            return {"push": pushed, "scores": scores}

        return self._begin_scores(
            f"{t}/evaluation", f"iteration {t}: dev", program, roles, self.splits.dev, answers, result
        )

    def begin_dev_bound(
        self,
        t: int,
        program: Program[Any],
        roles: Mapping[str, int],
        weigh: Weigh[Any],
        *,
        samples: int,
        sampling: Sampling,
    ) -> Begun:
        """Step "t/dev_bound": episodes of the dev questions as an E-step samples them, and what `weigh` says of them.

        Nothing is trained on them. As an evaluation it goes on beside other steps, and behind its complete shards.
        Without dev questions nothing is done, and the result is empty.

        Args:
            roles: the version of each policy that plays a role of its own name.
            samples: episodes per question.
            sampling: its seed is that of run and iteration.
        """
        if not self.splits.dev:
            return Begun(dict)
        shards = Shards(
            self.splits.dev, self.at(f"{t}/{DEV_SAMPLES}"), {}, self.config.rollout.questions_per_shard
        )

        def work() -> AbstractContextManager[Ongoing[SampleReport]]:
            policies, title = self._at(roles), f"iteration {t}: dev bound"
            figures = OnlyFigures(weigh)
            return self._sampling(shards, DEV_BOUND, title, program, policies, figures, samples, sampling, {})

        return self.begin(f"{t}/{DEV_BOUND}", work, _figures)

    def test(self, name: str, program: Program[Any], roles: Mapping[str, int], *, answers: str) -> Json:
        """Step "test/NAME": greedy scores on the test questions; done again if other versions are to be evaluated.

        Without test questions nothing is done, and the result is empty.
        """
        if not self.splits.test:
            return {}
        step, version = f"test/{name}", max(roles.values())
        if (self.files.finished(step) or {}).get("iteration") != version:
            self.files.forget(step)

        def result(scores: Json) -> Json:
            return {"iteration": version} | scores

        begun = self._begin_scores(step, f"test: {name}", program, roles, self.splits.test, answers, result)
        return begun.finish()

    def end_iteration(self, t: int, iterations: Iterations) -> None:
        """Mark iteration t as whole, and remove the models and checkpoints that need not stay."""
        self.files.close_iteration(t)
        self._write_timeline(t)
        remove_what_need_not_stay(self.files, t, iterations, self.config.storage)

    def report(self, iterations: Iterations) -> Json:
        """`report.json`, made anew; `step_report` says what is in it."""
        report = step_report(
            self.files,
            self.config.recipe,
            self.config.seed,
            iterations,
            self.config.evaluation.bootstrap_samples,
        )
        write_json(self.at("report.json"), report)
        return report

    # ---------------------------------------------------------------- inside

    def _are_still_to_be_read(self, t: int, policies: Sequence[str]) -> bool:
        """Whether training of iteration t has yet to read what was sampled for it."""
        is_over = (self.files.iteration(t) / "DONE").exists()
        return not is_over and any(self.files.finished(f"{t}/{name}/train") is None for name in policies)

    def _at(self, versions: Mapping[str, int]) -> dict[str, Policy]:
        """The policies, from now on at these versions, and to be sampled from."""
        policies = {name: self.cluster.policy(name) for name in versions}
        for name, policy in policies.items():
            policy.restore(self._checked(name, self.snapshot(name, versions[name])))
        return policies

    @contextmanager
    def _sampling(
        self,
        shards: Shards,
        name: str,
        title: str,
        program: Program[Any],
        policies: Mapping[str, Policy],
        weigh: Weigh[Any],
        samples: int,
        sampling: Sampling,
        lengths: Mapping[str, float],
        further: Further | None = None,
    ) -> Iterator[Ongoing[SampleReport]]:
        """Make the shards that an earlier process has not completed, and show how far it has come."""
        shards.resume(self.config.rollout.max_failure_share)
        total, done = len(shards.tasks), len(shards.tasks) - len(shards.to_do())
        with self.display.progress(title, total, "questions", done=done) as advance:
            yield self.cluster.begin(
                program,
                shards,
                weigh,
                policies,
                samples=samples,
                sampling=sampling,
                name=name,
                lengths=lengths,
                further=further,
                on_progress=lambda done: advance.to(done, total),
            )

    def _newest_model(self, name: str) -> Snapshot:
        """The newest version of a policy whose model is there."""
        removed = self.files.removed_models().get(name, [])
        there = [version for version in self.files.versions(name) if version not in removed]
        return self._checked(name, self.snapshot(name, max(there, default=-1)))

    def _checked(self, name: str, snapshot: Snapshot) -> Snapshot:
        """A version whose model, if this run exported it, is as it was written. Each is read once.

        Raises:
            UserError: it is damaged, or was removed.
        """
        model = Path(snapshot.model)
        if snapshot.state is None or model in self._whole:
            return snapshot
        if snapshot.version in self.files.removed_models().get(name, []):
            raise UserError(
                f"version {snapshot.version} of {name} is needed, and its model {model} is not there any more: it was "
                "removed (storage.keep_last, storage.keep_best) or by hand. Copy it back, or start another run"
            )
        check_export(model)
        self._whole.add(model)
        return snapshot

    def _begin_scores(
        self,
        step: str,
        title: str,
        program: Program[Any],
        roles: Mapping[str, int],
        questions: Sequence[Question],
        answers: str,
        result: Callable[[Json], Json],
    ) -> Begun:
        """Greedy scores, of which `result` makes the step's. The trajectories stay, for whoever wants to read them."""
        parts, evaluation = self.at(f"{step}.parts"), self.config.evaluation
        # Parts of other versions, which an earlier process may have left, are none of these.
        versions = "-".join(
            f"{role}-{self.snapshot(role, version).version}" for role, version in roles.items()
        )
        shards = Shards(questions, parts / versions, {}, self.config.rollout.questions_per_shard)

        def work() -> AbstractContextManager[Ongoing[SampleReport]]:
            name, weigh = in_iteration(step)[1], NothingToTrainOn()
            return self._sampling(shards, name, title, program, self._at(roles), weigh, 1, GREEDY, {})

        def scores(report: SampleReport) -> tuple[Json, float]:
            trajectories = [episode.turn(answers) for episode in shards.episodes()]
            write_records(
                self.at(f"{step}.parquet"), scored_table(questions, trajectories, evaluation.protocol)
            )
            found = evaluate(
                questions, trajectories, evaluation.bootstrap_samples, self.config.seed, evaluation.protocol
            )
            return result(found), report.seconds

        def finish() -> Json:
            recorded = begun.finish()
            shutil.rmtree(parts, ignore_errors=True)
            return recorded

        begun = self.begin(step, work, scores)
        return Begun(finish, begun.cancel)


def _figures(report: SampleReport) -> tuple[Json, float]:
    """Of step "t/sample", and the seconds that it took."""
    counts = {"trajectories": report.trajectories, "generated_tokens": report.generated_tokens}
    engines = {name: use.figures() for name, use in report.engines.items()}
    return {**report.statistics, **counts, "engines": engines}, report.seconds
