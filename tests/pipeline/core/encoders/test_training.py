"""sentence-transformers' trainer as we call it: the loss, a phase that is cut off, and the model that comes of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from pipeline.core.encoders.training import EncoderPhase, batches_of, end_with, loss_of, train_encoder
from pipeline.core.errors import RunError
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
        query_prefix="",
        passage_prefix="",
        epochs=10,
        batch_size=4,
        mini_batch=None,
        learning_rate=3e-3,
        warmup=0.1,
        temperature=0.05,
        max_length=24,
        dtype="float32",
        checkpoint_steps=8,
        processes=1,
        seed=3,
    )


def nothing(done: int, total: int) -> None:
    """Nobody looks at the progress."""


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


@pytest.mark.chaos  # half a minute of starting processes
def test_several_processes_share_the_rows_and_the_negatives(phase: EncoderPhase, tmp_path: Path) -> None:
    """By gloo on CPUs, as by NCCL on GPUs: steps of 2 rows on each of 2 processes.

    At a learning rate of next to nothing the loss is that of the start. By itself a row of a batch of 2 is told from 3
    other texts, with those of the other process from 7; without these the loss would be the same.
    """
    others = [f"{town} {person}" for person, town in zip(PEOPLE, TOWNS, strict=True)]
    pq.write_table(pa.table({"anchor": PEOPLE, "positive": TOWNS, "negative_1": others}), phase.rows)
    still = replace(phase, epochs=1, batch_size=2, learning_rate=1e-12)
    alone = train_encoder(replace(still, out=str(tmp_path / "a"), work=str(tmp_path / "alone")), nothing)
    together = train_encoder(replace(still, processes=2), nothing)
    assert (alone["steps"], together["steps"], together["left_over"]) == (4, 2, 0)
    assert together["loss"] > alone["loss"] + 0.05
    assert SentenceTransformer(phase.out, device="cpu").get_embedding_dimension() == 32


def test_a_process_of_several_ends_with_the_one_that_began_them() -> None:
    driver = subprocess.Popen(["sleep", "600"])
    program = (
        f"import time; from {end_with.__module__} import end_with; end_with({driver.pid}); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        assert process.poll() is None
        driver.kill()
        driver.wait()
        assert process.wait(timeout=300) == 1


def test_rows_that_share_a_text_are_all_trained_on_in_steps_of_their_own(phase: EncoderPhase) -> None:
    """12 rows of two kinds, all of a kind with the same tools: no step has more than two. The trainer by itself reckons
    with 3 steps of 4 rows, and never sees what is left."""
    columns = {
        "anchor": [f"{person} x{n}" for n in range(6) for person in PEOPLE[:2]],
        "positive": [town for _ in range(6) for town in TOWNS[:2]],
        "negative_1": [town for _ in range(6) for town in TOWNS[2:4]],
    }
    pq.write_table(pa.table(columns), phase.rows)
    figures = train_encoder(replace(phase, epochs=2), nothing)
    assert (figures["steps"], figures["left_over"]) == (2 * 6, 0)


def test_what_fills_no_batch_of_several_processes_is_counted() -> None:
    rows = Dataset.from_dict({"anchor": list(PEOPLE), "positive": list(TOWNS)})
    how: dict[str, Any] = {"seed": 0, "generator": torch.Generator()}
    for processes, batches in ((2, 2), (3, 3)):
        found = batches_of(rows, 2, processes, batch_size=3, drop_last=True, **how)
        drawn = list(found)
        assert len(drawn) == len(found) == batches, "as many for each process"
        assert all(len(batch) == 3 for batch in drawn)
        assert found.left_over == 2 * 2, "of 8 rows, in each of the two epochs"
    alone = batches_of(rows, 2, 1, batch_size=3, drop_last=False, **how)
    assert sorted(row for batch in alone for row in batch) == list(range(8)) and alone.left_over == 0
    with pytest.raises(RunError, match="too few rows without a text in common for batches of 9"):
        batches_of(rows, 1, 2, batch_size=9, drop_last=True, **how)


def test_a_loss_that_is_not_finite_ends_the_training(phase: EncoderPhase) -> None:
    with pytest.raises(
        RunError, match=r"the loss of step \d+ is (nan|inf); begin another run, with a lower learning rate"
    ):
        train_encoder(replace(phase, learning_rate=1e38, warmup=0.0), nothing)
    assert not Path(phase.out).exists()


def test_a_trained_model_has_the_prefixes_that_it_was_trained_with(phase: EncoderPhase) -> None:
    """Its directory has another name than the family that they are known of."""
    train_encoder(replace(phase, epochs=1, query_prefix="ask: ", passage_prefix="tool: "), nothing)
    spec = Encoder.load(EncoderSpec(phase.out, dtype="float32")).spec
    assert (spec.query_prefix, spec.passage_prefix) == ("ask: ", "tool: ")


def test_pooling_and_longest_input_are_those_of_the_start(phase: EncoderPhase) -> None:
    """The released script trains E5 with cls pooling, and its evaluator then takes the mean."""
    train_encoder(replace(phase, epochs=1), nothing)
    start, trained = (Encoder.load(EncoderSpec(path, dtype="float32")) for path in (phase.model, phase.out))
    assert start.pooling == trained.pooling == "mean"
    assert trained.spec.max_length == 24


@pytest.mark.parametrize("mini_batch", [None, 2])
def test_the_loss_is_info_nce_over_the_negatives_of_the_whole_batch(
    phase: EncoderPhase, mini_batch: int | None
) -> None:
    """Value and gradient against the formula of the module's head."""
    texts = (PEOPLE[:3], TOWNS[:3], TOWNS[3:6])

    def of(value: Any) -> Any:
        """The loss, and its gradient by parameter, of a model as it starts."""
        model = SentenceTransformer(phase.model, device="cpu").eval()
        loss = value(model)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def ours(model: Any) -> Any:
        loss = loss_of(replace(phase, mini_batch=mini_batch), model)
        return loss([model.preprocess(list(column)) for column in texts], None)

    def formula(model: Any) -> Any:
        encoded = (model(model.preprocess(list(column)))["sentence_embedding"] for column in texts)
        query, positive, negative = (vectors / vectors.norm(dim=1, keepdim=True) for vectors in encoded)
        exponents = torch.exp(query @ torch.cat([positive, negative]).T / phase.temperature)
        return -torch.log(torch.diagonal(exponents[:, :3]) / exponents.sum(dim=1)).mean()

    (value, gradient), (expected, by_formula) = of(ours), of(formula)
    assert value == pytest.approx(expected, rel=1e-4)
    assert gradient.keys() == by_formula.keys() and any(g.abs().max() > 1e-3 for g in by_formula.values())
    for name, of_parameter in gradient.items():
        torch.testing.assert_close(of_parameter, by_formula[name], rtol=1e-3, atol=1e-5)
