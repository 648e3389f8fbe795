"""One tiny model and one vLLM engine that all component tests share, so that its start is paid once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.engine import EngineOptions, VllmEngine
from tests.actors.support import EngineFixture, HfModel, build_model


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="session")
def shared_engine(tiny_model_path: Path) -> Iterator[EngineFixture]:
    """Float32, 512 tokens of context, 64 sequences at once. Whoever pushes weights must push the original ones back."""
    options = EngineOptions(
        model=str(tiny_model_path),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=64,
        kv_cache_gib=0.25,
        enforce_eager=True,
        num_threads=1,
        request_timeout_s=120,
    )
    with asyncio.Runner() as runner:
        engine = VllmEngine(options)
        runner.run(engine.start())
        try:
            yield EngineFixture(engine, tiny_model_path, runner.run)
        finally:
            engine.shutdown()


@pytest.fixture
def hf_model(tiny_model_path: Path) -> HfModel:
    return HfModel(tiny_model_path)
