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

from actors.cluster import Cluster, plan
from actors.session import ray_session
from actors.weighting import Destination
from pipeline.core.agents.program import Sampling, derive_seed
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import AgentConfig, Config
from pipeline.core.data.splits import Splits, load_splits
from pipeline.core.data.warmup_source import WarmUpSource, load_warm_up_source, warm_up_examples
from pipeline.core.display import Display
from pipeline.core.evaluation import evaluate
from pipeline.core.models import load_tokenizer
from pipeline.core.packing import num_targets
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import Question, examples_from_table, examples_to_table, trajectories_to_table
from pipeline.core.renderer import Renderer
from pipeline.core.report import best_iteration, build_report, scalars, should_stop
from pipeline.core.retrieval import Searched, Servers, await_servers, prepare_index
from pipeline.core.run import Json, RunDirectory, write_json, write_table
from pipeline.core.tracking import Tracker
from pipeline.core.weighing import SearchWeights
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
        with ray_session(config.cluster):
            plan([searcher_of(config)], config.cluster, config.retriever)
            searched = servers or prepare_index(config, run.path / "index", display)
            run.keep_to(
                searched.fingerprint if isinstance(searched, Servers) else read_manifest(searched).fingerprint
            )
            em = ExpectationMaximisation(config, renderer, splits, source, run, searched, tracker, display)
            with em.start_cluster():
                return em.run_all()


def searcher_of(config: Config) -> PolicySpec:
    """The one policy of ExSearch."""
    return PolicySpec(
        SEARCHER,
        config.model,
        config.rollout,
        config.learner,
        records_proposal=config.weighting.correct_proposal,
        seed=config.seed,
    )


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
            config, iteration = self.config, self.run.iteration(t)
            self.searcher.restore(self.snapshot(t - 1))
            with self.display.progress(
                f"iteration {t}: E-step", len(self.splits.train), "questions"
            ) as advance:
                report = self.cluster.sample(
                    SearchProgram(config.agent, score_answers=True),
                    self.splits.train,
                    {SEARCHER: self.searcher},
                    samples=config.rollout.samples,
                    sampling=Sampling(
                        config.rollout.temperature,
                        config.rollout.top_p,
                        config.rollout.top_k,
                        seed=derive_seed(config.seed, "e-step", t),
                    ),
                    into=Destination(
                        rollouts=self.run.fresh(iteration / "rollouts"),
                        examples={SEARCHER: self.run.fresh(iteration / "weighted")},
                        tasks_per_shard=config.em.questions_per_shard,
                        weigh=SearchWeights(config.weighting, config.agent, config.model.path),
                    ),
                    on_done=lambda summary: advance(1),
                )
            counts = {"trajectories": report.trajectories, "generated_tokens": report.generated_tokens}
            return {**report.statistics, **counts}

        self.phase(t, "expectation", sample)

    def m_step(self, t: int, learning_rate: float | None = None, epochs: int | None = None) -> None:
        """theta_t: weighted maximum likelihood on the E-step's shards, from theta_{t-1} on."""

        def maximise() -> Json:
            self.searcher.restore(self.snapshot(t - 1))
            shards = sorted((self.run.iteration(t) / "weighted").glob("*.parquet"))
            if t > 0 and self.config.warmup.mix > 0:
                shards.append(self.mixed_in(t, shards))
            name = f"iteration {t}: M-step" if t else "warm-up"
            with self.display.progress(name, None, "steps") as advance:
                metrics = self.searcher.train(
                    shards,
                    seed=derive_seed(self.config.seed, "m-step", t),
                    learning_rate=learning_rate,
                    epochs=epochs,
                    on_progress=advance.to,
                )
            self.searcher.save(t, state=self.run.learner(t), model=self.run.model(t))
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
            self.searcher.restore(self.snapshot(t))
            push = self.searcher.push()
            at = self.run.iteration(t) / "evaluation.parquet"
            scores = self.evaluate(self.splits.dev, self.config.agent, f"iteration {t}: dev", at)
            return {"push": push, "scores": scores}

        if self.splits.dev:
            self.phase(t, "evaluation", measure)

    def test(self, name: str, version: int, **switches: bool) -> None:
        """Evaluate one version on the test questions; `switches` turns it into a baseline."""

        def measure() -> Json:
            self.searcher.restore(self.snapshot(version))
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

    def snapshot(self, version: int) -> Snapshot:
        """A version of the searcher on disk."""
        if version == self.base_version:
            return Snapshot(version, self.config.model.path)
        return Snapshot(version, str(self.run.model(version)), self.run.learner(version))

    def start_cluster(self) -> Cluster:
        """Engines start with the newest finished model, which spares a resumed run one load."""
        finished = [t for t in range(self.config.em.iterations + 1) if self.run.finished(t, "maximisation")]
        newest = self.snapshot(max(finished, default=self.base_version))
        config = self.config
        with self.display.status("starting the retriever and the vLLM engines"):
            self.cluster = Cluster(
                [searcher_of(config)],
                config.cluster,
                config.retriever,
                self.searched,
                serving={SEARCHER: newest},
                status=self.display.status,
            )
        self.searcher = self.cluster.policy(SEARCHER)
        return self.cluster

    def evaluate(
        self, questions: Sequence[Question], agent: AgentConfig, name: str, trajectories_at: Path
    ) -> Json:
        """Greedy scores; the trajectories are kept beside them for whoever wants to read them."""
        with self.display.progress(name, len(questions), "questions") as advance:
            episodes = self.cluster.greedy(
                SearchProgram(agent), questions, {SEARCHER: self.searcher}, on_done=lambda summary: advance(1)
            )
        trajectories = [episode.turn(SEARCHER) for episode in episodes]
        write_table(trajectories_at, trajectories_to_table(trajectories))
        return evaluate(questions, trajectories, self.config.evaluation.bootstrap_samples, self.config.seed)

    def report(self) -> Json:
        report = build_report(self.run, self.config)
        write_json(self.run.path / "report.json", report)
        return report
