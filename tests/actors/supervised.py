"""A policy with real engines and a learner's pushes, which tests disturb."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import ray

from actors.engine_options import EngineOptions
from actors.placement import PolicyPlacement
from actors.policy import Policy, Turns
from actors.pool import EnginePool
from actors.sampling import Phase, Work, run_phase
from actors.weight_bucket import Bucket
from actors.weight_transfer import EngineRef, PushReport, RayEngines, SharedMemorySender
from pipeline.core.agents.program import Model, Retrieve, Sampling, Task
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import ClusterConfig, ModelConfig, RolloutConfig
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import Episode, Question, ScoreRequest, StopReason
from pipeline.core.shards import Counts
from tests.actors.support import HfModel

TASKS = [Question(f"q{number}", "Who?", ("Ada",)) for number in range(60)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=100, seed=3, stop=())
HEARTBEAT_S = 6.0


class Talk:
    """One turn of the model."""

    async def __call__(
        self,
        task: Question,
        roles: Mapping[str, Model],
        retrieve: Retrieve,
        *,
        sampling: Sampling,
        sample: int,
    ) -> Episode:
        model, transcript = roles["talker"], Transcript()
        transcript.append_model(await model.generate(list(range(260, 290)), sampling))
        turn = transcript.trajectory(
            question_id=task.id,
            sample=sample,
            role="talker",
            policy_version=model.version,
            stop_reason=StopReason.ANSWERED,
        )
        return Episode(task.id, sample, (turn,))


class Learner:
    """The part of a learner group that pushes."""

    def __init__(self, buckets: Callable[[], Iterator[Bucket]]) -> None:
        self.buckets = buckets

    def push(
        self, engines: Sequence[EngineRef], transport: str, version: int, *, deadline_s: float
    ) -> PushReport | None:
        node = ray.get_runtime_context().get_node_id()
        receivers = RayEngines(engines, node, may_miss=True)
        return SharedMemorySender(receivers, self.buckets, deadline_s=deadline_s).push(version)


class Supervised:
    """A policy with engines and a learner, whose model directory can be away when a worker starts.

    Args:
        cpus: of each engine, as Ray counts them.
        rollout: as in the configuration.
    """

    def __init__(self, model: Path, *, cpus: int = 0, **rollout: Any) -> None:
        self.model, self.cpus = model, cpus
        self.starts_without_model = 0
        self.rollout = RolloutConfig(**{"workers": 2, "concurrency": 4, "max_restarts": 3, **rollout})
        options = EngineOptions(
            str(model), "float32", 1, 512, kv_cache_gib=0.25, enforce_eager=True, num_threads=1
        )
        bundles = list(range(self.rollout.workers))
        placement = PolicyPlacement("shared_memory", bundles, [], 0.0, 0.0, 0.0)
        cluster = ClusterConfig(heartbeat_timeout_s=HEARTBEAT_S, start_timeout_s=900)
        retriever: Any = SimpleNamespace(search=None)
        self.pool = EnginePool("a", options, self.rollout, cluster, placement, self._options, retriever)
        self.policy = Policy(
            PolicySpec("a", ModelConfig(path=str(model)), self.rollout, None),
            Snapshot(0, str(model)),
            self.pool,
            placement=placement,
            rank_options=[],
            turns=Turns(take_turns=False, park_on_disk=False),
            push_timeout_s=60.0,
        )

    def _options(self, bundle: int | None, gpus: float) -> dict[str, Any]:
        """Called for each worker that is about to start."""
        hidden = self.model.with_suffix(".hidden")
        if self.starts_without_model:
            self.starts_without_model -= 1
            self.model.rename(hidden)
        elif hidden.exists():
            hidden.rename(self.model)
        return {"num_cpus": self.cpus}

    def become(self, version: int, model: HfModel, buckets: Callable[[], Iterator[Bucket]]) -> None:
        """The policy is that version: on disk as `model`, in a learner as `buckets`."""
        path = self.model.with_name(f"version-{version}")
        model.model.save_pretrained(path)
        model.tokenizer.save_pretrained(path)
        self.policy.restore(Snapshot(version, str(path)))
        learner: Any = Learner(buckets)
        self.policy._learner, self.policy._learner_holds = learner, version

    def sample(self, disturb: Callable[[], object] = lambda: None) -> dict[str, list[list[int]]]:
        """Token ids of each task's samples; `disturb` happens when some tasks are done."""
        found: dict[str, list[list[int]]] = {}
        work = Work(TASKS)

        async def keep(task: Task, counts: Counts, reference: Any) -> None:
            episodes = await reference
            assert task.id not in found, "a task was counted twice"
            found[task.id] = [e.turns[0].token_ids.tolist() for e in episodes]

        def on_progress(done: int) -> None:
            if done == 5:
                disturb()

        phase = Phase(Talk(), 2, SAMPLING, max_failure_share=0.0)
        asyncio.run(run_phase(phase, work, {"talker": self.pool}, keep, on_progress))
        assert work.done == len(TASKS)
        return found

    def mend(self) -> None:
        """Work on until all workers are there."""

        async def wait() -> None:
            async with self.pool.at_work():
                while len(self.pool.receivers()) < self.rollout.most_workers:
                    await asyncio.sleep(0.1)

        asyncio.run(wait())

    def workers(self) -> list[psutil.Process]:
        """Their processes, the oldest first."""
        ours = psutil.Process().children(recursive=True)
        return sorted((p for p in ours if "RolloutWorker" in p.name()), key=psutil.Process.create_time)


def assert_end(processes: list[psutil.Process]) -> None:
    """All of them, also the stopped ones; a zombie has given its memory back."""
    deadline = time.monotonic() + 60
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.1)


def engine_of(worker: psutil.Process) -> psutil.Process:
    return next(p for p in worker.children() if "EngineCor" in p.name())


def assert_serves(supervised: Supervised, model: HfModel, workers: int) -> None:
    """So many engines compute what transformers computes."""
    assert len(supervised.pool.receivers()) == workers
    ids = list(range(260, 290)) * 5
    expected = model.logprobs(ids)
    for logprobs in supervised.policy.score([ScoreRequest.of(ids, 1)] * 64 * workers):
        np.testing.assert_allclose(logprobs, expected, atol=5e-3)
