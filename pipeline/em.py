"""ExSearch: generalised EM for search agents. This file is the algorithm; everything else serves it.

    theta_0 <- warm-up of the base model on synthesised trajectories
    for t = 1 .. N:
        E-step   sample z_1..z_K ~ p(z | x; theta_{t-1}) for every training question x, with a real retriever;
                 w_k from log p(y | x, z_k; theta_{t-1})
        M-step   theta_t <- argmax sum_k w_k log p(z_k, y | x; theta), on the tokens that the model wrote
        push     theta_t -> the engines
        dev      greedy evaluation; stop early if it no longer improves
    test the best theta_t, beside the base model, the warm-up and the one-search baseline

Iteration 0 is the warm-up. Version -1 of the policy is the base model where there is a warm-up; version t is theta_t.
Every phase is skipped if the run directory says that it is finished (`pipeline.core.run`), so the same command resumes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from actors.cluster import Cluster, Serving, plan, ray_session
from actors.learner_group import LearnerGroup
from pipeline.core.agents.search import derive_seed
from pipeline.core.config import AgentConfig, Config
from pipeline.core.data.splits import Splits, load_splits
from pipeline.core.data.warmup_source import WarmUpSource, load_warm_up_source, warm_up_examples
from pipeline.core.display import Display
from pipeline.core.evaluation import evaluate
from pipeline.core.models import load_tokenizer
from pipeline.core.packing import num_targets
from pipeline.core.records import Question, examples_from_table, examples_to_table, trajectories_to_table
from pipeline.core.renderer import Renderer
from pipeline.core.report import best_iteration, build_report, scalars, should_stop
from pipeline.core.retrieval import Searched, Servers, await_servers, prepare_index
from pipeline.core.run import Json, RunDirectory, write_json, write_table
from pipeline.core.tracking import Tracker
from retriever_service.index.index import read_manifest

logger = logging.getLogger(__name__)


def train(config: Config, run_path: Path, display: Display) -> Json:
    """Run, or go on with, one training run.

    Returns:
        the report, as written to `report.json`.

    Raises:
        UserError: bad input, before anything expensive.
    """
    renderer = Renderer(load_tokenizer(config.model.path), config.agent)
    splits = load_splits(config)
    has_warm_up = config.warmup.questions or config.warmup.trajectories
    source = load_warm_up_source(config, splits.train, renderer) if has_warm_up else None
    servers = await_servers(config, display)
    with RunDirectory(run_path, config) as run, Tracker(run.path, config.tracking, run.path.name) as tracker:
        display.log_to(run.path / "run.log")
        with ray_session(config):
            plan(config)
            searched = servers or prepare_index(config, run.path / "index", display)
            run.keep_to(
                searched.fingerprint if isinstance(searched, Servers) else read_manifest(searched).fingerprint
            )
            em = ExpectationMaximisation(config, renderer, splits, source, run, searched, tracker, display)
            with em.start_cluster():
                return em.run_all()


class ExpectationMaximisation:
    """One run: the algorithm above, phase by phase."""

    def __init__(
        self,
        config: Config,
        renderer: Renderer,
        splits: Splits,
        warm_up_source: WarmUpSource | None,
        run: RunDirectory,
        searched: Searched,
        tracker: Tracker,
        display: Display,
    ) -> None:
        self.config = config
        self.renderer = renderer
        self.splits = splits
        self.warm_up_source = warm_up_source
        self.run = run
        self.searched = searched
        self.tracker = tracker
        self.display = display
        self.base_version = 0 if warm_up_source is None else -1
        self.learner_version: int | None = None

    def run_all(self) -> Json:
        if self.splits.test and self.base_version < 0:
            self.test("base", self.base_version)
        if self.warm_up_source is not None:
            self.warm_up(self.warm_up_source)
        self.dev(0)
        if self.splits.test:
            self.test("warm_up" if self.base_version < 0 else "base", 0)
            if self.config.evaluation.baselines:
                self.test("no_search", 0, think=False, search=False, record=False)
                self.test("one_search", 0, think=False)
        for t in range(1, self.config.em.iterations + 1):
            self.e_step(t)
            self.m_step(t)
            self.dev(t)
            self.run.close_iteration(t)
            self.report()
            if should_stop(self.run, t, self.config.em):
                logger.info(
                    f"stopped early: no better dev {self.config.em.select_by} for {self.config.em.patience}"
                )
                break
        if self.splits.test:
            self.test("best", best_iteration(self.run, self.config.em))
        return self.report()

    # ---------------------------------------------------------------- the phases

    def warm_up(self, source: WarmUpSource) -> None:
        """theta_0: supervised training on trajectories synthesised from gold supervision, all with weight 1."""

        def synthesise() -> Json:
            index = self.searched if isinstance(self.searched, Path) else self.run.path / "index"
            cache = Path(f"{index}.rewritten.jsonl")
            examples, statistics = asyncio.run(
                warm_up_examples(
                    self.config, source, self.renderer, self.cluster.retrieve, self.searched, cache
                )
            )
            directory = self.run.fresh(self.run.iteration(0) / "weighted")
            write_table(directory / "000000.parquet", examples_to_table(examples))
            return statistics

        self.phase(0, "expectation", synthesise)
        warmup = self.config.warmup
        self.m_step(0, learning_rate=warmup.learning_rate, epochs=warmup.epochs)

    def e_step(self, t: int) -> None:
        """Trajectories of theta_{t-1} and their weights."""

        def sample() -> Json:
            self.serve(t - 1)
            iteration = self.run.iteration(t)
            with self.display.progress(
                f"iteration {t}: E-step", len(self.splits.train), "questions"
            ) as advance:
                return self.cluster.expectation(
                    self.splits.train,
                    self.run.fresh(iteration / "rollouts"),
                    self.run.fresh(iteration / "weighted"),
                    seed=derive_seed(self.config.seed, "e-step", t),
                    on_done=lambda summary: advance(1),
                )

        self.phase(t, "expectation", sample)

    def m_step(self, t: int, learning_rate: float | None = None, epochs: int | None = None) -> None:
        """theta_t: weighted maximum likelihood on the E-step's shards, from theta_{t-1} on."""

        def maximise() -> Json:
            self.cluster.rest()
            learner = self.learner_at(t - 1)
            shards = sorted((self.run.iteration(t) / "weighted").glob("*.parquet"))
            if t > 0 and self.config.warmup.mix > 0:
                shards.append(self.mixed_in(t, shards))
            name = f"iteration {t}: M-step" if t else "warm-up"
            with self.display.progress(name, None, "steps") as advance:
                metrics = learner.train(
                    shards,
                    phase_seed=derive_seed(self.config.seed, "m-step", t),
                    learning_rate=learning_rate,
                    epochs=epochs,
                    on_progress=advance.to,
                )
            learner.save(self.run.learner(t))
            learner.export(self.run.model(t))
            self.learner_version = t
            for number, step in enumerate(metrics.pop("history"), start=1):
                self.tracker.log(step, iteration=t, phase="maximisation", step=number)
            return metrics

        self.phase(t, "maximisation", maximise)

    def mixed_in(self, t: int, shards: Sequence[Path]) -> Path:
        """A shard of warm-up examples beside the weighted ones, with their average weight per trained token."""
        weighted = [e for shard in shards for e in examples_from_table(pq.read_table(shard))]
        warm_up = examples_from_table(pq.read_table(self.run.iteration(0) / "weighted" / "000000.parquet"))
        tokens = sum(num_targets(e) for e in weighted)
        weight = sum(e.weight * num_targets(e) for e in weighted) / max(1, tokens)
        rng = random.Random(derive_seed(self.config.seed, "mix", t))
        chosen = rng.choices(warm_up, k=round(self.config.warmup.mix * len(weighted)))
        path = self.run.fresh(self.run.iteration(t) / "warm_up") / "000000.parquet"
        write_table(path, examples_to_table(replace(example, weight=weight) for example in chosen))
        return path

    def dev(self, t: int) -> None:
        """Push theta_t and evaluate it on the dev questions."""

        def measure() -> Json:
            push = self.serve(t)
            at = self.run.iteration(t) / "evaluation.parquet"
            scores = self.evaluate(self.splits.dev, self.config.agent, f"iteration {t}: dev", at)
            return {"push": push, "scores": scores}

        if self.splits.dev:
            self.phase(t, "evaluation", measure)

    def test(self, name: str, version: int, **switches: bool) -> None:
        """Evaluate one version on the test questions; `switches` turns it into a baseline."""

        def measure() -> Json:
            self.serve(version)
            agent = self.config.agent.model_copy(update=switches)
            at = self.run.path / "test" / f"{name}.parquet"
            return {"iteration": version} | self.evaluate(self.splits.test, agent, f"test: {name}", at)

        self.run.test(name, version, measure)
        self.report()

    # ---------------------------------------------------------------- what they stand on

    def phase(self, t: int, name: str, work: Callable[[], Json]) -> Json:
        """Run a phase unless it is finished, and record its figures once."""
        if (finished := self.run.finished(t, name)) is not None:
            return finished
        self.tracker.rollback(t, name)

        def logged() -> Json:
            logger.info(f"iteration {t}: {name} begins")
            result = work()
            logger.info(f"iteration {t}: {name}: {scalars(result)}")
            self.tracker.log(scalars(result), iteration=t, phase=name)
            return result

        return self.run.phase(t, name, logged)

    def policy(self, version: int) -> str:
        """The model directory of a version."""
        return self.config.model.path if version == self.base_version else str(self.run.model(version))

    def start_cluster(self) -> Cluster:
        """Engines start with the newest finished model, which spares a resumed run one load."""
        finished = [t for t in range(self.config.em.iterations + 1) if self.run.finished(t, "maximisation")]
        newest = max(finished, default=self.base_version)
        with self.display.status("starting the retriever and the vLLM engines"):
            self.cluster = Cluster(self.config, self.searched, Serving(self.policy(newest), newest))
        return self.cluster

    def learner_at(self, version: int) -> LearnerGroup:
        """The learner with the weights and the optimiser of a version."""
        if self.cluster.learner is None or self.learner_version != version:
            state = self.run.learner(version) if version != self.base_version else None
            with self.display.status("starting the learner"):
                self.cluster.start_learner(state)
            self.learner_version = version
        assert self.cluster.learner is not None
        return self.cluster.learner

    def serve(self, version: int) -> Json | None:
        """Bring a version to the engines: pushed by the learner if it holds it, else loaded from disk."""
        if self.cluster.serving.version == version:
            return None
        if self.learner_version == version and version != self.base_version:
            return self.cluster.push(self.run.model(version), version)
        self.cluster.serve(self.policy(version), version)
        return None

    def evaluate(
        self, questions: Sequence[Question], agent: AgentConfig, name: str, trajectories_at: Path
    ) -> Json:
        """Greedy scores; the trajectories are kept beside them for whoever wants to read them."""
        with self.display.progress(name, len(questions), "questions") as advance:
            trajectories = self.cluster.greedy(questions, agent, on_done=lambda summary: advance(1))
        write_table(trajectories_at, trajectories_to_table(trajectories))
        return evaluate(questions, trajectories, self.config.evaluation.bootstrap_samples, self.config.seed)

    def report(self) -> Json:
        report = build_report(self.run, self.config)
        write_json(self.run.path / "report.json", report)
        return report
