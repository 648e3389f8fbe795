"""Real ranks under Ray that are killed or stopped in each of a group's verbs: nobody who calls it notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from safetensors.numpy import load_file

from actors import learner_group
from actors.learner_group import LearnerGroup
from actors.weight_transfer import EngineRef
from pipeline.core.errors import UserError
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.record_tables import examples_to_table
from tests.actors.ranks import (
    AFTER_EACH_STEP,
    CONFIG,
    assert_same_weights,
    build_model,
    make_examples,
    run_ranks,
    train,
)

pytestmark = [pytest.mark.component, pytest.mark.chaos]

TWO_RANKS = CONFIG.model_copy(update={"num_ranks": 2, "zero_stage": 2, "epochs": 20})


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Engine:
    """Confirms every push."""

    def start_weight_update(self, version: int, deadline_s: float) -> None:
        self.tensors = 0

    def update_weights(self, manifest: dict[str, Any], payload: Any = None) -> None:
        self.tensors += len(manifest["names"])

    def finish_weight_update(self, version: int, digest: str) -> None:
        assert self.tensors


def pid_of(rank: Any) -> int:
    return ray.get(rank.__ray_call__.remote(lambda self: os.getpid()))  # type: ignore[no-any-return]


class Saboteur:
    """Kills one rank of a training group, then stops one of the group that takes its place."""

    def __init__(self) -> None:
        self.signals = [signal.SIGKILL, signal.SIGSTOP]
        self.group: Any = None
        self.pids: dict[Any, int] = {}

    def on_progress(self, step: float, of: float, begun_at: float) -> None:
        if self.signals and 2 <= step < of and self.group.ranks[1] in self.pids:
            os.kill(self.pids[self.group.ranks[1]], self.signals.pop(0))


class WatchedGroup(LearnerGroup):
    """Notes the process of each rank, while it is not busy yet."""

    saboteur: Saboteur

    def _start(self) -> None:
        super()._start()
        self.saboteur.pids |= {rank: pid_of(rank) for rank in self.ranks}


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_rank_refuses_when_it_starts_is_the_users_to_mend_and_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.path: .*gone is neither a directory nor a model"):
        LearnerGroup(TWO_RANKS, str(tmp_path / "gone"), state=None, options=[{"num_cpus": 1}] * 2, seed=7)


@pytest.mark.usefixtures("ray_cluster")
def test_a_rank_that_dies_or_hangs_in_any_verb_is_replaced_and_nothing_is_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_group, "PING_TIMEOUT_S", 5.0)
    model, shard, checkpoints = (
        build_model(tmp_path / "base"),
        tmp_path / "shard.parquet",
        tmp_path / "learner",
    )
    pq.write_table(examples_to_table(make_examples()), shard)
    saboteur = Saboteur()
    monkeypatch.setattr(WatchedGroup, "saboteur", saboteur, raising=False)
    config = TWO_RANKS.model_copy(update={"checkpoint_minutes": AFTER_EACH_STEP, "stall_timeout_s": 5.0})
    group = WatchedGroup(config, str(model), state=None, options=[{"num_cpus": 1}] * 2, seed=7)
    saboteur.group = group

    report = group.train(
        [shard],
        WeightedNll(config.negligible_weight),
        checkpoints=checkpoints,
        phase_seed=1,
        on_progress=saboteur.on_progress,
    )
    assert not saboteur.signals
    assert report.resumed_at >= 2
    undisturbed, weights = run_ranks(TWO_RANKS, model, train, make_examples())
    assert report.history == undisturbed.history

    def kill_one() -> None:
        os.kill(saboteur.pids[group.ranks[0]], signal.SIGKILL)

    kill_one()
    group.save(checkpoints, tmp_path / "model")
    assert_same_weights(load_file(tmp_path / "model" / "model.safetensors"), weights, atol=0)
    kill_one()
    engine = EngineRef(Engine.remote(), ray.get_runtime_context().get_node_id(), 1)  # type: ignore[attr-defined]
    push = group.push([engine], "shared_memory", 3, deadline_s=60)
    assert push.version == 3
    assert push.tensors == len(weights)
    group.close()
