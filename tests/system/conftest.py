"""One local Ray cluster, one small world with its index, and tiny random models for all system tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.actors.support import build_model
from tests.conftest import QWEN
from tests.retriever_service.server_process import index_server

MODEL_LENGTH = 1024
TOKEN = "open-sesame"
SEARCHER = Path(__file__).parents[2] / "models" / "tiny-searcher"
"""A model that searches, for where it matters what becomes of its searches."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated world, cut down to 500 passages and a handful of questions."""
    from pipeline.core.data.world.writer import WorldSpec, generate_passages, generate_questions

    out = tmp_path_factory.mktemp("world")
    spec = WorldSpec(seed=3, num_passages=500, num_train=8, num_dev=4, num_test=4)
    files = {"corpus": generate_passages(spec)}
    files |= {split: generate_questions(spec, split) for split in ("train", "dev", "test")}
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def index(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from retriever_service.building.build import build_index
    from retriever_service.encoding.encoder import EncoderSpec

    out = tmp_path_factory.mktemp("index") / "index"
    build_index([str(world / "corpus.jsonl")], out, EncoderSpec("minilm"))
    return out


@pytest.fixture(scope="session")
def server(index: Path) -> Iterator[str]:
    """Address of a server of the index, which wants `TOKEN`."""
    with index_server(index, TOKEN) as (url, _):
        yield url


def random_model(path: Path, architecture: str) -> Path:
    """A random model of one architecture whose tokenizer also has a chat template."""
    build_model(path, architecture)
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": QWEN}), encoding="utf-8"
    )
    return path


def overrides(world: Path, index: Path, model: Path) -> list[str]:
    """A configuration that trains in seconds."""
    return [
        f"data.root={world}",
        "data.corpus=corpus.jsonl",
        "data.train=train.jsonl",
        "data.dev=dev.jsonl",
        "data.test=test.jsonl",
        f"retriever.index={index}",
        f"model.path={model}",
        f"model.max_length={MODEL_LENGTH}",
        "agent.documents=1",
        "agent.max_searches=2",
        "agent.max_document_tokens=48",
        "agent.max_turn_tokens=128",
        "rollout.samples=2",
        "rollout.concurrency=16",
        "rollout.kv_cache_gib=0.25",
        "learner.num_ranks=2",
        "learner.batch_size=8",
        f"learner.tokens_per_microbatch={MODEL_LENGTH}",
        "learner.learning_rate=0.001",
        "cold_start.questions=4",
        "em.iterations=1",
        "evaluation.bootstrap_samples=20",
        "tracking.tensorboard=false",
    ]
