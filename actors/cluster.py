"""The cluster's verbs: policies that sample, score, train and push, and a retriever that can be re-indexed.

Recipes and commands use nothing else, and nobody else builds engines.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.background import Background, Ongoing
from actors.engine_use import EngineUse
from actors.memory import Memory
from actors.observer import Observer
from actors.policy import Policy, Turns
from actors.pool import EnginePool, engine_options, engines_per_node
from actors.reservation import reserve
from actors.retrievers import Retrievers
from actors.sampling import OnProgress, Phase, Work, run_phase
from actors.session import actor_environment
from actors.weighting import ShardSink
from pipeline.core.agents.program import GREEDY, Further, Program, Sampling, Task
from pipeline.core.config import ClusterConfig, RetrieverConfig
from pipeline.core.order import TIMES_IN_FLIGHT, longest_first
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import Episode
from pipeline.core.retrieval import Searched
from pipeline.core.shards import Counts, Shards
from pipeline.core.weighing import Weigh
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.hits import Hit

logger = logging.getLogger(__name__)

STORE_SHARE = 0.5
"""Of Ray's object stores, for episodes that have not been weighed. What does not fit there is spilled to disk."""

Status = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What came of a phase of sampling.

    Attributes:
        seconds: from its beginning to its end, in this process.
        statistics: what the recipe's `Weigh` says of it.
        engines: what those of each policy did meanwhile, of the workers that are there at the end: also for phases that
            overlapped, and not what was done before this process began.
    """

    trajectories: int
    generated_tokens: int
    seconds: float
    statistics: Mapping[str, Any]
    engines: Mapping[str, EngineUse] = field(default_factory=dict)


class Cluster:
    """All actors of one run. Use as a context manager.

    Args:
        policies: the models of the run.
        cluster, retriever: sections of the configuration.
        searched: a built index, for retriever actors of the cluster's own; or servers, and there are no such actors.
        serving: the versions that policies start as; those that are not named start as version 0, their own model.
        status: shows a person what is being waited for.
        observer: of the run that this is for.
    """

    def __init__(
        self,
        policies: Sequence[PolicySpec],
        cluster: ClusterConfig,
        retriever: RetrieverConfig,
        searched: Searched,
        *,
        serving: Mapping[str, Snapshot] | None = None,
        status: Status = lambda text: nullcontext(),
        observer: Observer | None = None,
    ) -> None:
        self.config, self._observer = cluster, observer or Observer()
        policies, self.placement, self._group = reserve(policies, cluster, retriever)
        self._runtime_env = {"env_vars": actor_environment(on_gpu=self.placement.device == "gpu")}
        self._retrievers = Retrievers(
            retriever,
            searched,
            runtime_env={"env_vars": actor_environment(on_gpu=retriever.torch_device == "cuda")},
            start_timeout_s=cluster.start_timeout_s,
            engines=sum(engines_per_node(s.rollout.workers) for s in policies if s.rollout is not None)
            if self.placement.device == "cpu"
            else 0,
            observer=self._observer,
        )
        turns = Turns(take_turns=self.placement.take_turns, park_on_disk=cluster.park_learners == "disk")
        start = {spec.name: Snapshot(0, spec.model.path) for spec in policies} | dict(serving or {})
        self._policies = {
            spec.name: self._new_policy(spec, start[spec.name], turns, status) for spec in policies
        }
        self._background = Background()
        self._sink_numbers = itertools.count()
        self._idle_sinks = [self._new_sink()]
        self._memories: dict[str, Memory] = {}
        """By policy, the room for what its engines have sampled, which all phases share."""
        self._start_engines()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what still goes on and all actors, and free their resources."""
        self._background.close()
        for policy in self._policies.values():
            policy.close()
        self._retrievers.close()
        for sink in self._idle_sinks:
            sink.close()
        remove_placement_group(self._group)
        self._observer.close()

    def policy(self, name: str) -> Policy:
        """One of the policies."""
        return self._policies[name]

    # ---------------------------------------------------------------- sampling

    def begin(
        self,
        program: Program[Any],
        shards: Shards,
        weigh: Weigh[Any],
        roles: Mapping[str, Policy],
        *,
        samples: int,
        sampling: Sampling,
        name: str = "",
        lengths: Mapping[str, float] = MappingProxyType({}),
        further: Further | None = None,
        on_progress: OnProgress = lambda done: None,
    ) -> Ongoing[SampleReport]:
        """Run `program` `samples` times on every task whose shard is not complete; make the missing shards.

        It goes on while the caller does something else. Phases may overlap where the same versions play their roles;
        their tasks then share the engines.

        Args:
            shards: the tasks and where they go, on a file system that the weighting actor reaches; after `resume`.
            weigh: makes the examples.
            roles: who plays each role of the program, at its current version. The program runs beside the first.
            sampling: its seed is that of the run and the phase.
            name: of the phase, for metrics.
            lengths: about how long tasks take, by their ids, in any unit; in what order they begin depends on it.
            further: how many more episodes of a task, given those.
            on_progress: called from another thread.

        Returns:
            what gives the report of all shards, those that were complete included. It raises `ClusterError` where
            workers or a weighting actor died too often, or too many episodes failed; `RuntimeError` where nothing can
            be trained on (see `weigh`).

        Raises:
            ClusterError: engines cannot be brought to a current version.
        """
        pools = self._serving(roles)
        home = next(iter(pools.values()))
        phase = Phase(program, samples, sampling, home.rollout.max_failure_share, name, further)
        at_once = TIMES_IN_FLIGHT * home.in_flight // phase.most_samples
        to_do = longest_first(shards.to_do(), lengths, at_once)
        work = Work(to_do, done=len(shards.tasks) - len(to_do), counts=shards.counts())
        rollout, memory = home.rollout, self._memory_of(home)
        before, began = _uses(pools), time.perf_counter()

        async def whole_phase() -> SampleReport:
            with self._a_sink() as sink:
                async with (
                    self._retrievers.at_work(),
                    sink.at_work(shards, weigh, work, max_restarts=rollout.max_restarts),
                ):
                    await run_phase(phase, work, pools, sink, on_progress, memory)
                    statistics = await sink.finish()
            seconds = time.perf_counter() - began
            engines = await asyncio.to_thread(_used_since, before, pools)
            return SampleReport(
                work.counts.episodes, work.counts.generated_tokens, seconds, statistics, engines
            )

        return self._background.begin(whole_phase())

    def greedy(
        self,
        program: Program[Any],
        tasks: Sequence[Task],
        roles: Mapping[str, Policy],
        on_progress: OnProgress = lambda done: None,
    ) -> list[Episode]:
        """One greedy episode per task, in the order of the tasks."""
        found: dict[str, Episode] = {}

        async def keep(task: Task, counts: Counts, episodes: Any) -> None:
            (found[task.id],) = await episodes

        pools = self._serving(roles)
        phase = Phase(program, 1, GREEDY, next(iter(pools.values())).rollout.max_failure_share)

        async def whole_phase() -> None:
            async with self._retrievers.at_work():
                await run_phase(phase, Work(tasks), pools, keep, on_progress)

        self._background.begin(whole_phase()).result()
        return [found[task.id] for task in tasks]

    def _memory_of(self, pool: EnginePool) -> Memory:
        memory = self._memories.setdefault(pool.name, Memory(0.0, pool.options.max_model_len))
        memory.limit = STORE_SHARE * pool.store_bytes()
        return memory

    @contextmanager
    def _a_sink(self) -> Iterator[ShardSink]:
        """One that no other phase uses."""
        sink = self._idle_sinks.pop() if self._idle_sinks else self._new_sink()
        try:
            yield sink
        finally:
            self._idle_sinks.append(sink)

    def _new_sink(self) -> ShardSink:
        return ShardSink(self.config, self._observer, number=next(self._sink_numbers))

    @staticmethod
    def _serving(roles: Mapping[str, Policy]) -> dict[str, EnginePool]:
        """The engines of each role, which serve its policy's current version."""
        pools: dict[str, EnginePool] = {}
        for role, policy in roles.items():
            policy.push()
            assert policy.pool is not None  # push would have failed
            pools[role] = policy.pool
        return pools

    # ---------------------------------------------------------------- retrieval

    async def retrieve(self, query: str, k: int) -> Sequence[Hit]:
        """The k best passages for one query."""
        return await self._retrievers.client.search(query, k)

    def reindex(
        self,
        encoder: EncoderSpec,
        corpus: Sequence[str],
        at: Path,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Search with another encoder, such as one that was just trained, from now on; see `Retrievers.reindex`."""
        self._retrievers.reindex(encoder, corpus, at, on_progress)
        for policy in self._policies.values():
            if policy.pool is not None:
                policy.pool.search_with(self._retrievers.client)

    # ---------------------------------------------------------------- starting

    def _new_policy(self, spec: PolicySpec, start: Snapshot, turns: Turns, status: Status) -> Policy:
        placement, pool = self.placement.policies[spec.name], None
        if spec.rollout is not None:
            options = engine_options(
                spec,
                placement,
                self.config,
                on_cpu=self.placement.device == "cpu",
                engines_per_node=engines_per_node(spec.rollout.workers),
                sleeps=self.placement.take_turns,
            )
            pool = EnginePool(
                spec.name,
                options,
                spec.rollout,
                self.config,
                placement,
                self._room,
                self._retrievers.client,
                self._observer,
            )
        return Policy(
            spec,
            start,
            pool,
            placement=placement,
            rank_options=[self._room(b, placement.rank_gpus) for b in placement.rank_bundles],
            turns=turns,
            push_timeout_s=self.config.push_timeout_s,
            status=status,
            observer=self._observer,
        )

    def _start_engines(self) -> None:
        """The retrievers beside the first policy's engines; policies one after the other, since they may share GPUs."""
        for policy in self._policies.values():
            if policy.pool is not None:
                policy.pool.start(policy.current)
        self._retrievers.wait()

    def _room(self, bundle: int | None, gpus: float) -> dict[str, Any]:
        """Ray options of an actor in a bundle, or of one that is in none."""
        options = {"num_gpus": gpus, "runtime_env": self._runtime_env}
        if bundle is None:
            return options | {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return options | {"num_cpus": 0, "scheduling_strategy": strategy}


def _uses(pools: Mapping[str, EnginePool]) -> dict[str, dict[Any, EngineUse]]:
    """By policy, what each worker's engine did so far."""
    return {pool.name: pool.uses() for pool in pools.values()}


def _used_since(
    before: Mapping[str, Mapping[Any, EngineUse]], pools: Mapping[str, EnginePool]
) -> dict[str, EngineUse]:
    """By policy, what its engines did since. Says so where they had to do things twice."""
    used = {}
    for name, uses in _uses(pools).items():
        since = [use - before[name].get(worker, EngineUse()) for worker, use in uses.items()]
        used[name] = sum(since, EngineUse())
        if used[name].preemptions:
            logger.warning(
                f"{used[name].preemptions} requests to the engines of {name} were thrown out of a full KV cache and "
                "computed again: lower rollout.concurrency, or leave it out"
            )
    return used
