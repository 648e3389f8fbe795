"""The cluster's verbs: sample and weight, evaluate greedily, retrieve, start the learner, push, serve from disk.
Recipes use nothing else.

Guarantees:

- The driver moves references and small summaries in an E-step and a push, never trajectories or weights.
- Every question of a `sample` is done exactly once. If a worker dies, what it had in hand is queued again; the worker
  is replaced, starts from the model now serving, and gets work only then.
- Every wait has a bound and says what it waited for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine import EngineOptions
from actors.learner_group import LearnerGroup
from actors.placement import Placement, plan_placement
from actors.retriever import ActorReplica, HttpReplica, RetrieverActor, client_of
from actors.rollout import RolloutActor, RolloutRequest, RolloutSummary
from actors.weight_transfer import EngineRef
from actors.weighting import WeightingActor
from pipeline.core.config import AgentConfig, Config
from pipeline.core.records import Question, Trajectory
from pipeline.core.retrieval import Searched
from pipeline.core.run import Json
from retriever_service.search.search import Hit

logger = logging.getLogger(__name__)

OnDone = Callable[[RolloutSummary], None]
Sink = Callable[[Any, Any], Awaitable[None]]
"""(reference to a question's trajectories, the worker that sampled them)."""

MAX_RETRIEVER_RESTARTS = 3
"""Times that Ray starts a dead retriever replica again; clients fail over or wait meanwhile."""

MIN_FOR_FAILURE_SHARE = 50
"""Trajectories from which on the share of infrastructure failures can end a phase before all are sampled."""


CPU_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""For actors that compute on CPUs. They share the cores, so a thread that waits must not spin. And by default glibc
gives each large tensor back to the kernel and faults it in again, which takes more time than the arithmetic of a small
model."""


class ClusterError(RuntimeError):
    """The cluster could not do what was asked: something died too often, or did not come up in time."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The model that the engines serve."""

    model: str
    version: int | None
    """None while the engines are asleep."""


class Cluster:
    """All actors of one run. Use as a context manager.

    Args:
        config: the run's configuration.
        searched: a built index, for retriever actors of the cluster's own; or servers, and there are no such actors.
        serving: the model and version that engines start with.
        learner: False if nothing will be trained: no place is kept for ranks.
    """

    def __init__(self, config: Config, searched: Searched, serving: Serving, *, learner: bool = True) -> None:
        self.config = config
        self.serving = serving
        self.placement = plan(config, learner=learner)
        self._runtime_env = {"env_vars": CPU_ENVIRONMENT} if self.placement.device == "cpu" else {}
        self._group = self._reserve()
        self._retrievers: list[Any] = []
        if isinstance(searched, Path):
            self._retrievers = [self._new_retriever(searched) for _ in range(config.retriever.replicas)]
            self.retriever = client_of([ActorReplica(actor) for actor in self._retrievers], config.retriever)
        else:
            self.retriever = client_of([HttpReplica(client) for client in searched.clients], config.retriever)
        self._workers = [self._new_worker(index) for index in range(config.rollout.workers)]
        self._weighting = WeightingActor.options(num_cpus=0).remote(config, serving.model)
        self.learner: LearnerGroup | None = None
        self._wait_until_up()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all actors and free their resources."""
        if self.learner is not None:
            self.learner.close()
        try:
            ray.get([worker.shutdown.remote() for worker in self._workers], timeout=30)
        except (RayActorError, GetTimeoutError) as error:
            logger.warning(f"an engine did not shut down by itself: {error}")
        for actor in [*self._workers, *self._retrievers, self._weighting]:
            ray.kill(actor)
        remove_placement_group(self._group)

    # ---------------------------------------------------------------- E-step

    def expectation(
        self, questions: Sequence[Question], rollouts: Path, weighted: Path, *, seed: int, on_done: OnDone
    ) -> Json:
        """Sample K trajectories per question, weight them, and write both as shards.

        Args:
            rollouts, weighted: empty directories on a file system that the weighting actor reaches.
            seed: of this iteration's E-step.

        Returns:
            the statistics of `Weighting.finish`, and generation counts.
        """
        rollout = self.config.rollout
        ray.get(self._weighting.begin.remote(list(questions), rollouts, weighted), timeout=60)
        requests = [
            RolloutRequest(
                question=question,
                agent=self.config.agent,
                samples=rollout.samples,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                seed=seed,
            )
            for question in questions
        ]

        async def weigh(group: Any, worker: Any) -> None:
            await self._weighting.add.remote(group, worker)

        summaries = asyncio.run(self._sample(requests, weigh, on_done))
        statistics: Json = ray.get(self._weighting.finish.remote(), timeout=300)
        return statistics | {
            "trajectories": sum(s.trajectories for s in summaries),
            "generated_tokens": sum(s.generated_tokens for s in summaries),
        }

    def greedy(self, questions: Sequence[Question], agent: AgentConfig, on_done: OnDone) -> list[Trajectory]:
        """One greedy trajectory per question, in the order of the questions.

        Args:
            agent: how to search; the baselines of an evaluation differ from the run here.
        """
        requests = [
            RolloutRequest(question, agent, samples=1, temperature=0.0, top_p=1.0, top_k=0, seed=0)
            for question in questions
        ]
        found: dict[str, Trajectory] = {}

        async def keep(group: Any, worker: Any) -> None:
            (trajectory,) = await group
            found[trajectory.question_id] = trajectory

        asyncio.run(self._sample(requests, keep, on_done))
        return [found[question.id] for question in questions]

    async def retrieve(self, query: str, k: int) -> Sequence[Hit]:
        """The k best passages for one query."""
        return await self.retriever.search(query, k)

    # ---------------------------------------------------------------- M-step

    def start_learner(self, state: Path | None) -> None:
        """Bring the learner's ranks up on the base model, then at the checkpoint `state` if there is one.

        A checkpoint of LoRA holds the adapters alone; on an exported model, which has them merged, they would count
        twice.
        """
        if self.learner is not None:
            self.learner.close()
        self.learner = LearnerGroup(
            self.config.learner,
            self.config.model.path,
            state=state,
            options=[self._learner_options(rank) for rank in range(self.config.learner.num_ranks)],
            seed=self.config.seed,
        )

    def rest(self) -> None:
        """Have the engines give their memory to the learner where they take turns; until a push or `serve`."""
        if self.placement.take_turns and self.serving.version is not None:
            seconds = self.config.cluster.push_timeout_s
            _get(
                [worker.sleep.remote(seconds) for worker in self._workers], seconds, "engines to fall asleep"
            )
            self.serving = Serving(self.serving.model, None)

    def push(self, model: Path, version: int) -> Json:
        """Learner -> engines. Afterwards every engine serves `version`, whose exported form is `model`."""
        assert self.learner is not None
        if self.placement.take_turns:
            self.learner.rest()
        engines = [
            EngineRef(worker, node, self.config.rollout.tensor_parallel_size)
            for worker, node in zip(self._workers, self._nodes, strict=True)
        ]
        report = self.learner.push(
            engines, self.placement.transport, version, deadline_s=self.config.cluster.push_timeout_s
        )
        self.serving = Serving(str(model), version)
        return report

    def serve(self, model: Path | str, version: int) -> None:
        """Let the engines load an exported model from disk, unless they serve that version already."""
        if self.serving.version == version:
            return
        seconds = self.config.cluster.start_timeout_s
        calls = [worker.reload.remote(str(model), version, seconds) for worker in self._workers]
        _get(calls, seconds, f"engines to load {model}")
        self.serving = Serving(str(model), version)

    # ---------------------------------------------------------------- inside

    async def _sample(
        self, requests: Sequence[RolloutRequest], sink: Sink, on_done: OnDone
    ) -> list[RolloutSummary]:
        """Serve all requests with all workers; `sink` gets each group before `on_done` hears of it."""
        queue, summaries = deque(requests), list[RolloutSummary]()
        self._restarts, self._replacing = 0, asyncio.Lock()

        async def slot(index: int) -> None:
            while queue:
                request, worker = queue.popleft(), self._workers[index]
                try:
                    summary = await _serve_one(request, worker, sink)
                except RayActorError as error:
                    queue.appendleft(request)
                    await self._replace_worker(index, worker, error)
                    continue
                summaries.append(summary)
                self._check_failures(summaries, at_least=MIN_FOR_FAILURE_SHARE)
                on_done(summary)

        samples = max((request.samples for request in requests), default=1)
        slots = math.ceil(self.config.rollout.concurrency / samples) + 1
        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(len(self._workers)):
                    for _ in range(slots):
                        tasks.create_task(slot(index))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        self._check_failures(summaries)
        return summaries

    def _check_failures(self, summaries: Sequence[RolloutSummary], at_least: int = 0) -> None:
        total = sum(s.trajectories for s in summaries)
        failed = sum(s.infrastructure_failures for s in summaries)
        allowed = self.config.retriever.max_failure_share
        if total >= at_least and failed > allowed * total:
            last = next(s.last_failure for s in reversed(summaries) if s.last_failure)
            raise ClusterError(
                f"{failed} of {total} trajectories failed for reasons outside of the model, more than "
                f"retriever.max_failure_share ({allowed:.0%}) allows; last: {last}"
            )

    def _reserve(self) -> PlacementGroup:
        bundles = self.placement.bundles
        group = placement_group(bundles, strategy="PACK" if self.placement.device == "gpu" else "SPREAD")
        if not group.wait(self.config.cluster.start_timeout_s):
            remove_placement_group(group)
            raise ClusterError(
                f"the cluster did not free {bundles} within {self.config.cluster.start_timeout_s:.0f} s "
                f"(cluster.start_timeout_s); it has {_amounts(ray.cluster_resources())} in all and "
                f"{_amounts(ray.available_resources())} free"
            )
        return group

    def _new_retriever(self, index_dir: Path) -> Any:
        retriever = self.config.retriever
        return RetrieverActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            num_gpus=retriever.gpus_per_replica,
            runtime_env=self._runtime_env,
            scheduling_strategy="SPREAD",
            max_restarts=MAX_RETRIEVER_RESTARTS,
        ).remote(
            str(index_dir),
            device=retriever.torch_device,
            max_batch=retriever.max_batch,
            search_parameters=retriever.search_parameters,
            num_threads=os.cpu_count() if retriever.torch_device == "cpu" else None,
        )

    def _new_worker(self, index: int) -> Any:
        rollout, placement = self.config.rollout, self.placement
        cpu = placement.device == "cpu"
        options = EngineOptions(
            model=self.serving.model,
            dtype=self.config.model.dtype,
            tensor_parallel_size=rollout.tensor_parallel_size,
            max_model_len=self.config.model.max_length,
            max_num_seqs=rollout.concurrency,
            gpu_memory_utilization=placement.gpu_memory_utilization,
            kv_cache_gib=rollout.kv_cache_gib,
            enforce_eager=rollout.enforce_eager or cpu,
            num_threads=self._threads_per_engine() if cpu else None,
            weight_transport=placement.transport,
            start_timeout_s=self.config.cluster.start_timeout_s,
            request_timeout_s=rollout.timeout_s,
            record_proposal=self.config.weighting.correct_proposal,
            sleeps=placement.take_turns,
        )
        return RolloutActor.options(
            **self._bundle(placement.engine_bundles[index], placement.engine_gpus), max_concurrency=10_000
        ).remote(options, self.retriever, concurrency=rollout.concurrency)

    def _threads_per_engine(self) -> int:
        """Cores of a node divided by the engines on it. Nodes are taken to be like the driver's."""
        nodes = sum(node["Alive"] for node in ray.nodes())
        return max(1, len(os.sched_getaffinity(0)) // math.ceil(self.config.rollout.workers / nodes))

    async def _replace_worker(self, index: int, dead: Any, error: RayError) -> None:
        """Put a new worker, which serves the current model, in the place of a dead one; once, whoever notices first."""
        async with self._replacing:
            while self._workers[index] is dead:
                self._restarts += 1
                if self._restarts > self.config.rollout.max_restarts:
                    raise ClusterError(
                        f"rollout workers died {self._restarts} times in one phase (rollout.max_restarts: "
                        f"{self.config.rollout.max_restarts}); last: {error}"
                    ) from error
                logger.warning(f"rollout worker {index} died and is replaced: {error}")
                ray.kill(dead)  # it may only be out of reach; its share of the bundle is needed
                worker = self._new_worker(index)
                try:
                    self._nodes[index] = await self._start_in_time(worker)
                    self._workers[index] = worker
                except RayActorError as again:
                    error = again

    async def _start_in_time(self, worker: Any) -> str:
        seconds = self.config.cluster.start_timeout_s
        try:
            return str(await asyncio.wait_for(worker.start.remote(self.serving.version), seconds))
        except TimeoutError as error:
            ray.kill(worker)
            raise ClusterError(
                f"waited {seconds:.0f} s for a new vLLM engine (cluster.start_timeout_s)"
            ) from error

    def _learner_options(self, rank: int) -> dict[str, Any]:
        return self._bundle(self.placement.rank_bundles[rank], self.placement.rank_gpus)

    def _bundle(self, index: int, gpus: float) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {
            "num_cpus": 0,
            "num_gpus": gpus,
            "scheduling_strategy": strategy,
            "runtime_env": self._runtime_env,
        }

    def _wait_until_up(self) -> None:
        seconds = self.config.cluster.start_timeout_s
        _get(
            [retriever.ready.remote() for retriever in self._retrievers],
            seconds,
            "retrievers to open their index",
        )
        starts = [worker.start.remote(self.serving.version) for worker in self._workers]
        self._nodes = _get(starts, seconds, "vLLM engines to start")


async def _serve_one(request: RolloutRequest, worker: Any, sink: Sink) -> RolloutSummary:
    """One request, sampled and in the sink.

    Raises:
        RayActorError: the worker died, before or under the sink.
        ClusterError: the sink's own actor died.
    """
    summary_ref, group_ref = worker.rollout.remote(request)
    summary: RolloutSummary = await summary_ref
    try:
        await sink(group_ref, worker)
    except RayTaskError as error:
        if isinstance(error.cause, RayActorError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise ClusterError(f"the weighting actor died: {error}") from error
    return summary


def _get(references: list[Any], timeout_s: float, what: str) -> list[Any]:
    try:
        return list(ray.get(references, timeout=timeout_s))
    except GetTimeoutError as error:
        raise ClusterError(
            f"waited {timeout_s:.0f} s for {what} (cluster.start_timeout_s); the cluster has "
            f"{_amounts(ray.available_resources())} free of {_amounts(ray.cluster_resources())}"
        ) from error


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one, for the duration; an open connection is left alone."""
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    # It announces Ray's new default, token authentication, at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        address=address,
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    try:
        yield
    finally:
        ray.shutdown()


def plan(config: Config, *, learner: bool = True) -> Placement:
    """The layout on the connected cluster, with the packages that are installed here; see `plan_placement`."""
    return plan_placement(config, ray.cluster_resources(), gpu_packages=_has_gpu_packages(), learner=learner)


def count_devices() -> int:
    """GPUs of the connected cluster if they can be used, else its CPUs."""
    resources = ray.cluster_resources()
    return (_has_gpu_packages() and int(resources.get("GPU", 0))) or int(resources.get("CPU", 0))


def _has_gpu_packages() -> bool:
    return torch.version.cuda is not None
