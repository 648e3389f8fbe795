"""A real Ray with its dashboard on loopback: what it exports, and the actors' logs, after sampling and training."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
import ray

from actors.cluster import Cluster
from actors.metrics import exposed_names
from actors.observer import Observer
from pipeline.core.agents.program import Sampling
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import (
    AgentConfig,
    ClusterConfig,
    LearnerConfig,
    ModelConfig,
    RetrieverConfig,
    RolloutConfig,
    WeightingConfig,
)
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.policies import PolicySpec
from pipeline.core.records import Question
from pipeline.core.shards import Shards
from pipeline.core.weighing import SearchWeights
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from tests.retriever_service.support import write_animals

pytestmark = [pytest.mark.component, pytest.mark.chaos]

MODEL = "models/tiny-searcher"
AGENT = AgentConfig(max_turn_tokens=48, max_searches=3, documents=2)
QUESTIONS = [Question(f"q{n}", f"Where does animal {n} live?", ("in the jungle",)) for n in range(4)]
OF_FAILURES = {"actors_lost_total", "actor_restarts_total", "push_missed_total", "skipped_steps_total"}
OF_FAILURES |= {"excluded_episodes_total"}


@pytest.fixture
def dashboard() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture
def cluster(dashboard: None, tmp_path: Path) -> Iterator[Cluster]:
    build_index([write_animals(tmp_path / "c.jsonl")], tmp_path / "index", EncoderSpec("minilm"))
    rollout = RolloutConfig(concurrency=8, kv_cache_gib=0.25, enforce_eager=True, questions_per_shard=2)
    learner = LearnerConfig(batch_size=4, learning_rate=1e-4)
    spec = PolicySpec(SEARCHER, ModelConfig(path=MODEL, max_length=768), rollout, learner)
    observer = Observer(tmp_path / "demo")
    with Cluster([spec], ClusterConfig(), RetrieverConfig(), tmp_path / "index", observer=observer) as made:
        yield made


def test_a_phase_is_seen_in_what_ray_exports_and_in_the_logs(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, run = cluster.policy(SEARCHER), tmp_path / "demo"
    shards = Shards(QUESTIONS, run / "rollouts", {SEARCHER: run / "examples"}, 2)
    shards.resume()
    weigh = SearchWeights(WeightingConfig(), AGENT, MODEL)
    roles = {SEARCHER: policy}
    sampled = cluster.begin(
        SearchProgram(AGENT, score_answers=True),
        shards,
        weigh,
        roles,
        samples=2,
        sampling=Sampling(1.0, seed=1),
        name="sample",
    ).result()
    trained = policy.train(
        sorted((run / "examples").glob("*.parquet")), WeightedNll(), state=run / "l", seed=0
    )
    policy.save(1, state=run / "l", model=run / "m")
    policy.push()

    expected = {name for name in exposed_names() if name.removeprefix("ray_exsearch_") not in OF_FAILURES}
    worker = f"rollout-{SEARCHER}-0"

    def is_whole(text: str) -> bool:
        names = {sample.partition("{")[0] for sample in text.splitlines()}
        return expected <= names and value(text, "weight_version", actor=worker) == 1

    found = scrape(is_whole)
    assert (
        value(found, "episodes_total", phase="sample", policy=SEARCHER, run="demo")
        == sampled.trajectories
        == 8
    )
    assert value(found, "generated_tokens_total") == sampled.generated_tokens
    assert value(found, "optimizer_steps_total", policy=SEARCHER) == trained.steps
    assert value(found, "weight_version", actor=worker) == 1
    assert value(found, "tasks", state="done") == 4 and value(found, "tasks", state="in_flight") == 0
    assert value(found, "shards_total") == 2
    assert value(found, "searches_total", outcome="found") == value(found, "search_seconds_count") > 0
    assert value(found, "pushes_total", way="sent") == 1 and value(found, "push_bytes_total") > 0
    assert address() in [target for group in discovered() for target in group["targets"]]

    logs = {path.stem: messages(path) for path in (run / "logs").iterdir()}
    names = {worker, "retriever-0", "weighting-0", f"learner-{SEARCHER}-0"}
    assert logs.keys() == names
    assert all(lines[0] == "begins" for lines in logs.values())
    assert [line for line in logs[worker] if line.startswith("serves")] == [
        "serves version 0",
        "serves version 1",
    ]
    assert any(line["logger"].startswith("vllm") for line in lines_of(run / "logs" / f"{worker}.jsonl"))
    assert [r for r in caplog.records if r.levelno >= logging.WARNING and "log" in r.message] == []


# ---------------------------------------------------------------- as Prometheus does it


def address() -> str:
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def scrape(is_whole: Callable[[str], bool], seconds: float = 60.0) -> str:
    """What the node exports, once it is all there."""
    opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + seconds
    while True:
        with opener.open(f"http://{address()}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        if is_whole(text) or time.monotonic() > deadline:
            return text
        time.sleep(1)


def value(text: str, name: str, **labels: str) -> float:
    """The sum over all series of a name that have these labels."""
    total = 0.0
    for line in text.splitlines():
        if match := re.fullmatch(rf"ray_exsearch_{name}\{{(.*)\}} (\S+)", line):
            own = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
            if labels.items() <= own.items():
                total += float(match[2])
    return total


def discovered() -> list[dict[str, Any]]:
    """The file that a Prometheus finds Ray's nodes by."""
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    found: list[dict[str, Any]] = json.loads((session / "prom_metrics_service_discovery.json").read_text())
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def messages(path: Path) -> list[str]:
    return [line["message"] for line in lines_of(path)]
