"""What a plan refuses, and what it warns of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.config import AgentConfig, StorageConfig
from pipeline.core.errors import UserError
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.disk import disk_needs
from pipeline.core.plan.engine import EngineNeeds
from pipeline.core.plan.kv_cache import KvCache
from pipeline.core.plan.machine import Node
from pipeline.core.plan.memory import GIB, Memory, memory
from pipeline.core.plan.needs import Layout, PolicyNeeds, Tenant
from pipeline.core.plan.run_plan import RunPlan
from pipeline.core.plan.work import PhaseWork, Trajectory
from tests.pipeline.core.plan.shapes import QWEN_SHAPE

TENANTS = (Tenant("searcher", "engine", 0), Tenant("searcher", "rank", 0))


def holding(gpu: float, host: float = 1) -> Memory:
    return memory([("weights", gpu * GIB, "gpu"), ("libraries", host * GIB, "host")])


def policy(engine: Memory, rank: Memory, tokens: int = 10**6, room: int = GIB) -> PolicyNeeds:
    return PolicyNeeds(
        name="searcher",
        model="some/model",
        shape=QWEN_SHAPE,
        engines=1,
        engine=EngineNeeds(engine, KvCache(room, 57_344, GIB, tokens)),
        tensor_parallel=1,
        concurrency=100,
        ranks=1,
        rank=rank,
        resting_bytes=4 * GIB,
        push_bytes=15 * GIB,
        transport="ipc",
    )


def plan(
    needs: PolicyNeeds, *, shared: bool = True, turns: bool = True, device: Any = "gpu", **node: int
) -> RunPlan:
    machine = Node(cpus=8, gpus=1, gpu_memory=node.get("gpu", 80) * GIB, memory=node.get("host", 64) * GIB)
    if "free" in node:
        machine = replace(machine, free_memory=node["free"] * GIB)
    return RunPlan(
        nodes=(machine,),
        layout=Layout(device, shared, turns, (TENANTS,)),
        policies=(needs,),
        retrievers=1,
        trajectory=Trajectory(total=4_000, written=500),
        disk=disk_needs([(10**9, 10**9, "bfloat16")], StorageConfig(), versions=3, tokens=10**6),
        phases=(PhaseWork("E-step", 1e9, 100), PhaseWork("M-step", 1e9, 900, trains=True)),
        iterations=1,
        assumptions=Assumptions().settled(AgentConfig(), device),
    )


def test_engine_and_rank_that_take_turns_fit_one_after_the_other() -> None:
    made = plan(policy(holding(60), holding(70)))

    assert made.refusals() == []
    # The learner's weights beside the engine; what CUDA keeps of the engine beside the learner.
    assert [(use.what, use.bytes // GIB) for use in made.gpus()] == [
        ("GPU while engines sample", 64),
        ("GPU while searcher is trained", 72),
    ]


def test_without_turns_they_must_fit_together() -> None:
    made = plan(policy(holding(60), holding(70)), turns=False)

    with pytest.raises(
        UserError, match=r"GPU that engines and learner share: 130.0 GiB of 80.0 GiB \(weights 70"
    ):
        made.check()


def test_apart_each_has_a_gpu_of_its_own() -> None:
    made = plan(policy(holding(60), holding(90)), shared=False, turns=False)

    (refusal,) = made.refusals()
    assert refusal.startswith(
        "GPU of a learner rank: 90.0 GiB of 80.0 GiB (weights 90.0 GiB); lower learner.tokens"
    )


def test_a_host_that_is_too_small_is_refused_with_who_needs_most() -> None:
    made = plan(policy(holding(60, host=20), holding(70, host=40)), host=32)

    with pytest.raises(
        UserError, match=r"host 0: 61.8 GiB of memory are needed, it has 32.0 GiB \(1 x rank of search"
    ):
        made.check()


def test_on_cpus_that_take_turns_a_host_holds_one_after_the_other() -> None:
    engine = memory([("KV cache", 20 * GIB, "host"), ("libraries", 2 * GIB, "host")])
    rank = memory([("Adam", 4 * GIB, "host"), ("activations", 30 * GIB, "host"), ("libraries", GIB, "host")])
    needs = policy(engine, rank)

    def held(**options: Any) -> dict[str, int]:
        (use,) = plan(needs, device="cpu", **options).hosts()
        return {name: size // GIB for name, size in use.parts[:2]}

    assert held(turns=False) == {"1 x engine of searcher": 22, "1 x rank of searcher": 35}
    # Training needs more than sampling does: the engine keeps its libraries.
    assert held(turns=True) == {"1 x engine of searcher": 2, "1 x rank of searcher": 35}
    needs = policy(engine, rank.only("Adam", "libraries"))
    assert held(turns=True) == {"1 x engine of searcher": 22, "1 x rank of searcher": 5}


def test_a_host_of_unknown_size_is_not_judged() -> None:
    assert plan(policy(holding(60, host=20), holding(70, host=40)), host=0).refusals() == []


def test_a_host_that_will_be_nearly_full_is_warned_of() -> None:
    made = plan(policy(holding(1, host=20), holding(1, host=40)), host=63)

    assert made.refusals() == []
    assert "host 0: 61.8 GiB of 63.0 GiB of memory will be used" in made.warnings()[0]


def test_less_free_memory_than_the_run_takes_is_warned_of() -> None:
    needs = policy(holding(1, host=20), holding(1, host=30))
    made = plan(needs, host=64, free=50)

    assert made.refusals() == []
    assert (
        "host 0: 51.8 GiB of memory will be used, and 50.0 GiB of 64.0 GiB are free now" in made.warnings()[0]
    )
    assert plan(needs, host=64, free=52).warnings() == []


def test_a_cache_without_room_for_one_request_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 100 MiB for keys and values, and one request .* takes 1.0 GiB"):
        plan(policy(holding(1), holding(1), room=100 * 2**20)).check()


def test_a_cache_too_small_for_its_agents_is_warned_of_with_a_number_that_fits() -> None:
    """100 agents hold 2,000 tokens each on average."""
    (warning,) = plan(policy(holding(1), holding(1), tokens=150_000)).warnings()

    assert (
        "150,000 tokens, 1,500 for each of rollout.concurrency=100 agents, which hold 2,000 on average"
        in warning
    )
    assert warning.endswith("rollout.concurrency=75 fits")
    assert plan(policy(holding(1), holding(1), tokens=200_000)).warnings() == []


def test_devices_that_are_idle_most_of_the_time_are_pointed_out() -> None:
    made = plan(policy(holding(1), holding(1)), shared=False, turns=False)

    assert made.warnings() == [
        "the GPUs of the engines are idle for 90% of the time, while the others work; cluster.colocate=yes lets "
        "engines and ranks share all of them, em.asynchronous=true lets both work at once"
    ]


def test_devices_of_a_cpu_cluster_are_judged_by_their_memory_alone() -> None:
    made = plan(policy(holding(0, host=10), holding(0, host=10)), device="cpu", gpu=0)

    assert (made.gpus(), made.refusals(), made.warnings()) == ([], [], [])


def test_the_json_form_holds_what_was_concluded() -> None:
    made = plan(policy(holding(60), holding(90)), shared=False, turns=False)

    told = made.as_json()
    assert told["refusals"] == made.refusals() != []
    assert (told["seconds"], told["disk"]["checkpoint"], told["policies"][0]["push_bytes"]) == (
        1_000,
        12 * 10**9,
        15 * GIB,
    )


def test_policies_that_share_devices_rest_while_another_is_trained() -> None:
    one, two = (replace(policy(holding(30), holding(50)), name=name) for name in ("selector", "generator"))
    made = replace(plan(one), policies=(one, two), layout=Layout("gpu", True, True, ((),)))

    assert [use.bytes // GIB for use in made.gpus()] == [2 * 30 + 2 * 4, 50 + 2 * 2 + 4, 50 + 2 * 2 + 4]


def test_what_goes_on_beside_another_phase_takes_no_time_of_its_own() -> None:
    apart = plan(policy(holding(60), holding(70)), shared=False, turns=False)
    e_step, m_step = apart.phases
    overlapping = replace(
        apart, phases=(replace(e_step, times=3, hidden_seconds=200.0), replace(m_step, times=3))
    )
    assert overlapping.seconds() == 100 + 3 * 900
    (warning,) = overlapping.warnings()
    assert "the GPUs of the engines are idle for 89% of the time" in warning
    assert "em.asynchronous=true lets both work at once" in warning
