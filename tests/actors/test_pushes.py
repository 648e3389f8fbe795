"""Whole pushes into a real engine: what it serves afterwards, and what it refuses to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine import VllmEngine
from actors.engine_options import EngineOptions
from actors.weight_bucket import Bucket, Digest, Segment, write_bucket
from actors.weight_transfer import (
    SharedMemorySender,
    WeightTransferError,
)
from pipeline.core.agents.program import EngineError, Sampling
from tests.actors.support import EngineFixture, HfModel, LocalEngines, build_model

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=20, seed=0, stop=())
PROMPT = list(range(260, 290)) * 10

# ---------------------------------------------------------------- whole pushes into a real engine


def score(fixture: EngineFixture, start: int = 290) -> float:
    return fixture.run(fixture.engine.score(PROMPT, start))


def greedy(fixture: EngineFixture) -> list[int]:
    return fixture.run(fixture.engine.generate(PROMPT[:40], GREEDY)).token_ids


def assert_serves(fixture: EngineFixture, model: HfModel) -> None:
    """The engine computes what transformers computes with `model`'s weights; nothing of older ones is left anywhere."""
    assert score(fixture) == pytest.approx(sum(model.logprobs(PROMPT)[289:]), abs=2e-4)
    assert score(fixture, 1) == pytest.approx(sum(model.logprobs(PROMPT)), abs=5e-3)
    completion = greedy(fixture)
    assert completion == model.greedy(PROMPT[:40], 20)[: len(completion)]


@pytest.fixture
def engines(shared_engine: EngineFixture, tiny_model_path: Path) -> Iterator[LocalEngines]:
    """The shared engine, which gets its original weights back afterwards."""
    local = LocalEngines(shared_engine)
    yield local
    local.remote = False
    original = HfModel(tiny_model_path)
    SharedMemorySender(local, original.buckets, deadline_s=60).push(0)
    assert_serves(shared_engine, original)


@pytest.mark.component
def test_engine_serves_exactly_what_was_pushed(engines: LocalEngines, hf_model: HfModel) -> None:
    fixture = engines.fixture
    assert_serves(fixture, hf_model)
    for version, seed in ((5, 50), (6, 60)):
        hf_model.perturb(seed)
        report = SharedMemorySender(engines, hf_model.buckets, deadline_s=60).push(version)
        assert report is not None
        state = fixture.engine.weights
        assert (state.version, state.digest, state.refusal) == (version, report.digest, "")
        assert_serves(fixture, hf_model)


@pytest.mark.component
@pytest.mark.parametrize("num_tensors", [1, 100])
def test_bucket_borders_do_not_matter(engines: LocalEngines, hf_model: HfModel, num_tensors: int) -> None:
    hf_model.perturb(1)
    SharedMemorySender(engines, lambda: hf_model.buckets(num_tensors), deadline_s=60).push(1)
    assert_serves(engines.fixture, hf_model)


@pytest.mark.component
def test_weights_reach_an_engine_on_another_node(engines: LocalEngines, hf_model: HfModel) -> None:
    engines.remote = True
    hf_model.perturb(2)
    SharedMemorySender(engines, hf_model.buckets, deadline_s=60).push(1)
    assert_serves(engines.fixture, hf_model)


@pytest.mark.component
def test_weights_are_reloaded_from_a_model_directory(
    engines: LocalEngines, hf_model: HfModel, tmp_path: Path
) -> None:
    hf_model.perturb(7)
    hf_model.model.save_pretrained(tmp_path)
    engines.call("reload", str(tmp_path), 12, 60.0, timeout_s=60)
    assert engines.fixture.engine.weights.version == 12
    assert_serves(engines.fixture, hf_model)


@pytest.mark.component
def test_push_waits_for_running_requests(engines: LocalEngines, hf_model: HfModel) -> None:
    fixture = engines.fixture
    expected = hf_model.greedy(PROMPT[:40], 150)

    async def push_during_generation() -> list[int]:
        engine = fixture.engine
        sampling = Sampling(0.0, 1.0, 0, 150, 0, ())
        request = asyncio.create_task(engine.generate(PROMPT[:40], sampling))
        await asyncio.sleep(0.02)
        await engine.start_weight_update(9, 60.0)
        return (await request).token_ids

    tokens = fixture.run(push_during_generation())
    assert tokens == expected[: len(tokens)]
    with pytest.raises(EngineError, match="version 9 is being pushed"):
        greedy(fixture)


def damaged(buckets: Iterator[Bucket]) -> Iterator[Bucket]:
    """The last bucket changes after it was digested."""
    buckets = list(buckets)
    yield from buckets[:-1]
    yield [(name, _Changing(tensor)) for name, tensor in buckets[-1]]


class _Changing(torch.Tensor):
    """A tensor that gives other values once it has been read for the checksum."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> _Changing:
        return torch.Tensor._make_subclass(cls, tensor.detach().clone())

    def detach(self) -> torch.Tensor:
        seen, self.seen = getattr(self, "seen", False), True
        plain = self.as_subclass(torch.Tensor)
        return plain + 1 if seen else plain


@pytest.mark.component
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "arrived damaged"),
        (lambda buckets: list(buckets)[:-1], "nobody sent all weights"),
        (
            lambda buckets: ([p for p in b if "k_proj.weight" not in p[0]] for b in buckets),
            "self_attn.qkv_proj",
        ),
        (
            lambda buckets: ([p for p in b if "k_proj.bias" not in p[0]] for b in buckets),
            "self_attn.qkv_proj",
        ),
    ],
)
def test_spoilt_push_is_never_served_and_the_next_one_mends_it(
    engines: LocalEngines, hf_model: HfModel, spoil: Any, message: str
) -> None:
    fixture = engines.fixture
    hf_model.perturb(3)
    with pytest.raises(WeightTransferError, match=message):
        SharedMemorySender(engines, lambda: spoil(hf_model.buckets()), deadline_s=60).push(4)
    with pytest.raises(EngineError, match="push of weight version 4 failed"):
        greedy(fixture)
    with pytest.raises(EngineError, match="push of weight version 4 failed"):
        score(fixture)
    SharedMemorySender(engines, hf_model.buckets, deadline_s=60).push(5)
    assert_serves(fixture, hf_model)


@pytest.mark.component
def test_sender_that_vanishes_leaves_an_engine_that_refuses_until_the_next_push(
    engines: LocalEngines, hf_model: HfModel
) -> None:
    fixture = engines.fixture
    hf_model.perturb(4)
    engines.call("start_weight_update", 2, 60.0, timeout_s=60)
    segment = Segment()
    engines.send_segment(asdict(write_bucket(next(hf_model.buckets(4)), segment, Digest())), segment, 60)
    with pytest.raises(EngineError, match="version 2 is being pushed"):
        greedy(fixture)
    hf_model.perturb(5)
    SharedMemorySender(engines, hf_model.buckets, deadline_s=60).push(3)
    assert_serves(fixture, hf_model)


@pytest.mark.component
def test_wrong_digest_or_version_is_refused(engines: LocalEngines, hf_model: HfModel) -> None:
    fixture = engines.fixture
    for version, digest, message in (
        (8, "0" * 64, "sent was 000"),
        (7, "", "version 8 was being pushed, not 7"),
    ):
        engines.call("start_weight_update", 8, 60.0, timeout_s=60)
        segment = Segment()
        for bucket in hf_model.buckets():
            engines.send_segment(asdict(write_bucket(bucket, segment, Digest())), segment, 60)
        with pytest.raises(WeightTransferError, match=message):
            engines.call("finish_weight_update", version, digest, timeout_s=60)
        with pytest.raises(EngineError):
            greedy(fixture)


@pytest.mark.component
def test_push_step_past_the_deadline_is_refused(engines: LocalEngines) -> None:
    with pytest.raises(WeightTransferError, match="deadline"):
        engines.call("start_weight_update", 8, -1.0, timeout_s=60)
    with pytest.raises(EngineError, match="push of weight version 8 failed"):
        greedy(engines.fixture)


@pytest.mark.component
@pytest.mark.parametrize(
    ("architecture", "tied"), [("Qwen3", True), pytest.param("Llama", False, marks=pytest.mark.chaos)]
)
def test_other_architectures_take_pushed_weights(architecture: str, tied: bool, tmp_path: Path) -> None:
    path = build_model(tmp_path / architecture, architecture, tied=tied)
    options = EngineOptions(
        model=str(path), max_model_len=512, kv_cache_gib=0.1, enforce_eager=True, num_threads=1
    )
    model = HfModel(path)
    with asyncio.Runner() as runner:
        engine = VllmEngine(options)
        runner.run(engine.start())
        try:
            fixture = EngineFixture(engine, path, runner.run)
            assert_serves(fixture, model)
            model.perturb(6)
            SharedMemorySender(LocalEngines(fixture), model.buckets, deadline_s=60).push(1)
            assert_serves(fixture, model)
        finally:
            engine.shutdown()
