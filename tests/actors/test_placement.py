"""Where engines and learner ranks go, for clusters of every kind."""

from __future__ import annotations

from typing import Any

import pytest

from actors.placement import Placement, PolicyPlacement, plan_placement
from pipeline.core.config import ClusterConfig, LearnerConfig, ModelConfig, RetrieverConfig, RolloutConfig
from pipeline.core.errors import UserError
from pipeline.core.policies import PolicySpec


def policy(
    name: str = "searcher", workers: int = 1, ranks: int = 1, tensor_parallel: int = 1, **rollout: Any
) -> PolicySpec:
    """0 workers: never sampled; 0 ranks: frozen."""
    return PolicySpec(
        name,
        ModelConfig(),
        RolloutConfig(workers=workers, tensor_parallel_size=tensor_parallel, **rollout) if workers else None,
        LearnerConfig(num_ranks=ranks) if ranks else None,
    )


def plan_of(
    *policies: PolicySpec,
    cpus: int = 64,
    gpus: int = 0,
    retriever_gpus: float = 0.0,
    gpu_packages: bool | None = None,
    **cluster: Any,
) -> Placement:
    """The layout; by default with the packages that go with the hardware."""
    return plan_placement(
        policies,
        ClusterConfig(**cluster),
        RetrieverConfig(replicas=2, gpus_per_replica=retriever_gpus),
        {"CPU": float(cpus), "GPU": float(gpus), "memory": 1e9},
        gpu_packages=gpus > 0 if gpu_packages is None else gpu_packages,
    )


class Plan:
    """The layout of one policy."""

    def __init__(self, placement: Placement) -> None:
        self.whole = placement
        self.device, self.bundles, self.take_turns = placement.device, placement.bundles, placement.take_turns
        self.own: PolicyPlacement = placement.policies["searcher"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def plan(
    *, workers: int = 1, ranks: int = 1, tensor_parallel: int = 1, learner: bool = True, **options: Any
) -> Plan:
    spec = policy("searcher", workers, ranks if learner else 0, tensor_parallel)
    return Plan(plan_of(spec, **options))


def gpus_used(placement: Plan | Placement) -> list[float]:
    """GPUs that engines and ranks take of each bundle."""
    whole = placement.whole if isinstance(placement, Plan) else placement
    used = [0.0] * len(whole.bundles)
    for own in whole.policies.values():
        for bundles, share in (
            (own.engine_bundles, own.engine_gpus),
            (own.rank_bundles, own.rank_gpus),
        ):
            for bundle in bundles:
                used[bundle] += share
    return used


@pytest.mark.parametrize(("workers", "ranks", "bundles"), [(1, 1, 1), (1, 2, 2), (3, 2, 3)])
def test_on_cpus_engine_and_rank_of_one_number_share_a_bundle(workers: int, ranks: int, bundles: int) -> None:
    placement = plan(workers=workers, ranks=ranks)
    assert (placement.device, placement.transport) == ("cpu", "shared_memory")
    assert placement.bundles == [{"CPU": 1.0}] * bundles
    assert placement.engine_bundles == list(range(workers))
    assert placement.rank_bundles == list(range(ranks))
    assert gpus_used(placement) == [0.0] * bundles


@pytest.mark.parametrize(
    ("asked", "key"), [({"workers": 3}, "rollout.workers is 3"), ({"ranks": 4}, "learner.num_ranks is 4")]
)
def test_more_processes_than_cpus_are_refused(asked: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=f"{key}, but the cluster has 2 CPUs; lower it or add nodes"):
        plan(cpus=2, **asked)


def test_tensor_parallelism_on_cpus_is_refused() -> None:
    with pytest.raises(UserError, match="tensor_parallel_size above 1 needs GPUs"):
        plan(tensor_parallel=2)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_gpu_transports_on_cpus_are_refused(transport: str) -> None:
    with pytest.raises(UserError, match=f"cluster.transport: {transport} needs GPUs"):
        plan(transport=transport)


def test_a_cluster_with_gpus_is_used_as_cpus_by_the_packages_for_cpus() -> None:
    assert plan(gpus=8).device == "gpu"
    assert plan(gpus=8, gpu_packages=False).device == "cpu"
    assert plan(gpus=8, gpu_packages=False, devices="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("gpus", "devices", "gpu_packages", "mend"),
    [(8, "gpu", False, "gpu"), (8, "cpu", True, "cpu"), (0, "auto", True, "cpu"), (0, "gpu", False, "gpu")],
)
def test_packages_for_other_devices_are_refused(
    gpus: int, devices: str, gpu_packages: bool, mend: str
) -> None:
    with pytest.raises(UserError, match=f"make --always-make setup DEVICE={mend}"):
        plan(gpus=gpus, devices=devices, gpu_packages=gpu_packages)


def test_gpus_that_are_asked_for_must_be_there() -> None:
    with pytest.raises(UserError, match="the cluster has 0"):
        plan(gpus=0, devices="gpu", gpu_packages=True)


def test_with_enough_gpus_engines_and_ranks_have_their_own() -> None:
    placement = plan(gpus=5, workers=3, ranks=2)
    assert (placement.device, placement.transport) == ("gpu", "nccl")
    assert placement.engine_bundles == [0, 1, 2]
    assert placement.rank_bundles == [3, 4]
    assert gpus_used(placement) == [bundle["GPU"] for bundle in placement.bundles] == [1.0] * 5


def test_an_engine_of_several_gpus_has_them_in_one_bundle() -> None:
    placement = plan(gpus=8, workers=2, tensor_parallel=3, ranks=2)
    assert [bundle["GPU"] for bundle in placement.bundles] == [3.0, 3.0, 1.0, 1.0]
    assert gpus_used(placement) == [3.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize(("workers", "ranks"), [(2, 2), (1, 2), (2, 1)])
def test_with_too_few_gpus_for_both_they_share(workers: int, ranks: int) -> None:
    placement = plan(gpus=2, workers=workers, ranks=ranks)
    assert (placement.transport == "ipc") == (workers == ranks)
    assert len(placement.bundles) == 2
    assert placement.engine_bundles == list(range(workers))
    assert placement.rank_bundles == list(range(ranks))
    assert all(used <= 1.0 for used in gpus_used(placement))
    assert all(bundle["GPU"] == 1.0 for bundle in placement.bundles)


def test_sharing_can_be_asked_for_and_forbidden() -> None:
    assert plan(gpus=8, workers=2, ranks=2, colocate="yes").transport == "ipc"
    assert plan(gpus=4, workers=2, ranks=2, colocate="no").transport == "nccl"
    with pytest.raises(UserError, match="need 4 GPUs, but the cluster has 3"):
        plan(gpus=3, workers=2, ranks=2, colocate="no")


def test_too_few_gpus_even_to_share_are_refused_with_the_figures() -> None:
    with pytest.raises(UserError) as caught:
        plan(gpus=2, workers=4, ranks=3)
    message = str(caught.value)
    assert "rollout.workers (4)" in message
    assert "learner.num_ranks (3)" in message
    assert "need 4 GPUs even when engines and ranks share, but the cluster has 2" in message


@pytest.mark.parametrize("colocate", ["auto", "yes"])
def test_engines_of_several_gpus_do_not_share_with_the_learner(colocate: str) -> None:
    with pytest.raises(UserError, match=r"tensor_parallel_size above 1 cannot share.*6 GPUs in all"):
        plan(gpus=4, workers=2, tensor_parallel=2, ranks=2, colocate=colocate)


@pytest.mark.parametrize(
    ("gpus", "colocate", "transport", "where"),
    [(2, "no", "ipc", "on GPUs of their own"), (2, "yes", "nccl", "on the same GPUs")],
)
def test_a_transport_that_does_not_fit_the_layout_is_refused(
    gpus: int, colocate: str, transport: str, where: str
) -> None:
    with pytest.raises(UserError, match=f"cluster.transport: {transport} .* {where}; use auto"):
        plan(gpus=gpus, colocate=colocate, transport=transport)


@pytest.mark.parametrize(("colocate", "own"), [("no", "nccl"), ("yes", "ipc")])
def test_shared_memory_goes_with_every_layout(colocate: str, own: str) -> None:
    assert plan(gpus=2, colocate=colocate, transport="shared_memory").transport == "shared_memory"
    assert plan(gpus=2, colocate=colocate, transport=own).transport == own


def test_ipc_is_refused_where_a_gpu_has_an_engine_or_a_rank_only() -> None:
    assert plan(gpus=2, workers=2, ranks=1, colocate="yes").transport == "shared_memory"
    with pytest.raises(UserError, match=r"ipc needs a learner rank .* rollout\.workers is 2"):
        plan(gpus=2, workers=2, ranks=1, colocate="yes", transport="ipc")


def test_an_engine_leaves_memory_to_a_rank_on_its_gpu() -> None:
    assert plan(gpus=1).gpu_memory_utilization < plan(gpus=2).gpu_memory_utilization == 0.9


def test_gpus_of_the_retriever_are_set_aside() -> None:
    assert plan(gpus=2, retriever_gpus=0.0).transport == "nccl"
    assert plan(gpus=2, retriever_gpus=0.5).transport == "ipc"
    with pytest.raises(UserError, match=r"gpus_per_replica \(2\) need 3 GPUs even when .* share"):
        plan(gpus=2, retriever_gpus=1.0)


def test_without_a_learner_the_engines_have_all_gpus() -> None:
    placement = plan(gpus=8, workers=1, tensor_parallel=8, learner=False)
    assert placement.rank_bundles == []
    assert gpus_used(placement) == [8.0]
    assert plan(cpus=1, ranks=4, learner=False).bundles == [{"CPU": 1.0}]


@pytest.mark.parametrize(
    ("cluster", "take_turns", "utilization"),
    [({}, True, 0.7), ({"take_turns": False}, False, 0.4), ({"colocate": "no"}, False, 0.9)],
)
def test_engines_and_ranks_that_share_gpus_take_turns_with_the_memory_by_default(
    cluster: dict[str, Any], take_turns: bool, utilization: float
) -> None:
    gpus = 4 if cluster.get("colocate") == "no" else 2
    placement = plan(gpus=gpus, workers=2, ranks=2, **cluster)

    assert placement.take_turns == take_turns
    assert placement.gpu_memory_utilization == utilization


@pytest.mark.parametrize("take_turns", [True, False])
def test_on_cpus_engines_sleep_while_the_learner_trains_unless_told_otherwise(take_turns: bool) -> None:
    assert plan(workers=2, ranks=2, take_turns=take_turns).take_turns == take_turns
    assert not plan(workers=2, ranks=0).take_turns


# ---------------------------------------------------------------- several policies


def test_on_cpus_policies_share_the_cores_and_each_has_what_it_asks_for() -> None:
    placement = plan_of(policy("selector", 2, 1), policy("generator", 1, 2), policy("teacher", 1, 0), cpus=2)
    assert placement.bundles == [{"CPU": 1.0}] * 2
    assert placement.policies["selector"].engine_bundles == [0, 1]
    assert placement.policies["generator"].rank_bundles == [0, 1]
    assert placement.policies["teacher"].rank_bundles == []


def test_with_enough_gpus_every_engine_has_its_own_and_learners_share_theirs() -> None:
    placement = plan_of(policy("selector", 2, 2), policy("generator", 1, 2), policy("teacher", 1, 0), gpus=6)
    engines = [i for own in placement.policies.values() for i in own.engine_bundles]
    assert engines == [0, 1, 2, 3]
    assert (
        placement.policies["selector"].rank_bundles == placement.policies["generator"].rank_bundles == [4, 5]
    )
    assert gpus_used(placement) == [1.0] * 6
    assert {own.gpu_memory_utilization for own in placement.policies.values()} == {0.9}


def test_with_too_few_gpus_all_policies_share_them_and_their_memory() -> None:
    two = [policy("selector", 2, 2), policy("generator", 2, 2)]
    placement, alone = plan_of(*two, gpus=2), plan_of(two[0], gpus=2)
    assert len(placement.bundles) == 2
    assert gpus_used(placement) == [1.0, 1.0]
    assert placement.take_turns
    for own in placement.policies.values():
        assert own.gpu_memory_utilization == alone.policies["selector"].gpu_memory_utilization / 2
        assert own.transport == "ipc"


def test_policies_that_do_not_take_turns_divide_the_memory_that_ranks_leave() -> None:
    two = [policy("selector"), policy("generator")]
    placement = plan_of(*two, gpus=1, take_turns=False)
    assert [own.gpu_memory_utilization for own in placement.policies.values()] == [0.2, 0.2]
    assert gpus_used(placement) == [1.0]


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_share_of_memory_that_is_asked_for_is_given(gpus: int) -> None:
    two = [policy("selector", gpu_memory_utilization=0.3), policy("generator")]
    placement = plan_of(*two, gpus=gpus)
    assert placement.policies["selector"].gpu_memory_utilization == 0.3
    assert placement.policies["generator"].gpu_memory_utilization != 0.3


def test_a_teacher_beside_its_students_gpus_does_not_weigh_on_their_ranks() -> None:
    placement = plan_of(policy("student", 1, 2), policy("teacher", 1, 0, tensor_parallel=2), gpus=5)
    assert placement.bundles == [{"CPU": 1.0, "GPU": gpus} for gpus in (1.0, 2.0, 1.0, 1.0)]
    assert placement.policies["teacher"].engine_bundles == [1]
    assert placement.policies["student"].rank_gpus == 1.0


def test_on_shared_gpus_policies_of_different_sizes_need_only_what_the_largest_does() -> None:
    placement = plan_of(policy("selector", 1, 1), policy("generator", 3, 2), gpus=3)
    assert placement.policies["selector"].engine_bundles == [0]
    assert placement.policies["generator"].engine_bundles == [0, 1, 2]
    assert placement.policies["selector"].transport == "ipc"
    assert placement.policies["generator"].transport == "shared_memory"
    assert max(gpus_used(placement)) == 1.0


def test_engines_without_any_learner_may_share_gpus_and_nobody_sleeps() -> None:
    placement = plan_of(policy("one", 1, 0), policy("other", 1, 0), gpus=1)
    assert gpus_used(placement) == [1.0]
    assert not placement.take_turns


def test_a_policy_that_is_never_sampled_takes_ranks_only() -> None:
    placement = plan_of(policy("searcher", 1, 1), policy("critic", 0, 1), gpus=2)
    assert placement.policies["critic"].engine_bundles == []
    assert gpus_used(placement) == [1.0, 1.0]


def test_too_few_gpus_for_several_policies_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"selector: rollout\.workers \(3\).*; generator: rollout\.workers \(1\)"
    ):
        plan_of(policy("selector", 3, 1), policy("generator", 1, 1), gpus=2)


def test_engines_that_join_later_have_gpus_of_their_own() -> None:
    apart = Plan(plan_of(policy(workers=1, tensor_parallel=2, max_workers=4), gpus=3))
    assert (apart.transport, apart.joiner_gpus, apart.engine_bundles) == ("nccl", 2.0, [0])
    shared = Plan(plan_of(policy(workers=1, max_workers=4), gpus=1))
    assert (shared.transport, shared.joiner_gpus, shared.engine_gpus) == ("shared_memory", 1.0, 0.5)
    assert Plan(plan_of(policy(workers=1, max_workers=4))).joiner_gpus == 0.0


def test_ipc_is_refused_where_engines_may_join_later() -> None:
    with pytest.raises(UserError, match=r"workers is 1 and may grow \(rollout\.max_workers\)"):
        plan_of(policy(workers=1, max_workers=2), gpus=1, transport="ipc")
