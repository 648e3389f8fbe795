"""The phases of ExSearch, in the order of a run: how often each happens, its tokens and its time."""

from __future__ import annotations

from dataclasses import replace

from pipeline.core.config import Config
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.machine import Node
from pipeline.core.plan.memory import number_format
from pipeline.core.plan.needs import Layout, PolicyNeeds
from pipeline.core.plan.work import GIGA, PhaseWork, Trajectory, sampling_seconds, training_seconds


def phases_of(
    config: Config,
    searcher: PolicyNeeds,
    layout: Layout,
    node: Node,
    assumed: Assumptions,
    one: Trajectory,
) -> tuple[PhaseWork, ...]:
    """Cold start, and E-step, M-step, push and dev of every iteration, and the tests.

    The longest part of each is counted: sampling and training, no start, no encoding, no checkpoint. Where engines
    share devices with ranks, each has all of its own; cores are divided among the processes of a node. With
    `em.asynchronous` every E-step but the first goes on beside an M-step.
    """
    assert searcher.engine is not None and searcher.rank is not None
    iterations, learner, rollout = config.em.iterations, config.learner, config.rollout

    def sampled(name: str, trajectories: int, times: int) -> PhaseWork:
        assert searcher.engine is not None
        seconds = sampling_seconds(
            searcher.shape,
            one,
            assumed,
            trajectories=trajectories,
            engines=searcher.engines,
            devices=_devices(layout, node, searcher.engines, searcher.tensor_parallel),
            concurrency=searcher.concurrency,
            dtype=number_format(rollout.dtype, layout.device),
            token_bytes=searcher.engine.cache.token_bytes // searcher.tensor_parallel,
        )
        return PhaseWork(name, trajectories * one.total, seconds, times)

    def trained(name: str, trajectories: float, epochs: int, times: int) -> PhaseWork:
        tokens = trajectories * one.total * epochs
        seconds = training_seconds(
            searcher.shape,
            tokens,
            assumed,
            devices=searcher.ranks * _devices(layout, node, searcher.ranks, 1),
            checkpointing=learner.gradient_checkpointing,
            adapters_only=learner.lora is not None,
        )
        return PhaseWork(name, tokens, seconds, times, trains=True)

    train, dev, test = (
        count or 0 for count in (assumed.questions, assumed.dev_questions, assumed.test_questions)
    )
    samples = train * config.most_samples
    cold = config.cold_start
    starts_cold = cold.questions > 0 or cold.trajectories is not None
    tests = 2 + 2 * config.evaluation.baselines + starts_cold if test else 0
    assert assumed.push_gb_s is not None
    e_step = sampled("E-step", samples, iterations)
    m_step = trained("M-step", samples * (1 + cold.mix), learner.epochs, iterations)
    if config.em.asynchronous and layout.device == "gpu" and not layout.shared:
        hidden = min(e_step.seconds, m_step.seconds) * max(0, iterations - 1)
        e_step = replace(e_step, hidden_seconds=hidden)
    return tuple(
        phase
        for phase in (
            trained("cold start", cold.questions, cold.epochs, int(starts_cold)),
            e_step,
            m_step,
            PhaseWork("push", 0, searcher.push_bytes / (assumed.push_gb_s * GIGA), iterations),
            sampled("dev", dev, iterations + 1),
            sampled("dev bound", dev * config.em.dev_samples, iterations + 1),
            sampled("test", test, tests),
        )
        if phase.times and phase.seconds
    )


def _devices(layout: Layout, node: Node, tenants: int, gpus: int) -> int:
    """GPUs of each engine or rank; or its cores."""
    if layout.device == "gpu":
        return gpus
    return max(1, node.cpus * len(layout.nodes) // max(1, tenants))
