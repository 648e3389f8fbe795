"""One tiny model and one vLLM engine that all component tests share, so that its start is paid once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.engine import VllmEngine
from actors.engine_options import EngineOptions
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


@pytest.fixture(scope="session")
def trained_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder that was taught by the learner where people live."""
    from transformers import AutoTokenizer

    from pipeline.core.losses.contrastive import InfoNce
    from tests.actors.encoders import ENCODER_CONFIG, build_encoder, homes
    from tests.actors.ranks import run_ranks, train_and_export

    folder = tmp_path_factory.mktemp("encoders")
    start, out = build_encoder(folder / "start"), folder / "trained"
    examples = homes(AutoTokenizer.from_pretrained(start))
    run_ranks(ENCODER_CONFIG, start, train_and_export, examples, InfoNce(), out, head="embedding")
    return out
