"""Two real engines that are frozen, killed and kept from starting: nothing is lost, and nothing false is served."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.weight_bucket import Bucket
from tests.actors.supervised import Supervised, assert_end, assert_serves, engine_of
from tests.actors.support import HfModel

pytestmark = [pytest.mark.component, pytest.mark.chaos, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def supervised(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    made = Supervised(Path(shutil.copytree(tiny_model_path, tmp_path_factory.mktemp("served") / "model")))
    try:
        made.pool.start(made.policy.current)
        yield made
        made.pool.close()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(supervised: Supervised) -> dict[str, list[list[int]]]:
    return supervised.sample()


def test_a_frozen_worker_is_replaced_and_its_work_done_once(
    supervised: Supervised, undisturbed: dict[str, list[list[int]]]
) -> None:
    worker = supervised.workers()[0]
    processes = [worker, *worker.children(recursive=True)]
    assert supervised.sample(lambda: worker.send_signal(signal.SIGSTOP)) == undisturbed
    assert_end(processes)


def test_a_frozen_engine_is_replaced_although_the_first_replacement_cannot_start(
    supervised: Supervised, undisturbed: dict[str, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    supervised.mend()
    engine = engine_of(supervised.workers()[0])
    processes = [engine, *engine.children(recursive=True)]
    supervised.starts_without_model = 1
    assert supervised.sample(lambda: engine.send_signal(signal.SIGSTOP)) == undisturbed
    assert_end(processes)

    supervised.mend()
    assert "a new engine did not start: " in caplog.text
    assert supervised.sample() == undisturbed


def test_an_engine_that_dies_in_the_middle_of_a_push_misses_it_and_the_others_serve_the_version(
    supervised: Supervised, hf_model: HfModel
) -> None:
    victim = supervised.workers()[0]

    def buckets() -> Iterator[Bucket]:
        for number, bucket in enumerate(hf_model.buckets()):
            if number == 1:
                engine_of(victim).kill()
            yield bucket

    hf_model.perturb(1)
    supervised.become(1, hf_model, buckets)
    report = supervised.policy.push()
    assert report is not None and len(report.missed) == 1
    assert_end([victim])
    assert_serves(supervised, hf_model, workers=1)
    supervised.mend()
    assert_serves(supervised, hf_model, workers=2)


def test_a_push_that_no_engine_got_is_made_up_for_from_disk(
    supervised: Supervised, hf_model: HfModel
) -> None:
    workers = supervised.workers()
    hf_model.perturb(2)
    supervised.become(2, hf_model, lambda: iter(list(hf_model.buckets())[:-1]))
    assert supervised.policy.push() is None
    assert_serves(supervised, hf_model, workers=2)
    assert supervised.workers() == workers
