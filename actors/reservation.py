"""The resources of a run: planned, asked for, and waited for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.placement import Placement, plan_placement
from actors.session import ClusterError, resources_in_words
from pipeline.core.config import ClusterConfig, RetrieverConfig
from pipeline.core.packages import has_gpu_packages
from pipeline.core.policies import PolicySpec

logger = logging.getLogger(__name__)

SECOND_TRY_S = 10.0
"""How long room for fewer workers is waited for, when there was none for all, in seconds."""


def plan(policies: Sequence[PolicySpec], cluster: ClusterConfig, retriever: RetrieverConfig) -> Placement:
    """The layout on the connected cluster, with the packages that are installed here; see `plan_placement`."""
    return plan_placement(
        policies, cluster, retriever, ray.cluster_resources(), gpu_packages=has_gpu_packages()
    )


def reserve(
    policies: Sequence[PolicySpec], cluster: ClusterConfig, retriever: RetrieverConfig
) -> tuple[Sequence[PolicySpec], Placement, PlacementGroup]:
    """Room for `rollout.workers` of each policy; if there is none in time, for `rollout.min_workers`.

    Returns:
        the policies, which start with so many workers as there is room for; their layout; its bundles, held.

    Raises:
        UserError: the cluster can never hold this.
        ClusterError: it did not free enough within `cluster.start_timeout_s`.
    """
    placement = plan(policies, cluster, retriever)
    if group := _held(placement, cluster.start_timeout_s):
        return policies, placement, group
    fewest = [
        spec if spec.rollout is None else replace(spec, rollout=spec.rollout.with_fewest())
        for spec in policies
    ]
    # CUDA IPC needs an engine beside each rank.
    smaller = placement if cluster.transport == "ipc" else plan(fewest, cluster, retriever)
    if len(smaller.bundles) < len(placement.bundles) and (group := _held(smaller, SECOND_TRY_S)):
        logger.warning(
            f"there was no room for all rollout workers within {cluster.start_timeout_s:.0f} s "
            "(cluster.start_timeout_s); the run starts with rollout.min_workers, the others join when there is"
        )
        return fewest, smaller, group
    raise ClusterError(
        f"the cluster did not free {placement.bundles} within {cluster.start_timeout_s:.0f} s "
        f"(cluster.start_timeout_s); it has {resources_in_words()}"
    )


def _held(placement: Placement, seconds: float) -> PlacementGroup | None:
    """The bundles as one group; None if they did not become free in time."""
    group = placement_group(placement.bundles, strategy="PACK" if placement.device == "gpu" else "SPREAD")
    if group.wait(seconds):
        return group
    remove_placement_group(group)
    return None
