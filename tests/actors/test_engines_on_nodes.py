"""Real engines on nodes that join and leave: the same tokens, and a place in the next push."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.actors.supervised import Supervised, assert_serves
from tests.actors.support import HfModel

pytestmark = [pytest.mark.component, pytest.mark.chaos, pytest.mark.timeout(1200)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with room for one engine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_an_engine_joins_in_mid_phase_takes_part_in_the_next_push_and_goes_with_its_node(
    cluster: Cluster, tiny_model_path: Path, hf_model: HfModel, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    supervised = Supervised(model, cpus=1, workers=1, max_workers=2, max_restarts=0)
    supervised.pool.start(supervised.policy.current)
    undisturbed = supervised.sample()

    joined = []
    assert supervised.sample(lambda: joined.append(cluster.add_node(num_cpus=1))) == undisturbed
    supervised.mend()
    assert {receiver.node_id for receiver in supervised.pool.receivers()} >= {joined[0].node_id}
    assert supervised.sample() == undisturbed

    hf_model.perturb(1)
    supervised.become(1, hf_model, hf_model.buckets)
    report = supervised.policy.push()
    assert report is not None and not report.missed
    assert_serves(supervised, hf_model, workers=2)

    after_push = supervised.sample()
    assert supervised.sample(lambda: cluster.remove_node(joined[0])) == after_push
    assert len(supervised.pool.receivers()) == 1
    supervised.pool.close()
