"""sentence-transformers' trainer as we call it: the loss, a phase that is cut off, and the model that comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from pipeline.core.encoders.training import EncoderPhase, train_encoder
from retriever_service.encoding.encoder import Encoder, EncoderSpec
from tests.actors.encoders import PEOPLE, TOWNS, build_encoder

pytestmark = pytest.mark.component


@pytest.fixture
def phase(tmp_path: Path) -> EncoderPhase:
    build_encoder(tmp_path / "start")
    columns = {
        "anchor": list(PEOPLE),
        "positive": list(TOWNS),
        "negative_1": [TOWNS[(n + 1) % len(TOWNS)] for n in range(len(TOWNS))],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    return EncoderPhase(
        model=str(tmp_path / "start"),
        rows=str(tmp_path / "rows.parquet"),
        out=str(tmp_path / "model"),
        work=str(tmp_path / "work"),
        epochs=10,
        batch_size=4,
        mini_batch=None,
        learning_rate=3e-3,
        warmup=0.1,
        temperature=0.05,
        max_length=24,
        dtype="float32",
        checkpoint_steps=4,
        processes=1,
        seed=3,
    )


def weights_of(path: str) -> dict[str, Any]:
    return SentenceTransformer(path, device="cpu").state_dict()


def first_finds(path: str) -> int:
    """People whose own town is the nearest."""
    encoder = Encoder.load(EncoderSpec(path, dtype="float32"))
    people, towns = encoder.encode_queries(PEOPLE), encoder.encode_queries(TOWNS)
    return int(np.sum((people @ towns.T).argmax(axis=1) == np.arange(len(PEOPLE))))


def test_a_phase_that_is_cut_off_ends_with_the_same_weights(phase: EncoderPhase, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    figures = train_encoder(phase, lambda done, total: told.append((done, total)))
    assert figures["steps"] == told[-1][0] == told[-1][1]
    assert first_finds(phase.model) < 5 and first_finds(phase.out) == len(PEOPLE)

    def killed(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    cut = replace(phase, out=str(tmp_path / "again"), work=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train_encoder(cut, killed)
    # What a kill leaves of a checkpoint that is being written.
    (tmp_path / "cut" / "checkpoint-10").mkdir()
    steps: list[int] = []
    assert train_encoder(cut, lambda done, total: steps.append(done)) == pytest.approx(figures)
    assert steps[0] == 9, "the checkpoint of step 8 is gone on from"
    assert not Path(cut.out).with_name(".again.partial").exists()
    whole, resumed = weights_of(phase.out), weights_of(cut.out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_several_processes_share_the_rows_and_the_negatives(phase: EncoderPhase) -> None:
    """By gloo on CPUs, as by NCCL on GPUs: 8 rows in steps of 2 on each of 2 processes."""
    figures = train_encoder(replace(phase, epochs=2, batch_size=2, processes=2), lambda done, total: None)
    assert figures["steps"] == 4
    assert np.isfinite(figures["loss"]) and first_finds(phase.out) >= 0


def test_pooling_and_longest_input_are_those_of_the_start(phase: EncoderPhase) -> None:
    """The released script trains E5 with cls pooling, and its evaluator then takes the mean."""
    train_encoder(replace(phase, epochs=1), lambda done, total: None)
    start, trained = (Encoder.load(EncoderSpec(path, dtype="float32")) for path in (phase.model, phase.out))
    assert start.pooling == trained.pooling == "mean"
    assert trained.spec.max_length == 24


@pytest.mark.parametrize("mini_batch", [None, 2])
def test_the_loss_is_info_nce_over_the_negatives_of_the_whole_batch(
    phase: EncoderPhase, mini_batch: int | None
) -> None:
    model = SentenceTransformer(phase.model, device="cpu")
    tau = 0.05
    loss: Any = losses.MultipleNegativesRankingLoss(model, scale=1 / tau)
    if mini_batch is not None:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=1 / tau, mini_batch_size=mini_batch)
    texts = (PEOPLE[:3], TOWNS[:3], TOWNS[3:6])
    value = loss([model.preprocess(list(column)) for column in texts], None)
    query, positive, negative = (
        torch.nn.functional.normalize(torch.as_tensor(model.encode(list(column))), dim=1) for column in texts
    )
    exponents = query @ torch.cat([positive, negative]).T / tau
    expected = torch.mean(torch.logsumexp(exponents, dim=1) - torch.diagonal(exponents[:, :3]))
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
